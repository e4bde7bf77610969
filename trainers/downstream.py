"""What a model still predicts where a map stands in for one of its sites.

A term of a training on paired rows. Windows of the target's text are run as
they are, and with the site replaced at all paired positions by what the map
makes of the source there.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gemma_jax.activations import ActivationStore, owner
from gemma_jax.alignment.paired import Paired
from gemma_jax.models import Model, ModelConfig
from gemma_jax.models.forward import forward
from gemma_jax.models.head import unembed

POSITIONS = 64  # of every window, whose logits exist at once


class Downstream(NamedTuple):
  """What the term needs of the models that are mapped to.

  Attributes:
    models: name -> model, whole, on the devices that train.
    tokens: name -> int [W, T], its windows that were paired.
    paired: the pairs of each route, in the order of the routes.
  """

  models: Mapping[str, Model]
  tokens: Mapping[str, np.ndarray]
  paired: Sequence[Paired]


class Text(NamedTuple):
  """Windows of one route.

  Attributes:
    tokens: int32 [B, T], the target's.
    mask: bool [B, T], where it is paired.
    x: float32 [B, T, D], the source there, and 0 elsewhere.
  """

  tokens: jax.Array
  mask: jax.Array
  x: jax.Array


class Texts:
  """Windows for every step of a training, drawn anew in each; and the term.

  Args:
    routes: (source, target, ...) each.
    stores: of each route.
    given: the texts and their pairs.
    count: B, windows of a step; different ones.
    mesh: of the training.
    seed: of the drawing.

  Attributes:
    constant: what every batch has besides: the models' parameters.

  Raises:
    ValueError: models on other devices or without their last layers, pairs of
      other stores, a target without its model, or fewer windows than a step
      takes.
  """

  def __init__(
    self,
    routes: Sequence[tuple],
    stores: Sequence[ActivationStore],
    given: Downstream,
    count: int,
    mesh: Mesh,
    seed: int,
  ):
    for name, model in given.models.items():
      if set(model.mesh.devices.flat) != set(mesh.devices.flat):
        raise ValueError(
          f"expected {name} on the {mesh.size} devices of the training, got it "
          f"on {model.mesh.size}"
        )
      if model.num_loaded < model.config.num_layers:
        raise ValueError(
          f"expected {name} with its {model.config.num_layers} layers, got the "
          f"first {model.num_loaded}"
        )
    if [one.store.path for one in given.paired] != [s.path for s in stores]:
      raise ValueError(
        "expected the pairs of each route's store, in the order of the routes, "
        f"got those of {len(given.paired)} stores for {len(stores)} routes, or "
        "of other ones"
      )
    self._count, self._seed, self._routes = count, seed, []
    self.constant = {
      "models": {name: model.params for name, model in given.models.items()}
    }
    for (source, target, *_), found in zip(routes, given.paired, strict=True):
      name, site = owner(target)
      if name not in given.models or name not in given.tokens:
        raise ValueError(
          f"expected the model and tokens of {name} for the term kl of "
          f"{target}, got those of {', '.join(given.models) or 'none'}"
        )
      places = found.places(name)
      windows, counts = np.unique(places[:, 0], return_counts=True)
      if len(windows) < count:
        raise ValueError(
          f"expected kl_windows of at most the {len(windows)} paired windows "
          f"of {name}, got {count}"
        )
      order = np.argsort(places[:, 0], kind="stable")
      self._routes.append(
        _Route(
          name,
          site,
          given.models[name].config,
          source,
          found.store,
          given.tokens[name],
          windows,
          np.split(order, np.cumsum(counts)[:-1]),
          places[:, 1],
        )
      )

  def shapes(self) -> dict[str, Text]:
    """Of the windows in a batch."""
    return {
      f"text {i}": jax.eval_shape(lambda one=one: self._empty(one))
      for i, one in enumerate(self._routes)
    }

  def beside(self, batches: Callable[..., Iterator]) -> Callable[..., Iterator]:
    """Batches of a `loop.Task`, and the windows of each step with them."""

    def both(start, sharding):
      def put(array):
        # Not device_put, which wants all devices to be of this process.
        return jax.make_array_from_callback(
          array.shape, sharding, lambda index: array[index]
        )

      with contextlib.closing(batches(start, sharding)) as rows:
        for number, batch in enumerate(rows, start):
          yield batch | {
            f"text {i}": jax.tree.map(put, self._text(number, i))
            for i in range(len(self._routes))
          }

    return both

  def kl(self, route: int, batch: Mapping, write: Callable) -> jax.Array:
    """See the function `kl`.

    Args:
      route: number.
      batch: with windows and models.
      write: the map, from source to target.
    """
    one, text = self._routes[route], batch[f"text {route}"]
    params = batch["models"][one.model]
    return kl(one.config, params, one.target, text, write(text.x))

  def _text(self, step: int, route: int) -> Text:
    """The same whenever a step is taken."""
    one = self._routes[route]
    rng = np.random.default_rng((self._seed, step, route))
    chosen = rng.choice(len(one.windows), self._count, replace=False)
    text = self._empty(one)
    text.tokens[:] = one.tokens[one.windows[chosen]]
    for row, j in enumerate(chosen):
      at = one.positions[one.rows[j]]
      text.mask[row, at] = True
      text.x[row, at] = one.store.take(one.rows[j], one.source)
    return text

  def _empty(self, one: "_Route") -> Text:
    shape = self._count, one.tokens.shape[1]
    return Text(
      np.zeros(shape, np.int32),
      np.zeros(shape, bool),
      np.zeros((*shape, one.store.sites[one.source]), np.float32),
    )


class _Route(NamedTuple):
  """Where the windows of a route come from.

  Attributes:
    model: name of the target's.
    target: its site, without the name.
    config: of the model.
    source: site.
    store: of paired rows.
    tokens: int [W, T], the target's.
    windows: int [G], those that have pairs.
    rows: of the store, those of each of them.
    positions: int [P], in the target's window, of every row of the store.
  """

  model: str
  target: str
  config: ModelConfig
  source: str
  store: ActivationStore
  tokens: np.ndarray
  windows: np.ndarray
  rows: Sequence[np.ndarray]
  positions: np.ndarray


def kl(
  cfg: ModelConfig, params, site: str, text: Text, values: jax.Array
) -> jax.Array:
  """Mean KL(whole || replaced) of the next token at replaced positions, nats.

  Args:
    cfg: of the model.
    params: of the model.
    site: that is replaced.
    text: windows [B, T] and which positions are replaced.
    values: what stands there, [B, T, E]; has a gradient.
  """
  last = f"blocks.{cfg.num_layers - 1}.resid_post"

  def stream(changes):
    _, found = forward(
      cfg,
      params,
      text.tokens,
      capture=(last,),
      edits=changes,
      stop_at=cfg.num_layers,
    )
    return found[last]

  def put(y):
    return jnp.where(text.mask[..., None], values.astype(y.dtype), y)

  def apart(rows):
    """Of some positions of all windows: the sum."""
    mask, *streams = rows
    whole, replaced = (
      jax.nn.log_softmax(unembed(cfg, params, one)) for one in streams
    )
    one = jnp.sum(jnp.exp(whole) * (whole - replaced), axis=-1)
    return jnp.sum(jnp.where(mask, one, 0))

  def blocks(array):
    """[B, T, ...] -> [T / POSITIONS, B, POSITIONS, ...]."""
    b, t, *rest = array.shape
    pad = [(0, 0), (0, -t % POSITIONS), *((0, 0) for _ in rest)]
    split = jnp.pad(array, pad).reshape(b, -1, POSITIONS, *rest)
    return jnp.swapaxes(split, 0, 1)

  rows = text.mask, jax.lax.stop_gradient(stream(None)), stream({site: put})
  # Made again for the gradient: logits of all positions would not fit.
  sums = jax.lax.map(jax.checkpoint(apart), jax.tree.map(blocks, rows))
  return sums.sum() / jnp.maximum(text.mask.sum(), 1)
