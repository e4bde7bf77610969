import numpy as np
import pytest
import scipy.sparse

from gemma_jax.probing import sparse
from gemma_jax.probing.labels import Labels, label, rows

NO_YES = ("no", "yes")


def _documents(rows, each=50):
  return np.arange(rows) // each


def _noise(rng, rows, width, density=0.1):
  return scipy.sparse.random(
    rows, width, density, format="csr", rng=rng, dtype=np.float32
  )


def _with(z, columns):
  """Latents with some columns replaced: {column: values}."""
  z = z.toarray()
  for j, values in columns.items():
    z[:, j] = values
  return scipy.sparse.csr_matrix(z)


def test_a_latent_that_is_the_label_is_found_and_scores_one():
  rng = np.random.default_rng(0)
  y = rng.random(2_000) < 0.1
  z = _with(_noise(rng, 2_000, 40), {17: 3.0 * y})
  found = sparse.probe(
    z, {"digit": Labels(y.astype(int), NO_YES)}, _documents(2_000)
  )
  assert found.tasks == ("digit=yes",)
  assert found.latents[1].tolist() == [[17]]
  for k in (1, 2, 5):
    assert found.latents[k][0, 0] == 17
    for metric in sparse.METRICS:
      assert found.scores[f"latents_k{k}"][metric][0] == 1, (k, metric)


def test_latents_that_know_nothing_score_a_half():
  rng = np.random.default_rng(1)
  labels = {
    f"l{i}": Labels((rng.random(4_000) < 0.3).astype(int), NO_YES)
    for i in range(40)
  }
  z, raw = _noise(rng, 4_000, 60), rng.standard_normal((4_000, 8))
  found = sparse.probe(z, labels, _documents(4_000), raw=raw)
  tested = found.counts[0, 2:]
  # Of an AUC under the null, Mann and Whitney 1947.
  sd = np.sqrt((tested.sum() + 1) / (12 * tested.prod()))
  for method in ("latents_k5", "raw", "raw_k2", "random_k5"):
    for metric in ("auc", "balanced_accuracy"):
      scores = found.scores[method][metric]
      assert scores.shape == (40,)
      assert abs(scores.mean() - 0.5) < 4 * sd / np.sqrt(40), (method, metric)
      assert np.abs(scores - 0.5).max() < 5 * sd, (method, metric)


def test_two_latents_are_needed_where_the_label_is_in_two():
  rng = np.random.default_rng(2)
  part = rng.integers(0, 4, 2_000)
  y = part < 2
  z = _with(_noise(rng, 2_000, 30), {3: 2.0 * (part == 0), 8: part == 1})
  found = sparse.probe(
    z, {"d": Labels(y.astype(int), NO_YES)}, _documents(2_000)
  )
  assert set(found.latents[2][0]) == {3, 8}
  share = np.mean(part[y] == 0)
  one = found.scores["latents_k1"]["balanced_accuracy"][0]
  assert one == pytest.approx((share + 1) / 2, abs=0.03)
  assert found.scores["latents_k2"]["balanced_accuracy"][0] == 1


def test_a_latent_that_fires_everywhere_else_will_do():
  rng = np.random.default_rng(9)
  y = rng.random(2_000) < 0.3
  z = _with(_noise(rng, 2_000, 30), {11: 1.0 * ~y})
  found = sparse.probe(
    z, {"d": Labels(y.astype(int), NO_YES)}, _documents(2_000)
  )
  assert found.latents[1].tolist() == [[11]]
  assert found.scores["latents_k1"]["auc"][0] == 1


def test_selection_takes_the_largest_difference_of_means():
  rng = np.random.default_rng(3)
  z = _noise(rng, 500, 20, 0.3)
  y, valid = rng.random((2, 3, 500)) < 0.5
  got = sparse.mean_difference(z, y, valid)
  dense = z.toarray()
  for s in range(3):
    expected = dense[valid[s] & y[s]].mean(0) - dense[valid[s] & ~y[s]].mean(0)
    np.testing.assert_allclose(got[s], expected, rtol=1e-5, atol=1e-7)
  np.testing.assert_allclose(got, sparse.mean_difference(dense, y, valid))
  columns = np.array([[1, 4], [4, 0], [19, 19]])
  np.testing.assert_array_equal(
    sparse.gather(z, columns), dense[:, columns].transpose(1, 0, 2)
  )


def test_baselines_see_what_is_in_the_raw_vector():
  rng = np.random.default_rng(4)
  raw = rng.standard_normal((3_000, 10))
  raw[:, 0] *= 1_000  # massive, and says nothing
  oblique = raw[:, 1:].sum(1) > 0
  aligned = raw[:, 4] > 0.5
  labels = {
    "oblique": Labels(oblique.astype(int), NO_YES),
    "aligned": Labels(aligned.astype(int), NO_YES),
  }
  z = _noise(rng, 3_000, 400)
  found = sparse.probe(z, labels, _documents(3_000), raw=raw)
  auc = {method: scores["auc"] for method, scores in found.scores.items()}
  assert (auc["raw"] > 0.99).all()
  assert auc["raw_k1"][1] > 0.99
  assert auc["raw_k1"][0] < 0.75
  assert 0.6 < auc["random_k5"][1] < 0.99
  assert auc["latents_k5"].max() < 0.6
  constant = found.scores["constant"]
  np.testing.assert_array_equal(constant["auc"], 0.5)
  np.testing.assert_array_equal(constant["balanced_accuracy"], 0.5)
  share = found.counts[:, 2] / found.counts[:, 2:].sum(1)
  np.testing.assert_allclose(constant["f1"], 2 * share / (1 + share))


