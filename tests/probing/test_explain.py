import numpy as np
import pytest
import scipy.sparse

from gemma_jax.probing import explain
from gemma_jax.probing.labels import Labels

N, T, V = 60, 64, 30


@pytest.fixture(scope="module")
def text():
  """Random tokens in windows, one document each, with a label of three."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, V, (N, T))
  mask = np.ones((N, T), bool)
  mask[:, 0] = False
  labels = {"mod": Labels(tokens % 3, ("0", "1", "2"))}
  kinds = explain.candidates(tokens, mask, labels)
  documents = np.broadcast_to(np.arange(N)[:, None], (N, T))[mask]
  return kinds, documents


def _latents(*columns):
  return scipy.sparse.csr_matrix(np.stack(columns, axis=1).astype(np.float32))


def test_candidates_are_those_of_the_masked_positions():
  tokens = np.array([[5, 6, 7], [8, 9, 5]])
  mask = np.array([[1, 1, 0], [0, 1, 1]], bool)
  labels = {"odd": Labels(tokens % 2, ("even", "odd"))}
  kinds = explain.candidates(tokens, mask, labels)
  assert list(kinds) == ["token", "previous", "bigram", "odd"]
  np.testing.assert_array_equal(kinds["token"], [5, 6, 9, 5])
  np.testing.assert_array_equal(kinds["previous"], [-1, 5, 8, 9])
  expected = [-1, (5 << 32) + 6, (8 << 32) + 9, (9 << 32) + 5]
  np.testing.assert_array_equal(kinds["bigram"], expected)
  np.testing.assert_array_equal(kinds["odd"], [1, 0, 1, 1])


@pytest.mark.parametrize(
  ("kind", "value"), [("token", 4), ("previous", 9), ("mod", 2)]
)
def test_a_latent_that_is_a_rule_is_explained_by_it(text, kind, value):
  kinds, documents = text
  fires = kinds[kind] == value
  strength = fires * np.random.default_rng(1).uniform(1, 2, len(fires))
  found = explain.explain_latents(_latents(strength), kinds, documents, [0])
  ((rule,),) = found.rules
  assert (rule.kind, rule.value, rule.silent) == (kind, value, 0)
  assert found.auroc[0] == 1
  assert found.bits[0] < 0.25 < found.base_bits[0]
  assert found.base_bits[0] == pytest.approx(1)


def test_several_tokens_make_several_rules(text):
  kinds, documents = text
  fires = np.isin(kinds["token"], [1, 5, 22])
  found = explain.explain_latents(_latents(fires), kinds, documents, [0])
  (rules,) = found.rules
  assert {(r.kind, r.value) for r in rules} == {
    ("token", 1),
    ("token", 5),
    ("token", 22),
  }
  assert found.auroc[0] == 1


def test_a_bigram_is_preferred_where_neither_token_alone_will_do():
  rng = np.random.default_rng(2)
  tokens = rng.integers(0, 5, (40, 80))
  mask = np.ones(tokens.shape, bool)
  kinds = explain.candidates(tokens, mask, {})
  documents = np.repeat(np.arange(40), 80)
  fires = kinds["bigram"] == (3 << 32) + 1
  found = explain.explain_latents(_latents(fires), kinds, documents, [0])
  assert [(r.kind, r.value) for r in found.rules[0]] == [
    ("bigram", (3 << 32) + 1)
  ]
  assert found.auroc[0] == 1


def test_shuffled_latents_and_noise_are_at_chance(text):
  kinds, documents = text
  rng = np.random.default_rng(3)
  rows = len(documents)
  fires = [np.isin(kinds["token"], rng.choice(V, 3)) for _ in range(25)]
  z = _latents(*(f * rng.uniform(1, 2, rows) for f in fires))
  x = np.stack([kinds["token"] == v for v in range(V)], axis=1) * 1.0
  found = explain.explain_with_baselines(z, kinds, documents, range(25), x)
  latents, shuffled = found["latents"], found["shuffled"]
  assert (latents.auroc > 0.99).all()
  # Standard error of an AUROC of 100 against 100, over 25 latents: 0.008.
  assert abs(shuffled.auroc.mean() - 0.5) < 0.035
  assert (shuffled.bits > 0.98 * shuffled.base_bits).all()
  assert (latents.bits < 0.5 * latents.base_bits).all()
  assert latents.summary()["shorter"] == 1
  # One-hot activations: every random direction is a sum of tokens.
  assert (found["random"].auroc > 0.9).all()


def test_random_directions_in_activations_without_tokens_are_at_chance(text):
  kinds, documents = text
  rng = np.random.default_rng(4)
  rows = len(documents)
  x = rng.standard_normal((rows, 20))
  z = scipy.sparse.random(rows, 25, 0.05, format="csr", rng=rng)
  found = explain.explain_with_baselines(z, kinds, documents, range(25), x)
  assert abs(found["random"].auroc.mean() - 0.5) < 0.035


def test_rules_are_scored_on_other_documents():
  """What tells the documents of one half says nothing of the other."""
  documents = np.repeat(np.arange(40), 50)
  rng = np.random.default_rng(5)
  fires = (rng.random(40) < 0.5)[documents] * rng.random(len(documents))
  kinds = {"token": documents}
  found = explain.explain_latents(
    _latents(fires), kinds, documents, [0], top=500
  )
  assert len(found.rules[0]) >= 3
  assert found.auroc[0] == pytest.approx(0.5)
  assert found.bits[0] > found.base_bits[0]


def test_the_strongest_activations_decide(text):
  kinds, documents = text
  strong, weak = kinds["token"] == 3, kinds["token"] == 8
  z = _latents(10 * strong + weak)
  found = explain.explain_latents(z, kinds, documents, [0], top=20)
  assert [r.value for r in found.rules[0]] == [3]
  both = explain.explain_latents(z, kinds, documents, [0], top=1_000)
  assert {r.value for r in both.rules[0]} == {3, 8}


def test_bits_are_those_of_the_rule_and_of_what_it_leaves(text):
  kinds, documents = text
  rng = np.random.default_rng(6)
  fires = (kinds["mod"] == 1) & (rng.random(len(documents)) < 0.7)
  found = explain.explain_latents(
    _latents(fires), {"mod": kinds["mod"]}, documents, [0], top=10_000
  )
  (rule,) = found.rules[0]
  second = explain.split(documents, fraction=0.5, seed=0)
  n = fires[~second].sum()
  assert rule.fired == n
  # All that fires is in the rule; of the n silent ones, some are.
  p, q = (n + 1) / (n + rule.silent + 2), 1 / (n - rule.silent + 2)
  ones = fires[second].sum()
  cost = 1 + np.log2(3) + 1
  for silent in range(int(ones) + 1):  # how many of them the rule takes
    residual = -ones * np.log2(p) - silent * np.log2(1 - p)
    residual -= (ones - silent) * np.log2(1 - q)
    if (cost + residual) / (2 * ones) == pytest.approx(found.bits[0]):
      break
  else:
    pytest.fail("no count of silent tokens gives these bits")
  assert silent == pytest.approx(rule.silent / n * ones, rel=0.3)


def test_rare_latents_are_not_scored(text):
  kinds, documents = text
  rare = np.zeros(len(documents))
  rare[::250] = 1
  assert explain.split(documents, fraction=0.5, seed=0)[::250].sum() > 5
  dead = 0 * rare
  fine = kinds["token"] == 4
  found = explain.explain_latents(
    _latents(rare, dead, fine), kinds, documents, [2, 0, 1]
  )
  assert np.isnan(found.auroc).tolist() == [False, True, True]
  assert found.rules[1:] == ((), ())
  summary = found.summary()
  assert (summary["scored"], summary["unscored"]) == (1, 2)
  assert summary["auroc_p50"] == 1
  none = explain.explain_latents(_latents(dead), kinds, documents, [0])
  assert none.summary() == {"scored": 0, "unscored": 1}


def test_what_cannot_be_explained_is_refused(text):
  kinds, documents = text
  z = _latents(kinds["token"] == 4)
  with pytest.raises(ValueError, match="at least 2 documents"):
    explain.explain_latents(z, kinds, documents * 0, [0])
  with pytest.raises(ValueError, match="latents below 1, got 0 to 1"):
    explain.explain_latents(z, kinds, documents, [0, 1])
  with pytest.raises(ValueError, match=r"\{'token': \(10,\)\}"):
    explain.explain_latents(
      z, {**kinds, "token": kinds["token"][:10]}, documents, [0]
    )
  with pytest.raises(ValueError, match="got none"):
    explain.explain_latents(z, {}, documents, [0])
  with pytest.raises(FloatingPointError, match="not finite"):
    explain.explain_latents(z * np.nan, kinds, documents, [0])
