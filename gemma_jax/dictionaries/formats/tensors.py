"""What somebody else's files hold: checked first, read afterwards.

Files are data. Nothing is unpickled, and every size that a file claims is
compared with its neighbours before memory is taken for it.
"""

import json
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

import ml_dtypes
import numpy as np

MAX_TEXT = 16 * 2**20  # bytes of a config
BLOCK = 4096  # latents that are held in float64 at a time
AGAIN = "Download or copy it again, or pass the format that it really has."


def weights(path: pathlib.Path, name: str) -> pathlib.Path:
  """The file of the weights: `path` itself, or `name` in that directory.

  Raises:
    FileNotFoundError: there is none.
  """
  file = path / name if path.is_dir() else path
  if not file.is_file():
    raise FileNotFoundError(f"{path} holds no {name}. Download it there.")
  return file


def read_json(file: pathlib.Path) -> dict[str, Any]:
  """The JSON object in a file.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it is too large, no JSON, or no object.
  """
  try:
    fields = json.loads(read_text(file))
  except (ValueError, RecursionError) as e:
    raise ValueError(f"{file} is no JSON ({e}). {AGAIN}") from e
  if not isinstance(fields, dict):
    raise ValueError(
      f"{file} holds a {type(fields).__name__}, expected an object. {AGAIN}"
    )
  return fields


def read_text(file: pathlib.Path) -> str:
  """The text of a config, of at most `MAX_TEXT` bytes; see `read_json`."""
  if not file.is_file():
    raise FileNotFoundError(
      f"{file.parent} has no {file.name}, which says what the weights are. "
      "Put it there too."
    )
  if file.stat().st_size > MAX_TEXT:
    raise ValueError(
      f"{file} has {file.stat().st_size} bytes; a config has at most "
      f"{MAX_TEXT}. {AGAIN}"
    )
  return file.read_text()


def field(
  file: pathlib.Path,
  fields: Mapping[str, Any],
  name: str,
  kinds: type | tuple[type, ...],
  default: Any = ...,
) -> Any:
  """`fields[name]`, which must be of one of the types, or the default.

  Raises:
    ValueError: it is missing and there is no default, or of another type.
  """
  value = fields.get(name)
  if value is None and default is not ...:
    return default
  kinds = kinds if isinstance(kinds, tuple) else (kinds,)
  if type(value) not in kinds:  # a bool is no int
    what = " or ".join(kind.__name__ for kind in kinds)
    got = repr(value) if name in fields else "nothing"
    raise ValueError(f"{file}: {name} must be {what}; got {got}. {AGAIN}")
  return value


def sizes(
  file: pathlib.Path,
  tensors: Mapping[str, Any],
  layout: Mapping[str, str],
  *,
  optional: Collection[str] = (),
  known: Mapping[str, tuple[int, str]] | None = None,
) -> dict[str, int]:
  """What the letters of a layout stand for, from the tensors' shapes alone.

  Args:
    file: named in errors.
    tensors: anything with a shape, by name.
    layout: for every name a letter for each axis, such as "DM".
    optional: names that may be absent.
    known: letters whose size is known, and from where.

  Returns:
    {letter: size}.

  Raises:
    ValueError: names that are missing or too many; shapes that contradict
      each other or what is known.
  """
  missing = [n for n in layout if n not in tensors and n not in optional]
  extra = [n for n in tensors if n not in layout]
  if missing or extra:
    raise ValueError(
      f"{file} holds {', '.join(sorted(tensors)) or 'nothing'}; expected "
      f"{', '.join(layout)}."
      + f" Missing: {', '.join(missing)}." * bool(missing)
      + f" Unknown: {', '.join(extra)}." * bool(extra)
      + f" {AGAIN}"
    )
  found = dict(known or {})
  for name, letters in layout.items():
    if name not in tensors:
      continue
    shape = tuple(tensors[name].shape)
    if len(shape) != len(letters) or 0 in shape:
      raise ValueError(
        f"{file}: {name} has shape {list(shape)}; expected "
        f"[{', '.join(letters)}], no size 0. {AGAIN}"
      )
    for letter, size in zip(letters, shape, strict=True):
      expected, where = found.setdefault(letter, (size, name))
      if expected != size:
        raise ValueError(
          f"{file}: {name} has shape {list(shape)}, [{', '.join(letters)}], so "
          f"{letter} = {size}; but {letter} = {expected} in {where}. {AGAIN}"
        )
  return {letter: size for letter, (size, _) in found.items()}


def array(
  file: pathlib.Path, tensors: Mapping[str, Any], name: str
) -> np.ndarray:
  """A copy of one tensor in float32.

  Raises:
    ValueError: it holds no floats; NaN, or infinities in anything but a
      threshold, or values that float32 cannot hold.
  """
  source = tensors[name]
  dtype = np.dtype(source.dtype)
  if dtype.kind != "f" and dtype != ml_dtypes.bfloat16:
    raise ValueError(
      f"{file}: {name} is {dtype}; expected floats. Load weights that are not "
      "quantised."
    )
  with np.errstate(over="ignore"):
    out = np.array(source, np.float32)
  good = ~np.isnan(out) if "threshold" in name else np.isfinite(out)
  if not good.all():
    raise ValueError(
      f"{file}: {name} holds {int((~good).sum())} values that are not finite, "
      f"of {out.size}; expected none. The training failed, or the file is "
      "damaged: load another checkpoint."
    )
  return out


def fold(
  w: Mapping[str, np.ndarray],
  *,
  subtracts_b_dec: bool = False,
  input_scale: float = 1.0,
) -> dict[str, np.ndarray]:
  """A dictionary on raw inputs from one that changes them first.

  The given one encodes input_scale * x - b_dec (or without b_dec) and divides
  what it writes by input_scale.

  Args:
    w: parameters under our names and in our orientation, float32.
    subtracts_b_dec: whether the encoder reads its input less b_dec.
    input_scale: factor on the input.

  Returns:
    The same names; nothing that is active or reconstructed changes.
  """
  w = dict(w)
  if subtracts_b_dec:
    shift = _product(w["b_dec"], w["W_enc"])
    w["b_enc"] = (w["b_enc"] - shift).astype(np.float32)
    if "b_mag" in w:  # Gated: the magnitude has no gate's bias in it
      shift *= np.exp(w["r_mag"].astype(np.float64))
      w["b_mag"] = (w["b_mag"] - shift).astype(np.float32)
  if input_scale != 1:
    scale = np.float32(input_scale)
    w["W_enc"] = w["W_enc"] * scale
    w["W_dec"] = w["W_dec"] / scale
    w["b_dec"] = w["b_dec"] / scale
  return w


def _product(vector, matrix):
  """vector [D] @ matrix [D, M] in float64, without all of M in float64."""
  parts = range(0, matrix.shape[1], BLOCK)
  vector = vector.astype(np.float64)
  return np.concatenate(
    [vector @ matrix[:, i : i + BLOCK].astype(np.float64) for i in parts]
  )
