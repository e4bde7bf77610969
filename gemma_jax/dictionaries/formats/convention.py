"""What a format takes for granted, and what loading one returns."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from gemma_jax.dictionaries.config import DictionaryConfig
from gemma_jax.dictionaries.formats import hooks


@dataclasses.dataclass(frozen=True)
class Convention:
  """What a file does not say, or says in its own way.

  Loaded dictionaries are folded to ours (nothing is subtracted from the input,
  which is not scaled; y += x @ W_skip), and keep this in their provenance.

  Attributes:
    format: its name.
    source: where this is known from.
    read: our site of the input; "" where the files do not tell it.
    write: our site of the output.
    gain: whether the input has its norm's learned gain in it; None where the
      site is behind no norm.
    subtracts_b_dec: whether the file's encoder reads its input less b_dec.
    input_scale: what the file's encoder multiplies its input by.
    skip: how the file's skip matrix A is applied: "x @ A", "x @ A.T" or "".
    note: what else is different.
  """

  format: str
  source: str
  read: str = ""
  write: str = ""
  gain: bool | None = None
  subtracts_b_dec: bool = False
  input_scale: float = 1.0
  skip: str = ""
  note: str = ""

  def at(self, read: str, write: str, **changes: Any) -> "Convention":
    """The same at sites, with their gain, and with changes."""
    gain = hooks.GAIN.get(read.rsplit(".", 1)[-1])
    return dataclasses.replace(
      self, read=read, write=write, gain=gain, **changes
    )


class Loaded(NamedTuple):
  """What a format's `read` returns.

  Attributes:
    config: the dictionary.
    params: `config.shapes()`, float32, folded.
    provenance: see `Dictionary.provenance`.
  """

  config: DictionaryConfig
  params: dict[str, np.ndarray]
  provenance: dict[str, Any]


def finish(
  file: pathlib.Path,
  convention: Convention,
  params: Mapping[str, np.ndarray],
  *,
  dtype: Any,
  label: Mapping[str, Any] | None = None,
  metadata: Mapping[str, Any] | None = None,
  prefix_widths: tuple[int, ...] = (),
  **fields: Any,
) -> Loaded:
  """The dictionary that parameters under our names make up.

  Args:
    file: of the weights.
    convention: of the format, at its sites.
    params: folded.
    dtype: of the file's weights.
    label: what the file's path says.
    metadata: what its config says, JSON.
    prefix_widths: () for none.
    **fields: others of `DictionaryConfig`, such as activation and k.

  Raises:
    ValueError: they do not fit together.
  """
  d_in, width = params["W_enc"].shape
  try:
    cfg = DictionaryConfig(
      d_in=d_in,
      d_out=params["W_dec"].shape[1],
      width=width,
      prefix_widths=prefix_widths or (width,),
      skip="W_skip" in params,
      read=convention.read,
      write=convention.write,
      **fields,
    )
  except (TypeError, ValueError) as e:
    raise ValueError(f"{file}: {e}") from e
  shapes = {name: x.shape for name, x in params.items()}
  assert shapes == cfg.shapes(), (shapes, cfg)
  provenance = {
    "format": convention.format,
    "path": str(file),
    "dtype": str(np.dtype(dtype)),
    "convention": dataclasses.asdict(convention),
  }
  for name, value in (("label", label), ("metadata", metadata)):
    if value:
      provenance[name] = dict(value)
  return Loaded(cfg, dict(params), provenance)