def test_a_probe_is_tested_on_other_documents():
  """What only tells documents apart is worth nothing on new ones."""
  rng = np.random.default_rng(5)
  documents = _documents(4_000, 40)
  own = rng.random(100) < 0.5  # each document has one class
  y = own[documents]
  z = scipy.sparse.csr_matrix(np.eye(100, dtype=np.float32)[documents])
  found = sparse.probe(
    z, {"code": Labels(y.astype(int), NO_YES)}, documents, ks=(5, 50)
  )
  assert found.scores["latents_k50"]["auc"][0] == pytest.approx(0.5)


def test_every_class_is_a_task_and_rare_ones_are_dropped_with_a_reason():
  rng = np.random.default_rng(6)
  values = rng.choice(4, 2_000, p=[0.5, 0.3, 0.198, 0.002])
  values[rng.random(2_000) < 0.25] = -1
  labels = {"script": Labels(values, ("a", "b", "c", "d"))}
  z = _with(_noise(rng, 2_000, 20), {5: 1.0 * (values == 1)})
  found = sparse.probe(z, labels, _documents(2_000))
  assert found.tasks == tuple(f"script={c}" for c in "abcd")
  assert found.counts[:3].sum(1).tolist() == [np.sum(values >= 0)] * 3
  for i, c in enumerate(range(4)):
    assert found.counts[i, [0, 2]].sum() == np.sum(values == c)
  assert list(found.dropped) == ["script=d"]
  assert "needs 20 of each" in found.dropped["script=d"]
  auc = found.scores["latents_k1"]["auc"]
  assert auc[1] == 1
  assert np.isnan(auc).tolist() == [False, False, False, True]
  assert found.latents[1][3].tolist() == [-1]


def test_seeds_change_the_split_and_nothing_else_does():
  rng = np.random.default_rng(7)
  y = rng.random(1_000) < 0.4
  z = _with(_noise(rng, 1_000, 20), {2: y * rng.random(1_000)})
  labels = {"d": Labels(y.astype(int), NO_YES)}
  raw = rng.standard_normal((1_000, 5))

  def scores(seed):
    found = sparse.probe(z, labels, _documents(1_000), raw=raw, seed=seed)
    return [v for m in found.scores.values() for v in m["auc"]]

  assert scores(0) == scores(0)
  assert scores(0) != scores(1)


def test_a_label_of_real_text_is_read_from_a_latent_that_is_it(smollm2):
  import pydoc_data.topics

  names = (
    "strings",
    "lambda",
    "typesseq",
    "context-managers",
    "operator-summary",
  )
  texts = [pydoc_data.topics.topics[name][:3_000] for name in names]
  ids = [smollm2(text, add_special_tokens=False)["input_ids"] for text in texts]
  length = min(map(len, ids))
  tokens = np.array([i[:length] for i in ids])
  mask = np.ones(tokens.shape, bool)
  mask[:, 0] = False
  found = rows(label(tokens, mask, smollm2), mask)
  documents = np.broadcast_to(np.arange(5)[:, None], mask.shape)[mask]
  t = found["first_letter"].values == 19
  z = _with(_noise(np.random.default_rng(0), t.size, 10), {4: 1.0 * t})
  result = sparse.probe(z, found, documents, test_fraction=0.4, min_count=10)
  scores = dict(
    zip(result.tasks, result.scores["latents_k1"]["auc"], strict=True)
  )
  assert scores["first_letter=t"] == 1
  assert {"digit=yes", "starts_word=yes", "repeated=yes"} <= scores.keys()
  assert 0.4 < scores["repeated=yes"] < 0.6


def test_what_cannot_be_probed_is_refused():
  rng = np.random.default_rng(8)
  z = _noise(rng, 400, 10)
  y = Labels((rng.random(400) < 0.5).astype(int), NO_YES)
  documents = _documents(400)
  with pytest.raises(ValueError, match=r"none of 1 \(d=yes: 0 positives"):
    sparse.probe(z, {"d": Labels(y.values * 0, NO_YES)}, documents)
  # Two documents, each of one class.
  halves = Labels(np.arange(400) // 200, NO_YES)
  with pytest.raises(ValueError, match="hold both classes"):
    sparse.probe(z, {"d": halves}, halves.values)
  with pytest.raises(ValueError, match="at least 2 documents, got 1"):
    sparse.probe(z, {"d": y}, documents * 0)
  with pytest.raises(ValueError, match=r"k in \[1, 10\]"):
    sparse.probe(z, {"d": y}, documents, ks=(1, 11))
  with pytest.raises(ValueError, match="latents of 300 rows"):
    sparse.probe(z, {"d": y}, documents[:300])
  with pytest.raises(ValueError, match=r"'d' of shape \[400\], got \(399,\)"):
    sparse.probe(z, {"d": Labels(y.values[1:], NO_YES)}, documents)
  with pytest.raises(ValueError, match="at least one label"):
    sparse.probe(z, {}, documents)
  with pytest.raises(ValueError, match=r"raw \[400, D\]"):
    sparse.probe(z, {"d": y}, documents, raw=np.zeros((399, 2)))
  with pytest.raises(FloatingPointError, match="Raw"):
    sparse.probe(z, {"d": y}, documents, raw=np.full((400, 2), np.nan))
  with pytest.raises(TypeError, match=r"csr_matrix.*ndarray"):
    sparse.probe(z.toarray(), {"d": y}, documents)
  bad = _with(z, {6: np.where(np.arange(400) == 9, np.nan, 0)})
  with pytest.raises(FloatingPointError, match=r"1 activations.*\[6\]"):
    sparse.probe(bad, {"d": y}, documents)
