"""The models of a study across models, on the same text: rows and dictionaries.

Every model reads the same excerpts in its own tokens. One harvest of a model
serves its dictionaries and all pairs that it is in.
"""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gemma_jax import activations, cache, data, dictionaries, models
from gemma_jax.activations import ActivationStore, owner
from gemma_jax.alignment.paired import Paired, Side, pair_stores, rows_of
from gemma_jax.alignment.pairing import pair_windows
from gemma_jax.dictionaries import Dictionary
from gemma_jax.models import perturb, sites
from studies import jobs
from trainers import stores

SPLIT = ("train", "heldout")
SEEDS = 2  # of every dictionary: the second is a ceiling


class Pair(NamedTuple):
  """Two sites, "model:blocks.9.resid_post"."""

  a: str
  b: str

  @property
  def name(self) -> str:
    """As in "gemma:5 | smollm2:9"."""
    return f"{short(self.a)} | {short(self.b)}"

  @property
  def kind(self) -> str:
    """Between two models or among one's layers."""
    return "within" if owner(self.a)[0] == owner(self.b)[0] else "across"

  @property
  def models(self) -> tuple[str, str]:
    """Their names."""
    return owner(self.a)[0], owner(self.b)[0]

  @property
  def turned(self) -> "Pair":
    """The other way round."""
    return Pair(self.b, self.a)


@dataclasses.dataclass(frozen=True)
class Subject:
  """One model of the study, not loaded.

  Attributes:
    name: in the study.
    directory: of the checkpoint.
    config: its shape.
    sites: that are harvested, sorted.
    streams: side -> windows of exactly the tokens that there are.
    windows: the same, in memory.
  """

  name: str
  directory: pathlib.Path
  config: models.ModelConfig
  sites: tuple[str, ...]
  streams: Mapping[str, data.WindowStream]
  windows: Mapping[str, data.Windows]

  def load(self, config: Mapping[str, Any]) -> models.Model:
    """The whole model."""
    return models.load_model(
      self.directory,
      dtype=stores.default_dtype(config["dtype"]),
      mesh=models.make_mesh(config["mesh"]),
    )

  @functools.cached_property
  def tokenizer(self):
    """Of transformers."""
    return models.load_tokenizer(self.directory)

  @property
  def depth(self) -> int:
    """Blocks that its harvest runs."""
    return sites.last_layer(self.sites, self.config)


def short(site: str) -> str:
  """ "gemma:5" of "gemma:blocks.5.resid_post"."""
  model, own = owner(site)
  _, layer, name = own.split(".")
  return f"{model}:{layer}" + ("" if name == "resid_post" else f".{name}")


def layer(site: str) -> int:
  """Of a site with its model's name."""
  return int(owner(site)[1].split(".")[1])


def check(config: Mapping[str, Any], known: Mapping[str, models.ModelConfig]):
  """The pairs of a config, and those that only networks learn from.

  Raises:
    ValueError: names, sites or pairs that do not fit the models.
  """
  for name, source in config["models"].items():
    if not (re.fullmatch(r"[\w-]+", name) and isinstance(source, str)):
      raise ValueError(
        f"models has {name!r}: {source!r}; expected a short name of letters "
        "and digits, and where the model comes from."
      )
  found = {}
  for group in ("pairs", "network_pairs"):
    found[group] = [_pair(group, one, known) for one in config[group]]
  if not found["pairs"]:
    raise ValueError("pairs is empty; name at least one pair of sites.")
  every = found["pairs"] + found["network_pairs"]
  for one in every:
    if every.count(one) + every.count(one.turned) > 1:
      raise ValueError(f"{one.name} is in pairs or network_pairs twice.")
  unseen = [_pair("unseen", one, known) for one in config["unseen"]]
  for one in unseen:
    if one not in found["pairs"]:
      raise ValueError(f"unseen has {one.name}, which is not one of pairs.")
  return found["pairs"], found["network_pairs"], unseen


