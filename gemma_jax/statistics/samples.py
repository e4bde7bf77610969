"""What a test may be given: finite samples, labels, probabilities."""

import numpy as np

DESIGNS = ("paired", "independent")


def sample(x, name: str, *, least: int = 2) -> np.ndarray:
  """A sample as float64 [n].

  Raises:
    ValueError: not [n], fewer than `least` values, or one not finite.
  """
  x = np.asarray(x, np.float64)
  if x.ndim != 1 or len(x) < least:
    raise ValueError(
      f"expected {name} as [n] with at least {least} values, got {x.shape}"
    )
  bad = np.flatnonzero(~np.isfinite(x))
  if len(bad):
    raise ValueError(
      f"expected finite {name}, got {x[bad[0]]} at {bad[0]} ({len(bad)} such "
      "values); leave these prompts out of both samples"
    )
  return x


def pairs(x, y) -> tuple[np.ndarray, np.ndarray]:
  """Two samples of the same prompts, float64 [n] each.

  Raises:
    ValueError: as `sample`, or different lengths.
  """
  x, y = sample(x, "x"), sample(y, "y")
  if len(x) != len(y):
    raise ValueError(
      f"expected x and y of the same prompts, got {len(x)} and {len(y)}; "
      "samples of different prompts are independent, not paired"
    )
  return x, y


def differences(x, y=None) -> np.ndarray:
  """x - y of the same prompts, or x if there is no y: float64 [n]."""
  if y is None:
    return sample(x, "differences")
  x, y = pairs(x, y)
  return x - y


def varying(*parts: np.ndarray) -> None:
  """Raises a ValueError if no sample varies but for rounding."""
  if all(np.ptp(part) <= 1e-12 * np.abs(part).max() for part in parts):
    raise ValueError(
      "expected values that vary, got the same for all prompts: there is no "
      "t-test and no standardised size of such a difference, report it as it is"
    )


def codes(labels, n: int, name: str) -> np.ndarray:
  """Labels of n rows as whole numbers from 0, or 0 to n - 1 without labels.

  Raises:
    ValueError: not one label a row.
  """
  if labels is None:
    return np.arange(n)
  labels = np.asarray(labels)
  if labels.shape != (n,):
    raise ValueError(
      f"expected {name} as one label for each of {n} rows, got {labels.shape}"
    )
  return np.unique(labels, return_inverse=True)[1]


def choice(value: str, choices: tuple[str, ...], name: str) -> None:
  if value not in choices:
    raise ValueError(f"expected {name} to be one of {choices}, got {value!r}")


def probability(value: float, name: str) -> None:
  if not 0 < value < 1:
    raise ValueError(f"expected {name} between 0 and 1, got {value}")


def count(value: int, name: str) -> None:
  if int(value) != value or value < 1:
    raise ValueError(f"expected {name} to be a whole number > 0, got {value}")
