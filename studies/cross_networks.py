"""The networks of a study across models: what they learn from, and give."""

import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from gemma_jax import alignment, models
from gemma_jax.activations import owner
from gemma_jax.alignment import hypernetwork as hyper
from gemma_jax.alignment import objective
from gemma_jax.alignment import translator as translating
from gemma_jax.alignment.hypernetwork import Route, SiteScale
from gemma_jax.alignment.maps import Map
from gemma_jax.alignment.scores import Scores
from gemma_jax.dictionaries import Dictionary
from studies import cross_maps, cross_scores
from studies.cross_maps import Contender
from studies.cross_sides import Pair, layer
from trainers import hypernetwork, translator
from trainers.downstream import Downstream

DEFINITIONS = {
  "unseen": (
    "FVU about the training mean of activations at a pair of layers that the "
    "network never saw, with a 95 % bootstrap interval over documents."
  ),
  "nearest": "The ridge map of the nearest pair of layers that it saw.",
  "mean_of_neighbours": "The mean of the ridge maps of the two nearest pairs.",
  "pooled_ridge": "One ridge map for all pairs of layers that it saw.",
  "fitted_ridge": "The ridge map that is fitted there: the ceiling.",
}


def both_ways(pairs: Sequence[Pair]) -> list[Pair]:
  """Every pair and its other direction."""
  return [way for pair in pairs for way in (pair, pair.turned)]


def scales(m: alignment.Moments) -> tuple[SiteScale, SiteScale]:
  """Of the source and the target of a pair's moments."""
  return (
    SiteScale.of(m.mean_x, m.xx.diagonal() / m.count),
    SiteScale.of(m.mean_y, m.squares_y / m.count),
  )


def pooled(several: Iterable[alignment.Moments]) -> jax.Array:
  """One ridge map [D, E] for several pairs, in each site's own scale."""
  return hyper.pooled_base((m, *scales(m)) for m in several)


def network_config(config, subjects, pairs: Sequence[Pair]) -> hyper.Config:
  """Sizes of the hypernetwork for all directions of some pairs."""
  names = dict.fromkeys(way.models for way in both_ways(pairs))
  own = config["hypernetwork"]
  return hyper.Config(
    tuple(
      (a, b, subjects[a].config.width, subjects[b].config.width)
      for a, b in names
    ),
    **{n: own[n] for n in ("rank", "width", "embedding", "frequencies")},
  )


def route_of(about: hyper.Config, subjects, way: Pair) -> Route:
  """A pair's place among the directions, and its depths."""
  named = [direction[:2] for direction in about.directions]
  depths = tuple(_depths(subjects, way).tolist())
  return Route(way.a, way.b, named.index(way.models), depths)


def train_hypernetwork(
  config,
  subjects,
  found,
  pairs,
  moments,
  encoders,
  load: Callable[[str], models.Model],
  workdir: pathlib.Path,
) -> dict[Pair, Map]:
  """The maps of all directions of the pairs that it learns from, and more.

  Args:
    config: of the study.
    subjects: by name.
    found: training pairs by models and side.
    pairs: that it learns from.
    moments: of both directions of every pair of the study.
    encoders: by site; of sites without any, activations alone count.
    load: (name) -> the model; called where the term "kl" has a weight.
    workdir: of its own.

  Returns:
    By direction of a pair, whether it learned from it or not.
  """
  about = network_config(config, subjects, pairs)
  ways = both_ways(pairs)
  routes = [route_of(about, subjects, way) for way in ways]
  bases = [
    pooled(
      moments[way]
      for way, r in zip(ways, routes, strict=True)
      if r.direction == i
    )
    for i in range(len(about.directions))
  ]
  known = {}
  for way, m in moments.items():
    known |= dict(zip(way, scales(m), strict=True))
  rows = [found[_key(found, way)]["train"] for way in ways]
  downstream = None
  if config["hypernetwork"]["weights"].get("kl"):
    targets = sorted({way.models[1] for way in ways})
    downstream = Downstream(
      {name: load(name) for name in targets},
      {name: subjects[name].windows["train"].tokens for name in targets},
      rows,
    )
  trained = hypernetwork.train(
    config["hypernetwork"],
    about,
    routes,
    [one.store for one in rows],
    known,
    bases,
    encoders,
    workdir,
    mesh=models.make_mesh(config["mesh"]),
    seed=config["seed"],
    downstream=downstream,
  )
  return {
    way: hyper.as_map(
      about,
      trained,
      route_of(about, subjects, way),
      *(known[site] for site in way),
    )
    for way in moments
    if way.models in [direction[:2] for direction in about.directions]
  }


