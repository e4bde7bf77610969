"""Encoders, and batches of several stores of paired rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax.alignment.objective import code_statistics
from tests.trainers.pairs import dictionary, rows, site, statistics, write
from trainers import paired

pytestmark = pytest.mark.usefixtures("quick_compiles")

A, B = site("a", 0), site("b", 1)
ACTIVATIONS = ["relu", "topk", "batchtopk", "jumprelu", "gated"]


@pytest.mark.parametrize("activation", [*ACTIVATIONS, "layer_norm"])
def test_an_encoder_gives_the_codes_and_who_fires(activation):
  x, changes = rows([A])[A][:500], {}
  if activation == "layer_norm":
    activation, changes = "batchtopk", {"layer_norm": True}
  own = dictionary(x, activation=activation, **changes)
  about = statistics(own, x)
  codes, logits = paired.encoder(own, about)(x)
  np.testing.assert_allclose(codes, own.encode(x), rtol=1e-5)
  fires = np.asarray(codes) > 0
  assert 0.02 < fires.mean() < 0.4
  # Rounding decides about the last of the k, whose logit is 0.
  np.testing.assert_array_equal(np.asarray(logits)[fires] >= 0, True)
  assert (np.asarray(logits)[~fires] <= 0).all()


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu"])
def test_logits_have_gradients_where_codes_are_zero(activation):
  x = rows([A])[A][:50]
  own = dictionary(x, activation=activation)
  encoder = paired.encoder(own, statistics(own, x))
  codes, logits = encoder(x)
  silent = jnp.argmin(logits, axis=1)[:, None]
  assert not jnp.take_along_axis(codes, silent, 1).any()

  def lowest(x, which):
    return jnp.take_along_axis(encoder(x)[which], silent, 1).sum()

  assert not jax.grad(lowest)(x, 0).any()
  slope = jax.grad(lowest)(x, 1)
  expected = (own.params["W_enc"] / encoder.about.unit).T[silent[:, 0]]
  np.testing.assert_allclose(slope, expected, rtol=1e-5)


def test_statistics_of_another_dictionary_are_refused():
  x = rows([A])[A]
  other = code_statistics([np.ones((2, 3)) * [[1], [2]]])
  with pytest.raises(ValueError, match=r"of the 32 latents .* got .*\(3,\)"):
    paired.encoder(dictionary(x), other)


def test_rows_of_one_store_stay_paired_and_each_site_comes_once(tmp_path):
  arrays = rows([A, B])
  arrays[B][:, 0] = arrays[A][:, 0]
  both = write(tmp_path / "both", arrays)
  alone = write(tmp_path / "alone", {A: rows([A], seed=1)[A]})
  found = paired.Rows([(A, B), (B, A), (A, A)], [both, both, alone])
  config = {"batch_size": 64, "buffer_rows": 1024}
  batches = found.batches(config, seed=0)(0, None)
  batch = next(batches)
  assert sorted(batch) == sorted(found.sites) == sorted(found.shapes(64))
  assert len(batch) == 3
  for name, x in batch.items():
    assert (x.shape, x.dtype) == (
      found.shapes(64)[name].shape,
      found.shapes(64)[name].dtype,
    )
  (x, y), back, (own, _) = found.routes
  assert back == (y, x)
  np.testing.assert_array_equal(batch[x][:, 0], batch[y][:, 0])
  assert not np.isin(batch[own][:, 0], arrays[A][:, 0]).any()
  second = next(batches)
  again = next(found.batches(config, seed=0)(1, None))
  for name, x in again.items():
    np.testing.assert_array_equal(second[name], x)
  batches.close()
