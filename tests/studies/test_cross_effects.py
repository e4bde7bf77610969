"""Effects of matched latents, on tiny models where they are known."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from gemma_jax import models
from gemma_jax.alignment import Map
from gemma_jax.dictionaries import Dictionary
from gemma_jax.dictionaries.config import DictionaryConfig
from gemma_jax.models.head import head
from studies import (
  cross_effects,
  cross_fingerprints,
  cross_injection,
  cross_places,
  cross_substitution,
)

CONFIG = {
  "documents": 6,
  "context": 20,
  "batch_size": 4,
  "unit": 4,
  "start": 6,
  "positions": 24,
  "set": 10,
  "doses": [1.0, 4.0],
  "counts": [3, 99],
  "draws": 199,
  "resamples": 200,
}
D, M, W, T = 48, 40, 6, 20

pytestmark = pytest.mark.usefixtures("quick_compiles")


def dictionary(scale):
  """Latents that fire on about a quarter of what a random model has."""
  rng = np.random.default_rng(7)
  params = {
    "W_enc": rng.standard_normal((D, M)) * scale / D**0.5,
    "b_enc": np.full(M, -0.8),
    "W_dec": rng.standard_normal((M, D)),
    "b_dec": np.zeros(D),
  }
  config = DictionaryConfig(
    d_in=D,
    d_out=D,
    width=M,
    activation="relu",
    k=None,
    prefix_widths=(M,),
    read="blocks.2.resid_post",
    write="blocks.2.resid_post",
  )
  return Dictionary(
    config, {n: jnp.asarray(a, jnp.float32) for n, a in params.items()}
  )


def made(name, mesh, scale):
  """A document in each window, whose tokens are places but for some."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(4, 900, (W, T)).astype(np.int32)
  tokens[:, 0] = 2
  mask = np.ones((W, T), bool)
  mask[:, 0] = mask[2, 11] = False
  positions = [np.sort(rng.permutation(T - 4)[:14]) + 3 for _ in range(W)]
  document = np.repeat(np.arange(W), 14)
  return cross_places.Side(
    models.load_model(f"random:{name}", mesh=mesh),
    dictionary(scale),
    tokens,
    mask,
    np.stack([document, np.concatenate(positions)], axis=1),
    document,
  )


@pytest.fixture(scope="module")
def side(one_device):
  return made("gemma3-tiny", one_device, 0.5)


@pytest.fixture(scope="module")
def llama(one_device):
  """Of a width, a tokenizer and a text like the other's; all else differs."""
  return made("llama-tiny", one_device, 1.0)


def site(side):
  _, found = side.model.forward(side.tokens, capture=(side.site,))
  return np.asarray(found[side.site])


def log_probs(side, change=0.0):
  """[W, T, V] with a change [W, T, D] of the site, in float64."""
  edits = {side.site: models.edits.add(jnp.asarray(change))}
  logits, _ = side.model.forward(side.tokens, edits=edits)
  return special.log_softmax(np.asarray(logits, np.float64), axis=-1)


def divergence(side, change):
  """KL(clean || changed), [W, T]."""
  before, after = log_probs(side), log_probs(side, change)
  return np.sum(np.exp(before) * (before - after), axis=-1)


def codes(side, latents):
  """At the places, float64 [P, K]."""
  z = np.asarray(side.dictionary.encode(site(side)), np.float64)
  return z[*side.at.T][:, latents]


def kl_by_label(side, kl, label):
  """Sums and counts over predicted tokens up to the next place, by loops."""
  sums, counts = np.zeros(max(label) + 1), np.zeros(max(label) + 1)
  for w in range(W):
    here = side.at[:, 0] == w
    places = list(zip(side.at[here, 1], label[here], strict=True))
    for t in range(1, T):
      owner = next((own for at, own in places if at >= t), None)
      if side.mask[w, t] and owner is not None:
        sums[owner] += kl[w, t - 1]
        counts[owner] += 1
  return sums, counts


