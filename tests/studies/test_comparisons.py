"""Measures of two models, prompt by prompt, against the plain formulas."""

import types

import jax
import numpy as np
import pytest
from scipy import sparse

from gemma_jax import models
from gemma_jax.metrics import similarity
from studies import comparisons, next_tokens
from studies.comparisons import Side

COUNT = np.array([3, 5, 2, 4, 6, 3, 4, 5])
N, TOKENS = len(COUNT), int(COUNT.sum())
OTHER = np.array([1, 2, 3, 0, 5, 6, 7, 4])


@pytest.fixture(scope="module")
def model(one_device):
  return models.load_model("random:gemma2-tiny", mesh=one_device)


def side(model, seed, layers=4, width=24, latents=30, name="m"):
  rng = np.random.default_rng(seed)
  codes = np.maximum(rng.normal(size=(TOKENS, latents)) - 0.5, 0)
  return Side(
    types.SimpleNamespace(name=name, config=model.config),
    {n: x for n, x in model.params.items() if n != "blocks"},
    {
      "last": rng.normal(size=(TOKENS, model.config.width)).astype(np.float32),
      "count": COUNT,
      "pooled": rng.normal(size=(layers, N, width)).astype(np.float32),
      "codes": [sparse.csr_array(codes)],
    },
    [f"answer {i * (seed + 1)}" for i in range(N)],
    {n: rng.uniform(1, 2, N) for n in "ab"},
    {n: rng.uniform(3, 4, N) for n in "ab"},
  )


@pytest.fixture(scope="module")
def pair(model):
  return side(model, 0, name="a"), side(model, 1, layers=7, width=9, name="b")


def compare(a, b, wanted, **changes):
  options = {"other": OTHER, "neighbours": 3} | changes
  return comparisons.compare(a, b, wanted, **options)


def text_means(values):
  return [part.mean() for part in np.split(values, np.cumsum(COUNT)[:-1])]


def test_distributions_are_means_over_tokens_of_the_plain_measures(pair):
  a, b = pair
  names = ("kl", "jsd", "top1_agreement", "rbo", "topk_overlap", "hellinger")
  found = compare(a, b, names)
  logits = [
    models.unembed(s.subject.config, s.head, s.reading["last"]) for s in pair
  ]
  for name in names:
    plain = np.asarray(getattr(similarity, name)(*logits))
    np.testing.assert_allclose(
      found[name].values, text_means(plain), rtol=1e-5, atol=1e-6
    )
  starts = np.cumsum(COUNT) - COUNT
  order = [
    starts[j] + t % COUNT[j]
    for i, j in enumerate(OTHER)
    for t in range(COUNT[i])
  ]
  plain = np.asarray(similarity.jsd(logits[0], logits[1][np.array(order)]))
  np.testing.assert_allclose(found["jsd"].null, text_means(plain), rtol=1e-5)


def test_few_tokens_are_spread_over_each_text():
  text, first, second = next_tokens.token_rows(np.array([5, 1, 9]), None, 3)
  assert text.tolist() == [0, 0, 0, 1, 2, 2, 2]
  assert first.tolist() == [0, 2, 4, 5, 6, 10, 14]
  assert second.tolist() == first.tolist()
  other = np.array([1, 2, 0])
  _, _, second = next_tokens.token_rows(np.array([5, 1, 9]), other, 3)
  assert second.tolist() == [5, 5, 5, 6, 0, 4, 3]


def test_means_over_few_tokens(pair):
  found = next_tokens.distributions(*pair, ("jsd",), tokens=2)["jsd"]
  every = next_tokens.distributions(*pair, ("jsd",))["jsd"]
  assert not np.allclose(found, every)
  two = COUNT == 2
  np.testing.assert_allclose(found[two], every[two], rtol=1e-5)


def test_a_longer_embedding_adds_no_tokens(pair):
  a, b = pair
  longer = dict(b.head)
  spare = np.ones((7, b.head["embed"].shape[1]), np.float32) * 9
  longer["embed"] = jax.numpy.concatenate([b.head["embed"], spare])
  other = Side(**{**vars(b), "head": longer})
  found = compare(a, other, ("jsd",))["jsd"].values
  plain = compare(a, b, ("jsd",))["jsd"].values
  np.testing.assert_allclose(found, plain, rtol=1e-5)


def test_cross_likelihood_takes_each_models_bits_of_both(pair):
  a, b = pair
  found = compare(a, b, ("cross_likelihood",))["cross_likelihood"]
  plain = (a.bits["b"] - a.bits["a"] + b.bits["a"] - b.bits["b"]) / 2
  np.testing.assert_allclose(found.values, plain)
  plain = (
    a.bits_other["b"] - a.bits["a"] + b.bits_other["a"] - b.bits["b"]
  ) / 2
  np.testing.assert_allclose(found.null, plain)


def test_texts_are_those_of_the_prompt_and_of_the_other(pair):
  a, b = pair
  found = compare(a, b, ("chrf",))["chrf"]
  assert found.values[2] == similarity.chrf(a.answers[2], b.answers[2])
  assert found.null[2] == similarity.chrf(a.answers[2], b.answers[OTHER[2]])


