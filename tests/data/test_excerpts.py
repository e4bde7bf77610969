import unicodedata

import pytest

from gemma_jax import data
from gemma_jax.data.excerpts import excerpts

LETTERS = "e\u0301 is two code points\n"  # NFC makes them one


def _corpus():
  long = "".join(f"line {i} of many\n" for i in range(400))
  texts = {
    "a": [long, "short", long, LETTERS * 50],
    "b": [
      "x" * 5_000,
      "one\n\n\n" + " " * 3_000,
      *(f"b {i}" for i in range(9)),
    ],
  }
  return data.Corpus.of(
    [
      data.Document(text, source, f"{source}{i}", f"{source}/{i}")
      for source, some in texts.items()
      for i, text in enumerate(some)
    ]
  )


def test_pieces_are_of_their_documents_and_no_longer_than_asked():
  corpus = _corpus()
  whole = {d.name: unicodedata.normalize("NFC", d.text) for d in corpus}
  found = excerpts(corpus, documents=100, characters=200)
  assert len(found) > 10
  for one in found:
    assert 0 < len(one.text) <= 200
    name = one.name.split(": ")[1]
    at = whole[name].find(one.text)
    assert at >= 0
    assert "\n" not in whole[name] or at == 0 or whole[name][at - 1] == "\n"
    assert one.group == next(d.group for d in corpus if d.name == name)


def test_equal_and_blank_pieces_are_left_out():
  texts = [one.text for one in excerpts(_corpus(), documents=99, characters=9)]
  assert len(set(texts)) == len(texts)
  assert all(text.strip() for text in texts)


def test_every_source_gives_as_many_and_another_seed_gives_others():
  found = excerpts(_corpus(), documents=6, characters=50)
  assert sorted(one.name[0] for one in found) == list("aaabbb")
  assert found.sources == ("excerpts",)
  again = excerpts(_corpus(), documents=6, characters=50)
  assert [d.id for d in again] == [d.id for d in found]
  other = excerpts(_corpus(), documents=6, characters=50, seed=1)
  assert {d.id for d in other} != {d.id for d in found}


def test_a_config_asks_for_them(tmp_path):
  (tmp_path / "text.txt").write_text("word " * 100)
  spec = {"kind": "text", "path": str(tmp_path / "text.txt")}
  cut = {"documents": 5, "characters": 20}
  (one,) = data.load(spec | {"excerpts": cut})
  assert len(one.text) == 20
  with pytest.raises(ValueError, match="documents and characters"):
    data.load(spec | {"excerpts": {"documents": 5, "tokens": 20}})
  with pytest.raises(ValueError, match="at least 1 document"):
    data.load(spec | {"excerpts": {"documents": 5, "characters": 0}})
