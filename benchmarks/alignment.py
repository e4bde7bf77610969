"""A ridge map whose penalty is chosen, against scikit-learn's RidgeCV.

  python benchmarks/alignment.py [--rows=50000] [--widths=640,576] [--json]

Rows of two models that share some directions. Ours sums moments in one pass
and picks one of 37 penalties by generalised cross-validation; the peer picks
one of the same by leaving rows out, from the decomposition of all rows. Both
predict other rows; at one penalty both must give the same weights.
"""

import json
import time

import numpy as np
from absl import app, flags
from sklearn.linear_model import Ridge, RidgeCV

from gemma_jax import alignment
from gemma_jax.alignment.maps import ALPHAS

ROWS = flags.DEFINE_integer("rows", 50_000, "n.")
WIDTHS = flags.DEFINE_list("widths", ["640", "576"], "D and E.")
ROUNDS = flags.DEFINE_integer("rounds", 3, "Of both, by turns.")
JSON = flags.DEFINE_bool("json", False, "Print one JSON object.")

HELD_OUT, BATCH, TOGETHER = 5_000, 8_192, 1e4


def rows(count: int, rng, into):
  """x [n, D] and y [n, E]: shared directions of falling variance, and noise."""
  shared = rng.normal(size=(count, len(into[0]))) / np.arange(1, 201) ** 0.5
  return [
    (shared @ to + 0.3 * rng.normal(size=(count, to.shape[1]))).astype(
      np.float32
    )
    for to in into
  ]


def main(argv) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"Unknown arguments {argv[1:]}.")
  rng = np.random.default_rng(0)
  into = [rng.normal(size=(200, int(width))) for width in WIDTHS.value]
  x, y = rows(ROWS.value, rng, into)
  other_x, other_y = rows(HELD_OUT, rng, into)

  def ours():
    moments = alignment.Moments(full=False)
    for start in range(0, len(x), BATCH):
      moments.update(x[start : start + BATCH], y[start : start + BATCH])
    return alignment.fit_ridge(moments)

  alphas = ALPHAS * float(x.var(0).mean() * len(x))

  def peer():
    return RidgeCV(alphas=alphas).fit(x, y)

  seconds = {"ours": [], "scikit-learn": []}
  found = {}
  ours()  # compiles
  for _ in range(ROUNDS.value):
    for name, fit in (("ours", ours), ("scikit-learn", peer)):
      began = time.perf_counter()
      found[name] = fit()
      seconds[name].append(time.perf_counter() - began)
  fixed = np.asarray(alignment.fit_ridge(x, y, alpha=TOGETHER).weights)
  exact = Ridge(TOGETHER, solver="cholesky").fit(x.astype(np.float64), y)
  apart = float(np.abs(fixed - exact.coef_.T).max() / np.abs(fixed).max())
  predicted = {
    "ours": np.asarray(found["ours"](other_x)),
    "scikit-learn": found["scikit-learn"].predict(other_x),
  }
  total = np.square(other_y - other_y.mean(0)).sum()
  r2 = {
    name: float(1 - np.square(other_y - made).sum() / total)
    for name, made in predicted.items()
  }
  best = {name: min(values) for name, values in seconds.items()}
  result = {
    "name": "ridge map, penalty chosen",
    "ours": best["ours"],
    "peers": {"scikit-learn": best["scikit-learn"]},
    "unit": "s",
    "ratio": best["scikit-learn"] / best["ours"],
    "equal": apart < 1e-3 and abs(r2["ours"] - r2["scikit-learn"]) < 1e-3,
    "weights_apart": apart,
    "r2_held_out": r2,
    "rows": len(x),
  }
  if JSON.value:
    print(json.dumps(result))
    return
  for name, value in best.items():
    print(f"{name:>14} {value:8.2f} s   held-out R^2 {r2[name]:.5f}")
  print(
    f"ratio {result['ratio']:.1f}, weights at one penalty {apart:.1e} apart"
  )


if __name__ == "__main__":
  app.run(main)
