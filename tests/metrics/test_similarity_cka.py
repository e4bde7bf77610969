"""Centred kernel alignment, against the sums written out over all rows."""

import logging

import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax.metrics.similarity import (
  StreamedCKA,
  cka,
  kernel_cka,
  linear_cka,
  minibatch_cka,
)


def written_out(x, y, debiased):
  """HSICs of Song et al. 2012 and their ratio, with n x n matrices."""
  x, y = x.astype(np.float64), y.astype(np.float64)
  n = len(x)

  def hsic(k, l):
    if not debiased:
      h = np.eye(n) - 1 / n
      return np.trace(k @ h @ l @ h) / (n - 1) ** 2
    k, l = k - np.diag(np.diag(k)), l - np.diag(np.diag(l))
    ones = np.ones(n)
    first = np.trace(k @ l)
    second = (ones @ k @ ones) * (ones @ l @ ones) / ((n - 1) * (n - 2))
    third = 2 / (n - 2) * (ones @ k @ l @ ones)
    return (first + second - third) / (n * (n - 3))

  k, l = x @ x.T, y @ y.T
  return hsic(k, l), hsic(k, k), hsic(l, l)


def ratio(hsics):
  kl, kk, ll = hsics
  return kl / np.sqrt(kk * ll)


def related(n, d, e, seed=0, noise=2.0):
  """Rows [n, d] and [n, e] of which the second is partly a map of the first."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(n, d)) * rng.gamma(2, size=d)
  y = x @ rng.normal(size=(d, e)) + noise * rng.normal(size=(n, e))
  return x.astype(np.float32), y.astype(np.float32)


@pytest.mark.parametrize("debiased", [True, False])
@pytest.mark.parametrize(
  ("n", "d", "e"),
  [(4, 3, 9), (40, 64, 30), (60, 31, 30), (61, 31, 30), (300, 5, 12)],
)
def test_both_forms_are_the_sums_written_out(n, d, e, debiased):
  x, y = related(n, d, e)
  expected = ratio(written_out(x, y, debiased))
  assert linear_cka(x, y, debiased=debiased) == pytest.approx(
    expected, rel=1e-9
  )
  k, l = (rows.astype(np.float64) @ rows.T for rows in (x, y))
  assert kernel_cka(k, l, debiased=debiased) == pytest.approx(
    expected, rel=1e-9
  )


@pytest.mark.parametrize(
  ("n", "d", "expected"),
  [
    (100, 1152, 0.920),
    (500, 1152, 0.697),
    (1000, 1152, 0.535),
    (2000, 768, 0.278),
  ],
)
def test_independent_rows_score_d_over_n_plus_d_unless_debiased(n, d, expected):
  x, y = np.random.default_rng(n).normal(size=(2, n, d)).astype(np.float32)
  assert linear_cka(x, y, debiased=False) == pytest.approx(expected, abs=0.01)
  assert abs(linear_cka(x, y)) < 0.03


@pytest.mark.parametrize("debiased", [True, False])
@pytest.mark.parametrize("n", [20, 200])
def test_rotation_scale_and_shift_change_nothing_but_other_maps_do(n, debiased):
  x, y = related(n, 16, 16)
  x = x.astype(np.float64)
  rng = np.random.default_rng(1)
  turn = np.linalg.qr(rng.normal(size=(16, 16)))[0]
  before = linear_cka(x, y, debiased=debiased)
  moved = linear_cka(300 * x @ turn + 7, y, debiased=debiased)
  assert moved == pytest.approx(before, rel=1e-9)
  skewed = linear_cka(x @ np.diag(np.arange(1.0, 17)), y, debiased=debiased)
  assert abs(skewed - before) > 0.01
  assert linear_cka(x, -3 * x @ turn, debiased=debiased) == pytest.approx(1)


@pytest.mark.parametrize("offset", [0, 1e3])
@pytest.mark.parametrize("size", [1, 7, 100, 250])
def test_streamed_is_in_memory_whatever_the_batches(size, offset, monkeypatch):
  monkeypatch.setattr(cka, "_BLOCK", 64)
  x, y = related(250, 150, 120)
  # The first rows lie far from the rest, as those of one document may.
  x[:8] += 300
  x, y = x + np.float32(offset), y - np.float32(offset)
  stream = StreamedCKA()
  for at in range(0, 250, size):
    stream.update(x[at : at + size], y[at : at + size])
  assert stream.count == 250
  for debiased in (True, False):
    # With n < D + E this is the other form.
    whole = linear_cka(x, y, debiased=debiased)
    found = stream.compute(debiased=debiased)
    assert found == pytest.approx(whole, rel=1e-6)


def test_a_stream_can_be_asked_in_between():
  x, y = related(60, 4, 5)
  stream = StreamedCKA().update(x[:30], y[:30])
  assert stream.compute() == pytest.approx(linear_cka(x[:30], y[:30]))
  stream.update(x[30:30], y[30:30]).update(x[30:], y[30:])
  assert stream.compute() == pytest.approx(linear_cka(x, y))


def massive(n=400, d=64):
  x, y = np.random.default_rng(3).normal(size=(2, n, d)).astype(np.float32)
  x[17], y[17] = 300 * x[17], 300 * y[17]
  return x, y


@pytest.mark.parametrize("n", [100, 400])
def test_one_massive_row_decides_biased_cka_and_is_warned_of(n, caplog):
  x, y = massive(n)
  rest = np.arange(n) != 17
  with caplog.at_level(logging.WARNING, "gemma_jax"):
    assert linear_cka(x, y, debiased=False) > 0.99
  said = [record.getMessage() for record in caplog.records]
  assert len(said) == 2
  assert all("Row 17 of" in line for line in said)
  caplog.clear()
  null = 64 / (n - 1 + 64)
  without = linear_cka(x[rest], y[rest], debiased=False)
  assert without == pytest.approx(null, abs=0.02)
  assert not caplog.records


def test_a_massive_row_of_one_model_in_a_stream_is_named(caplog):
  x, _ = massive()
  y = np.random.default_rng(4).normal(size=x.shape)
  stream = StreamedCKA()
  for at in range(0, 400, 10):
    stream.update(x[at : at + 10], y[at : at + 10])
  stream.compute()
  assert len(caplog.records) == 1
  assert "Row 17 of x carries 9" in caplog.records[0].getMessage()


@pytest.mark.parametrize("debiased", [True, False])
def test_a_massive_row_costs_no_digits(debiased):
  x, y = massive(80)
  expected = ratio(written_out(x, y, debiased))
  assert linear_cka(x, y, debiased=debiased) == pytest.approx(
    expected, rel=1e-6
  )


def test_minibatches_average_hsics_before_the_ratio():
  x, y = related(90, 12, 10)
  # One batch in either form, and of different norms.
  parts = [slice(0, 15), slice(15, 90)]
  x[:15] *= 5
  sums = np.sum([written_out(x[p], y[p], True) for p in parts], axis=0)
  found = minibatch_cka((x[p], y[p]) for p in parts)
  assert found == pytest.approx(ratio(sums), rel=1e-9)
  mean = np.mean([linear_cka(x[p], y[p]) for p in parts])
  assert abs(found - mean) > 1e-3


def test_bfloat16_rows_are_compared_in_float64():
  x, y = (jnp.asarray(rows, jnp.bfloat16) for rows in related(50, 8, 9))
  expected = ratio(written_out(*(np.asarray(r, np.float64) for r in (x, y)), 1))
  assert linear_cka(x, y) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
  ("x", "y", "message"),
  [
    (np.ones((5, 2)), np.ones((6, 2)), "row i of both"),
    (np.ones(5), np.ones(5), "row i of both"),
    (np.eye(3), np.eye(3), "at least 4 rows, got 3"),
    (np.full((9, 2), 0.1), np.random.default_rng(0).random((9, 2)), "differ"),
    (np.full((9, 8), 0.1), np.random.default_rng(0).random((9, 8)), "differ"),
    (np.eye(9), np.random.default_rng(0).random((9, 8)), "rows that differ"),
    (np.array([[1.0], [2], [3], [np.nan]]), np.ones((4, 1)), "first in row 3"),
    (np.eye(4), np.array([[1.0], [2], [np.inf], [4]]), "1 rows of y"),
  ],
)
def test_rows_that_cannot_be_compared_are_an_error(x, y, message):
  with pytest.raises(ValueError, match=message):
    linear_cka(x, y)


def test_other_kernels_streams_and_batches_than_expected_are_errors():
  with pytest.raises(ValueError, match="two kernels"):
    kernel_cka(np.ones((5, 4)), np.ones((5, 5)))
  stream = StreamedCKA()
  with pytest.raises(ValueError, match="at least 4 rows, got 0"):
    stream.compute()
  stream.update(np.ones((2, 3)), np.ones((2, 3)))
  with pytest.raises(ValueError, match="widths"):
    stream.update(np.ones((2, 3)), np.ones((2, 4)))
  with pytest.raises(ValueError, match="at least one batch"):
    minibatch_cka([])
