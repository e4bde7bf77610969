"""Lexicons: the bundled ones, and hits against closed forms and SciPy."""

import dataclasses
import math
import pathlib

import numpy as np
import pytest
import tokenizers
from scipy import stats

from gemma_jax.concepts import lexemes as lexemes_lib
from gemma_jax.concepts import lexicon as lib

CATEGORIES = {
  "animals",
  "body_parts",
  "colours",
  "emotions",
  "food",
  "language",
  "numbers",
  "science",
  "space",
  "technology",
  "time",
  "travel",
}
FILES = sorted(pathlib.Path(lib.__file__).with_name("lexicons").glob("*.txt"))
ANIMALS = ("dog", "cat", "horse", "lion", "tiger", "bear", "wolf", "rabbit")


@pytest.fixture(scope="module", params=["smollm2", "gemma"])
def real(request):
  """A tokenizer, its words, and the bundled lexicon fitted to them."""
  tokenizer = request.getfixturevalue(request.param)
  lexemes = lexemes_lib.read(tokenizer, len(tokenizer))
  return tokenizer, lexemes, lib.fit(lib.load(), lexemes)


def content_families(lexemes):
  content = lexemes.kind == lexemes_lib.KINDS.index("content")
  return np.unique(lexemes.family[content & lexemes.usable])


@pytest.fixture(scope="module")
def small():
  """Twenty words w0, ..., w19 of one token each, then two that do not count."""
  letters = "abcdefghijklmnopqrst"
  pieces = [f"▁w{c * 3}" for c in letters] + ["▁the", "ing"]
  model = tokenizers.models.BPE({p: i for i, p in enumerate(pieces)}, [])
  made = tokenizers.Tokenizer(model)
  made.decoder = tokenizers.decoders.Metaspace()
  words = {
    "first": frozenset(f"w{c * 3}" for c in letters[:5]),
    "rest": frozenset(f"w{c * 3}" for c in letters[5:]) | {"wzzz", "the"},
  }
  lexemes = lexemes_lib.read(made, len(pieces))
  return words, lexemes, lib.fit(words, lexemes)


def test_the_bundled_categories_are_these():
  found = lib.load()
  assert set(found) == CATEGORIES
  assert len(FILES) == len(CATEGORIES)
  for path in FILES:
    lines = path.read_text("utf-8").splitlines()
    words = [line for line in lines if not line.startswith("#")]
    assert len(words) == len(found[path.stem]), "a word stands there twice"
    headings = [line for line in lines if line.startswith("# ")]
    assert {"# English", "# Spanish", "# Hindi"} <= set(headings)


def test_no_function_word_is_in_a_bundled_category():
  words = frozenset().union(*lib.load().values())
  lower = {word.casefold() for word in words}
  assert lower & lexemes_lib.function_words() == set()


def test_no_function_word_is_a_hit(real):
  _, lexemes, lexicon = real
  function = lexemes.kind == lexemes_lib.KINDS.index("function")
  families = np.unique(lexemes.family[function])
  hits = families[lexicon.member[:, families].any(axis=0)]
  assert [lexemes.names[family] for family in hits] == []


def test_words_of_two_bundled_categories_belong_to_both():
  categories = {}
  for name, words in lib.load().items():
    for word in set(map(lexemes_lib.normalise, words)):
      categories.setdefault(word, []).append(name)
  assert {w: c for w, c in categories.items() if len(c) > 1} == {
    "chicken": ["animals", "food"],
    "once": ["numbers", "time"],
    "orange": ["colours", "food"],
    "peach": ["colours", "food"],
    "salmon": ["animals", "colours", "food"],
    "second": ["numbers", "time"],
    "shrimp": ["animals", "food"],
    "tongue": ["body_parts", "language"],
    "tuna": ["animals", "food"],
  }


def test_ones_own_files_join_the_bundled_ones(tmp_path):
  path = tmp_path / "tools.txt"
  path.write_text("hammer\nsaw\n# rusty\nnail\n")
  found = lib.load([path])
  assert set(found) == CATEGORIES | {"tools"}
  assert found["tools"] == {"hammer", "saw", "nail"}


def test_bad_files_are_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match="no such file"):
    lib.load([tmp_path / "tools.txt"])
  path = tmp_path / "animals.txt"
  path.write_text("cat\n")
  with pytest.raises(ValueError, match="a category 'animals' already"):
    lib.load([path])
  path = tmp_path / "tools.txt"
  path.write_text("# none\n")
  with pytest.raises(ValueError, match="got no words"):
    lib.load([path])


def test_words_that_the_tokenizer_splits_are_reported(real):
  tokenizer, _, lexicon = real
  assert lexicon.names == tuple(sorted(CATEGORIES))
  # The tokenizer's own word for it.
  for name, words in lexicon.split.items():
    assert words == sorted(words)
    for word in words:
      for form in (word, word.capitalize()):
        pieces = tokenizer(" " + form, add_special_tokens=False)["input_ids"]
        assert len(pieces) > 1, (name, form)
  reported = sum(map(len, lexicon.split.values()))
  held = lexicon.member.sum()
  assert 0 < reported < sum(map(len, lib.load().values()))
  assert held > 700


