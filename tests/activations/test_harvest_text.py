"""From text to a store: streams, statistics, subsampling, appending."""

import json

import numpy as np
import pytest
import tokenizers

from gemma_jax import data, models
from gemma_jax.activations import (
  ActivationStore,
  capture,
  fitting_batch,
  harvest,
  layout,
  measure,
)
from gemma_jax.activations.harvester import Harvester
from gemma_jax.activations.storage import Document, Location
from tests.activations.windows import SITES, make_windows

pytestmark = pytest.mark.usefixtures("quick_compiles")

READ, WRITE = SITES


@pytest.fixture(scope="module")
def tokenizer():
  """Bytes as tokens, from 3 on."""
  vocabulary = {f"<{i}>": i for i in range(3)}
  letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
  vocabulary |= {c: i for i, c in enumerate(sorted(letters), start=3)}
  bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
  bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  return bpe


@pytest.fixture(scope="module")
def documents():
  rng = np.random.default_rng(0)
  words = ["apple", "Bär", "c", "dog", "été", "fog"]
  return [
    data.Document(
      " ".join(rng.choice(words, 30)), f"source{i % 3}", f"d{i}", f"d{i}"
    )
    for i in range(60)
  ]


@pytest.fixture
def windows(documents, tokenizer):
  return stream(documents, tokenizer)


def stream(documents, tokenizer, **options):
  options = {"context": 32, "max_tokens": 3_000, "seed": 0} | options
  return data.WindowStream(documents, tokenizer, bos_id=2, pad_id=0, **options)


@pytest.fixture
def small_shards(monkeypatch):
  monkeypatch.setattr(layout, "SHARD_ROWS", 256)
  monkeypatch.setattr(layout, "CHUNK_ROWS", 64)


def everything(store):
  names = (*store.sites, *layout.LABELS)
  return {name: store.read(0, len(store), name) for name in names}


def assert_same(a, b):
  for name, x in everything(a).items():
    np.testing.assert_array_equal(x, everything(b)[name])


def test_a_stream_of_windows_gives_what_its_collected_windows_give(
  model, windows, small_shards, tmp_path
):
  streamed = harvest(model, windows, SITES, tmp_path / "a", batch_size=8)
  whole = harvest(model, windows.collect(), SITES, tmp_path / "b", batch_size=8)
  assert len(streamed) == 3_000
  assert_same(streamed, whole)
  assert streamed.documents == list(windows.collect().documents)
  assert streamed.sources == ("source0", "source1", "source2")


def test_a_vectors_labels_lead_back_to_its_text(
  model, windows, documents, tokenizer, small_shards, tmp_path
):
  store = harvest(model, windows, SITES, tmp_path, batch_size=8)
  rows = everything(store)
  texts = {d.name: d for d in documents}
  for i in range(0, len(store), 7):
    _, source, name = store.documents[rows["document"][i]]
    document = texts[name]
    assert document.source == source == store.sources[rows["source"][i]]
    piece = document.text.encode()[rows["begin"][i] : rows["end"][i]]
    token = tokenizer.id_to_token(int(rows["token"][i]))
    if len(piece) == 1:  # the others are bytes of one character
      (byte,) = tokenizer.encode(piece.decode()).tokens
      assert byte == token
  shares = [len(store.rows(source)) for source in store.sources]
  assert shares == [1_000] * 3


def test_the_report_of_the_text_and_the_options_stay_with_the_store(
  model, windows, tmp_path
):
  store = harvest(model, windows, SITES, tmp_path, batch_size=8)
  (part,) = store.parts
  assert part["made_by"]["fields"] == json.loads(json.dumps(windows.fields))
  kept = Document(Location(tmp_path / "parts/00000"), layout.PART).value
  assert kept["report"] == windows.report()


