"""A store's statistics as files: what a harvest saves, and `stats.json`."""

import io
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma_jax.activations.reading import remedy
from gemma_jax.activations.statistics import Statistics

if TYPE_CHECKING:
  from gemma_jax.activations.store import ActivationStore


def write_statistics(
  store: "ActivationStore", measured: Mapping[str, Statistics] | None = None
) -> dict[str, Any]:
  """Writes and returns `stats.json`: {site: summary}, outliers by name.

  Args:
    store: of any size; only its statistics are read.
    measured: by site; None takes what the harvest measured, without the sites
      that it did not.
  """
  found = {}
  for site in store.sites:
    if measured is None:
      statistics = store.statistics(site)
    else:
      statistics = measured.get(site)
    if statistics is not None:
      found[site] = statistics.summary()
  name_outliers(store, found)
  text = json.dumps(found, indent=1, allow_nan=False)
  store.root.write("stats.json", text.encode())
  return found


def name_outliers(
  store: "ActivationStore", summaries: Mapping[str, dict[str, Any]]
) -> None:
  """Adds the document's id, source and name to every outlier of all sites."""
  rows = [
    row
    for summary in summaries.values()
    for end in summary["outliers"].values()
    for row in end
  ]
  names = store.named({row["document"] for row in rows})
  for row in rows:
    # Who writes a store without a harvest need not name its documents.
    found = names.get(row["document"], (None,) * 3)
    row |= dict(zip(("id", "source", "name"), found, strict=True))


def save_statistics(found: dict[str, Statistics], **more: int) -> bytes:
  """Statistics of each site, and numbers, as bytes."""
  out = io.BytesIO()
  arrays = {
    f"{site}|{name}": x
    for site, statistics in found.items()
    for name, x in statistics.state().items()
  }
  np.savez(out, **arrays, **{n: np.asarray(x) for n, x in more.items()})
  return out.getvalue()


def load_statistics(data: bytes, where: str) -> dict[str, Any]:
  """What `save_statistics` saved: sites' statistics, and the numbers.

  Raises:
    OSError: damaged.
  """
  try:
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
      arrays = {name: file[name] for name in file.files}
    out, states = {}, {}
    for name, x in arrays.items():
      site, separator, key = name.rpartition("|")
      if separator:
        states.setdefault(site, {})[key] = x
      else:
        out[name] = int(x)
    return out | {s: Statistics.from_state(x) for s, x in states.items()}
  except Exception as e:
    raise OSError(
      f"{where} holds statistics that are damaged ({e}). {remedy(where)}"
    ) from e