def _key(found, way: Pair) -> tuple[str, str]:
  return way.models if way.models in found else way.turned.models


def train_translators(
  config, found, pairs, dictionaries, statistics, workdir: pathlib.Path
) -> dict[Pair, Contender]:
  """A translator of codes for both directions of every pair."""
  ways = both_ways(pairs)
  trained = translator.train(
    config["translator"],
    ways,
    [found[_key(found, way)]["train"].store for way in ways],
    {site: some[0] for site, some in dictionaries.items()},
    statistics,
    workdir,
    mesh=models.make_mesh(config["mesh"]),
    seed=config["seed"],
  )
  out = {}
  for way, params in zip(ways, trained, strict=True):
    about = [statistics[site] for site in way]

    @jax.jit
    def codes(params, z, about=about):
      return translating.apply(params, *about, z)[0]

    out[way] = Contender(
      "translator",
      "network",
      codes=lambda b, params=params, codes=codes: codes(params, b.z),
      parameters=translating.parameters(params),
    )
  return out


def code_statistics(found, dictionaries: Mapping[str, Sequence[Dictionary]]):
  """site -> `CodeStatistics` over training pairs."""
  out = {}
  for both in found.values():
    store = both["train"].store
    for site in sorted(set(store.sites) & set(dictionaries) - set(out)):
      out[site] = objective.code_statistics(
        dictionaries[site][0].encode(x)
        for _, (x,) in cross_maps.blocks(store, [site])
      )
  return out


def unseen(
  found, way: Pair, seen: Sequence[Pair], moments, written: Map, subjects
) -> list[dict[str, Any]]:
  """FVU of activations where the network never was, beside cheaper guesses.

  Args:
    found: held-out pairs of the two models.
    way: the direction of the unseen pair.
    seen: directions that the network learned from.
    moments: by direction.
    written: the network's map.
    subjects: by name.
  """
  here = scales(moments[way])
  own = _depths(subjects, way)
  others = [one for one in seen if one.models == way.models]
  order = sorted(
    others, key=lambda one: np.abs(_depths(subjects, one) - own).sum()
  )
  near = [
    cross_maps.moved(
      alignment.fit_ridge(moments[one]), scales(moments[one]), here
    )
    for one in order[:2]
  ]
  guesses = {
    "hypernetwork": written,
    "nearest": near[0],
    "mean_of_neighbours": jax.tree.map(
      lambda *w: sum(w) / len(w), *((one.weights, one.bias) for one in near)
    ),
    "pooled_ridge": _normalised(pooled(moments[one] for one in others), here),
    "fitted_ridge": alignment.fit_ridge(moments[way]),
  }
  scored = {name: Scores(moments[way].mean_y) for name in guesses}
  for part, (x, y) in cross_maps.blocks(found.store, way):
    for name, one in guesses.items():
      made = one(x) if isinstance(one, Map) else x @ one[0] + one[1]
      scored[name].update(made, y, found.document[part])
  out = []
  for name, one in scored.items():
    ends = one.interval() or (None, None)
    out.append(
      {
        "route": cross_scores.route(way),
        "map": name,
        "fvu": 1 - one.compute()["r2_pooled"],
        "low": None if ends[1] is None else 1 - ends[1],
        "high": None if ends[0] is None else 1 - ends[0],
      }
    )
  return out


def _depths(subjects, way: Pair) -> np.ndarray:
  return np.array(
    [
      (layer(site) + 1) / subjects[owner(site)[0]].config.num_layers
      for site in way
    ]
  )


def _normalised(weights, here: tuple[SiteScale, SiteScale]):
  x, y = here
  weights = weights / x.scale[:, None] * y.scale
  return weights, y.mean - x.mean @ weights