def _pair(group: str, given, known) -> Pair:
  if isinstance(given, str) or len(given) != 2:
    raise ValueError(
      f"{group} has {given!r}; expected two sites such as "
      "'gemma:blocks.9.resid_post'."
    )
  spelled = []
  for site in given:
    model, own = owner(site)
    if model not in known:
      raise ValueError(
        f"{group} has {site!r}; models has no {model!r}, only "
        f"{', '.join(known)}."
      )
    parsed = sites.parse(own, known[model])
    if parsed.layer is None:
      raise ValueError(f"{group} has {site!r}; expected one layer, not *.")
    spelled.append(f"{model}:{parsed}")
  if spelled[0] == spelled[1]:
    raise ValueError(f"{group} has {spelled[0]} twice in one pair.")
  return Pair(*spelled)


def of_pairs(pairs: Sequence[Pair]) -> list[str]:
  """All sites, each once, in order."""
  return sorted({site for pair in pairs for site in pair})


def text(config: Mapping[str, Any], tokens: Mapping[str, int | None]) -> dict:
  """`data` of a job's config for one model's windows of the study's text."""
  return {
    **jobs.plain(config["text"]),
    "packing": "document",
    "bos": "both",
    "stride": None,
    "allocation": "equal",
    "document_tokens": None,
    **{f"{side}_tokens": count for side, count in tokens.items()},
  }


def read(config: Mapping[str, Any], pairs: Sequence[Pair]) -> dict:
  """Every model and its windows; tokenises the text.

  Returns:
    name -> `Subject`.
  """
  found = {}
  for name, source in config["models"].items():
    directory = models.resolve(source)
    about = models.read_config(directory)
    everything = stores.windows(
      text(config, dict.fromkeys(SPLIT)), directory, about
    )
    windows = {side: everything[side].collect() for side in SPLIT}
    # Budgets of all that there is, which jobs of their own find again.
    counts = {side: windows[side].num_tokens for side in SPLIT}
    found[name] = Subject(
      name,
      directory,
      about,
      tuple(own for model, own in map(owner, of_pairs(pairs)) if model == name),
      stores.windows(text(config, counts), directory, about),
      windows,
    )
  return found


def coverage(config, subjects, pairs: Sequence[Pair]) -> list[dict[str, Any]]:
  """How much of the text is paired, for the results; before any harvest.

  Raises:
    ValueError: too little, or fewer training pairs than an unregularised map
      has inputs and outputs.
  """
  out = []
  for a, b in dict.fromkeys(pair.models for pair in pairs):
    for side in SPLIT:
      pairs_here = pair_windows(
        subjects[a].windows[side],
        subjects[b].windows[side],
        skip=config["skip"],
      )
      count = len(pairs_here.a)
      least = subjects[a].config.width + subjects[b].config.width + 1
      if side == "train" and count < least:
        raise ValueError(
          f"expected at least {least} paired training tokens of {a} and {b}, "
          f"one more than their widths together, got {count}: maps without a "
          "penalty would fit anything. Take more documents or longer excerpts."
        )
      out.append(
        {
          "a": a,
          "b": b,
          "side": side,
          **dataclasses.asdict(pairs_here.coverage),
          "pairs": count,
          "documents": len(np.unique(pairs_here.document)),
        }
      )
  return out


def harvest(config, subjects) -> dict[str, dict[str, ActivationStore]]:
  """Stores of every model, by name and side."""
  return {
    name: stores.harvest(
      subject.streams,
      subject.directory,
      subject.sites,
      config["activations"],
      mesh=models.make_mesh(config["mesh"]),
      dtype=stores.default_dtype(config["dtype"]),
      depth=subject.depth,
    )
    for name, subject in subjects.items()
  }


def paired(config, subjects, harvested, pairs) -> dict[tuple, dict]:
  """(name, name) -> side -> `Paired`."""

  def side(name, split):
    return Side(name, harvested[name][split], subjects[name].windows[split])

  return {
    (a, b): {
      split: pair_stores(side(a, split), side(b, split), skip=config["skip"])
      for split in SPLIT
    }
    for a, b in dict.fromkeys(pair.models for pair in pairs)
  }


