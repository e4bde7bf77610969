"""Planted: a word is its letter's direction and one of its own."""

import numpy as np
import pytest
import scipy.sparse

from gemma_jax.probing import absorption

LETTERS, WORDS, DIMS = 4, 60, 300
SITE = {"read": "blocks.3.resid_post", "write": "blocks.3.resid_post"}


class Planted:
  """Latents 0-3 are letters, the next 240 words, the last 240 both at once."""

  def __init__(self, absorbed=(), partly=(), split=None):
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((DIMS, DIMS)))[0]
    count = LETTERS * WORDS
    letter, word = basis[:LETTERS], basis[LETTERS : LETTERS + count]
    self.letters = np.repeat(np.arange(LETTERS), WORDS)
    self.groups = np.arange(count)
    both = (letter[self.letters] + word) / np.sqrt(2)
    spare = basis[LETTERS + count : LETTERS + count + 1]
    self.decoder = np.concatenate([letter, word, both, spare])
    z = np.zeros((count, len(self.decoder)))
    z[self.groups, self.letters] = 1
    z[self.groups, LETTERS + self.groups] = 1
    for w in absorbed:
      z[w, self.letters[w]] = z[w, LETTERS + w] = 0
      z[w, LETTERS + count + w] = np.sqrt(2)
    for w in partly:  # the letter's latent at a half, a word's for the rest
      z[w, self.letters[w]] = z[w, LETTERS + w] = 0.5
      z[w, LETTERS + count + w] = np.sqrt(2) / 2
    if split is not None:  # the second half of a letter has another latent
      half = np.flatnonzero(self.letters == split)[::2]
      z[half, -1], z[half, split] = z[half, split], 0
      self.decoder[-1] = self.decoder[split]
    self.x = z @ self.decoder
    self.latents = scipy.sparse.csr_matrix(z)

  def measure(self, **options):
    arguments = {
      "latents": self.latents,
      "decoder": self.decoder,
      "x": self.x,
      "letters": self.letters,
      "groups": self.groups,
      **SITE,
      "min_count": 2,
      **options,
    }
    return absorption.measure_absorption(**arguments)


def test_there_is_none_where_there_is_none():
  found = Planted().measure()
  np.testing.assert_array_equal(found.full[:LETTERS], 0)
  np.testing.assert_array_equal(found.fraction[:LETTERS], 0)
  assert np.isnan(found.full[LETTERS:]).all()
  assert found.main == {"a": (0,), "b": (1,), "c": (2,), "d": (3,)}
  assert (found.words[:LETTERS] > 15).all()
  assert (found.probe_f1[:LETTERS] > 0.95).all()
  assert len(found.rows) == 0
  assert found.mean_full == found.mean_fraction == 0
  assert set(found.dropped) == set("efghijklmnopqrstuvwxyz")


@pytest.mark.parametrize("seed", [0, 1])
def test_words_whose_latent_took_the_letters_place_are_found(seed):
  absorbed = np.arange(0, 15)  # of the letter a
  planted = Planted(absorbed)
  found = planted.measure(seed=seed)
  assert found.main["a"] == (0,)
  assert set(found.rows) <= set(absorbed)
  assert len(found.rows) >= 3
  assert found.full[0] == len(found.rows) / found.words[0]
  np.testing.assert_array_equal(
    found.absorbers, LETTERS + LETTERS * WORDS + found.rows
  )
  # Nothing but the absorber speaks for these words.
  assert found.fraction[0] == pytest.approx(found.full[0])
  np.testing.assert_array_equal(found.full[1:LETTERS], 0)
  assert found.mean_full == pytest.approx(found.full[0] / LETTERS)


def test_every_absorbed_test_word_counts():
  planted = Planted(absorbed=range(0, 240, 4))
  found = planted.measure()
  tested = absorption.split(planted.groups, fraction=0.5, seed=0)
  expected = np.flatnonzero(tested & (planted.groups % 4 == 0))
  np.testing.assert_array_equal(np.sort(found.rows), expected)


def test_partial_absorption_has_a_fraction_and_is_not_full():
  found = Planted(partly=range(0, 60)).measure()
  np.testing.assert_array_equal(found.full[:LETTERS], 0)
  # Of a word's projection, half is the letter's latent's and half another's.
  assert found.fraction[0] == pytest.approx(0.5, abs=0.05)
  np.testing.assert_array_equal(found.fraction[1:LETTERS], 0)


@pytest.mark.parametrize(
  ("others", "main", "total", "expected"),
  [
    (0.5, 0.5, 1.0, 0.5),
    (0.9, 0.3, 1.0, 0.7),  # no more than the main latents leave
    (0.45, 0.3, 1.0, 0.6),  # noise has the rest
    (0.39, 0.3, 1.0, 0.0),  # too little
    (0.9, 1.0, 1.0, 0.0),  # the main latents give it all
    (0.5, 0.0, 1.0, 1.0),
    (0.5, -0.2, 1.0, 1.0),
    (0.5, 0.0, -1.0, 0.0),  # the probe says no
  ],
)
def test_the_fraction_of_a_word(others, main, total, expected):
  got = absorption._fraction(others, main, total, 0.4)
  assert got == pytest.approx(expected)