def test_words_that_are_in_no_token_are_left_out(small):
  _, _, lexicon = small
  assert lexicon.split == {"first": [], "rest": ["the", "wzzz"]}
  expected = np.zeros((2, 22), bool)
  expected[0, :5] = expected[1, 5:20] = True
  np.testing.assert_array_equal(lexicon.member, expected)


def test_a_category_of_few_words_is_refused(small):
  words, lexemes, _ = small
  few = {"few": {"waaa", "wbbb", "wccc", "wddd", "wzzz", "wyyy"}}
  with pytest.raises(
    ValueError, match=r"few: .* got 4 of 6; .* \['wyyy', 'wzzz'\]"
  ):
    lib.fit(words | few, lexemes)
  with pytest.raises(ValueError, match="categories of words, got none"):
    lib.fit({}, lexemes)


def test_chances_are_those_by_hand(small):
  _, lexemes, lexicon = small
  families = np.array(
    [
      [0, 1, 5, 6],
      [0, 1, 2, 3],
      [5, 6, 7, 8],
      # Repeated, of no content, and none: no draws.
      [0, 0, 20, -1],
      [-1, -1, 21, 20],
    ]
  )
  found = lib.purity(families, lexicon, lexemes)
  np.testing.assert_array_equal(
    found.hits, [[2, 2], [4, 0], [0, 4], [1, 0], [0, 0]]
  )
  ways = math.comb(20, 4)
  two = sum(math.comb(5, h) * math.comb(15, 4 - h) for h in (2, 3, 4)) / ways
  other = sum(math.comb(15, h) * math.comb(5, 4 - h) for h in (2, 3, 4)) / ways
  expected = [
    [two, other],
    [math.comb(5, 4) / ways, 1],
    [1, math.comb(15, 4) / ways],
    [5 / 20, 1],
    [1, 1],
  ]
  np.testing.assert_allclose(found.p, expected, rtol=1e-10)
  for none in (families[4:], families[:0]):
    found = lib.purity(none, lexicon, lexemes)
    assert found.p.shape == found.hits.shape == (len(none), 2)
    assert (found.p == 1).all()


def test_chances_are_scipys(real):
  _, lexemes, lexicon = real
  rng = np.random.default_rng(0)
  content = content_families(lexemes)
  members = np.flatnonzero(lexicon.member.any(axis=0))
  pool = np.concatenate([rng.choice(content, 400), rng.choice(members, 100)])
  families = np.stack([rng.choice(pool, 25, replace=False) for _ in range(40)])
  found = lib.purity(families, lexicon, lexemes)
  for row, line in enumerate(families):
    drawn = set(line)
    for column, member in enumerate(lexicon.member):
      hits = len(drawn & set(np.flatnonzero(member)))
      assert found.hits[row, column] == hits
      chance = stats.hypergeom(len(content), member.sum(), len(drawn))
      p = chance.sf(hits - 1) if hits else 1
      np.testing.assert_allclose(found.p[row, column], p, rtol=1e-9)
  assert found.hits.max() > 2


def test_a_list_of_animals_is_called_animals(real):
  tokenizer, lexemes, lexicon = real
  ids = [
    tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
    for word in ANIMALS
  ]
  assert {len(i) for i in ids} == {1}
  families = lexemes.family[np.array(ids).T]
  found = lib.purity(families, lexicon, lexemes)
  category, p = lib.best(found)
  assert lexicon.names[category[0]] == "animals"
  assert p[0] < 1e-6
  assert found.hits[0, category[0]] == len(ANIMALS)


def test_families_drawn_at_random_are_of_no_category(real):
  _, lexemes, lexicon = real
  rng = np.random.default_rng(0)
  content = content_families(lexemes)
  families = np.stack(
    [rng.choice(content, 25, replace=False) for _ in range(500)]
  )
  found = lib.purity(families, lexicon, lexemes)
  assert (found.p < 0.05).mean() <= 0.08
  _, p = lib.best(found)
  assert (p < 0.05).mean() <= 0.08


def test_the_best_category_pays_for_the_choice():
  p = np.array([[0.02, 0.3, 1], [0.5, 0.4, 0.9], [1, 1, 1], [0.2, 0.1, 0.3]])
  category, corrected = lib.best(lib.Purity(p, np.zeros((4, 3), int)))
  np.testing.assert_array_equal(category, [0, -1, -1, 1])
  np.testing.assert_allclose(corrected, [0.06, 1, 1, 0.3])


def test_a_lexicon_of_another_vocabulary_is_refused(small):
  _, lexemes, lexicon = small
  other = dataclasses.replace(lexicon, member=lexicon.member[:, :-1])
  with pytest.raises(ValueError, match=r"of 22 families, got .* lexicon of 21"):
    lib.purity(np.zeros((1, 3), int), other, lexemes)
  with pytest.raises(ValueError, match=r"got \(3,\)"):
    lib.purity(np.zeros(3, int), lexicon, lexemes)
