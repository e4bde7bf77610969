"""Logistic probes for many tasks at once, and the scores of a probe."""

from typing import NamedTuple

import numpy as np
import scipy.special
import scipy.stats

PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4)


class Probe(NamedTuple):
  """S linear probes; a row belongs to the class where its logit is positive.

  Attributes:
    coefficients: float64 [S, D], for the features as they were given.
    intercept: float64 [S].
  """

  coefficients: np.ndarray
  intercept: np.ndarray

  def __call__(self, x: np.ndarray) -> np.ndarray:
    """Logits [S, R] of features, shared [R, D] or each task's own [S, R, D]."""
    return _forward(x, self.coefficients) + self.intercept[:, None]


def balanced(y: np.ndarray, valid: np.ndarray) -> np.ndarray:
  """Weights [S, R] that give both classes of each task one half; 0 elsewhere.

  Args:
    y: bool [S, R].
    valid: bool [S, R], rows that take part.
  """
  out = np.zeros(y.shape)
  for side in (valid & y, valid & ~y):
    out += side / np.maximum(2 * side.sum(1, keepdims=True), 1)
  return out


def fit(
  x: np.ndarray,
  y: np.ndarray,
  weight: np.ndarray,
  *,
  l2: float | np.ndarray = 1e-3,
  tolerance: float = 1e-5,
) -> Probe:
  """Logistic regression with an L2 penalty, S tasks at once, in float64.

  Minimises sum_r weight_r log(1 + exp(-s_r logit_r)) + l2 / 2 |b|^2, with
  weights that sum to 1, s = +1 or -1, and b the coefficients of standardised
  features (mean 0, variance 1 over the rows given); the intercept is free.
  Newton's method for all tasks together; its linear systems by conjugate
  gradients, so that there is no Hessian of each task.

  Args:
    x: features, [R, D] for all tasks or [S, R, D].
    y: bool [S, R].
    weight: [S, R], not negative, e.g. from `balanced`; normalised here.
    l2: penalty, a number or [S]; positive.
    tolerance: of the largest entry of the gradient.

  Raises:
    FloatingPointError: features that are not finite.
    ValueError: a penalty that is not positive, or a task without weight.
    RuntimeError: no convergence.
  """
  basis = _Basis(x)
  return basis.probe(_solve(basis, y, weight, l2, tolerance))


def fit_validated(
  x: np.ndarray,
  y: np.ndarray,
  weight: np.ndarray,
  inner: np.ndarray,
  *,
  penalties: tuple[float, ...] = PENALTIES,
) -> Probe:
  """`fit` with each task's penalty chosen on the `inner` rows, then on all.

  Args:
    x: as `fit` takes it.
    y: bool [S, R].
    weight: [S, R].
    inner: bool [R], rows of other groups than the rest.
    penalties: candidates, the strongest first; a task goes down them as long
      as its weighted loss falls. One with a single class outside `inner` is
      judged by rows that it was fitted on.

  Raises:
    As `fit`.
  """
  outer = weight * ~inner
  usable = ((outer * y).sum(1) > 0) & ((outer * ~y).sum(1) > 0)
  rest = np.where(usable[:, None], outer, weight)
  sign = np.where(y, 1, -1)
  basis = _Basis(x)
  theta = np.zeros((len(y), len(basis.variance)))
  least, best = np.full(len(y), np.inf), np.full(len(y), penalties[0])
  going = np.arange(len(y))  # tasks that the last step down has helped
  for l2 in penalties:
    theta[going] = _solve(basis, y[going], rest[going], l2, start=theta[going])
    logits = basis.probe(theta[going])(x)
    loss = np.logaddexp(0, -sign[going] * logits) * weight[going] * inner
    loss = loss.sum(1)
    better = loss < least[going]
    going = going[better]
    least[going], best[going] = loss[better], l2
    if not len(going):
      break
  return basis.probe(_solve(basis, y, weight, best, start=theta))


class _Basis:
  """Features standardised, shared ones along their principal axes too.

  There the Hessian is nearly diagonal. A column of ones comes last.
  """

  def __init__(self, x):
    x = np.asarray(x, np.float64)
    if not np.isfinite(x).all():
      raise FloatingPointError("Features of a probe that are not finite.")
    self.mean, scale = x.mean(-2), x.std(-2)
    self.scale = np.where(scale > 1e-12 * np.abs(self.mean), scale, 1.0)
    x = (x - self.mean[..., None, :]) / self.scale[..., None, :]
    variance, self.axes = np.ones(x.shape[-1]), None
    if x.ndim == 2:
      variance, self.axes = np.linalg.eigh(x.T @ x / len(x))
      x = x @ self.axes
    self.variance = np.append(np.maximum(variance, 0), 1.0)
    self.x = np.concatenate([x, np.ones((*x.shape[:-1], 1))], axis=-1)

  def probe(self, theta) -> Probe:
    """The probe of raw features whose coefficients here are [S, D + 1]."""
    coefficients, intercept = theta[:, :-1], theta[:, -1]
    if self.axes is not None:
      coefficients = coefficients @ self.axes.T
    coefficients = coefficients / self.scale
    offset = np.sum(coefficients * self.mean, axis=-1)
    return Probe(coefficients, intercept - offset)


