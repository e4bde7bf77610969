"""Small dictionaries and batches, and derivatives by finite differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax.dictionaries import DictionaryConfig, core
from gemma_jax.dictionaries.recipe import Recipe

D, E, M, B = 6, 5, 24, 40


def make_config(activation="batchtopk", **changes) -> DictionaryConfig:
  """A transcoder unless read and write are the same."""
  base = {
    "d_in": D,
    "d_out": E,
    "width": M,
    "activation": activation,
    "k": 3,
    "prefix_widths": (M,),
    "read": "a",
    "write": "b",
  }
  return DictionaryConfig(**(base | changes))


def make_sae(activation="batchtopk", **changes) -> DictionaryConfig:
  """One that reads what it writes."""
  return make_config(activation, **({"d_in": E, "write": "a"} | changes))


def make_recipe(**changes) -> Recipe:
  """Squared error alone, summed over dims."""
  return Recipe(**({"loss": "sum", "aux_coefficient": 0.0} | changes))


def identity(cfg) -> core.Normalisation:
  """Raw coordinates."""
  return core.Normalisation.identity(cfg.d_in, cfg.d_out)


def make_norm(cfg, seed=0, scales=()) -> core.Normalisation:
  """Coordinates far from raw ones."""
  rng = np.random.default_rng(seed)
  a = rng.normal(size=(cfg.d_in, cfg.d_in)) / np.sqrt(cfg.d_in)
  values = (
    3 * rng.normal(size=cfg.d_in),
    a @ a.T + 0.3 * np.eye(cfg.d_in),
    3 * rng.normal(size=cfg.d_out),
    rng.uniform(0.5, 2, size=scales) * np.ones(cfg.d_out),
    rng.uniform(0.5, 2),
  )
  return core.Normalisation(*(jnp.asarray(v, jnp.float32) for v in values))


def make_params(cfg, seed=0, threshold=0.4):
  """Rows of different norms, biases that are not 0."""
  rng = np.random.default_rng(seed)
  shapes = cfg.shapes()
  shapes.pop("threshold", None)
  params = {name: rng.normal(size=shapes[name]) * 0.5 for name in shapes}
  params["W_dec"] *= rng.uniform(0.4, 2, size=(cfg.width, 1))
  if cfg.activation == "jumprelu":
    params["threshold"] = threshold * rng.uniform(0.5, 1.5, cfg.width)
  return {n: jnp.asarray(x, jnp.float32) for n, x in params.items()}


def make_batch(cfg, seed=0, rows=B):
  rng = np.random.default_rng(seed + 100)
  x = rng.normal(size=(rows, cfg.d_in)).astype(np.float32)
  y = rng.normal(size=(rows, cfg.d_out)).astype(np.float32)
  same = cfg.read == cfg.write
  return {"x": jnp.asarray(x), "y": jnp.asarray(x if same else y)}


def make_state(cfg, norm=None, since=None, threshold=-1.0, steps=0, seed=0):
  """With latents that have not fired for 0, 6, 12 ... tokens, in disorder."""
  if since is None:
    since = np.random.default_rng(seed).permutation(np.arange(cfg.width) * 6)
  return core.State(
    identity(cfg) if norm is None else norm,
    jnp.asarray(since, jnp.int32),
    jnp.asarray(threshold, jnp.float32),
    jnp.asarray(steps, jnp.int32),
  )


def f64(tree):
  return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames="sparse")
def value_and_grad(cfg, recipe, params, state, batch, hyper, *, sparse=True):
  """((loss, (state, metrics)), gradients), compiled once for a recipe."""

  def value(params):
    return core.loss(cfg, recipe, params, state, batch, hyper, sparse=sparse)

  return jax.value_and_grad(value, has_aux=True)(params)


def run(cfg, recipe, params, state, batch, *, sparse=True, **changes):
  """Loss, gradients, new state and metrics; `changes` are hyper's."""
  hyper = core.hyper(cfg, recipe)
  hyper |= {n: jnp.asarray(x, jnp.float32) for n, x in changes.items()}
  (loss, (state, metrics)), gradients = value_and_grad(
    cfg, recipe, params, state, batch, hyper, sparse=sparse
  )
  return float(loss), f64(gradients), state, f64(metrics)


def slopes(value, params, h=1e-6):
  """Gradient of `value` of NumPy arrays, element by element."""
  params = f64(params)
  out = {}
  for name, array in params.items():
    found = np.zeros(array.size)
    for i in range(array.size):
      moved = [array.copy(), array.copy()]
      moved[0].flat[i] += h
      moved[1].flat[i] -= h
      rise, fall = (value(params | {name: a}) for a in moved)
      found[i] = (rise - fall) / (2 * h)
    out[name] = found.reshape(array.shape)
  return out


def close(got, want, tolerance=1e-5):
  """Arrays by name agree, to a part of the largest entry of each."""
  assert got.keys() == want.keys()
  for name in want:
    size = np.abs(want[name]).max()
    worst = np.abs(got[name] - want[name]).max()
    assert worst <= tolerance * size + 1e-7, f"{name}: {worst} of {size}"


def kept(z, k, activation):
  """The k largest of each row, or k * B of all, by sorting; positive ones."""
  keep = np.zeros(z.shape, bool)
  if activation == "topk":
    order = np.argsort(-z, axis=1)[:, : int(k)]
    np.put_along_axis(keep, order, True, axis=1)
  else:
    keep.flat[np.argsort(-z, axis=None)[: int(k * len(z))]] = True
  return keep & (z > 0)


def recs(cfg, p, x, acts):
  """What every prefix reconstructs."""
  affine = p["b_dec"] + (x @ p["W_skip"] if cfg.skip else 0)
  return [acts[:, :w] @ p["W_dec"][:w] + affine for w in cfg.prefix_widths]
