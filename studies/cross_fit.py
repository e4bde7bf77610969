"""What is fitted over all pairs at once, and every map of one route."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gemma_jax.activations import ActivationStore
from gemma_jax.alignment import Moments
from gemma_jax.alignment.maps import Map
from gemma_jax.alignment.objective import CodeStatistics
from gemma_jax.alignment.paired import Paired
from gemma_jax.dictionaries import Dictionary
from gemma_jax.models import Model
from studies import cross_maps, cross_networks, cross_sides
from studies.cross_maps import Contender
from studies.cross_networks import both_ways
from studies.cross_sides import Pair
from trainers import translator

UNSEEN = "hypernetwork_unseen"


class Rows(NamedTuple):
  """What the study has of its models, before maps.

  Attributes:
    config: of the study.
    subjects: the models, by name.
    harvested: their stores, by name and side.
    found: paired stores, by names of both models and side.
    trained: dictionaries, by site.
    pairs: that are validated.
    more: that only networks learn from.
    unseen: some of pairs.
  """

  config: Mapping[str, Any]
  subjects: Mapping[str, cross_sides.Subject]
  harvested: Mapping[str, Mapping[str, ActivationStore]]
  found: Mapping[tuple[str, str], Mapping[str, Paired]]
  trained: Mapping[str, Sequence[Dictionary]]
  pairs: Sequence[Pair]
  more: Sequence[Pair]
  unseen: Sequence[Pair]


class Fitted(NamedTuple):
  """What was fitted over all pairs at once.

  Attributes:
    moments: of activations, by direction.
    written: maps of each hypernetwork, by its name and direction.
    translators: by direction.
    statistics: of codes, by site.
  """

  moments: Mapping[Pair, Moments]
  written: Mapping[str, Mapping[Pair, Map]]
  translators: Mapping[Pair, Contender]
  statistics: Mapping[str, CodeStatistics]


def fit(
  rows: Rows, load: Callable[[str], Model], workdir: pathlib.Path
) -> Fitted:
  """Moments, and the networks that learn from all pairs.

  Args:
    rows: of the study.
    load: (name) -> the model.
    workdir: trainings go below it.
  """
  every = [*rows.pairs, *rows.more]
  moments = {}
  for pair in every:
    moments[pair] = cross_maps.moments(rows.found[pair.models]["train"], pair)
    moments[pair.turned] = moments[pair].turned()
  statistics = cross_networks.code_statistics(rows.found, rows.trained)
  encoders = {
    site: translator.encoder(some[0], statistics[site])
    for site, some in rows.trained.items()
  }
  written = {}
  for name, left_out in (("hypernetwork", []), (UNSEEN, rows.unseen)):
    if name == UNSEEN and not left_out:
      continue
    written[name] = cross_networks.train_hypernetwork(
      rows.config,
      rows.subjects,
      rows.found,
      [pair for pair in every if pair not in left_out],
      moments,
      encoders,
      load,
      workdir / name,
    )
  translators = {}
  if rows.config["translator"]:
    translators = cross_networks.train_translators(
      rows.config,
      rows.found,
      rows.pairs,
      rows.trained,
      statistics,
      workdir / "translator",
    )
  return Fitted(moments, written, translators, statistics)


def contenders(
  rows: Rows,
  fitted: Fitted,
  train: Paired,
  way: Pair,
  codes: Moments,
  drawn: tuple[np.ndarray, np.ndarray],
) -> list[Contender]:
  """Every map of a route, from floors to ceilings.

  Args:
    rows: of the study.
    fitted: over all of its pairs.
    train: paired rows of both models.
    way: the route.
    codes: of both sites' codes.
    drawn: numbers of some rows, and what redrawn weights make of the source
      there.
  """
  config = rows.config
  source, target = (rows.trained[site] for site in way)
  linear = cross_maps.linear(fitted.moments[way], config["maps"])
  numbers, x = drawn
  y = np.asarray(train.store.take(numbers, way.b), np.float32)
  translators = [fitted.translators[way]] if fitted.translators else []
  return [
    *cross_maps.floors(train, way, target[0]),
    *(cross_maps.of_map(name, "linear", one) for name, one in linear.items()),
    *cross_maps.of_codes(codes, linear["ridge"], source[0]),
    *(
      cross_maps.of_map(
        name,
        "network",
        maps[way],
        unseen=name == UNSEEN,
      )
      for name, maps in fitted.written.items()
      if name != UNSEEN or way in both_ways(rows.unseen)
    ),
    *translators,
    *cross_maps.shuffled_pairs(train, way, seed=config["seed"]),
    cross_maps.redrawn(x, y),
    *cross_maps.ceilings(target),
  ]
