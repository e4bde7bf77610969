"""Reading Hugging Face's config.json, in its old and its new spellings.

A key that is null is as good as absent.
"""

import reprlib
from collections.abc import Mapping
from typing import Any

from gemma_jax.models.config import ModelConfig


def need(hf: Mapping[str, Any], *keys: str, default: Any = None) -> Any:
  """The first of `keys` that is set, or else the default.

  Raises:
    ValueError: none of them is, and there is no default; says which are.
  """
  for value in (*map(hf.get, keys), default):
    if value is not None:
      return value
  raise ValueError(
    f"config.json lacks {keys[0]!r}, which has no default. Where it belongs "
    f"there are: {', '.join(sorted(hf))}. Add it."
  )


def size(hf: Mapping[str, Any], *keys: str, default: int | None = None) -> int:
  """As `need`, of a positive integer.

  Raises:
    ValueError: see `need`; or it is something else.
  """
  value = need(hf, *keys, default=default)
  # The file is data: a wrong number must not become a loop or an array.
  most = 1000 if "layer" in keys[0] else 2**31
  if type(value) is not int or not 0 < value <= most:
    raise ValueError(
      f"config.json: {keys[0]}={value!r} must be an integer of 1 to {most}."
    )
  return value


def number(hf: Mapping[str, Any], key: str, default: float | None = None):
  """As `need`, of a positive number.

  Raises:
    ValueError: see `need`; or it is something else.
  """
  value = need(hf, key, default=default)
  if type(value) not in (int, float) or not 0 < value < float("inf"):
    raise ValueError(f"config.json: {key}={value!r} must be a positive number.")
  return float(value)


def flag(hf: Mapping[str, Any], key: str, default: bool) -> bool:
  """A boolean.

  Raises:
    ValueError: it is something else, such as the string "false".
  """
  value = need(hf, key, default=default)
  if type(value) is not bool:
    raise ValueError(f"config.json: {key}={value!r} must be true or false.")
  return value


def section(hf: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
  """The first of `keys` that holds anything, an object; {} if none does.

  Raises:
    ValueError: it is something else.
  """
  for key in keys:
    value = need(hf, key, default={})
    if not isinstance(value, Mapping):
      raise ValueError(f"config.json: {key}={value!r} must be an object.")
    if value:
      return value
  return {}


def per_head(width: int, heads: int) -> int:
  """The width of a head.

  Raises:
    ValueError: the heads do not divide the width.
  """
  if width % heads:
    raise ValueError(
      f"config.json: the hidden size {width} must be a multiple of the "
      f"{heads} attention heads."
    )
  return width // heads


def ids(
  hf: Mapping[str, Any], bos: int, eos: int, pad: int | None = None
) -> dict[str, Any]:
  """`bos_id`, `eos_ids` and `pad_id` of a `ModelConfig`.

  Args:
    hf: the config.
    bos: where it has no `bos_token_id`.
    eos: where it has no `eos_token_id`, which may be a list.
    pad: where it has no `pad_token_id`; None for the first of `eos_ids`.

  Raises:
    ValueError: not an integer.
  """

  def read(key, default, several=False):
    value = need(hf, key, default=default)
    listed = several and isinstance(value, list)
    found = tuple(value or [default]) if listed else (value,)
    if not all(type(i) is int for i in found):
      raise ValueError(
        f"config.json: {key}={hf.get(key)!r} must be a token id, an integer."
      )
    # Old files write -1 for none.
    return tuple(i for i in found if i >= 0) or (default,)

  ends = read("eos_token_id", eos, several=True)
  return {
    "bos_id": read("bos_token_id", bos)[0],
    "eos_ids": ends,
    "pad_id": read("pad_token_id", ends[0] if pad is None else pad)[0],
  }


def to_ids(cfg: ModelConfig) -> dict[str, int | list[int]]:
  """The entries that `ids` reads."""
  ends = list(cfg.eos_ids)
  return {
    "bos_token_id": cfg.bos_id,
    "eos_token_id": ends if len(ends) > 1 else cfg.eos_id,
    "pad_token_id": cfg.pad_id,
  }


def refuse(hf: Mapping[str, Any], **expected: Any) -> None:
  """Raises where a feature that is not implemented is switched on.

  Args:
    hf: the config.
    **expected: key -> the only value that is supported, or a tuple of them;
      an absent or null key is fine.

  Raises:
    ValueError: names the key, the value, and what is supported.
  """
  for key, only in expected.items():
    allowed = only if isinstance(only, tuple) else (only,)
    value = hf.get(key)
    if value is not None and value not in allowed:
      raise ValueError(
        f"{key}={reprlib.repr(value)} is not supported; expected "
        f"{' or '.join(map(repr, allowed)) or 'none'}."
      )


def rope(parameters: Mapping[str, Any], theta: float) -> tuple[float, float]:
  """(base, factor by which positions are divided) of RoPE.

  Args:
    parameters: of `rope_scaling` or `rope_parameters`.
    theta: the base where they do not give one.

  Raises:
    ValueError: a RoPE type other than default and linear, linear without a
      factor, or RoPE of a part of each head.
  """
  refuse(parameters, partial_rotary_factor=1)
  kind = parameters.get("rope_type", parameters.get("type", "default"))
  if kind not in ("default", "linear"):
    raise ValueError(
      f"RoPE type {kind!r} is not supported; expected 'default' or 'linear'."
    )
  factor = number(parameters, "factor") if kind == "linear" else 1.0
  return number(parameters, "rope_theta", theta), factor


def linear(factor: float) -> dict[str, Any] | None:
  """`rope_scaling` for a factor; None for 1."""
  return None if factor == 1 else {"rope_type": "linear", "factor": factor}