def test_words_that_the_probe_gets_wrong_do_not_count():
  planted = Planted()
  wrong = np.arange(6)  # speak for a, and are said to be b's
  planted.letters[wrong] = 1
  found = planted.measure()
  tested = absorption.split(planted.groups, fraction=0.5, seed=0)
  assert tested[wrong].any()
  expected = tested & (planted.letters == 1)
  expected[wrong] = False
  assert found.words[1] == expected.sum()
  assert found.probe_f1[1] < 1


def test_a_letter_without_a_latent_is_left_out():
  planted = Planted()
  z = planted.latents.toarray()
  z[planted.letters == 2] = 0
  found = planted.measure(latents=scipy.sparse.csr_matrix(z))
  assert np.isnan(found.full[2])
  assert "no latent is more active" in found.dropped["c"]
  assert list(found.main) == ["a", "b", "d"]
  assert found.mean_full == 0


def test_a_letter_split_in_two_latents_is_not_absorbed():
  found = Planted(split=1).measure()
  last = 2 * LETTERS * WORDS + LETTERS
  assert set(found.main["b"]) == {1, last}
  np.testing.assert_array_equal(found.full[:LETTERS], 0)
  np.testing.assert_array_equal(found.fraction[:LETTERS], 0)
  # With the second latent not allowed, it takes the first one's words.
  alone = Planted(split=1).measure(max_latents=1)
  assert alone.full[1] > 0.3


def test_the_thresholds_are_those_that_are_given():
  planted = Planted(absorbed=range(15))
  assert planted.measure().full[0] > 0
  # cos(both, letter) = 0.71 at most.
  assert planted.measure(full_cosine=0.8).full[0] == 0
  assert planted.measure(fraction_cosine=0.8).fraction[0] == 0
  assert planted.measure(proportion=1.1).full[0] == 0
  assert planted.measure(max_absorbers=0).fraction[0] == 0


def test_a_bias_is_taken_off_before_projecting():
  planted = Planted(absorbed=range(15))
  expected = planted.measure()
  bias = 20 * planted.decoder[0]
  planted.x = planted.x + bias
  assert planted.measure().full[0] == 0
  found = planted.measure(bias=bias)
  np.testing.assert_allclose(found.full, expected.full)
  np.testing.assert_allclose(found.fraction, expected.fraction)


def test_rows_without_a_letter_take_no_part():
  planted = Planted(absorbed=range(15))
  expected = planted.measure()
  rng = np.random.default_rng(1)
  junk = 30
  planted.x = np.concatenate([rng.standard_normal((junk, DIMS)), planted.x])
  empty = scipy.sparse.csr_matrix((junk, planted.latents.shape[1]))
  planted.latents = scipy.sparse.vstack([empty, planted.latents]).tocsr()
  planted.letters = np.concatenate([np.full(junk, -1), planted.letters])
  planted.groups = np.concatenate([np.full(junk, 999), planted.groups])
  found = planted.measure()
  np.testing.assert_array_equal(found.full, expected.full)
  np.testing.assert_array_equal(found.rows, expected.rows + junk)


def test_decoders_that_are_not_of_norm_one_are_refused_and_can_be_scaled():
  planted = Planted(absorbed=range(15))
  expected = planted.measure()
  scale = np.random.default_rng(0).uniform(0.5, 4, len(planted.decoder))
  planted.decoder = planted.decoder * scale[:, None]
  planted.latents = planted.latents.multiply(1 / scale).tocsr()
  low, high = (f"{v:.4g}" for v in (scale.min(), scale.max()))
  with pytest.raises(
    ValueError, match=f"norms from {low} to {high}.*unit_rows"
  ):
    planted.measure()
  planted.latents, planted.decoder = absorption.unit_rows(
    planted.latents, planted.decoder
  )
  found = planted.measure()
  np.testing.assert_allclose(found.full, expected.full)
  np.testing.assert_allclose(found.fraction, expected.fraction)
  planted.decoder[7] = 0  # a latent that writes nothing
  planted.measure()


def test_transcoders_are_refused():
  with pytest.raises(
    ValueError, match=r"transcoder from '.*resid_post' to 'x'"
  ):
    Planted().measure(write="x")


def test_what_cannot_be_measured_is_refused():
  planted = Planted()
  with pytest.raises(ValueError, match=r"two letters with 100 rows.*got 0"):
    planted.measure(min_count=100)
  with pytest.raises(ValueError, match=r"decoder \[485, D\]"):
    planted.measure(decoder=planted.decoder[1:])
  with pytest.raises(ValueError, match="at least 2 documents"):
    planted.measure(groups=planted.groups * 0)
  x = planted.x.copy()
  x[3, 3] = np.inf
  with pytest.raises(FloatingPointError, match="Activations"):
    planted.measure(x=x)
  latents = planted.latents.copy()
  latents.data[0] = np.nan
  with pytest.raises(FloatingPointError, match="1 activations"):
    planted.measure(latents=latents)