# ---------------------------------------------------------------- fingerprints


@pytest.fixture(scope="module")
def prints(side):
  return cross_fingerprints.fingerprints(side, np.arange(12), CONFIG)


def test_a_fingerprint_is_kl_by_unit_of_text(side, prints):
  # 14 places of a document in 3 parts.
  assert prints.places.tolist() == [5, 5, 4] * W
  unit = np.repeat(np.arange(3 * W), prints.places)
  z = np.asarray(side.dictionary.encode(site(side)))
  for latent in (0, 5):
    code = np.where(side.mask, z[..., latent], 0)
    row = side.decoder([latent])[0]
    expected, _ = kl_by_label(
      side, divergence(side, -code[..., None] * row), unit
    )
    np.testing.assert_allclose(
      prints.kl[latent], expected, rtol=1e-3, atol=1e-5
    )
    fired, _ = kl_by_label(side, np.roll(code > 0, -1, axis=1), unit)
    assert prints.fired[latent].tolist() == fired.tolist()
  assert prints.kl.max() > 0.01


def test_the_same_latents_matter_in_the_same_places(prints):
  found = cross_fingerprints.compare_fingerprints(prints, prints, CONFIG, 0)
  assert (found["latents"], found["silent"], found["units"]) == (12, 0, 3 * W)
  assert found["matched"] == pytest.approx(1)
  assert found["low"] == pytest.approx(1)
  assert found["active"] == pytest.approx(1)
  assert found["p"] == found["p_similar"] == 1 / (CONFIG["draws"] + 1)
  values = prints.kl / prints.places
  off = np.corrcoef(values)[~np.eye(12, dtype=bool)]
  assert found["null"] == pytest.approx(off.mean())
  assert found["null"] < 0.7
  # Two groups of six, by tokens on which they fire.
  order = np.argsort(prints.fired.sum(1), kind="stable")
  inside = [np.corrcoef(values[some]) for some in (order[:6], order[6:])]
  expected = np.mean([r[~np.eye(6, dtype=bool)].mean() for r in inside])
  assert found["similar"] == pytest.approx(expected)


def test_latents_of_other_matches_do_not(prints):
  turned = cross_fingerprints.Fingerprints(
    np.roll(prints.kl, 5, axis=0), np.roll(prints.fired, 5, 0), prints.places
  )
  found = cross_fingerprints.compare_fingerprints(prints, turned, CONFIG, 0)
  assert found["p"] > 0.01
  assert found["matched"] < 0.7
  assert found["low"] < found["matched"] < found["high"]


def test_units_in_which_neither_fires_do_not_count_as_active(prints):
  """Alike where they are silent, unlike where they fire."""
  rng = np.random.default_rng(0)
  fired = np.zeros_like(prints.fired)
  fired[:, :4] = 1
  a, b = (fired * (5 + rng.random(fired.shape)) for _ in range(2))
  found = cross_fingerprints.compare_fingerprints(
    *(prints._replace(kl=kl * prints.places, fired=fired) for kl in (a, b)),
    CONFIG,
    0,
  )
  assert found["matched"] > 0.9
  assert abs(found["active"]) < 0.5
  assert found["active_latents"] == 12


def test_silent_latents_are_left_out(prints):
  quiet = prints.fired.copy()
  quiet[3] = 0
  found = cross_fingerprints.compare_fingerprints(
    prints, prints._replace(fired=quiet), CONFIG, 0
  )
  assert (found["latents"], found["silent"]) == (11, 1)
  with pytest.raises(ValueError, match="2 matches that fire in both"):
    cross_fingerprints.compare_fingerprints(
      prints, prints._replace(fired=0 * quiet), CONFIG, 0
    )
  with pytest.raises(ValueError, match="on the same text"):
    cross_fingerprints.compare_fingerprints(
      prints, prints._replace(places=prints.places + 1), CONFIG, 0
    )


# ------------------------------------------------------------------------- cut