def _solve(basis, y, weight, l2, tolerance=1e-5, start=None) -> np.ndarray:
  total = weight.sum(1, keepdims=True)
  penalty = np.broadcast_to(np.asarray(l2, np.float64), len(y))
  if (penalty <= 0).any() or (total <= 0).any():
    raise ValueError("expected l2 > 0, and rows with weight for every task")
  ridge = np.repeat(penalty[:, None], len(basis.variance), axis=1)
  ridge[:, -1] = 0
  if start is None:
    start = np.zeros_like(ridge)
  return _newton(basis, y, weight / total, ridge, start, tolerance)


def _forward(x, v):
  return v @ x.T if x.ndim == 2 else np.matmul(x, v[:, :, None])[..., 0]


def _backward(x, u):
  return u @ x if x.ndim == 2 else np.matmul(u[:, None], x)[:, 0]


def _newton(basis, y, weight, ridge, theta, tolerance, steps=100):
  x = basis.x
  sign = np.where(y, 1.0, -1.0)
  margin = _forward(x, theta)

  def loss(margin, theta):
    data = np.sum(weight * np.logaddexp(0, -sign * margin), axis=1)
    return data + np.sum(ridge * theta**2, axis=1) / 2

  value = loss(margin, theta)
  for _ in range(steps):
    p = scipy.special.expit(margin)
    gradient = _backward(x, weight * (p - y)) + ridge * theta
    size = np.abs(gradient).max(1)
    if size.max() < tolerance:
      return theta
    curvature = weight * p * (1 - p)
    step = _conjugate_gradients(
      lambda v, h=curvature: _backward(x, h * _forward(x, v)) + ridge * v,
      -gradient,
      curvature.sum(1, keepdims=True) * basis.variance + ridge,
    )
    moved = _forward(x, step)
    slope = np.sum(gradient * step, axis=1)
    length = np.where(size < tolerance, 0.0, 1.0)
    for _ in range(30):
      new = loss(margin + length[:, None] * moved, theta + _by(length, step))
      # Rounding may raise a loss that has converged.
      bad = new > value + 1e-4 * length * slope + 1e-14
      if not bad.any():
        break
      length = np.where(bad, length / 2, length)
    theta = theta + _by(length, step)
    margin = margin + length[:, None] * moved
    value = loss(margin, theta)
  raise RuntimeError(
    f"A logistic probe did not converge in {steps} steps: its gradient is "
    f"{size.max():.1e}, not below {tolerance:.0e}. Raise l2."
  )


def _by(length, step):
  return length[:, None] * step


def _conjugate_gradients(product, b, diagonal, *, steps=200):
  """x with product(x) = b, each row a system; residuals 1e-2 to 1e-6 of b."""
  x, r = np.zeros_like(b), b
  # The norm that goes with the preconditioner.
  step = r / np.maximum(diagonal, 1e-12)
  square = np.sum(r * step, axis=1)
  # Tighter near the end, so that Newton converges faster than linearly.
  goal = np.clip(np.linalg.norm(b, axis=1), 1e-6, 1e-2) ** 2 * square
  d = step
  for _ in range(steps):
    going = square > goal
    if not going.any():
      break
    ad = product(d)
    along = np.sum(d * ad, axis=1)
    going &= along > 0
    alpha = np.where(going, square / np.where(going, along, 1), 0)
    x = x + _by(alpha, d)
    r = r - _by(alpha, ad)
    step = r / np.maximum(diagonal, 1e-12)
    new = np.where(going, np.sum(r * step, axis=1), 0)
    d = step + _by(new / np.where(square > 0, square, 1), d)
    square = new
  return x


def auc(score: np.ndarray, y: np.ndarray) -> float:
  """Area under the ROC curve: P(positive above negative), ties count half.

  Mann-Whitney's U over its largest value; NaN where a class is missing.

  Args:
    score: [R].
    y: bool [R].
  """
  positives, negatives = int(y.sum()), int((~y).sum())
  if not positives or not negatives:
    return float("nan")
  ranks = scipy.stats.rankdata(score)[y].sum()
  u = ranks - positives * (positives + 1) / 2
  return float(u / (positives * negatives))


def f1(predicted: np.ndarray, y: np.ndarray) -> float:
  """2 TP / (2 TP + FP + FN) of bool [R]; 0 where there is nothing to find."""
  both = int(predicted.sum()) + int(y.sum())
  return float(2 * (predicted & y).sum() / both) if both else 0.0


def balanced_accuracy(predicted: np.ndarray, y: np.ndarray) -> float:
  """Mean of sensitivity and specificity of bool [R]; NaN without a class."""
  if y.all() or not y.any():
    return float("nan")
  return float((predicted[y].mean() + (~predicted[~y]).mean()) / 2)


def best_threshold(score: np.ndarray, y: np.ndarray) -> float:
  """The t whose predictions score >= t have the largest F1 on these rows.

  Args:
    score: [R].
    y: bool [R].
  """
  order = np.argsort(-score, kind="stable")
  ordered = score[order]
  hits = np.cumsum(y[order])
  values = 2 * hits / (np.arange(1, len(y) + 1) + y.sum())
  # Equal scores fall on one side together.
  last = np.append(ordered[1:] != ordered[:-1], True)
  return float(ordered[np.argmax(np.where(last, values, -1))])