def test_cka_of_all_layers_of_equal_depth(pair):
  a, b = pair
  x, y = a.reading["pooled"], b.reading["pooled"]
  assert comparisons.depth_pairs(4, 7) == [(0, 0), (1, 2), (2, 4), (3, 6)]
  assert comparisons.depth_pairs(7, 4) == [(0, 0), (2, 1), (4, 2), (6, 3)]
  assert comparisons.depth_pairs(1, 3) == [(0, 2)]
  found = compare(a, b, ("linear_cka", "mutual_knn", "rsa"))
  for name, tolerance in (("linear_cka", 0.3), ("mutual_knn", 1e-9)):
    measure = {
      "linear_cka": similarity.linear_cka,
      "mutual_knn": lambda x, y: similarity.mutual_knn(
        x - x.mean(0), y - y.mean(0), k=3
      ),
    }[name]
    plain = np.mean(
      [measure(x[i], y[j]) for i, j in comparisons.depth_pairs(4, 7)]
    )
    assert found[name].values.mean() == pytest.approx(plain, abs=tolerance)
  assert found["rsa"].values.shape == (N,)


def test_a_model_is_identical_to_itself_by_every_measure(pair):
  a, _ = pair
  wanted = [n for n in comparisons.DEFINITIONS if n != "cross_likelihood"]
  for name, one in compare(a, a, wanted).items():
    identity = 0 if name in comparisons.DISTANCES else 1
    np.testing.assert_allclose(one.values, identity, atol=1e-5, err_msg=name)
    if one.null is not None:
      assert abs(one.null.mean() - identity) > 0.02, name


def test_latents_overlap_token_by_token(pair):
  a, b = pair
  found = compare(a, b, ("jaccard",))["jaccard"]
  x, y = (s.reading["codes"][0] for s in pair)
  plain = similarity.token_overlaps(x, y)
  np.testing.assert_allclose(found.values, text_means(plain))


def test_tokens_without_latents_are_left_out(pair):
  a, b = pair
  codes = [s.reading["codes"][0].toarray() for s in pair]
  for code in codes:
    code[: COUNT[0]] = 0  # the first text has none at all
    code[COUNT[0]] = 0  # the second text's first token
  a, b = (
    Side(
      **{**vars(s), "reading": {**s.reading, "codes": [sparse.csr_array(c)]}}
    )
    for s, c in zip(pair, codes, strict=True)
  )
  found = compare(a, b, ("jaccard",))["jaccard"].values
  plain = similarity.token_overlaps(*codes)
  assert found[0] == 0
  assert found[1] == pytest.approx(plain[COUNT[0] + 1 : COUNT[:2].sum()].mean())


def test_maps_and_the_chance_of_layers_of_equal_depth(pair):
  x = np.random.default_rng(5).normal(size=(3, 30, 8))
  rotation = np.linalg.qr(np.random.default_rng(6).normal(size=(8, 8)))[0]
  maps = comparisons.layer_maps(
    x,
    x @ rotation,
    neighbours=4,
    draws=39,
    alpha=0.05,
    blocks=["a"] * 15 + ["b"] * 15,
  )
  for name in ("linear_cka", "mutual_knn"):
    np.testing.assert_allclose(maps[name].scores.diagonal(), 1, atol=1e-6)
    assert maps[name].p.diagonal() == pytest.approx([1 / 40] * 3)
    off = ~np.eye(3, dtype=bool)
    assert (maps[name].p[off] > 1 / 40).all()
    chance, p = comparisons._chance(maps, name, x, x)
    assert p == 1 / 40
    assert abs(chance) < 0.3
  assert comparisons._chance(None, "linear_cka", x, x) is None


def test_exchange_moves_prompts_within_their_capability_only():
  blocks = ["a", "b", "a", "b", "a", "b"]
  seen = []

  def of_order(order):
    seen.append(order.copy())
    return float((order == np.arange(6)).mean())

  mean, p = comparisons.exchange(of_order, blocks=blocks, draws=200, seed=0)
  assert seen[0].tolist() == list(range(6))
  for order in seen:
    assert sorted(order[::2]) == [0, 2, 4]
    assert sorted(order[1::2]) == [1, 3, 5]
  # Of 3! x 3! orders one is the observed; a third of places stays in the mean.
  assert p == pytest.approx(1 / 36, abs=0.04)
  assert mean == pytest.approx(1 / 3, abs=0.05)


def test_the_measure_that_decides_is_the_first_that_is_defined():
  wanted = ("cross_likelihood", "linear_cka", "code_cka")
  assert comparisons.primary(wanted) == set(wanted)
  assert comparisons.primary((*wanted, "jsd", "jaccard")) == {
    "jsd",
    "linear_cka",
    "jaccard",
  }
  assert {comparisons.level(n) for n in comparisons.DEFINITIONS} == set(
    comparisons.LEVELS
  )
