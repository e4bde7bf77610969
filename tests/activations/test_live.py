"""Batches straight from the model are its sites, each row once per epoch."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from gemma_jax import models
from gemma_jax.activations.live import ModelStream
from tests.activations.windows import CONTEXT, SITES, make_windows

pytestmark = pytest.mark.usefixtures("quick_compiles")

READ, WRITE = SITES
OPTIONS = {"windows_per_pass": 8, "buffer_rows": 200, "dtype": "float32"}


@pytest.fixture(scope="module")
def windows():
  return make_windows(40)


def take(model, windows, count, *, batch=16, seed=0, **options):
  stream = ModelStream(model, windows, SITES, batch, seed, **OPTIONS | options)
  batches = iter(stream)
  found = [jax.device_get(b) for b in itertools.islice(batches, count)]
  batches.close()
  return found


def expected(model, windows):
  _, found = model.forward(windows.tokens, capture=SITES)
  return {s: np.asarray(x)[windows.mask] for s, x in found.items()}


def by_first(x):
  return x[np.argsort(x[:, 0])]


@pytest.mark.parametrize("batch", [16, 7, 150])
def test_every_epoch_has_each_row_of_the_model_once(batch, model, windows):
  rows = windows.num_tokens
  assert rows > 150
  found = take(model, windows, -(-2 * rows // batch), batch=batch)
  whole = {s: np.concatenate([b[s] for b in found]) for s in SITES}
  for epoch in range(2):
    for site, x in expected(model, windows).items():
      got = whole[site][epoch * rows : (epoch + 1) * rows]
      np.testing.assert_allclose(by_first(got), by_first(x), atol=2e-5)


def test_the_sites_of_a_row_stay_together(model, windows):
  known = expected(model, windows)
  for batch in take(model, windows, 8):
    for read, write in zip(batch[READ], batch[WRITE], strict=True):
      row = np.abs(known[READ] - read).max(1).argmin()
      np.testing.assert_allclose(known[WRITE][row], write, atol=2e-5)


def test_rows_are_shuffled_within_a_block_of_several_passes(model, windows):
  known = expected(model, windows)[READ]
  first = np.concatenate([b[READ] for b in take(model, windows, 4)])
  rows = [np.abs(known - x).max(1).argmin() for x in first]
  # A block is two passes of eight windows.
  assert max(rows) >= windows.mask[:8].sum()
  assert max(rows) < windows.mask[:16].sum()
  assert rows != sorted(rows)


def test_every_start_gives_its_batch(model, windows):
  whole = take(model, windows, 30)
  for start in (1, 9, 17, 29):
    (batch,) = take(model, windows, 1, start=start)
    for site in SITES:
      np.testing.assert_array_equal(batch[site], whole[start][site])


def test_seeds_and_epochs_have_their_own_order(model, windows):
  (a,), (b,), (c,) = (take(model, windows, 1, seed=s) for s in (0, 0, 1))
  np.testing.assert_array_equal(a[READ], b[READ])
  assert not np.array_equal(a[READ], c[READ])
  rows = windows.num_tokens
  epochs = take(model, windows, 2, batch=rows)
  assert not np.array_equal(epochs[0][READ], epochs[1][READ])


def test_eight_devices_give_what_one_gives(model, windows):
  mesh = models.make_mesh({"data": 4, "fsdp": 2}, jax.devices())
  spread = models.load_model("random:gemma2-tiny", mesh=mesh)
  for a, b in zip(
    take(model, windows, 25), take(spread, windows, 25), strict=True
  ):
    for site in SITES:
      np.testing.assert_allclose(a[site], b[site], atol=2e-5)


def test_batches_lie_split_over_the_mesh(windows):
  mesh = models.make_mesh({"data": 4, "fsdp": 2}, jax.devices())
  spread = models.load_model("random:gemma2-tiny", mesh=mesh)
  stream = ModelStream(spread, windows, SITES, 16, 0, **OPTIONS)
  batches = iter(stream)
  x = next(batches)[READ]
  batches.close()
  assert {s.data.shape[0] for s in x.addressable_shards} == {2}


def test_sizes_that_the_mesh_does_not_divide_are_refused(windows):
  mesh = models.make_mesh({"data": 8}, jax.devices())
  spread = models.load_model("random:gemma2-tiny", mesh=mesh)
  with pytest.raises(ValueError, match=r"batch_size=12 .*8 devices.*multiples"):
    ModelStream(spread, windows, SITES, 12, 0, **OPTIONS)


def test_a_value_that_is_not_finite_names_the_site(model, windows):
  tokens = windows.tokens.copy()
  broken = model.params["embed"].at[tokens[3, 1]].set(np.nan)
  bad = dataclasses.replace(model, params=model.params | {"embed": broken})
  with pytest.raises(FloatingPointError, match=r"blocks\.1\.mlp_in is not"):
    take(bad, windows, 1)


def test_what_fits_is_taken_where_no_size_is_given(model, windows):
  (batch,) = take(model, windows, 1, windows_per_pass=None)
  assert batch[READ].shape == (16, model.config.width)
  assert windows.tokens.shape[1] == CONTEXT


def test_windows_of_which_nothing_counts_are_an_error(model, windows):
  nothing = dataclasses.replace(windows, mask=np.zeros_like(windows.mask))
  with pytest.raises(ValueError, match="No position of these windows counts"):
    take(model, nothing, 1)


@pytest.mark.parametrize(("batch", "start"), [(0, 0), (-3, 0), (16, -1)])
def test_a_batch_or_a_start_that_is_none_is_refused(
  batch, start, model, windows
):
  with pytest.raises(ValueError, match="must be at least 1"):
    ModelStream(model, windows, SITES, batch, 0, start=start, **OPTIONS)