def test_a_cut_keeps_the_same_places_of_the_first_documents(side, llama):
  shifted = dataclasses.replace(
    llama, at=np.stack([llama.at[::-1, 0], llama.at[:, 1]], axis=1)
  )
  config = CONFIG | {"documents": 3, "context": 12}
  a, b, kept = cross_places.cut(side, shifted, config)
  assert kept.tolist() == [
    d < 3 and t < 12 for d, t in zip(side.document, side.at[:, 1], strict=True)
  ]
  for one, whole in ((a, side), (b, shifted)):
    assert one.tokens.shape == one.mask.shape == (3, 12)
    there = whole.at[kept]
    assert (one.tokens[*one.at.T] == whole.tokens[*there.T]).all()
    assert (one.mask[*one.at.T] == whole.mask[*there.T]).all()
    assert (one.document == whole.document[kept]).all()
  other = dataclasses.replace(llama, document=llama.document + 1)
  with pytest.raises(ValueError, match="the same places"):
    cross_places.cut(side, other, config)
  with pytest.raises(ValueError, match="got none"):
    cross_places.cut(side, llama, config | {"context": 2})


def test_models_are_compared_on_the_same_units(side, llama, prints):
  a, b, _ = cross_places.cut(side, llama, CONFIG | {"documents": 3})
  few, other = (
    cross_fingerprints.fingerprints(one, np.arange(6), CONFIG) for one in (a, b)
  )
  np.testing.assert_allclose(few.kl, prints.kl[:6, :9], rtol=1e-3, atol=1e-5)
  assert (few.fired == prints.fired[:6, :9]).all()
  # Random models have nothing in common.
  found = cross_fingerprints.compare_fingerprints(few, other, CONFIG, 0)
  assert abs(found["matched"]) < 0.4
  assert found["p"] > 0.05


@pytest.mark.parametrize(
  ("config", "message"),
  [
    ({"write": "blocks.2.mlp_out"}, "an SAE of one resid_post"),
    ({"read": "blocks.2.mlp_in", "write": "blocks.2.mlp_in"}, "an SAE of one"),
    ({"layer_norm": True}, "without layer_norm"),
    ({"d_in": 8, "d_out": 8}, "the model's width, 48"),
  ],
)
def test_other_dictionaries_are_refused(side, config, message):
  own = side.dictionary
  changed = dataclasses.replace(own.config, **config)
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(side, dictionary=Dictionary(changed, own.params))


def test_places_that_are_not_of_the_windows_are_refused(side):
  with pytest.raises(ValueError, match=r"at \[P, 2\]"):
    dataclasses.replace(side, at=side.at[1:])
  with pytest.raises(ValueError, match="places by document"):
    dataclasses.replace(side, document=side.document[::-1])


# ------------------------------------------------------------------- injection


@pytest.fixture(scope="module")
def speaking(llama):
  """Latents whose decoder rows are the unembedding of tokens of their own."""
  rng = np.random.default_rng(1)
  sets = rng.permutation(900)[: 4 * CONFIG["set"]].reshape(4, -1)
  table = np.asarray(head(llama.model.config, llama.model.params))
  gain = np.asarray(llama.model.params["final_norm"])
  rows = np.asarray(llama.dictionary.params["W_dec"]).copy()
  rows[:4] = (table[sets].sum(1) - CONFIG["set"] * table.mean(0)) * gain
  own = Dictionary(
    llama.dictionary.config,
    llama.dictionary.params | {"W_dec": jnp.asarray(rows)},
  )
  return dataclasses.replace(llama, dictionary=own), sets


def injected(side, vectors, typical, **changes):
  rows = cross_injection.inject(
    side, np.arange(4), vectors, typical, CONFIG | changes, seed=3
  )
  return {(row["vector"], row["dose"]): row for row in rows}


