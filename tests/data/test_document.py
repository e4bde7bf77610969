import hashlib

import numpy as np

from gemma_jax import data
from gemma_jax.data import document


def test_a_draw_is_splitmix64_behind_a_shift():
  # The first numbers of the published generator with the seed 0, which adds
  # the golden ratio and then mixes.
  published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
  states = [(i * 0x9E3779B97F4A7C15) % 2**64 for i in (1, 2, 3)]
  text = b"5:order1:7"
  shift = int(hashlib.sha256(text).hexdigest()[:16], 16)
  values = np.array([state ^ shift for state in states], np.uint64)
  assert document.draw(values, "order", 7).tolist() == published
  assert values.tolist() == [state ^ shift for state in states]


def test_draws_for_other_purposes_and_seeds_are_uncorrelated():
  values = np.random.default_rng(0).integers(0, 2**64, 10_000, np.uint64)
  draws = [
    document.draw(values, purpose, seed) / 2**64
    for purpose, seed in (("split", 0), ("order", 0), ("split", 1))
  ]
  correlations = np.corrcoef([values / 2**64, *draws])
  # Five deviations of 1 / sqrt(10,000).
  assert (abs(correlations - np.eye(4)) < 0.05).all()


def test_an_id_is_a_hash_of_source_name_and_text():
  made = data.Document("té", "s", "name", "g")
  digest = hashlib.sha256("1:s4:name3:té".encode()).hexdigest()
  assert made.id == digest[:16]
  assert document.key(made) == int(digest[:16], 16)
  assert document.group_key(made) == int(
    hashlib.sha256(b"1:g").hexdigest()[:16], 16
  )
