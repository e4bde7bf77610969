"""Harvested rows are the model's sites at the positions that count."""

import dataclasses
import hashlib
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax import models
from gemma_jax.activations import (
  ActivationStore,
  fingerprints,
  harvest,
  is_complete,
  layout,
  store_path,
)
from gemma_jax.activations.harvester import Harvester
from gemma_jax.activations.store import read_manifest
from gemma_jax.data import fingerprint
from tests.activations.windows import BOS, CONTEXT, PAD, SITES, make_windows


@pytest.fixture(scope="module", params=["gemma2-tiny", "gemma3-tiny"])
def model(request, one_device):
  return models.load_model(f"random:{request.param}", mesh=one_device)


@pytest.fixture(scope="module")
def gemma2(one_device):
  return models.load_model("random:gemma2-tiny", mesh=one_device)


@pytest.fixture
def small_shards(monkeypatch):
  """Shards of 20 rows, so that a few windows fill several."""
  monkeypatch.setattr(layout, "SHARD_ROWS", 20)
  monkeypatch.setattr(layout, "CHUNK_ROWS", 10)


def files(path):
  """Hash of every file that holds rows, documents or statistics."""
  return {
    p.relative_to(path): hashlib.sha256(p.read_bytes()).hexdigest()
    for p in sorted(path.rglob("*"))
    if p.is_file() and p.name not in (layout.PART, ".lock")
  }


def read_all(store):
  names = (*store.sites, *layout.LABELS)
  return {name: store.read(0, len(store), name) for name in names}


def test_rows_are_the_sites_at_unmasked_positions_in_order(model, tmp_path):
  windows = make_windows(7)
  store = harvest(
    model, windows, SITES, tmp_path / "s", batch_size=3, dtype="float32"
  )
  assert len(store) == windows.num_tokens
  _, sites = model.forward(windows.tokens, capture=SITES)
  for site in SITES:
    expected = np.asarray(sites[site])[windows.mask]
    got = store.read(0, len(store), site)
    # Batches of another size may sum in another order.
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5)


def test_stored_bfloat16_is_float32_rounded(gemma2, tmp_path):
  windows = make_windows(4)
  exact, rounded = (
    harvest(
      gemma2, windows, SITES, tmp_path / dtype, batch_size=2, dtype=dtype
    ).read(0, windows.num_tokens, SITES[0])
    for dtype in ("float32", "bfloat16")
  )
  assert rounded.dtype == jnp.bfloat16
  np.testing.assert_array_equal(rounded, exact.astype(jnp.bfloat16))


def test_labels_say_token_document_and_position(gemma2, tmp_path):
  windows = make_windows(6)
  rows = read_all(harvest(gemma2, windows, SITES, tmp_path, batch_size=4))
  expected = [
    (windows.tokens[w, t], windows.document[w, t], t)
    for w in range(6)
    for t in range(CONTEXT)
    if windows.mask[w, t]
  ]
  got = zip(rows["token"], rows["document"], rows["position"], strict=True)
  assert list(got) == expected


def test_neither_bos_nor_padding_is_stored(gemma2, tmp_path):
  store = harvest(gemma2, make_windows(6), SITES, tmp_path, batch_size=2)
  rows = read_all(store)
  assert not np.isin(rows["token"], [BOS, PAD]).any()
  assert rows["position"].min() >= 1
  assert rows["document"].min() >= 0


def test_the_store_says_what_made_it(gemma2, tmp_path):
  windows = make_windows(3)
  store = harvest(gemma2, windows, SITES, tmp_path, batch_size=2)
  assert store.metadata == {
    "model": gemma2.directory.name,
    "model_fingerprint": fingerprints.of_model(gemma2.directory),
    "family": gemma2.config.family,
    "compute_dtype": "float32",
    "backend": "cpu",
  }
  (part,) = store.parts
  assert part["made_by"] == {
    "windows": fingerprint(windows),
    "fields": {},
    "context": CONTEXT,
    "keep": [1.0, 0],
    "covariance": False,
    "batch_size": 2,
    "mesh": {"data": 1, "fsdp": 1, "tensor": 1},
    "process": [0, 1],
  }
  assert store.documents == list(windows.documents)
  assert store.sites == dict.fromkeys(SITES, gemma2.config.width)


