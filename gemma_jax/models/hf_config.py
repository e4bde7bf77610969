"""Reading Hugging Face's config.json, in its old and its new spellings."""

from collections.abc import Mapping
from typing import Any


def need(hf: Mapping[str, Any], *keys: str) -> Any:
  """The first of `keys` that is set.

  Raises:
    ValueError: none of them is; says which keys there are.
  """
  for key in keys:
    if hf.get(key) is not None:
      return hf[key]
  raise ValueError(
    f"config.json lacks {keys[0]!r}, which a {hf.get('model_type')} model "
    f"needs. It has: {', '.join(sorted(hf))}."
  )


def size(hf: Mapping[str, Any], *keys: str) -> int:
  """As `need`, of a positive integer.

  Raises:
    ValueError: see `need`; or it is something else.
  """
  value = need(hf, *keys)
  # The file is data: a wrong number must not become a loop or an array.
  most = 1000 if "layer" in keys[0] else 2**31
  if type(value) is not int or not 0 < value <= most:
    raise ValueError(
      f"config.json: {keys[0]}={value!r} must be an integer of 1 to {most}."
    )
  return value


def first(value, default: int) -> int:
  """A token id that may be a list of them, or absent."""
  if isinstance(value, list):
    value = value[0] if value else None
  if value is None:
    return default
  if type(value) is not int:
    raise ValueError(f"config.json: {value!r} is no token id, an integer.")
  return value


def ids(hf: Mapping[str, Any], bos: int, eos: int, pad: int) -> dict[str, int]:
  """`bos_id`, `eos_id` and `pad_id`, with defaults for those not given."""
  return {
    "bos_id": first(hf.get("bos_token_id"), bos),
    "eos_id": first(hf.get("eos_token_id"), eos),
    "pad_id": first(hf.get("pad_token_id"), pad),
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
        f"{key}={value!r} is not supported; expected "
        f"{' or '.join(map(repr, allowed))}."
      )


def rope(
  parameters: Mapping[str, Any] | None, theta: float
) -> tuple[float, float]:
  """(base, factor by which positions are divided) of RoPE.

  Args:
    parameters: of `rope_scaling` or `rope_parameters`.
    theta: the base where they do not give one.

  Raises:
    ValueError: a RoPE type other than default and linear.
  """
  parameters = parameters or {}
  kind = parameters.get("rope_type", parameters.get("type", "default"))
  if kind not in ("default", "linear"):
    raise ValueError(
      f"RoPE type {kind!r} is not supported; expected 'default' or 'linear'."
    )
  factor = parameters.get("factor", 1.0) if kind == "linear" else 1.0
  try:
    return float(parameters.get("rope_theta", theta)), float(factor)
  except (TypeError, ValueError) as e:
    raise ValueError(
      f"config.json: rope_theta and factor must be numbers; got {parameters}."
    ) from e


def linear(factor: float) -> dict[str, Any] | None:
  """`rope_scaling` for a factor; None for 1."""
  return None if factor == 1 else {"rope_type": "linear", "factor": factor}