def redrawn(
  config, subject: Subject, found: Mapping[str, Paired]
) -> dict[str, tuple[ActivationStore, np.ndarray, np.ndarray]]:
  """What the model with redrawn weights has at the pairs: a control.

  Of as many training windows as hold `config["redrawn_tokens"]`, and of all
  held-out ones.

  Returns:
    side -> its store, and for the pairs that it has their numbers and its
    rows.
  """
  model, out = None, {}
  for split, windows in subject.windows.items():
    counted = np.cumsum(windows.mask.sum(1))
    count = len(counted)
    if split == "train":
      enough = np.searchsorted(counted, config["redrawn_tokens"]) + 1
      count = min(count, int(enough))
    some = dataclasses.replace(
      windows,
      **{
        name: getattr(windows, name)[:count]
        for name in ("tokens", "mask", "document", "begin", "end", "source")
      },
    )
    key = activations.store_path(
      subject.directory,
      some,
      subject.sites,
      dtype=config["activations"]["dtype"],
      compute_dtype=stores.default_dtype(config["dtype"]),
    ).name
    where = cache.directory("activations", f"{key}-redrawn{config['seed']}")
    if not activations.is_complete(where) and model is None:
      model = perturb.redraw(
        models.load_model(
          subject.directory,
          dtype=stores.default_dtype(config["dtype"]),
          mesh=models.make_mesh(config["mesh"]),
          layers=subject.depth,
        ),
        seed=config["seed"],
      )
    store = activations.harvest(
      model,
      some,
      subject.sites,
      where,
      batch_size=config["activations"]["batch_size"],
      dtype=config["activations"]["dtype"],
    )
    places = found[split].places(subject.name)
    kept = np.flatnonzero(places[:, 0] < count)
    rows = rows_of(Side(subject.name, store, some))
    out[split] = store, kept, rows[*places[kept].T]
  return out


def run_config(config, subjects, site: str) -> dict[str, Any]:
  """Config of `trainers.dictionary` for one site."""
  model, own = owner(site)
  subject = subjects[model]
  counts = {side: subject.windows[side].num_tokens for side in SPLIT}
  run = jobs.changed(
    config["run"],
    {
      "model.name": config["models"][model],
      "model.dtype": config["dtype"],
      "activations.read": own,
      "activations.write": own,
      "activations.also": list(subject.sites),
      "sweep.seed": list(range(config["seed"], config["seed"] + SEEDS)),
    },
  )
  run["activations"] |= config["activations"]
  return run | {
    "data": text(config, counts),
    "mesh": jobs.plain(config["mesh"]),
    "seed": config["seed"],
  }


def train(config, subjects, pairs: Sequence[Pair], workdir: pathlib.Path):
  """Dictionaries of all sites of the pairs, trained or given.

  Returns:
    site -> its dictionaries, of which the first is the one that counts; and
    rows for the results.

  Raises:
    ValueError: a given dictionary is of another site or width.
  """
  found, rows = {}, []
  given = config["given"]
  for site in of_pairs(pairs):
    if site in given:
      found[site] = [_given(site, given[site], subjects)]
      continue
    members = jobs.train(
      run_config(config, subjects, site),
      workdir / "dictionaries" / short(site).replace(":", "_"),
    )
    found[site] = [dictionaries.load(one["path"]) for one in members]
    names = ("seed", "width", "fvu", "l0", "dead_fraction", "ce_recovered")
    rows += [{"site": site, **{n: one[n] for n in names}} for one in members]
  return found, rows


def _given(site: str, path: str, subjects) -> Dictionary:
  model, own = owner(site)
  one = dictionaries.load(path)
  about = subjects[model].config
  if not isinstance(one.config.read, str) or (
    sites.parse(one.config.read, about) != sites.parse(own, about)
    or one.config.write != one.config.read
  ):
    raise ValueError(
      f"{path} reads {one.config.read} and writes {one.config.write}; expected "
      f"an SAE of {own} of {model}."
    )
  width = sites.width(own, about)
  if one.config.d_in != width:
    raise ValueError(
      f"{path} reads {one.config.d_in} dims; {site} has {width}. Is it a "
      "dictionary of this model?"
    )
  return one
