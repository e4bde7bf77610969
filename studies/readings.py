"""What a model answers, and what it makes of texts, one model at a time.

All of it goes to files, so that models need not be in memory together and an
interrupted study goes on where it was.
"""

import functools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from scipy import sparse

from gemma_jax import models, progress
from gemma_jax.metrics import similarity
from studies import arrays, subjects
from studies.prompts import Prompt
from studies.subjects import Subject
from trainers import fields

ROUND = 32  # lengths of batches are multiples: fewer programs to compile
LOGIT_ROWS = 256  # tokens whose logits exist at once


def answers(
  subject: Subject,
  model: models.Model,
  prompts: Sequence[Prompt],
  config: Mapping[str, Any],
) -> list[str]:
  """Greedy answers.

  Args:
    subject: whose model it is.
    model: loaded.
    prompts: N of them.
    config: of the study.
  """
  given = [
    subjects.prompt_tokens(subject, prompt, config["prompts"]["template"])
    for prompt in prompts
  ]
  new = config["answers"]["max_new_tokens"]
  ends = {*subject.config.eos_ids, subject.config.pad_id}
  out = [""] * len(given)
  with progress.bar(
    len(given) * new, f"{subject.name} answers", unit="tokens"
  ) as bar:
    size = config["answers"]["batch_size"]
    for some, tokens, mask in _batches(given, subject, size):
      made = model.generate(tokens, mask=mask, max_new_tokens=new)
      for i, row in zip(some, made[:, tokens.shape[1] :], strict=False):
        stop = next((j for j, t in enumerate(row) if int(t) in ends), new)
        out[i] = subject.tokenizer.decode(row[:stop], skip_special_tokens=True)
      bar.update(len(some) * new)
  return out


def read(
  subject: Subject,
  model: models.Model,
  prompts: Sequence[Prompt],
  texts: Sequence[str],
  config: Mapping[str, Any],
  *,
  what: str,
  capture: bool = False,
) -> dict[str, Any]:
  """A model reads a text after each prompt.

  Args:
    subject: whose model it is.
    model: loaded.
    prompts: N of them.
    texts: N of them, not empty.
    config: of the study.
    what: for the progress bar.
    capture: also the representations below.

  Returns:
    "bits": [N], bits per byte of each text given its prompt. With `capture`
    also "last" [P, D], the residual stream that predicts each of the texts' P
    tokens; "count" [N], the tokens of each; "pooled" [L, N, D], means of every
    layer's `resid_post` over the texts' tokens; "codes", for each dictionary
    its latents on these tokens, sparse [P, M].

  Raises:
    FloatingPointError: the model gave NaN or infinity; names the prompt.
  """
  cfg = subject.config
  given, targets = [], []
  for prompt, text in zip(prompts, texts, strict=True):
    own = subjects.text_tokens(subject, text)
    before = subjects.prompt_tokens(
      subject, prompt, config["prompts"]["template"]
    )
    given.append([*before, *own])
    targets.append(np.asarray(own, np.int32))
  last = f"blocks.{cfg.num_layers - 1}.resid_post"
  found = subject.load_dictionaries() if capture else []
  whole = tuple(dict.fromkeys([last, *(one.config.read for one in found)]))
  rows = [None] * len(given)
  pooled, inputs = [None] * len(given), [[None] * len(given) for _ in found]
  with progress.bar(
    sum(map(len, given)), f"{subject.name} reads {what}", unit="tokens"
  ) as bar:
    size = config["reading"]["batch_size"]
    for some, tokens, mask in _batches(given, subject, size):
      counts = [len(targets[i]) for i in some]
      counts += [1] * (len(tokens) - len(some))
      # Which positions hold the text: the last `count` that are not padding.
      from_end = np.cumsum(mask[:, ::-1], axis=1)[:, ::-1]
      text = mask & (from_end <= np.array(counts)[:, None])
      wanted = dict.fromkeys(whole)
      if capture:
        wanted["blocks.*.resid_post"] = Partial(_mean, jnp.asarray(text))
      _, sites = model.forward(
        tokens, mask=mask, capture=wanted, stop_at=cfg.num_layers
      )
      arrays = {n: np.asarray(x.astype(jnp.float32)) for n, x in sites.items()}
      for j, i in enumerate(some):
        at = np.flatnonzero(text[j])
        rows[i] = arrays[last][j, at - 1]
        if not np.isfinite(rows[i]).all():
          raise FloatingPointError(
            f"{subject.name} gave NaN or infinity on prompt {prompts[i].id}. "
            "Try dtype=float32, or look at its weights."
          )
        for dictionary, into in zip(found, inputs, strict=True):
          into[i] = arrays[dictionary.config.read][j, at]
        if capture:
          pooled[i] = arrays["blocks.*.resid_post"][:, j]
      bar.update(sum(len(given[i]) for i in some))
  rows = np.concatenate(rows)
  log_probs = target_log_probs(
    cfg, subjects.head(model), rows, np.concatenate(targets)
  )
  ends = np.cumsum([len(own) for own in targets])
  out = {
    "bits": np.array(
      [
        similarity.bits_per_byte(own, text)
        for own, text in zip(np.split(log_probs, ends[:-1]), texts, strict=True)
      ]
    )
  }
  if capture:
    out |= {
      "last": rows,
      "count": np.array([len(own) for own in targets]),
      "pooled": np.stack(pooled, axis=1),
      "codes": [
        _codes(one, np.concatenate(x))
        for one, x in zip(found, inputs, strict=True)
      ],
    }
  return out


