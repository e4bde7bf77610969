"""Counts of firing and coherence against NumPy on whole arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax.metrics import (
  RunningLatents,
  decoder_coherence,
  largest_cosines,
  latents,
)


def activations(tokens=400, width=40, seed=0):
  """Densities from never over rare to nearly always."""
  rng = np.random.default_rng(seed)
  share = np.geomspace(1e-3, 0.95, width)
  share[:3] = 0
  on = rng.random((tokens, width)) < share
  values = rng.exponential(size=(tokens, width)) + 1e-6
  return np.where(on, values, -values * (rng.random(values.shape) < 0.5))


def of(*batches, **options):
  running = RunningLatents()
  for batch in batches:
    running.update(jnp.asarray(batch, jnp.float32), **options)
  return running


@pytest.fixture(scope="module")
def acts():
  return activations()


def test_numbers_are_those_of_the_whole_array(acts):
  got, on = of(acts).compute(), acts > 0
  density = on.mean(0)
  assert got["tokens"] == 400
  assert got["l0"] == pytest.approx(on.sum(1).mean(), rel=1e-14)
  assert got["dead_fraction"] == np.mean(density == 0) > 0
  assert got["dense_fraction"] == np.mean(density > 0.1) > 0
  np.testing.assert_array_equal(of(acts).density, density)
  for percent, value in got["l0_percentiles"].items():
    expected = np.quantile(
      on.sum(1), float(percent) / 100, method="inverted_cdf"
    )
    assert value == expected
  assert list(got["l0_percentiles"]) == ["5", "25", "50", "75", "95"]
  assert len(set(got["l0_percentiles"].values())) == 5


def test_a_percentile_is_reached_by_exactly_its_share_of_tokens():
  acts = np.tril(np.ones((20, 20)), -1)  # 0, 1, ... 19 active latents
  expected = {"5": 0, "25": 4, "50": 9, "75": 14, "95": 18}
  assert of(acts).compute()["l0_percentiles"] == expected


def test_the_histogram_counts_every_latent_once(acts):
  histogram = of(acts).compute()["density_histogram"]
  density = (acts > 0).mean(0)
  edges = np.array(histogram["edges"])
  assert edges[0] == -8
  assert edges[-1] == 0
  assert np.diff(edges) == pytest.approx(0.25)
  assert histogram["dead"] == np.sum(density == 0) >= 3
  assert sum(histogram["counts"]) + histogram["dead"] == 40
  for count, low, high in zip(
    histogram["counts"], 10 ** edges[:-1], 10 ** edges[1:], strict=True
  ):
    last = high == 1 and np.sum(density == 1)
    assert count == np.sum((density >= low) & (density < high)) + last


def test_a_latent_that_always_fires_is_in_the_last_bin():
  histogram = of(np.ones((5, 2))).compute()["density_histogram"]
  assert histogram["counts"][-1] == 2


def test_rarer_than_the_first_edge_is_in_the_first_bin(monkeypatch):
  monkeypatch.setattr(latents, "EDGES", np.array([-1.0, -0.5, 0]))
  acts = np.zeros((100, 3))
  acts[0, 0] = 1
  acts[:50, 1] = 1
  histogram = of(acts).compute()["density_histogram"]
  assert histogram["counts"] == [1, 1]
  assert histogram["dead"] == 1


def test_dense_is_more_than_a_tenth():
  acts = np.zeros((30, 2))
  acts[:3, 0] = acts[:4, 1] = 1
  assert of(acts).compute()["dense_fraction"] == 0.5


@pytest.mark.parametrize("sizes", [(1,) * 400, (399, 1), (150, 0, 250)])
def test_batches_change_nothing(acts, sizes):
  parts = np.split(acts, np.cumsum(sizes)[:-1])
  assert of(*parts).compute() == of(acts).compute()


def test_masked_tokens_count_for_nothing_whatever_they_hold(acts):
  mask = np.random.default_rng(1).random((20, 20)) < 0.6
  spoilt = acts.reshape(20, 20, 40).copy()
  spoilt[~mask] = np.nan
  got = of(spoilt, mask=mask)
  expected = of(acts.reshape(20, 20, 40)[mask])
  assert got.compute() == expected.compute()
  assert got.count == mask.sum()


def test_counts_go_on_where_float32_would_stop():
  running = of(np.ones((4, 2)))
  running._fired += 2**24
  running.count += 2**24
  running.update(jnp.ones((1, 2)))
  assert running._fired.tolist() == [2**24 + 5] * 2
  assert running._fired.dtype == np.int64


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_activation_that_is_not_finite_is_an_error(acts, value):
  running = of(acts)
  before = running.compute()
  spoilt = acts.copy()
  spoilt[3, 1] = value
  with pytest.raises(FloatingPointError, match="not finite"):
    running.update(spoilt)
  assert running.compute() == before


def test_what_does_not_belong_together_is_refused(acts):
  running = of(acts)
  with pytest.raises(ValueError, match="39 latents after 40"):
    running.update(acts[:, 1:])
  with pytest.raises(ValueError, match="expected bool"):
    running.update(acts, mask=np.ones(399, bool))
  with pytest.raises(ValueError, match="expected bool"):
    running.update(acts, mask=np.ones(400))
  with pytest.raises(ValueError, match="No token"):
    RunningLatents().compute()
  with pytest.raises(ValueError, match="No token"):
    of(acts[:0]).compute()


# ------------------------------------------------------------- coherence


def by_hand(decoder):
  unit = decoder / np.linalg.norm(decoder, axis=1, keepdims=True)
  cosines = np.abs(unit @ unit.T)
  np.fill_diagonal(cosines, 0)
  return cosines.max(1)


@pytest.mark.parametrize("at_once", [2**26, 37 * 37, 37 * 10, 37, 1])
def test_coherence_is_the_mean_largest_cosine_whatever_the_blocks(
  at_once, monkeypatch
):
  monkeypatch.setattr(latents, "_COSINES", at_once)
  decoder = np.random.default_rng(0).normal(size=(37, 6)) * 3
  decoder[5] = -2 * decoder[30]  # opposite rows repeat each other too
  got = largest_cosines(decoder)
  np.testing.assert_allclose(got, by_hand(decoder), atol=1e-6)
  assert got[5] == pytest.approx(1, abs=1e-6)
  assert decoder_coherence(decoder) == pytest.approx(got.mean(), rel=1e-6)


def test_orthogonal_rows_have_no_coherence_and_equal_ones_all():
  assert decoder_coherence(7 * np.eye(8)) == 0
  assert decoder_coherence(np.ones((8, 3))) == pytest.approx(1, abs=1e-6)


def test_a_row_of_zeros_resembles_nothing():
  decoder = np.random.default_rng(0).normal(size=(5, 4))
  decoder[2] = 0
  got = largest_cosines(decoder)
  assert got[2] == 0
  rest = [0, 1, 3, 4]
  np.testing.assert_allclose(got[rest], by_hand(decoder[rest]), atol=1e-6)


def test_no_more_cosines_exist_at_once_than_there_should():
  width, block = 65_536, latents._COSINES // 65_536
  shape = jax.eval_shape(
    lambda unit: latents._largest_of_block(unit, 0, block),
    jax.ShapeDtypeStruct((width, 64), jnp.float32),
  )
  assert shape.shape == (block,)
  assert block * width * 4 <= 2**28


@pytest.mark.parametrize("shape", [(1, 4), (4,), (0, 4)])
def test_coherence_needs_two_rows(shape):
  with pytest.raises(ValueError, match="two rows"):
    decoder_coherence(np.ones(shape))