@pytest.mark.parametrize("covariance", [False, True])
def test_statistics_of_the_pass_are_those_of_the_stored_rows(
  covariance, model, windows, small_shards, tmp_path
):
  store = harvest(
    model, windows, SITES, tmp_path, batch_size=8, covariance=covariance
  )
  written = json.loads((tmp_path / "stats.json").read_text())
  for site in SITES:
    taken = store.statistics(site)
    x = store.read(0, len(store), site).astype(np.float64)
    np.testing.assert_allclose(taken.mean, x.mean(0), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(taken.variance, x.var(0), rtol=1e-6)
    again = measure(store, site, covariance=covariance).summary()
    assert written[site]["tokens"] == again["tokens"] == len(store)
    assert (again["participation_ratio"] is None) == (not covariance)
    for end in ("largest", "smallest"):
      rows = [row["row"] for row in written[site]["outliers"][end]]
      assert rows == [row["row"] for row in again["outliers"][end]]
      first = written[site]["outliers"][end][0]
      number = store.read(first["row"], first["row"] + 1, "document")[0]
      assert first["name"] == store.documents[number][2]


def test_without_statistics_there_are_none(model, windows, tmp_path):
  store = harvest(
    model, windows, SITES, tmp_path, batch_size=8, statistics=False
  )
  assert store.statistics(READ) is None
  assert json.loads((tmp_path / "stats.json").read_text()) == {}


def test_subsampling_keeps_a_share_of_the_same_rows(model, windows, tmp_path):
  whole = harvest(model, windows, SITES, tmp_path / "all", batch_size=8)
  kept, other = (
    harvest(
      model,
      windows,
      SITES,
      tmp_path / f"kept{size}",
      batch_size=size,
      keep=0.25,
      dtype="bfloat16",
    )
    for size in (8, 16)
  )
  # Three standard deviations of the binomial.
  assert abs(len(kept) - 750) < 3 * np.sqrt(3_000 * 0.25 * 0.75)
  key = ("document", "begin", "position", "token")
  rows = [
    list(zip(*(everything(s)[k].tolist() for k in key), strict=True))
    for s in (whole, kept, other)
  ]
  assert rows[1] == rows[2]  # whatever the batch
  at = [rows[0].index(row) for row in rows[1]]
  assert at == sorted(at)
  np.testing.assert_array_equal(
    everything(kept)[READ], everything(whole)[READ][at]
  )
  seeded = harvest(
    model,
    windows,
    SITES,
    tmp_path / "seeded",
    batch_size=8,
    keep=0.25,
    keep_seed=1,
  )
  assert not np.array_equal(
    everything(seeded)["begin"], everything(kept)["begin"]
  )


@pytest.mark.parametrize("keep", [0.0, 1.5, -1.0])
def test_a_share_that_is_none_is_refused(keep, model, windows, tmp_path):
  with pytest.raises(ValueError, match="share above 0"):
    harvest(model, windows, SITES, tmp_path, batch_size=8, keep=keep)


def test_holes_are_filled_with_the_bytes_that_were_there(
  model, windows, small_shards, tmp_path
):
  store = harvest(model, windows, SITES, tmp_path, batch_size=8)
  before = everything(store)
  statistics = store.statistics(READ).summary()
  shard = tmp_path / "parts/00000" / READ / "c" / "3" / "0"
  original = shard.read_bytes()
  shard.unlink()
  part = Document(Location(tmp_path / "parts/00000"), layout.PART)
  part.replace(part.value | {"holes": [[768, 1024]]})
  with pytest.raises(ValueError, match=r"holes .*Run the same harvest again"):
    ActivationStore.open(tmp_path)
  again = harvest(model, windows, SITES, tmp_path)
  assert shard.read_bytes() == original
  for name, x in before.items():
    np.testing.assert_array_equal(x, everything(again)[name])
  assert again.statistics(READ).summary() == statistics


def test_more_text_is_appended(model, documents, tokenizer, tmp_path):
  one, two = (stream(documents, tokenizer, seed=seed) for seed in (0, 1))
  first = harvest(model, one, SITES, tmp_path / "s", batch_size=8)
  both = harvest(model, two, SITES, tmp_path / "s", batch_size=8, append=True)
  alone = harvest(model, two, SITES, tmp_path / "t", batch_size=8)
  assert len(both) == len(first) + len(alone)
  for name in (READ, "token", "position", "begin"):
    np.testing.assert_array_equal(
      both.read(len(first), len(both), name), alone.read(0, len(alone), name)
    )
  total = both.statistics(READ)
  again = measure(both, READ)
  np.testing.assert_allclose(total.mean, again.mean, rtol=1e-6, atol=1e-7)
  ours, theirs = (
    [(r["row"], r["document"]) for r in s.summary()["outliers"]["largest"]]
    for s in (total, again)
  )
  assert ours == theirs
  # The same text again is there already.
  same = harvest(model, two, SITES, tmp_path / "s", batch_size=8, append=True)
  assert len(same) == len(both)


def test_a_store_of_another_model_site_or_text_is_refused(
  model, windows, documents, tokenizer, one_device, tmp_path
):
  harvest(model, windows, SITES, tmp_path, batch_size=8)
  other = models.load_model("random:gemma3-tiny", mesh=one_device)
  text = stream(documents, tokenizer, seed=3)
  for args, message in (
    ((model, windows, (READ,)), "sites"),
    ((model, text, SITES), "windows"),
  ):
    with pytest.raises(
      ValueError, match=f"made by another harvest .*{message}"
    ):
      harvest(*args, tmp_path, batch_size=8)
  with pytest.raises(ValueError, match=r"another harvest .*family"):
    harvest(other, text, SITES, tmp_path, batch_size=8, append=True)


def test_int8_is_within_its_scale_of_what_the_model_gives(
  model, windows, tmp_path
):
  exact, rough = (
    harvest(model, windows, SITES, tmp_path / d, batch_size=8, dtype=d)
    for d in ("float32", "int8")
  )
  a, b = (s.read(0, len(s), READ) for s in (exact, rough))
  scale = np.abs(a).max(1, keepdims=True) / 127
  assert np.abs(a - b).max() > 0
  assert np.all(np.abs(a - b) <= scale * 0.5001)


def test_sites_of_all_layers_at_once_are_refused(model, windows, tmp_path):
  with pytest.raises(ValueError, match="Name each layer by itself"):
    harvest(model, windows, ("blocks.*.mlp_in",), tmp_path / "s")


# ----------------------------------------------------------------- batch size


def test_the_batch_grows_until_the_memory_is_full(model):
  def needed(batch):
    return capture._bytes(model, SITES, 64, "bfloat16", batch)

  for batch in (1, 2, 8):
    limit = needed(batch) * 1.01
    found = fitting_batch(model, SITES, 64, "bfloat16", limit=limit)
    assert needed(found) <= limit
    assert found == batch


def test_a_batch_is_never_larger_than_is_of_use(model):
  found = fitting_batch(model, SITES, 64, "bfloat16", limit=2**40)
  assert found * 64 == capture.ENOUGH_TOKENS["cpu"]


def test_a_window_that_does_not_fit_is_an_error_before_any_work(model):
  with pytest.raises(MemoryError, match="shorter context"):
    fitting_batch(model, SITES, 64, "bfloat16", limit=1_000)


def test_windows_are_regrouped_with_their_documents():
  windows = make_windows(23)
  (whole,) = capture.rebatch([windows], 50)
  parts = list(capture.rebatch([windows], 5))
  assert [len(p.tokens) for p in parts] == [5, 5, 5, 5, 3]
  for name in capture.ARRAYS:
    joined = np.concatenate([getattr(p, name) for p in parts])
    np.testing.assert_array_equal(joined, getattr(whole, name))
  assert [len(p.documents) for p in parts] == [3, 0, 0, 0, 0]
  assert [p.first_document for p in parts] == [0, 3, 3, 3, 3]
  again = list(capture.rebatch(parts, 10))
  assert [len(p.tokens) for p in again] == [10, 10, 3]
  np.testing.assert_array_equal(again[1].tokens, windows.tokens[10:20])


# ------------------------------------------------------------- what is refused


def test_a_complete_store_of_another_model_is_refused(
  model, windows, one_device, tmp_path
):
  harvest(model, windows, SITES, tmp_path, batch_size=8)
  other = models.load_model("random:gemma3-tiny", mesh=one_device)
  with pytest.raises(ValueError, match=r"another harvest .*family"):
    harvest(other, windows, SITES, tmp_path, batch_size=8)
  with pytest.raises(ValueError, match=r"another harvest .*keep"):
    harvest(model, windows, SITES, tmp_path, batch_size=8, keep=0.5)


def test_what_could_not_be_summed_up_is_not_appended(
  model, documents, tokenizer, tmp_path
):
  text = stream(documents, tokenizer)
  store = harvest(model, text, SITES, tmp_path, batch_size=8)
  other = stream(documents, tokenizer, seed=1, context=16)
  with pytest.raises(ValueError, match=r"context=32; .*got 16"):
    harvest(model, other, SITES, tmp_path, batch_size=8, append=True)
  with pytest.raises(ValueError, match=r"covariance=False; .*got True"):
    harvest(
      model,
      stream(documents, tokenizer, seed=1),
      SITES,
      tmp_path,
      batch_size=8,
      append=True,
      covariance=True,
    )
  assert len(ActivationStore.open(tmp_path)) == len(store)


def test_statistics_that_an_interruption_left_behind_do_not_speak_for_all(
  model, windows, small_shards, tmp_path, monkeypatch
):
  real, calls = Harvester._launch, []

  def breaks_off(self, job):
    calls.append(job)
    if len(calls) == 8:
      raise KeyboardInterrupt
    return real(self, job)

  with monkeypatch.context() as patch:
    patch.setattr(Harvester, "_launch", breaks_off)
    with pytest.raises(KeyboardInterrupt):
      harvest(model, windows, SITES, tmp_path, batch_size=8)
  assert list(tmp_path.rglob("state/*.npz"))
  store = harvest(
    model, windows, SITES, tmp_path, batch_size=8, statistics=False
  )
  assert store.statistics(READ) is None
  assert not list(tmp_path.rglob("state/*.npz"))


@pytest.mark.parametrize("seed", [-1, 5, 2**70])
def test_any_integer_is_a_seed_of_the_subsampling(
  seed, model, windows, tmp_path
):
  store = harvest(
    model, windows, SITES, tmp_path, batch_size=8, keep=0.5, keep_seed=seed
  )
  assert abs(len(store) - 1_500) < 3 * np.sqrt(3_000 * 0.25)