def target_log_probs(cfg, head, rows, targets) -> np.ndarray:
  """Log-probabilities of tokens, nats, [P] in float64.

  Args:
    cfg: of the model.
    head: of `subjects.head`.
    rows: residual streams [P, D] that predict them.
    targets: their ids [P].
  """
  spare = -len(rows) % LOGIT_ROWS
  rows = np.pad(rows, ((0, spare), (0, 0)))
  padded = np.pad(targets, (0, spare))
  parts = [
    np.asarray(
      _log_probs(
        cfg,
        head,
        rows[start : start + LOGIT_ROWS],
        padded[start : start + LOGIT_ROWS],
      )
    )
    for start in range(0, len(rows), LOGIT_ROWS)
  ]
  return np.concatenate(parts)[: len(targets)].astype(np.float64)


@functools.partial(jax.jit, static_argnums=0)
def _log_probs(cfg, head, rows, targets):
  logits = models.unembed(cfg, head, rows.astype(head["embed"].dtype))
  chosen = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
  return jnp.minimum(chosen - jax.nn.logsumexp(logits, axis=1), 0)


def _mean(text, x):
  weight = text[..., None].astype(jnp.float32)
  return jnp.sum(x * weight, axis=1) / jnp.sum(weight, axis=1)


def _codes(dictionary, x: np.ndarray) -> sparse.csr_array:
  """Latents [P, M] of rows [P, D]."""
  parts = [
    sparse.csr_array(np.asarray(dictionary.encode(x[start : start + 1_024])))
    for start in range(0, len(x), 1_024)
  ]
  return sparse.csr_array(sparse.vstack(parts))


def _batches(given, subject: Subject, size: int):
  """(numbers, tokens [B, T], mask [B, T]) of sequences of like length.

  The last batch is filled up with its first sequence.
  """
  order = np.argsort([len(ids) for ids in given], kind="stable")
  for start in range(0, len(order), size):
    some = order[start : start + size].tolist()
    length = -(-max(len(given[i]) for i in some) // ROUND) * ROUND
    length = min(length, subject.config.max_context)
    filled = some + [some[0]] * (size - len(some))
    tokens = np.full((size, length), subject.config.pad_id, np.int32)
    mask = np.zeros((size, length), bool)
    for row, i in enumerate(filled):
      tokens[row, : len(given[i])] = given[i]
      mask[row, : len(given[i])] = True
    yield some, tokens, mask


def save(path: pathlib.Path, found: Mapping[str, Any]) -> None:
  """Writes what `read` gave as an .npz, whole or not at all."""
  flat = {k: v for k, v in found.items() if k != "codes"}
  for i, code in enumerate(found.get("codes", ())):
    flat |= {
      f"codes.{i}.{part}": getattr(code, part)
      for part in ("data", "indices", "indptr", "shape")
    }
  arrays.save(path, flat)


def load(path: pathlib.Path) -> dict[str, Any]:
  """What `save` wrote.

  Raises:
    ValueError: a damaged file; says to delete it.
  """
  found = arrays.load(path)
  codes = []
  while (name := f"codes.{len(codes)}") + ".data" in found:
    parts = [found.pop(f"{name}.{p}") for p in ("data", "indices", "indptr")]
    codes.append(
      sparse.csr_array(tuple(parts), shape=tuple(found.pop(f"{name}.shape")))
    )
  return {**found, "codes": codes}


def cached_answers(path: pathlib.Path, make) -> list[str]:
  """Answers in a JSON file, made once."""
  if not path.exists():
    path.parent.mkdir(parents=True, exist_ok=True)
    fields.write_json(path, make())
  return json.loads(path.read_text())
