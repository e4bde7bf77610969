"""Ablations against what they say they do, and against the model by hand."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from gemma_jax import models
from gemma_jax.metrics import (
  ABLATIONS,
  Resample,
  SpliceLosses,
  ablations,
  ce_recovered,
  document_interval,
  head_losses,
  splice_losses,
  spliced_cross_entropy,
)
from gemma_jax.metrics.ablation import Given, donors

READ, WRITE = "blocks.2.mlp_in", "blocks.2.mlp_out"
W, T = 4, 10
SITES = {"read": READ, "write": WRITE}

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture(scope="module")
def model(one_device):
  return models.load_model("random:gemma2-tiny", mesh=one_device)


@pytest.fixture(scope="module")
def text():
  """(tokens, mask, document): BOS, padding, a special token, 5 documents."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(4, 250, (W, T)).astype(np.int32)
  mask, document = np.ones((W, T), bool), np.zeros((W, T), np.int32)
  document[:] = np.array([7, 3, 3, 11])[:, None]
  document[0, 6:] = 3
  document[3, 5:] = 20
  tokens[:, 0], mask[:, 0] = 2, False
  tokens[2, 7:], mask[2, 7:], document[2, 7:] = 0, False, -1
  mask[1, 4] = False
  return tokens, mask, document


@pytest.fixture(scope="module")
def mean(model, text):
  _, found = model.forward(text[0], capture=(WRITE,))
  return np.asarray(found[WRITE])[text[1]].mean(0)


def half(x, y):
  return 0.5 * y


def losses(model, text, replacements, *, batch_size=W, **options):
  tokens, mask, document = text
  return splice_losses(
    model,
    tokens,
    mask,
    replacements,
    document=document,
    batch_size=batch_size,
    **SITES,
    **options,
  )


def by_hand(model, text, value=None, *, keep=True):
  """(ce, kl) per document in float64, with `value(y)` in WRITE's place."""
  tokens, mask, document = text
  where = jnp.asarray(mask if keep else np.ones_like(mask))[..., None]
  edits = {}
  if value is not None:
    edits = {WRITE: lambda y: jnp.where(where, value(y), y)}
  clean, _ = model.forward(tokens)
  logits, _ = model.forward(tokens, edits=edits)
  clean, logp = (
    special.log_softmax(np.asarray(a, np.float64), axis=-1)[:, :-1]
    for a in (clean, logits)
  )
  ce = -np.take_along_axis(logp, tokens[:, 1:, None], -1)[..., 0]
  kl = np.sum(np.exp(clean) * (clean - logp), -1)
  owner, counted = document[:, 1:], mask[:, 1:]
  ids = np.unique(owner[counted])
  return tuple(
    np.array([a[counted & (owner == i)].sum() for i in ids]) for a in (ce, kl)
  )


def chosen_by(seed, text):
  return donors(text[1], text[2], np.random.default_rng(seed))