def test_sites_of_different_layers_and_widths_go_together(gemma2, tmp_path):
  capture = ("blocks.0.mlp_hidden", "blocks.2.resid_post")
  windows = make_windows(3)
  store = harvest(
    gemma2, windows, capture, tmp_path, batch_size=3, dtype="float32"
  )
  _, sites = gemma2.forward(windows.tokens, capture=capture)
  for site in capture:
    expected = np.asarray(sites[site])[windows.mask]
    got = store.read(0, len(store), site)
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5)
  assert store.sites[capture[0]] != store.sites[capture[1]]


def test_layers_past_the_last_site_need_not_be_loaded(
  gemma2, one_device, tmp_path
):
  windows = make_windows(4)
  half = models.load_model("random:gemma2-tiny", mesh=one_device, layers=2)
  a = harvest(gemma2, windows, SITES, tmp_path / "a", batch_size=4)
  b = harvest(half, windows, SITES, tmp_path / "b", batch_size=4)
  for name, x in read_all(a).items():
    np.testing.assert_array_equal(x, read_all(b)[name])


def test_eight_devices_store_what_one_stores(gemma2, tmp_path):
  windows = make_windows(11)
  mesh = models.make_mesh({"data": 4, "fsdp": 2}, jax.devices())
  spread = models.load_model("random:gemma2-tiny", mesh=mesh)
  one, eight = (
    read_all(
      harvest(m, windows, SITES, tmp_path / n, batch_size=8, dtype="float32")
    )
    for n, m in (("one", gemma2), ("eight", spread))
  )
  for name, x in one.items():
    np.testing.assert_allclose(eight[name], x, rtol=0, atol=2e-5)


def test_a_complete_store_needs_no_model(gemma2, tmp_path):
  windows = make_windows(4)
  before = read_all(harvest(gemma2, windows, SITES, tmp_path, batch_size=2))
  after = read_all(harvest(None, windows, SITES, tmp_path, batch_size=2))
  for name, x in before.items():
    np.testing.assert_array_equal(after[name], x)


def broken_off(monkeypatch, batches, *args, **options):
  """Harvests until so many batches were launched; returns rows committed."""
  real, calls = Harvester._launch, []

  def breaks_off(self, job):
    calls.append(job)
    if len(calls) > batches:
      raise KeyboardInterrupt
    return real(self, job)

  with monkeypatch.context() as patch:
    patch.setattr(Harvester, "_launch", breaks_off)
    with pytest.raises(KeyboardInterrupt):
      harvest(*args, **options)
  root, manifest = read_manifest(args[3])
  return layout.parts(root, manifest)[0]["committed"]


def launches(monkeypatch):
  """A list that every launched batch's first row is put into."""
  real, rows = Harvester._launch, []

  def noted(self, job):
    rows.append(job["row"])
    return real(self, job)

  monkeypatch.setattr(Harvester, "_launch", noted)
  return rows


@pytest.mark.parametrize("batches", [1, 4])
def test_an_interrupted_harvest_ends_as_one_left_alone(
  batches, gemma2, small_shards, tmp_path, monkeypatch
):
  windows = make_windows(16)
  whole = harvest(gemma2, windows, SITES, tmp_path / "a", batch_size=3)
  args = gemma2, windows, SITES, tmp_path / "b"
  committed = broken_off(monkeypatch, batches, *args, batch_size=3)
  assert not is_complete(tmp_path / "b")
  starts = launches(monkeypatch)
  # Without a batch size, that of the interrupted one is gone on with.
  again = harvest(*args)
  expected = read_all(whole)
  for name, x in read_all(again).items():
    np.testing.assert_array_equal(x, expected[name])
  assert files(tmp_path / "a") == files(tmp_path / "b")
  # Only batches that hold an uncommitted row, or one that the statistics
  # lack, are computed again.
  rows = np.cumsum([0, *windows.mask.sum(1)])[::3]
  assert starts[0] in rows
  assert committed - starts[0] <= np.diff(rows).max()
  assert batches < 4 or committed > 0


def test_windows_without_a_counting_position_add_nothing(gemma2, tmp_path):
  windows = make_windows(6)
  mask = windows.mask.copy()
  mask[[0, 3, 5]] = False
  windows = dataclasses.replace(windows, mask=mask)
  store = harvest(gemma2, windows, SITES, tmp_path, batch_size=1)
  np.testing.assert_array_equal(
    store.read(0, len(store), "token"), windows.tokens[mask]
  )


