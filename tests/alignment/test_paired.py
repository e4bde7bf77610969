"""Paired stores: row i of all sites is the same place of the text."""

import dataclasses

import numpy as np
import pytest

from gemma_jax import data
from gemma_jax.activations import ActivationStore, Writer
from gemma_jax.activations.layout import LABELS
from gemma_jax.alignment import paired
from gemma_jax.alignment.paired import Side, pair_stores

TEXTS = [
  "".join(f"Zeile {i} – naïve “x” 日本 {j} 🙂\n" for j in range(40))
  for i in range(6)
]


def side(name, tokenizer, where, context, texts=TEXTS):
  """Rows that say which document they are of and at which byte they end."""
  documents = [
    data.Document(t, "s", f"d{i}", f"{i}") for i, t in enumerate(texts)
  ]
  windows = data.make_windows(
    documents,
    tokenizer.backend_tokenizer,
    context=context,
    bos_id=2,
    pad_id=0,
    packing="document",
  )
  mask = windows.mask
  labels = {
    "token": windows.tokens[mask],
    "document": windows.document[mask],
    "position": np.nonzero(mask)[1],
    "source": np.zeros(mask.sum(), int),
    "begin": windows.begin[mask],
    "end": windows.end[mask],
  }
  said = np.stack([labels["document"], labels["end"]], 1).astype(np.float32)
  sites = {"blocks.0.resid_post": said, "blocks.1.resid_post": 2 * said}
  with Writer(
    where / name,
    sites={site: 2 for site in sites},
    dtype="float32",
    metadata={"model": name},
  ) as writer:
    writer.append(sites | labels, documents=windows.documents)
  return Side(name, ActivationStore.open(where / name), windows)


@pytest.fixture
def sides(gemma, smollm2, tmp_path, monkeypatch):
  monkeypatch.setenv("GEMMA_JAX_CACHE", str(tmp_path / "cache"))
  monkeypatch.setattr(paired, "ROWS", 300)
  return (
    side("gemma", gemma, tmp_path, 128),
    side("smollm2", smollm2, tmp_path, 96),
  )


def test_rows_of_both_are_the_same_place(sides):
  found = pair_stores(*sides)
  n = len(found.store)
  assert n > 1_000
  a = found.store.read(0, n, "gemma:blocks.0.resid_post")
  b = found.store.read(0, n, "smollm2:blocks.0.resid_post")
  np.testing.assert_array_equal(a, b)
  np.testing.assert_array_equal(
    found.store.read(0, n, "smollm2:blocks.1.resid_post"), 2 * b
  )
  np.testing.assert_array_equal(a[:, 0], found.document)
  assert set(found.store.sites) == {
    f"{name}:blocks.{i}.resid_post" for name in found.tokens for i in range(2)
  }
  for name, one in zip(found.tokens, sides, strict=True):
    places = found.pairs.a if name == "gemma" else found.pairs.b
    np.testing.assert_array_equal(
      found.tokens[name], one.windows.tokens[*places.T]
    )
    assert found.position(name).min() >= 4
  for label in LABELS:
    assert len(found.store.read(0, n, label)) == n


def test_the_same_sides_are_paired_once(sides, monkeypatch):
  first = pair_stores(*sides)
  monkeypatch.setattr(paired, "Writer", None)
  assert pair_stores(*sides).store.path == first.store.path


def test_a_model_pairs_with_itself_at_every_counted_position(sides):
  a = sides[0]
  found = pair_stores(a, a, skip=0)
  assert len(found.store) == a.windows.num_tokens
  assert list(found.tokens) == ["gemma"]
  assert set(found.store.sites) == {f"gemma:{site}" for site in a.store.sites}


def test_what_does_not_fit_is_refused(sides, gemma, tmp_path):
  a, b = sides
  with pytest.raises(ValueError, match="two names"):
    pair_stores(a, b._replace(name="gemma"))
  tokens = a.windows.tokens.copy()
  tokens[a.windows.mask] += 1
  other = dataclasses.replace(a.windows, tokens=tokens)
  with pytest.raises(ValueError, match="counted tokens of gemma's windows"):
    pair_stores(a._replace(windows=other), b)
  fewer = side("fewer", gemma, tmp_path, 128, TEXTS[1:])
  with pytest.raises(ValueError, match="same documents"):
    pair_stores(fewer, b)
