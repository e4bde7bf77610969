"""What the loop trains: the dictionary's task, and what comes of it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from gemma_jax import dictionaries
from gemma_jax.activations import ActivationStore
from gemma_jax.dictionaries import core, linear
from gemma_jax.dictionaries.selection import kth_largest
from trainers import loop
from trainers.dictionary_plan import Plan

EXAMPLES = 65_536  # rows from which initial latents are drawn


def make(
  p: Plan,
  store: ActivationStore | None = None,
  moments: linear.Moments | None = None,
  ridge: linear.Ridge | None = None,
) -> loop.Task:
  """The loop's task; without the training store, good for its shapes only."""
  cfg, train = p.dictionary, p.config["train"]
  d, e = cfg.d_in, cfg.d_out
  f32 = jnp.float32
  shape = jax.ShapeDtypeStruct
  stored = p.config["activations"]["dtype"]
  stored = jnp.dtype("float32" if stored == "int8" else stored)
  size = train["batch_size"]
  rows = max(EXAMPLES, cfg.width)
  if store is not None:
    rows = min(rows, len(store))
  from_examples = train["init"] == "examples"
  norm_shapes = core.Normalisation(
    *(shape(s, f32) for s in ((d,), (d, d), (e,), ()))
  )
  ridge_shapes = (shape((d, e), f32), shape((e,), f32))
  example_shapes = (
    shape((rows, d), f32),
    shape((rows, e), f32),
    shape((rows,), bool),
  )
  key_shape = jax.eval_shape(lambda: jax.random.key(0))

  def init(key, norm, affine, examples):
    return core.init(
      cfg,
      key,
      norm,
      linear.Ridge(*affine, 0.0) if cfg.skip else None,
      examples if from_examples else None,
      encoder_norm=train["encoder_norm"],
      decoder_norm=train["decoder_norm"],
    )

  def init_args():
    batch = next(store.stream(rows, p.config["seed"] + 1))
    x, y = (np.asarray(batch[s], np.float32) for s in (cfg.read, cfg.write))
    norm = core.normalisation(
      moments,
      train["normalise"],
      epsilon=train["whiten_epsilon"],
      # The moments hold no norms; so many rows tell their mean well enough.
      mean_norm=float(np.linalg.norm(x, axis=1).mean()),
    )
    first = np.zeros(rows, bool)
    first[np.unique(x, axis=0, return_index=True)[1]] = True
    key = jax.random.key(p.config["seed"])
    return key, norm, (ridge.linear, ridge.bias), (x, y, first)

  def loss(params, state, batch):
    hyper = {"aux_coefficient": cfg.aux_coefficient}
    return core.loss(cfg, params, state, batch, hyper)

  def batches(start, sharding):
    stream = store.stream(
      train["batch_size"],
      p.config["seed"],
      sites=tuple(dict.fromkeys((cfg.read, cfg.write))),
      start=start,
      buffer_rows=p.config["activations"]["buffer_rows"],
      sharding=sharding,
    )
    try:
      for batch in stream:
        yield {"x": batch[cfg.read], "y": batch[cfg.write]}
    finally:
      stream.close()

  return loop.Task(
    init=init,
    init_args=init_args,
    init_shapes=(key_shape, norm_shapes, ridge_shapes, example_shapes),
    loss=loss,
    optimizer=_optimizer(train),
    learning_rate=_schedule(train),
    batches=batches,
    batch_shapes={"x": shape((size, d), stored), "y": shape((size, e), stored)},
    rule=_rule,
    shown=("loss", "fvu", "l0", "dead_fraction"),
  )


def _rule(path: str, shape: tuple[int, ...]) -> P:
  """Latents are split over fsdp and tensor, everything else is whole."""
  axes = ("fsdp", "tensor")
  if "W_enc" in path:  # D M
    return P(None, axes)
  if "W_dec" in path:  # M E
    return P(axes, None)
  if "b_enc" in path or "since_fired" in path:  # M
    return P(axes)
  return P()


def _schedule(train) -> optax.Schedule:
  """Linear warm-up from zero and linear decay to zero at the last step."""
  steps = train["steps"]
  warmup = max(1, round(train["warmup_fraction"] * steps))
  decay = max(1, round(train["decay_fraction"] * steps))

  def schedule(step):
    shape = jnp.minimum((step + 1) / warmup, (steps - step) / decay)
    return train["learning_rate"] * jnp.clip(shape, 0, 1)

  return schedule


def _optimizer(train) -> optax.GradientTransformation:
  def slower_skip(updates, params):
    slow = train["skip_learning_rate"]
    return {n: u * (slow if n == "W_skip" else 1) for n, u in updates.items()}

  return optax.chain(
    optax.scale_by_adam(train["beta1"], train["beta2"], train["epsilon"]),
    optax.stateless(slower_skip),
    optax.scale_by_learning_rate(_schedule(train)),
  )


def finish(
  p: Plan, state: loop.State, store: ActivationStore
) -> tuple[dictionaries.Dictionary, dict[str, float]]:
  """The trained dictionary on raw activations, and its thresholds."""
  cfg = p.dictionary
  extra = jax.device_get(state.extra)
  params = jax.device_get(state.params)
  calibrated, found = None, {}
  if cfg.activation == "batchtopk":
    rows = min(len(store), max(1024, 2**25 // cfg.width))
    batch = next(store.stream(rows, p.config["seed"] + 2, sites=(cfg.read,)))[
      cfg.read
    ]

    @jax.jit
    def calibrate(params, norm, x):
      x = (x.astype(jnp.float32) - norm.x_mean) @ norm.x_map
      return kth_largest(core.pre_activations(params, x), cfg.k * len(x))

    calibrated = float(calibrate(params, extra.norm, jnp.asarray(batch)))
    found = {
      "threshold": calibrated,
      "threshold_running": float(extra.threshold),
    }
  folded = core.fold(cfg, params, extra.norm, calibrated)
  folded = {name: jnp.asarray(x) for name, x in folded.items()}
  return dictionaries.Dictionary(cfg, folded), found