def test_a_value_that_is_not_finite_names_the_site_and_the_document(
  gemma2, tmp_path
):
  windows = make_windows(5)
  token = 250  # of the last document alone
  windows.tokens[4, 1] = token
  broken = gemma2.params["embed"].at[token].set(np.nan)
  model = dataclasses.replace(gemma2, params=gemma2.params | {"embed": broken})
  assert windows.document[4, 1] != windows.document[0, 1]
  name = f"name{windows.document[4, 1]}"
  message = rf"blocks\.1\.mlp_in is not finite at position 1 of .*{name}"
  with pytest.raises(FloatingPointError, match=message):
    harvest(model, windows, SITES, tmp_path, batch_size=5)
  # Nothing of it stays in the way of a harvest with sound weights.
  assert len(harvest(gemma2, windows, SITES, tmp_path, batch_size=5)) > 0


def test_a_batch_that_the_mesh_does_not_divide_says_what_would_do(tmp_path):
  model = models.load_model("random:gemma2-tiny")
  with pytest.raises(ValueError, match=r"batch_size=6 .*8 devices.*multiple"):
    harvest(model, make_windows(6), SITES, tmp_path / "s", batch_size=6)
  assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
  ("site", "message"),
  [
    ("blocks.9.mlp_in", "layer 9 does not exist"),
    ("blocks.1.mlp_inn", "Did you mean 'mlp_in'"),
  ],
)
def test_a_site_that_does_not_exist_is_refused(site, message, gemma2, tmp_path):
  with pytest.raises(ValueError, match=message):
    harvest(gemma2, make_windows(2), (site,), tmp_path / "s", batch_size=2)


def test_a_damaged_manifest_says_how_to_go_on(gemma2, tmp_path):
  windows = make_windows(2)
  harvest(gemma2, windows, SITES, tmp_path, batch_size=2)
  (tmp_path / "manifest.json").write_text("{")
  with pytest.raises(ValueError, match=r"repair.*harvest then writes it"):
    harvest(gemma2, windows, SITES, tmp_path, batch_size=2)


def test_progress_and_rate_are_logged(gemma2, tmp_path, caplog):
  windows = make_windows(4)
  with caplog.at_level(logging.INFO, "gemma_jax"):
    harvest(gemma2, windows, SITES, tmp_path, batch_size=2)
  assert f"activations: {windows.num_tokens} tokens at" in caplog.text


def test_a_path_depends_on_everything_that_decides_the_values(gemma2, tmp_path):
  def path(directory=gemma2.directory, windows=None, sites=SITES, **dtypes):
    dtypes = {"dtype": "bfloat16", "compute_dtype": "float32"} | dtypes
    return store_path(directory, windows or make_windows(4), sites, **dtypes)

  other = models.load_model("random:gemma3-tiny").directory
  paths = [
    path(),
    path(other),
    path(windows=make_windows(4, seed=1)),
    path(windows=make_windows(5)),
    path(sites=SITES[:1]),
    path(dtype="float32"),
    path(compute_dtype="bfloat16"),
  ]
  assert len(set(paths)) == len(paths)
  assert path() == paths[0]


def test_fine_tuned_weights_have_another_fingerprint(gemma2, tmp_path):
  before = fingerprints.of_model(gemma2.directory)
  for path in gemma2.directory.iterdir():
    (tmp_path / path.name).write_bytes(path.read_bytes())
  assert fingerprints.of_model(tmp_path) == before
  weights = tmp_path / "model.safetensors"
  data = bytearray(weights.read_bytes())
  end = int.from_bytes(data[:8], "little") + 8
  data[end::4] = bytes(b ^ 1 for b in data[end::4])  # all low mantissa bits
  weights.write_bytes(data)
  assert fingerprints.of_model(tmp_path) != before


def test_opening_through_the_store_equals_what_harvest_returned(
  gemma2, tmp_path
):
  made = harvest(gemma2, make_windows(3), SITES, tmp_path, batch_size=3)
  opened = ActivationStore.open(tmp_path)
  for name, x in read_all(made).items():
    np.testing.assert_array_equal(read_all(opened)[name], x)
