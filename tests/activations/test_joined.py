"""Several models' stores of the same tokens, side by side."""

import numpy as np
import pytest

from gemma_jax.activations import Joined
from tests.activations.rows import READ, SITES, WRITE, make_rows, write


def make_two(tmp_path, n=500, **labels):
  """Rows of two models on the same tokens, but for `labels`; their stores."""
  first, second = make_rows(n), make_rows(n, seed=1)
  second |= {k: v for k, v in first.items() if k not in SITES} | labels
  stores = {
    "": write(tmp_path / "a", first),
    "b": write(tmp_path / "b", second),
  }
  return first, second, stores


def test_sites_say_whose_they_are(tmp_path):
  first, second, stores = make_two(tmp_path)
  both = Joined(stores)
  assert both.sites == {READ: 4, WRITE: 3, f"b:{READ}": 4, f"b:{WRITE}": 3}
  assert len(both) == 500
  np.testing.assert_array_equal(both.read(3, 400, READ), first[READ][3:400])
  np.testing.assert_array_equal(
    both.take(np.array([7, 2, 499]), f"b:{READ}"), second[READ][[7, 2, 499]]
  )
  np.testing.assert_array_equal(both.read(0, 500, "token"), first["token"])
  assert both.statistics(f"b:{WRITE}") is None  # none were taken
  rates = [s.tokens_per_second for s in stores.values()]
  assert min(rates) / 2 <= both.tokens_per_second < min(rates)


def test_a_shuffled_batch_has_both_models_at_the_same_tokens(tmp_path):
  first, second, stores = make_two(tmp_path)
  names = (READ, f"b:{READ}", "token")
  batch = next(Joined(stores).stream(64, seed=3, sites=names))
  rows = [np.flatnonzero(first["token"] == t).item() for t in batch["token"]]
  np.testing.assert_array_equal(batch[READ], first[READ][rows])
  np.testing.assert_array_equal(batch[f"b:{READ}"], second[READ][rows])


def test_other_tokens_are_refused(tmp_path):
  token = make_rows(500)["token"]
  token[123] += 1
  _, _, stores = make_two(tmp_path, token=token)
  with pytest.raises(ValueError, match="do not hold the same tokens"):
    Joined(stores)
  shorter = write(tmp_path / "c", make_rows(400))
  with pytest.raises(ValueError, match="do not hold the same tokens"):
    Joined({"": stores[""], "b": shorter})


def test_a_model_or_a_site_that_is_not_there_lists_those_that_are(tmp_path):
  _, _, stores = make_two(tmp_path)
  for name in (f"c:{READ}", "b:blocks.7.mlp_in"):
    with pytest.raises(KeyError, match=rf"it has|b:{WRITE}"):
      Joined(stores).read(0, 1, name)