@pytest.fixture(scope="module")
def injection(speaking):
  side, _ = speaking
  native = side.decoder(np.arange(4))
  typical = 5 / np.linalg.norm(native, axis=1)
  return injected(side, 7 * native, typical)


def test_a_vector_says_its_tokens_and_a_random_one_does_not(injection):
  native, moved, random, other = (
    [injection[name, dose] for dose in CONFIG["doses"]]
    for name in cross_injection.VECTORS
  )
  for one, two in zip(native, moved, strict=True):
    # The same direction of another length is as long.
    assert two["effect"] == pytest.approx(one["effect"], rel=1e-4)
    assert two["kl"] == pytest.approx(one["kl"], rel=1e-4)
    assert one["low"] <= one["effect"] <= one["high"]
    assert one["low"] > 0.2
    assert one["elsewhere"] < one["effect"] / 4
  assert native[1]["effect"] > 2 * native[0]["effect"]
  for control in (*random, *other):
    assert control["effect"] < native[0]["effect"] / 2
    assert control["kl"] > 0


def test_an_effect_is_the_mean_change_of_log_probabilities(speaking, injection):
  side, _ = speaking
  native = side.decoder(np.arange(4))
  where = side.mask & (np.arange(T) >= CONFIG["start"])
  everywhere = injected(
    side,
    native,
    5 / np.linalg.norm(native, axis=1),
    positions=W * T,
    doses=[2.0],
  )["native", 2.0]
  table = np.asarray(head(side.model.config, side.model.params))
  gain = np.asarray(side.model.params["final_norm"])
  before, effects, kls = log_probs(side), [], []
  for row in native:
    change = where[..., None] * 10 * row / np.linalg.norm(row)
    said = np.argsort(table @ (gain * row))[-CONFIG["set"] :]
    moved = log_probs(side, change.astype(np.float32)) - before
    effects.append(moved[where][:, said].mean())
    kls.append(-np.sum(np.exp(before) * moved, axis=-1)[where].mean())
  assert everywhere["effect"] == pytest.approx(np.mean(effects), rel=1e-4)
  assert everywhere["kl"] == pytest.approx(np.mean(kls), rel=1e-4)


def test_blocks_of_logits_are_only_a_matter_of_memory(
  speaking, injection, monkeypatch
):
  side, _ = speaking
  native = side.decoder(np.arange(4))
  monkeypatch.setattr(cross_injection, "LOGIT_ROWS", 9)
  got = injected(side, native, 5 / np.linalg.norm(native, axis=1))
  for key, row in injection.items():
    for name in ("effect", "elsewhere", "kl"):
      assert got[key][name] == pytest.approx(row[name], rel=1e-4, abs=1e-5)


def test_what_cannot_be_injected_is_refused(llama):
  vectors, typical = llama.decoder(np.arange(4)), np.ones(4)
  with pytest.raises(ValueError, match="typical activations"):
    injected(llama, vectors, typical[1:])
  with pytest.raises(ValueError, match="vectors"):
    injected(llama, vectors[:, 1:], typical)
  with pytest.raises(ValueError, match="got none in windows of 20"):
    injected(llama, vectors, typical, start=T)


def test_directions_go_through_the_linear_part_of_a_map(side):
  rng = np.random.default_rng(0)
  weights = rng.standard_normal((D, 32)).astype(np.float32)
  bias = np.ones(32, np.float32)
  got = cross_injection.transferred(side, [3, 1], Map(weights, bias, {}, "", 0))
  np.testing.assert_allclose(
    got, side.decoder([3, 1]) @ weights, rtol=1e-4, atol=1e-4
  )
  turned, nothing = (
    Map(w, bias, {}, "mean", 0) for w in (weights.T, 0 * weights)
  )
  with pytest.raises(ValueError, match="the other way round"):
    cross_injection.transferred(side, [3], turned)
  with pytest.raises(ValueError, match="got zeros of 'mean'"):
    cross_injection.transferred(side, [3], nothing)


# ---------------------------------------------------------------- substitution


