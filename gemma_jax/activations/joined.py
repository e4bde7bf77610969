"""Several models on the same tokens: their stores side by side."""

from collections.abc import Mapping

import numpy as np

from gemma_jax.activations.reading import Reading
from gemma_jax.activations.statistics import Statistics
from gemma_jax.activations.store import ActivationStore


def owner(site: str) -> tuple[str, str]:
  """("chat", "blocks.9.mlp_in") of "chat:blocks.9.mlp_in"; else ("", site)."""
  name, _, own = site.rpartition(":")
  return name, own


class Joined(ActivationStore):
  """Stores of the same rows as one, whose sites say which model is theirs.

  The sites of the model called "" keep their names, those of another are
  "name:site". Labels are those of "", on whose tokens all agree.

  Args:
    stores: by the model's name, "" among them; harvested from the same windows.

  Raises:
    ValueError: the stores do not hold the same tokens in the same parts.
  """

  def __init__(self, stores: Mapping[str, ActivationStore]):
    first = stores[""]
    super().__init__(first.root, first._manifest, first._parts, first.sources)
    self._stores = dict(stores)
    spans = [(part["start"], part["stop"]) for part in self.parts]
    for store in [s for s in stores.values() if s is not first]:
      same = [(part["start"], part["stop"]) for part in store.parts] == spans
      if not same or not np.array_equal(
        store.read(0, len(store), "token"), self.read(0, len(self), "token")
      ):
        raise ValueError(
          f"{store.path} and {first.path} do not hold the same tokens. Harvest "
          "both models from the same windows."
        )

  @property
  def sites(self) -> dict[str, int]:
    """Site -> width of its vectors."""
    return {
      f"{name}:{site}" if name else site: width
      for name, store in self._stores.items()
      for site, width in store.sites.items()
    }

  @property
  def tokens_per_second(self) -> float:
    """The rate at which all were harvested, one after the other."""
    return 1 / sum(1 / s.tokens_per_second for s in self._stores.values())

  def _of(self, name: str) -> tuple[ActivationStore, str]:
    model, own = owner(name)
    store = self._stores.get(model)
    if store is None:
      raise KeyError(
        f"{name!r}: expected one of {', '.join(self.sites)}, or a label."
      )
    return store, own

  def empty(self, n: int, name: str) -> np.ndarray:
    """See `ActivationStore.empty`."""
    store, own = self._of(name)
    return store.empty(n, own)

  def begin_read(self, start: int, out: np.ndarray, name: str) -> Reading:
    """See `ActivationStore.begin_read`."""
    store, own = self._of(name)
    return store.begin_read(start, out, own)

  def statistics(self, site: str) -> Statistics | None:
    """See `ActivationStore.statistics`."""
    store, own = self._of(site)
    return store.statistics(own)
