"""One training step of every member of a sweep, on a mesh.

The whole step runs under `shard_map`: members, rows and latents are split over
the axes `member`, `data` and `latent`, and nothing is gathered but what the
selection and the reconstruction must share.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gemma_jax.dictionaries import core, linear
from gemma_jax.dictionaries.axes import Axes, total
from gemma_jax.dictionaries.config import DictionaryConfig
from gemma_jax.dictionaries.recipe import Recipe
from trainers.dictionary_members import Member

OVER_LATENTS = {
  "W_enc": (None, "latent"),  # D M
  "W_dec": ("latent", None),  # M E
  "b_enc": ("latent",),
  "r_mag": ("latent",),
  "b_mag": ("latent",),
  "since_fired": ("latent",),
}


def rule(path: str, shape: tuple[int, ...]) -> P:
  """How a leaf of the state is split; its first axis counts the members."""
  if "['norm']" in path or not shape:
    return P()
  for name, axes in OVER_LATENTS.items():
    if name in path:
      return P("member", *axes)
  if "['threshold']" in path:  # of JumpReLU, which is trained
    return P("member", "latent")
  return P("member")


def schedule(recipe: Recipe, steps: int) -> Callable[[jax.Array], jax.Array]:
  """Share of the learning rate at a step: linear up, level, linear down."""

  warmup = max(1, _in_steps(recipe.warmup, steps))
  decay = _in_steps(recipe.decay, steps)

  def shape(step):
    up = (step + 1) / warmup
    down = (steps - step) / decay if decay else 1.0
    return jnp.clip(jnp.minimum(up, down), 0, 1)

  return shape


def in_steps(recipe: Recipe, steps: int) -> Recipe:
  """The recipe with every share of the training as a number of steps."""
  return dataclasses.replace(
    recipe,
    sparsity_warmup=_in_steps(recipe.sparsity_warmup, steps),
    k_anneal=_in_steps(recipe.k_anneal, steps),
  )


def _in_steps(length: float, steps: int) -> int:
  """1 or less are shares of the whole training; at least a step, or none."""
  given = length * steps if length <= 1 else length
  return max(1, round(given)) if given else 0


def optimizer(recipe: Recipe) -> optax.GradientTransformation:
  """Adam without its learning rate, which members do not share."""
  return optax.scale_by_adam(recipe.beta1, recipe.beta2, recipe.epsilon)


def keys(groups: list[tuple[Member, ...]]) -> tuple[jax.Array, ...]:
  """Random keys of the members, stacked by group."""
  return tuple(
    jnp.stack([jax.random.key(member.seed) for member in group])
    for group in groups
  )


def start(groups, recipe: Recipe, keys, norm, affine, examples):
  """The state of all members at step 0, as the step takes it.

  Args:
    groups: members, those of one width together.
    recipe: how all are trained; lengths in steps.
    keys: of `keys`.
    norm: `core.Normalisation`.
    affine: (linear [D, E], bias [E]) from which skips start; None without.
    examples: see `core.init`.

  Returns:
    params, opt_state, extra; see `make`.
  """
  out = []
  for group, own in zip(groups, keys, strict=True):
    cfg = group[0].config
    ridge = linear.Ridge(*affine, 0.0) if cfg.skip else None

    def one(key, cfg=cfg, ridge=ridge):
      params, state = core.init(cfg, recipe, key, norm, ridge, examples)
      opt_state = optimizer(recipe).init(params)
      return params, opt_state, state._replace(norm=None)

    out.append(jax.lax.map(one, own))
  params, opt_state, states = zip(*out, strict=True)
  return params, opt_state, {"norm": norm, "states": states}


def hypers(group: tuple[Member, ...], recipe: Recipe) -> dict[str, np.ndarray]:
  """What differs between the members of a group, each [S]."""
  own = [
    core.hyper(
      m.config, dataclasses.replace(recipe, sparsity_coefficient=m.sparsity)
    )
    for m in group
  ]
  return {
    **{name: np.stack([h[name] for h in own]) for name in own[0]},
    "learning_rate": np.array([m.learning_rate for m in group], np.float32),
    "seed": np.array([m.seed for m in group], np.uint32),
  }


def widest(group: tuple[Member, ...]) -> DictionaryConfig:
  """The config of the member with the largest k: the program fits all."""
  return max((m.config for m in group), key=lambda cfg: cfg.k or 0)


def make(
  groups: list[tuple[Member, ...]],
  recipe: Recipe,
  mesh: Mesh,
  *,
  steps: int,
  at_once: int,
  sparse: bool,
) -> Callable:
  """The step of all members.

  Args:
    groups: members, those of one width together.
    recipe: how all are trained; lengths in steps.
    mesh: over `dictionary_plan.AXES`.
    steps: of the whole training.
    at_once: members that one device vectorises over; the rest wait.
    sparse: see `core.loss`.

  Returns:
    (params, opt_state, extra, batch, step) -> (params, opt_state, extra,
    finite [S], metrics of [S]), where extra is {"norm", "states"} and params,
    opt_state and states have one entry for each group, stacked over its
    members.
  """
  # An axis of one device needs no sums.
  axes = Axes(*(a if mesh.shape[a] > 1 else None for a in ("data", "latent")))
  shape = schedule(recipe, steps)
  hyper = [hypers(group, recipe) for group in groups]

  def local(params, opt_state, extra, batch, hyper, step):
    norm, states = extra["norm"], extra["states"]
    out = []
    for group, *own in zip(
      groups, params, opt_state, states, hyper, strict=True
    ):
      one = functools.partial(
        _member,
        widest(group),
        recipe,
        norm=norm,
        batch=batch,
        step=step,
        rate=shape(step),
        axes=axes,
        sparse=sparse,
        freeze=sum(map(len, groups)) > 1,
      )
      out.append(_over_members(lambda own, one=one: one(*own), own, at_once))
    params, opt_state, states, finite, metrics = zip(*out, strict=True)
    extra = {"norm": norm, "states": states}
    return params, opt_state, extra, finite, metrics

  def step_fn(params, opt_state, extra, batch, step):
    state = params, opt_state, extra
    specs = jax.tree_util.tree_map_with_path(
      lambda path, x: rule(jax.tree_util.keystr(path), x.shape), state
    )
    by_row = jax.tree.map(lambda _: P("data"), batch)
    by_member = jax.tree.map(lambda _: P("member"), hyper)
    *state, finite, metrics = jax.shard_map(
      local,
      mesh=mesh,
      in_specs=(*specs, by_row, by_member, P()),
      out_specs=(*specs, P("member"), P("member")),
      check_vma=False,
    )(*state, batch, hyper, step)
    # By group, then by member, wherever they were.
    finite, metrics = jax.tree.map(
      lambda *x: jnp.concatenate(x), *zip(finite, metrics, strict=True)
    )
    return *state, finite, metrics

  return step_fn


def _over_members(one, stacked, at_once):
  """`one` for every entry of the leading axis; without a loop if it is 1."""
  if len(jax.tree.leaves(stacked)[0]) == 1:
    out = one(jax.tree.map(lambda x: x[0], stacked))
    return jax.tree.map(lambda x: x[None], out)
  return jax.lax.map(one, stacked, batch_size=at_once if at_once > 1 else None)


def _member(
  cfg: DictionaryConfig,
  recipe: Recipe,
  params,
  opt_state,
  carried,
  hyper: Mapping[str, jax.Array],
  *,
  norm,
  batch,
  step,
  rate,
  axes: Axes,
  sparse: bool,
  freeze: bool,
):
  """One member's step on this device's rows and latents."""
  state = carried._replace(norm=norm)
  before = params, opt_state, carried

  def loss(params):
    return core.loss(
      cfg, recipe, params, state, batch, hyper, axes=axes, sparse=sparse
    )

  (value, (new, metrics)), gradients = jax.value_and_grad(loss, has_aux=True)(
    params
  )
  gradients = total(gradients, axes.data)
  if recipe.decoder == "unit_before_step":
    params = core.constrain(recipe, params)
  gradients = core.project(recipe, params, gradients)
  norm_of = functools.partial(_norm, axes=axes)
  size = norm_of(gradients)
  if recipe.clip is not None:
    shrink = jnp.minimum(1, recipe.clip / (size + 1e-6))
    gradients = jax.tree.map(lambda g: g * shrink, gradients)
  updates, opt_state = optimizer(recipe).update(gradients, opt_state, params)
  speed = hyper["learning_rate"] * rate
  slower = {"W_skip": recipe.skip_learning_rate}
  params = {
    name: params[name] - slower.get(name, 1.0) * speed * update
    for name, update in updates.items()
  }
  if recipe.decoder != "unit_before_step":
    params = core.constrain(recipe, params)
  if recipe.resample_every:
    params, opt_state = _resample(
      cfg, recipe, params, opt_state, new, batch, hyper, step, axes
    )
  finite = jnp.isfinite(value) & jnp.isfinite(size)
  metrics = metrics | {"learning_rate": speed}
  after = params, opt_state, new._replace(norm=None)
  if freeze:
    # Once left behind, its own count of steps never catches up.
    finite &= carried.steps == step
    after = jax.tree.map(lambda a, b: jnp.where(finite, a, b), after, before)
  return *after, finite, metrics


def _norm(tree, axes: Axes):
  """Of all leaves together, latents of other devices included."""
  squares = jnp.zeros(())
  for name, x in tree.items():
    here = jnp.sum(x * x)
    split = name in OVER_LATENTS or name == "threshold"
    squares += total(here, axes.latent) if split else here
  return jnp.sqrt(squares)


def _resample(cfg, recipe, params, opt_state, state, batch, hyper, step, axes):
  """Restarts dead latents and forgets their moments, every so many steps."""
  due = (step > 0) & (step % recipe.resample_every == 0)

  def restart():
    key = jax.random.fold_in(jax.random.key(hyper["seed"]), step)
    new, moved = core.resample(
      cfg, recipe, params, state, batch, hyper, key, axes=axes
    )

    where = {"W_enc": moved, "W_dec": moved[:, None], "b_enc": moved}

    def forget(moments):
      return moments | {
        name: jnp.where(where[name], 0, moments[name]) for name in where
      }

    return new, opt_state._replace(
      mu=forget(opt_state.mu), nu=forget(opt_state.nu)
    )

  return jax.lax.cond(due, restart, lambda: (params, opt_state))
