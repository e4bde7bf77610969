"""The models of a study: as they are, changed by a known amount, redrawn."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gemma_jax import dictionaries, models
from gemma_jax.metrics.similarity import guard
from gemma_jax.models import perturb, sites
from studies.prompts import Prompt

FLOOR = "_floor"  # behind the name of a model: with redrawn weights

FIELDS = {
  "path": str,  # as for `gemma_jax.load_model`
  # Models of one origin were trained on from the same weights; None: path.
  "origin": (str, type(None)),
  "noise": float,  # added, in standard deviations of each matrix
  "bits": (int, type(None)),  # to which weights are rounded; None: not at all
  "redraw": (int, type(None)),  # seed of weights drawn anew; None: not drawn
  "chat": bool,  # prompts go through the tokenizer's chat template
  # Paths, or @ and a name of the study's `dictionaries`; by depth.
  "dictionaries": (list, tuple),
}


@dataclasses.dataclass(frozen=True)
class Subject:
  """One model of a study, not loaded.

  Attributes:
    name: in the study.
    spec: with the fields of `FIELDS`.
    directory: of the checkpoint.
    config: its shape.
    tokenizer: of transformers.
    vocabulary: fingerprint of its token ids.
    dictionaries: paths, by depth.
  """

  name: str
  spec: Mapping[str, Any]
  directory: pathlib.Path
  config: models.ModelConfig
  tokenizer: Any
  vocabulary: str
  dictionaries: tuple[str, ...]

  @property
  def guarded(self) -> guard.Subject:
    """What decides which measures are defined."""
    return guard.Subject(
      self.name,
      self.config.width,
      self.vocabulary,
      self.spec["origin"] or self.spec["path"],
      self.dictionaries,
    )

  def load(self, config: Mapping[str, Any]) -> models.Model:
    """The model on the mesh of the study's config, with its changes."""
    return self._changed(
      models.load_model(
        self.directory,
        dtype=config["dtype"],
        mesh=models.make_mesh(config["mesh"]),
      )
    )

  def load_head(self, config: Mapping[str, Any]) -> dict:
    """Its parameters without the blocks, for `models.unembed`."""
    model = models.load_model(
      self.directory,
      dtype=config["dtype"],
      mesh=models.make_mesh(config["mesh"]),
      layers=1 if self.config.tied else None,
    )
    return head(self._changed(model))

  def load_dictionaries(self) -> list[dictionaries.Dictionary]:
    """In order of depth.

    Raises:
      ValueError: one of another width, or of a site that the model lacks.
    """
    found = [dictionaries.load(path) for path in self.dictionaries]
    for path, one in zip(self.dictionaries, found, strict=True):
      if not isinstance(one.config.read, str):
        raise ValueError(
          f"{path} reads {one.config.read}; expected a dictionary of one site "
          f"of {self.name}."
        )
      sites.parse(one.config.read, self.config)
      if one.config.d_in != self.config.width:
        raise ValueError(
          f"{path} reads {one.config.d_in} dims, {self.name} has "
          f"{self.config.width}. Is it a dictionary of this model?"
        )
    return found

  def _changed(self, model: models.Model) -> models.Model:
    spec = self.spec
    if spec["redraw"] is not None:
      model = perturb.redraw(model, seed=spec["redraw"])
    if spec["noise"]:
      model = perturb.add_noise(model, spec["noise"])
    if spec["bits"] is not None:
      model = perturb.requantise(model, spec["bits"])
    return model


def head(model: models.Model) -> dict:
  """The parameters that `models.unembed` takes."""
  return {name: x for name, x in model.params.items() if name != "blocks"}


def prepare(
  name: str, spec: Mapping[str, Any], trained: Mapping[str, str]
) -> Subject:
  """A model's shape and tokenizer, without its weights.

  Args:
    name: in the study.
    spec: with the fields of `FIELDS`.
    trained: paths of the study's own dictionaries by name.

  Raises:
    FileNotFoundError: no such model, or one without a tokenizer.
    ValueError: a chat template is asked of a tokenizer that has none.
  """
  directory = models.resolve(spec["path"])
  tokenizer = models.load_tokenizer(directory)
  if tokenizer is None:
    raise FileNotFoundError(
      f"{name}: {directory} has no tokenizer.json; prompts cannot be "
      "tokenised. Put the model's tokenizer beside its weights."
    )
  if spec["chat"] and not tokenizer.chat_template:
    raise ValueError(
      f"{name}: the tokenizer of {directory} has no chat template. Set "
      f"models.{name}.chat=False, or add the template to its "
      "tokenizer_config.json."
    )
  vocabulary = json.dumps(sorted(tokenizer.get_vocab().items())).encode()
  return Subject(
    name,
    spec,
    directory,
    models.read_config(directory),
    tokenizer,
    hashlib.sha256(vocabulary).hexdigest()[:16],
    tuple(
      trained[path[1:]] if path.startswith("@") else path
      for path in spec["dictionaries"]
    ),
  )


def prompt_tokens(subject: Subject, prompt: Prompt, template: str) -> list[int]:
  """What the model is given before it answers; begins with BOS."""
  tokenizer = subject.tokenizer
  if subject.spec["chat"]:
    text = tokenizer.apply_chat_template(
      [{"role": "user", "content": prompt.prompt}],
      add_generation_prompt=True,
      tokenize=False,
    )
    return text_tokens(subject, text)
  text = template.replace("{prompt}", prompt.prompt)
  return [subject.config.bos_id, *text_tokens(subject, text)]


def text_tokens(subject: Subject, text: str) -> list[int]:
  """Tokens of a text by itself, with nothing added."""
  return subject.tokenizer.encode(text, add_special_tokens=False)


def check_lengths(
  subject: Subject,
  prompts: Sequence[Prompt],
  template: str,
  max_new_tokens: int,
) -> None:
  """Raises a ValueError for prompts that do not fit the context."""
  most = subject.config.max_context
  lengths = np.array(
    [
      len(prompt_tokens(subject, prompt, template))
      + max(max_new_tokens, len(text_tokens(subject, prompt.response)))
      for prompt in prompts
    ]
  )
  if (lengths > most).any():
    long = np.flatnonzero(lengths > most)
    raise ValueError(
      f"{len(long)} prompts do not fit {subject.name}'s context of {most} "
      f"tokens with their response or {max_new_tokens} new tokens: "
      + ", ".join(f"{prompts[i].id} ({lengths[i]})" for i in long[:10])
      + ". Shorten them, or leave them out."
    )