def test_predictions_are_least_squares_lines_on_training_codes():
  rng = np.random.default_rng(0)
  a, b = rng.random((50, 4)), rng.random((50, 4))
  a[:, 3] = 0.3
  parts = [
    cross_substitution.code_sums(a[s], b[s]) for s in (slice(20), slice(20, 50))
  ]
  sums = cross_substitution.CodeSums(*map(np.add, *parts))
  new = rng.random((7, 4))
  got = cross_substitution.predict(sums, new, [2, 0, 3])
  assert got.shape == (7, 3)
  for k, source in enumerate((2, 0)):
    line = np.polyfit(a[:, source], b[:, k], 1)
    np.testing.assert_allclose(got[:, k], np.polyval(line, new[:, source]))
  np.testing.assert_allclose(got[:, 2], b[:, 2].mean())


@pytest.fixture(scope="module")
def substituted(side):
  """Codes of a that are lines of those of b, whose means are off."""
  latents = np.arange(8)
  own = codes(side, latents)
  sums = cross_substitution.code_sums(3 - 2 * own[:60], own[:60])
  rows = cross_substitution.substitute(
    side, latents, sums, 3 - 2 * own, own, CONFIG, seed=0
  )
  return {(row["count"], row["codes"]): row for row in rows}, own, sums


def test_exact_codes_recover_all_and_their_means_nothing(substituted):
  rows, _, _ = substituted
  assert {count for count, _ in rows} == {3, 8}
  for count in (3, 8):
    matched, dealt, mean, zero = (
      rows[count, name] for name in cross_substitution.CODES
    )
    assert matched["recovered"] == pytest.approx(1, abs=1e-3)
    assert matched["kl"] == pytest.approx(0, abs=1e-5)
    assert mean["recovered"] == mean["low"] == mean["high"] == 0
    assert mean["kl_low"] < mean["kl"] < mean["kl_high"]
    assert mean["kl"] > 0.01
    assert dealt["recovered"] < 0.6
    assert zero["low"] <= zero["recovered"] <= zero["high"] < 0.9
  assert rows[8, "mean"]["kl"] > rows[3, "mean"]["kl"]


def test_kl_is_that_of_the_codes_put_in_at_the_places(side, substituted):
  rows, own, sums = substituted
  for name, value in (("zero", 0), ("mean", sums.b[:3] / sums.count)):
    change = np.zeros((W, T, D), np.float32)
    change[*side.at.T] = (value - own[:, :3]) @ side.decoder(np.arange(3))
    kl, counts = kl_by_label(side, divergence(side, change), side.document)
    expected = kl.sum() / counts.sum()
    assert rows[3, name]["kl"] == pytest.approx(expected, rel=1e-3)


def test_codes_of_other_places_are_refused(side):
  own = codes(side, np.arange(3))
  sums = cross_substitution.code_sums(own, own)
  with pytest.raises(ValueError, match="cut says which places"):
    cross_substitution.substitute(
      side, [0, 1, 2], sums, own[1:], own, CONFIG, 0
    )
  few = CONFIG | {"counts": [1]}
  with pytest.raises(ValueError, match="2 matches or more"):
    cross_substitution.substitute(side, [0, 1, 2], sums, own, own, few, 0)


def test_every_number_is_defined(prints, injection, substituted):
  compared = cross_fingerprints.compare_fingerprints(prints, prints, CONFIG, 0)
  known = set(cross_effects.DEFINITIONS)
  for part, rows, labels in (
    ("fingerprints", [compared], {"latents", "units", "p_similar"}),
    ("inject", injection.values(), {"vector", "dose"}),
    ("substitution", substituted[0].values(), {"count", "codes"}),
  ):
    named = set().union(*rows) - labels
    named |= {row[n] for row in rows for n in ("vector", "codes") if n in row}
    ends = {n for n in named if n.endswith(("low", "high", "active_latents"))}
    assert {f"{part}.{name}" for name in named - ends} <= known
