"""The k-th largest without a sort, against a sort."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax import models
from gemma_jax.dictionaries.selection import kth_largest

jitted = jax.jit(kth_largest)


def sorted_threshold(z, k):
  """The k-th largest value if that many are positive, else None."""
  descending = np.sort(z, axis=None)[::-1]
  positive = descending[descending > 0]
  return positive[int(np.ceil(k)) - 1] if len(positive) >= k else None


def assert_selects(z, k, threshold):
  expected = sorted_threshold(z, k)
  threshold = np.asarray(threshold)
  kept = z >= threshold
  assert threshold > 0
  if expected is None:
    np.testing.assert_array_equal(kept, z > 0)
  else:
    np.testing.assert_array_equal(kept, z >= expected)


@pytest.mark.parametrize(
  ("shape", "jit"),
  [
    ((1,), True),
    ((7,), False),
    ((64, 33), True),
    ((5, 1), True),
    ((1, 257), True),
    ((3, 4, 50), True),
  ],
)
def test_the_same_entries_as_a_sort_keeps(shape, jit):
  rng = np.random.default_rng(0)
  function = jitted if jit else kth_largest
  for scale in (1e-30, 1.0, 1e30):
    z = (scale * rng.normal(size=shape)).astype(np.float32)
    for k in {1, 2, z.size // 3 + 1, z.size}:
      assert_selects(z, k, function(jnp.asarray(z), k))


def test_every_k_keeps_exactly_k_of_distinct_positive_values():
  z = np.random.default_rng(1).permutation(np.arange(1, 201)) / np.float32(7)
  z = z.astype(np.float32)
  select = jax.jit(jax.vmap(kth_largest, (None, 0)))
  thresholds = np.asarray(select(jnp.asarray(z), jnp.arange(1, 201)))
  counts = (z >= thresholds[:, None]).sum(1)
  np.testing.assert_array_equal(counts, np.arange(1, 201))


@pytest.mark.parametrize("k", [1, 3, 10])
def test_rows_are_selected_each_for_itself(k):
  rng = np.random.default_rng(2)
  rows = (
    rng.normal(size=(40, 30)) * 10.0 ** rng.integers(-8, 8, (40, 1))
  ).astype(np.float32)
  thresholds = jax.jit(lambda z: kth_largest(z, k, axis=-1))(jnp.asarray(rows))
  assert thresholds.shape == (40, 1)
  for row, threshold in zip(rows, np.asarray(thresholds)[:, 0], strict=True):
    assert_selects(row, k, threshold)


def test_equal_values_at_the_threshold_are_all_kept():
  z = jnp.asarray([3.0, 1.0, 2.0, 2.0, 2.0, 1.0])
  for k, kept in {1: 1, 2: 4, 3: 4, 4: 4, 5: 6, 6: 6}.items():
    assert int((z >= kth_largest(z, k)).sum()) == kept


@pytest.mark.parametrize("value", [1.0, 1e-30, 3e38])
def test_all_equal_keeps_all(value):
  z = np.full((4, 5), value, np.float32)
  for k in (1, 19, 20, 21):
    assert_selects(z, k, kth_largest(jnp.asarray(z), k))


@pytest.mark.parametrize("positives", [0, 1, 4])
def test_fewer_positives_than_k_keeps_the_positive_ones(positives):
  z = -np.ones(10, np.float32)
  z[3 : 3 + positives] = np.linspace(1, 2, positives)
  z[9] = 0
  for k in (5, 10, 100):
    threshold = kth_largest(jnp.asarray(z), k)
    kept = (z >= np.asarray(threshold)) & (z > 0)
    assert kept.sum() == positives


def test_k_may_be_a_fraction_and_a_traced_value():
  z = jnp.asarray([5.0, 4.0, 3.0, 2.0, 1.0])
  threshold = jax.jit(kth_largest)(z, jnp.asarray(2.5))
  assert int((z >= threshold).sum()) == 3  # the fewest that are no less


def test_neighbouring_floats_are_told_apart():
  values = [np.float32(1)]
  for _ in range(9):
    values.append(np.nextafter(values[-1], np.float32(2)))
  z = np.random.default_rng(3).permutation(np.asarray(values, np.float32))
  for k in range(1, 11):
    threshold = kth_largest(jnp.asarray(z), k)
    assert int((z >= np.asarray(threshold)).sum()) == k


def test_infinity_and_the_largest_float_are_values_like_others():
  z = np.asarray([np.inf, np.finfo(np.float32).max, 1, -np.inf], np.float32)
  for k in (1, 2, 3):
    assert_selects(z, k, kth_largest(jnp.asarray(z), k))


def test_the_threshold_lies_between_the_last_kept_and_the_first_dropped():
  z = np.random.default_rng(5).exponential(size=400).astype(np.float32)
  descending = np.sort(z)[::-1]
  for k in (1, 20, 399):
    threshold = float(kth_largest(jnp.asarray(z), k))
    assert descending[k] < threshold <= descending[k - 1]


@pytest.mark.parametrize("k", [1, 2, 3, 4, 6])
def test_denormals_never_take_a_normal_values_place(k):
  # Hardware may flush denormals to zero: they may count as zero, no more.
  z = np.asarray([1e-40, 2.0, 3e-45, 1e-37, 0.0, -1e-40, -1.0], np.float32)
  kept = jax.jit(lambda z: (z >= kth_largest(z, k)) & (z > 0))(jnp.asarray(z))
  kept = np.asarray(kept)
  normal = np.asarray([1, 3])  # descending
  np.testing.assert_array_equal(kept[normal], np.arange(2) < k)
  assert kept.sum() <= k
  assert not kept[z <= 0].any()


def test_counts_past_float32s_integers_are_exact():
  # A float32 counter would stop at 2^24 = 16 777 216.
  n = 2**24 + 3
  z = jnp.ones(n).at[:5].set(2.0)
  assert 1 < float(kth_largest(z, 5)) <= 2
  assert float(kth_largest(z, 6)) <= 1


def test_a_sharded_array_gives_the_same_threshold():
  mesh = models.make_mesh({"fsdp": 8})
  z = np.random.default_rng(4).normal(size=(64, 32)).astype(np.float32)
  spec = jax.sharding.PartitionSpec(None, "fsdp")
  spread = jax.device_put(z, jax.sharding.NamedSharding(mesh, spec))
  assert_selects(z, 100, jax.jit(lambda z: kth_largest(z, 100))(spread))


def test_another_dtype_is_refused():
  with pytest.raises(TypeError, match="float32 bits; got bfloat16"):
    kth_largest(jnp.ones(3, jnp.bfloat16), 1)