def values_of(model, text, mean, seed):
  """name -> function of the site that does by hand what the ablation does."""
  where = chosen_by(seed, text)
  return {
    "zero": jnp.zeros_like,
    "mean": lambda y: jnp.broadcast_to(jnp.asarray(mean), y.shape),
    "resample": lambda y: y[where // T, where % T],
  }


@pytest.fixture(scope="module")
def got(model, text, mean):
  return losses(model, text, {"half": half} | ablations(mean, seed=5))


def test_there_are_three_ablations(mean):
  assert tuple(ablations(mean)) == ABLATIONS == ("zero", "mean", "resample")


def test_sums_by_document_are_those_of_the_logits(model, text, mean, got):
  assert got.documents.tolist() == [3, 7, 11, 20]
  counted = text[1][:, 1:]
  owner = text[2][:, 1:][counted]
  assert got.tokens.tolist() == [np.sum(owner == i) for i in got.documents]
  cases = {"clean": None, "half": lambda y: y / 2}
  for name, value in (cases | values_of(model, text, mean, 5)).items():
    ce, kl = by_hand(model, text, value)
    np.testing.assert_allclose(got.ce[name], ce, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(got.kl[name], kl, rtol=1e-3, atol=1e-5)
  assert len({round(float(ce.sum()), 3) for ce in got.ce.values()}) == 5


def test_masked_positions_are_replaced_only_if_asked(model, text, mean):
  found = losses(model, text, ablations(mean, seed=5), keep_unmasked=False)
  for name, value in values_of(model, text, mean, 5).items():
    ce, _ = by_hand(model, text, value, keep=False)
    np.testing.assert_allclose(found.ce[name], ce, rtol=1e-5, err_msg=name)
    kept, _ = by_hand(model, text, value)
    assert abs(ce.sum() - kept.sum()) > 1e-3


def test_numbers_are_ratios_of_sums_with_the_gap_beside_them(got):
  numbers = got.summary(resamples=200)
  means = {n: ce.sum() / got.tokens.sum() for n, ce in got.ce.items()}
  assert set(numbers) == {"clean", "half", *ABLATIONS}
  assert numbers["clean"]["ce"] == pytest.approx(means["clean"], rel=1e-12)
  for name in ("half", *ABLATIONS):
    own = numbers[name]
    assert own["ce"] == pytest.approx(means[name], rel=1e-12)
    delta = means[name] - means["clean"]
    assert own["delta_ce"] == pytest.approx(delta, rel=1e-9)
    assert own["kl"] == pytest.approx(got.kl[name].sum() / got.tokens.sum())
    assert own["tokens"] == got.tokens.sum()
    low, high = own["kl_interval"]
    assert 0 < low < own["kl"] < high
    assert ("ce_recovered" in own) == (name == "half")
  for name, own in numbers["half"]["ce_recovered"].items():
    gap = means[name] - means["clean"]
    assert own["gap"] == numbers[name]["delta_ce"]
    assert own["gap"] == pytest.approx(gap, rel=1e-9)
    expected = ce_recovered(means["clean"], means["half"], means[name])
    assert own["value"] == pytest.approx(expected, rel=1e-9)
    assert own["interval"] == document_interval(
      got.ce[name] - got.ce["half"],
      got.ce[name] - got.ce["clean"],
      resamples=200,
    )
  assert tuple(numbers["half"]["ce_recovered"]) == ABLATIONS


def test_a_ratio_of_means_is_not_a_mean_of_ratios(got):
  ratios = (got.ce["zero"] - got.ce["half"]) / (
    got.ce["zero"] - got.ce["clean"]
  )
  value = got.summary(resamples=50)["half"]["ce_recovered"]["zero"]["value"]
  assert abs(value - ratios.mean()) > 1e-3


def test_a_single_document_has_numbers_without_intervals(got):
  one = SpliceLosses(
    got.documents[:1],
    got.tokens[:1],
    {name: ce[:1] for name, ce in got.ce.items()},
    {name: kl[:1] for name, kl in got.kl.items()},
  )
  numbers = one.summary()
  assert numbers["clean"]["ce_interval"] is None
  assert numbers["half"]["delta_ce_interval"] is None
  assert numbers["half"]["kl_interval"] is None
  assert numbers["half"]["ce_recovered"]["mean"]["interval"] is None
  assert np.isfinite(numbers["half"]["ce_recovered"]["mean"]["value"])


def test_without_documents_windows_are_documents(model, text):
  tokens, mask, _ = text
  got = splice_losses(model, tokens, mask, {}, batch_size=3, **SITES)
  assert got.documents.tolist() == list(range(W))
  assert got.tokens.tolist() == mask[:, 1:].sum(1).tolist()
  expected = by_hand(model, (tokens, mask, np.arange(W)[:, None] + 0 * tokens))
  np.testing.assert_allclose(got.ce["clean"], expected[0], rtol=1e-5)


def test_the_older_function_gives_the_means(model, text, got):
  tokens, mask, _ = text
  replacements = {"half": half, "resample": Resample()}
  means = spliced_cross_entropy(
    model, tokens, mask, replacements, batch_size=W, **SITES
  )
  assert means["half"] == pytest.approx(got.means()["half"], rel=1e-6)
  assert set(means["resample"]) == {"ce", "kl", "tokens"}


def test_a_seed_decides_what_is_resampled_and_each_batch_is_drawn_anew(
  model, text
):
  tokens, mask, document = (np.concatenate([a, a]) for a in text)
  windows = np.arange(2 * W)[:, None] + 0 * document
  chosen = {"a": Resample(0), "b": Resample(0), "c": Resample(1)}
  ce = losses(model, (tokens, mask, windows), chosen).ce
  np.testing.assert_array_equal(ce["a"], ce["b"])
  assert np.abs(ce["a"] - ce["c"]).max() > 1e-4
  assert np.abs(ce["a"][:W] - ce["a"][W:]).max() > 1e-4
  np.testing.assert_allclose(ce["clean"][:W], ce["clean"][W:], rtol=1e-6)


def test_eight_devices_give_the_numbers_of_one(text, mean, got):
  spread = models.load_model("random:gemma2-tiny")
  tokens, mask, document = text
  pad = ((0, 8 - W), (0, 0))
  padded = np.pad(tokens, pad), np.pad(mask, pad), np.pad(document, pad)
  found = losses(spread, padded, ablations(mean, seed=5), batch_size=8)
  np.testing.assert_allclose(found.ce["mean"], got.ce["mean"], rtol=1e-5)
  # Padded windows take no draws away from those that count.
  first = donors(*padded[1:], np.random.default_rng(5))[:W]
  np.testing.assert_array_equal(first, chosen_by(5, text))
  np.testing.assert_allclose(
    found.ce["resample"], got.ce["resample"], rtol=1e-5
  )


def test_what_does_not_belong_together_is_refused(model, text):
  tokens, mask, document = text
  with pytest.raises(ValueError, match="choose another name"):
    losses(model, text, {"clean": half})
  with pytest.raises(ValueError, match="mask is"):
    losses(model, (tokens, mask[:, 1:], document), {})
  with pytest.raises(ValueError, match="document is"):
    losses(model, (tokens, mask, document[1:]), {})


# ---------------------------------------------------------------- given


@pytest.fixture(scope="module")
def halves(model, text):
  """What `half` makes of every window, and nothing of what does not count."""
  _, found = model.forward(text[0], capture=(WRITE,))
  return np.where(text[1][..., None], np.asarray(found[WRITE]) / 2, np.nan)


@pytest.mark.parametrize("batch_size", [3, 8])
def test_given_values_do_what_the_function_does_that_made_them(
  model, text, halves, got, batch_size
):
  own = {"half": Given(halves), "other": Given(np.roll(halves, 1, axis=-1))}
  found = losses(model, text, own, batch_size=batch_size)
  np.testing.assert_allclose(found.ce["half"], got.ce["half"], rtol=1e-5)
  np.testing.assert_allclose(found.kl["half"], got.kl["half"], rtol=1e-3)
  assert np.abs(found.kl["other"] - got.kl["half"]).min() > 1e-3


def test_values_of_other_windows_or_sites_are_refused(model, text, halves):
  message = rf"in all windows, .*\({W}, {T}, 48\)"
  for wrong in (halves[1:], halves[:, :-1], halves[..., 1:], halves[..., 0]):
    with pytest.raises(ValueError, match=message):
      losses(model, text, {"half": Given(wrong)})


# --------------------------------------------------------------- donors


def test_donors_count_and_are_of_other_documents(text):
  _, mask, document = text
  for seed in range(20):
    chosen = chosen_by(seed, text)
    assert mask.reshape(-1)[chosen].all()
    owner = document.reshape(-1)[chosen]
    assert (owner != document)[mask].all()


def test_every_token_of_another_document_is_drawn_alike():
  mask = np.array([[False, True, True, True, True, True]])
  document = np.array([[0, 0, 0, 1, 2, 2]])
  rng = np.random.default_rng(0)
  drawn = np.stack([donors(mask, document, rng)[0] for _ in range(6_000)])
  for position, others in enumerate(
    [[3, 4, 5], [3, 4, 5], [3, 4, 5], [1, 2, 4, 5], [1, 2, 3], [1, 2, 3]]
  ):
    found, counts = np.unique(drawn[:, position], return_counts=True)
    assert found.tolist() == others
    assert counts == pytest.approx(6_000 / len(others), rel=0.1)


def test_a_batch_of_one_document_gives_other_tokens():
  mask = np.array([[False, True, True, True]])
  rng = np.random.default_rng(0)
  same = np.zeros((1, 4), int)
  drawn = np.stack([donors(mask, same, rng)[0] for _ in range(200)])
  for position in (1, 2, 3):
    expected = sorted({1, 2, 3} - {position})
    assert np.unique(drawn[:, position]).tolist() == expected
  assert np.unique(drawn[:, 0]).tolist() == [1, 2, 3]


def test_a_token_alone_is_its_own_donor():
  rng = np.random.default_rng(0)
  alone = donors(np.array([[False, True]]), np.zeros((1, 2), int), rng)
  assert alone[0, 1] == 1
  none = donors(np.zeros((1, 3), bool), np.zeros((1, 3), int), rng)
  assert none.tolist() == [[0, 1, 2]]


# ------------------------------------------------------------------- KL


def test_kl_is_finite_where_probabilities_underflow():
  logits = np.array([[0.0, 400, -300, 3], [1, 2, 3, 4]], np.float32)
  other = np.array([[300.0, -400, 2, 1], [1, 2, 3, 4]], np.float32)
  with np.errstate(divide="ignore"):
    assert np.isinf(np.log(special.softmax(logits, axis=-1))).any()
  cfg = models.describe("random:llama-tiny")
  none = np.zeros(2, np.float32)
  clean = changed = head_losses._Sums(none - np.inf, none, none)
  # A head that passes on what it reads, in blocks of three tokens and one.
  for block in np.split(np.eye(4, dtype=np.float32), [3]):
    of_clean, clean = head_losses._pass_clean(cfg, logits, block, clean)
    changed = head_losses._pass(cfg, other, block, of_clean, changed)
  own = other[[0, 1], [1, 0]]
  ce, kl = np.asarray(head_losses._row_losses(own, clean, changed), np.float64)
  assert kl == pytest.approx([700, 0], rel=1e-6, abs=1e-6)
  assert ce == pytest.approx([700, 3.4401897], rel=1e-6)


def test_kl_of_a_model_whose_logits_are_far_apart_is_finite(text, one_device):
  sharp = models.load_model("random:gemma3-tiny", mesh=one_device)
  params = sharp.params | {"final_norm": sharp.params["final_norm"] + 1e3}
  object.__setattr__(sharp, "params", params)
  logits = np.asarray(sharp.forward(text[0])[0])
  with np.errstate(divide="ignore"):
    assert np.isinf(np.log(special.softmax(logits, axis=-1))).any()
  got = losses(sharp, text, {"half": half})
  ce, kl = by_hand(sharp, text, lambda y: y / 2)
  np.testing.assert_allclose(got.kl["half"], kl, rtol=1e-2, atol=0.1)
  np.testing.assert_allclose(got.ce["half"], ce, rtol=1e-3)
