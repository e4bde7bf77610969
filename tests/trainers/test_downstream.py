"""What a model predicts with mapped activations, as a term of a training."""

from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax import activations, data, models
from gemma_jax.alignment.hypernetwork import Config, Route
from gemma_jax.alignment.paired import Side, pair_stores
from tests.trainers.pairs import interrupt, scale
from trainers import hypernetwork, loop
from trainers.downstream import Downstream, Text, kl

pytestmark = pytest.mark.usefixtures("quick_compiles")

SOURCES = {"gemma": "random:gemma3-tiny", "llama": "random:llama-tiny"}
SITE = "blocks.1.resid_post"
A, B = f"gemma:{SITE}", f"llama:{SITE}"
WAYS = ((A, B), (B, A))
# As many positions as blocks of logits do not divide, and more than a window
# of attention.
CONTEXT = 90
CONFIG = {
  "rank": 4,
  "width": 16,
  "embedding": 4,
  "frequencies": 1,
  "steps": 60,
  "batch_size": 64,
  "learning_rate": 3e-2,
  "weights": {"kl": 1.0},
  "sampled": 2,
  "buffer_rows": 512,
  "log_every": 20,
  "checkpoint_every": 20,
  "keep": 1,
  "kl_windows": 2,
}


@pytest.fixture(scope="module")
def loaded(one_device):
  return {
    name: models.load_model(source, mesh=one_device, dtype="float32")
    for name, source in SOURCES.items()
  }


@pytest.fixture(scope="module")
def found(loaded, tmp_path_factory):
  """The paired rows of both models, and the tokens of both."""
  where, patch = tmp_path_factory.mktemp("pairs"), pytest.MonkeyPatch()
  patch.setenv("GEMMA_JAX_CACHE", str(where / "cache"))
  documents = [
    data.Document(text[:300], "s", f"d{i}", f"{i}")
    for i, text in enumerate(list(topics.values())[:12])
  ]
  sides = []
  for name, model in loaded.items():
    windows = data.make_windows(
      documents,
      model.tokenizer.backend_tokenizer,
      context=CONTEXT,
      bos_id=model.config.bos_id,
      pad_id=0,
      packing="document",
    )
    store = activations.harvest(
      model, windows, [SITE], where / name, batch_size=4, dtype="float32"
    )
    sides.append(Side(name, store, windows))
  yield pair_stores(*sides), {s.name: s.windows.tokens for s in sides}
  patch.undo()


def network(loaded):
  """Sizes, both routes and scales."""
  widths = {name: model.config.width for name, model in loaded.items()}
  directions = [("gemma", "llama"), ("llama", "gemma")]
  about = Config(
    tuple((a, b, widths[a], widths[b]) for a, b in directions), 4, 16, 4, 1
  )
  return about, [Route(*way, i, (0.5, 0.5)) for i, way in enumerate(WAYS)]


def run(loaded, found, workdir, mesh, downstream=True, both=False, **changes):
  pairs, tokens = found
  about, routes = network(loaded)
  routes = routes if both else routes[:1]
  if downstream is True:
    downstream = Downstream(loaded, tokens, [pairs] * len(routes))
  n = len(pairs.store)
  return hypernetwork.train(
    CONFIG | changes,
    about,
    routes,
    [pairs.store] * len(routes),
    {s: scale(pairs.store.read(0, n, s)) for s in (A, B)},
    None,
    {},
    workdir,
    mesh=mesh,
    seed=0,
    downstream=downstream,
  )


@pytest.fixture(scope="module")
def alone(loaded, found, one_device, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("alone")
  return workdir, run(loaded, found, workdir, one_device)


@pytest.mark.parametrize("name", SOURCES)
def test_it_is_the_mean_divergence_where_the_site_is_replaced(loaded, name):
  model, rng = loaded[name], np.random.default_rng(0)
  shape = 2, CONTEXT
  tokens = rng.integers(3, model.config.vocab_size, shape).astype(np.int32)
  mask = rng.random(shape) < 0.5
  values = rng.normal(size=(*shape, model.config.width)).astype(np.float32)

  def changed(y):
    return jnp.where(mask[..., None], values, y)

  whole, replaced = (
    np.asarray(model.forward(tokens, edits=e)[0], np.float64)
    for e in (None, {SITE: changed})
  )
  whole, replaced = (
    z - np.log(np.exp(z).sum(-1, keepdims=True)) for z in (whole, replaced)
  )
  each = (np.exp(whole) * (whole - replaced)).sum(-1)
  text = Text(tokens, mask, None)
  got = jax.jit(kl, static_argnums=(0, 2))(
    model.config, model.params, SITE, text, values
  )
  assert each[mask].mean() > 0.01
  np.testing.assert_allclose(got, each[mask].mean(), rtol=1e-4)


def test_its_gradient_is_that_of_differences(loaded):
  model, rng = loaded["gemma"], np.random.default_rng(1)
  tokens = rng.integers(3, model.config.vocab_size, (1, 70)).astype(np.int32)
  _, at = model.forward(tokens, capture=[SITE])
  own = np.asarray(at[SITE], np.float32)
  text = Text(tokens, np.arange(70)[None] % 3 == 1, None)
  step = rng.normal(size=own.shape).astype(np.float32)
  step[~text.mask] = 0

  def off(strength):
    return kl(model.config, model.params, SITE, text, own + strength * step)

  both = jax.jit(jax.value_and_grad(off))
  value, slope = both(0.3)
  near = [float(both(0.3 + d)[0]) for d in (-1e-2, 1e-2)]
  assert abs(float(both(0.0)[0])) < 1e-6
  assert value > 1e-4
  np.testing.assert_allclose(slope, (near[1] - near[0]) / 2e-2, rtol=2e-2)


def test_a_network_learns_from_predictions_alone(alone, loaded):
  workdir, params = alone
  written = loop.read_metrics(workdir / "metrics.jsonl")
  assert [row["step"] for row in written] == [20, 40, 60]
  assert written[-1]["kl"] < 0.8 * written[0]["kl"]
  assert written[-1]["loss"] == pytest.approx(written[-1]["kl"], rel=1e-5)
  # The models are what it learns with, not what it keeps.
  saved = sum(
    path.stat().st_size
    for path in (workdir / "checkpoints").rglob("*")
    if path.is_file()
  )
  own = sum(x.nbytes for x in jax.tree.leaves(params))
  theirs = sum(
    x.nbytes for m in loaded.values() for x in jax.tree.leaves(m.params)
  )
  assert saved < 3 * own + theirs / 2


def test_a_training_that_broke_off_reads_the_same_texts(
  alone, loaded, found, one_device, tmp_path, monkeypatch
):
  with monkeypatch.context() as patch:
    interrupt(patch, at=30)
    with pytest.raises(InterruptedError):
      run(loaded, found, tmp_path, one_device)
  again = run(loaded, found, tmp_path, one_device)
  jax.tree.map(np.testing.assert_array_equal, again, alone[1])


@pytest.mark.slow
def test_a_mesh_gives_the_parameters_of_one_device(
  loaded, found, one_device, tmp_path
):
  mesh = models.make_mesh({"data": 2, "fsdp": 2}, jax.devices()[:4])
  spread = {
    name: models.load_model(source, mesh=mesh, dtype="float32")
    for name, source in SOURCES.items()
  }
  one, many = (
    run(own, found, tmp_path / str(on.size), on, steps=4, learning_rate=1e-3)
    for own, on in ((loaded, one_device), (spread, mesh))
  )
  for a, b in zip(
    *(jax.tree.leaves(tree) for tree in (many, one)), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_without_a_weight_no_model_is_needed(
  loaded, found, one_device, tmp_path
):
  run(
    loaded,
    found,
    tmp_path,
    one_device,
    downstream=None,
    steps=2,
    weights={"reconstruction": 1.0, "kl": 0.0},
  )
  (row,) = loop.read_metrics(tmp_path / "metrics.jsonl")
  assert "kl" not in row


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"downstream": None}, 'for the term "kl", got none'),
    ({"kl_windows": 0}, "axis .data. divides, got 0"),
    ({"kl_windows": 10**6}, "kl_windows of at most the .* paired windows"),
    ({"weights": {"ce": 1.0}}, "firing, kl, got {'ce': 1.0}"),
  ],
)
def test_what_does_not_fit_is_refused(
  changes, message, loaded, found, one_device, tmp_path
):
  with pytest.raises(ValueError, match=message):
    run(loaded, found, tmp_path, one_device, **changes)
  assert not (tmp_path / "config.json").exists()


def test_models_and_texts_of_others_are_refused(
  loaded, found, one_device, tmp_path
):
  pairs, tokens = found
  two = models.make_mesh({"data": 2}, jax.devices()[:2])
  elsewhere = models.load_model(SOURCES["llama"], mesh=two, dtype="float32")
  short = models.load_model(
    SOURCES["llama"], mesh=one_device, dtype="float32", layers=2
  )
  assert short.num_loaded < short.config.num_layers
  for given, message in (
    ((loaded, tokens, [pairs]), "those of 1 stores for 2 routes"),
    (({"gemma": loaded["gemma"]}, tokens, [pairs] * 2), "tokens of llama"),
    ((loaded | {"llama": elsewhere}, tokens, [pairs] * 2), "1 devices"),
    ((loaded | {"llama": short}, tokens, [pairs] * 2), "got the first 2"),
  ):
    with pytest.raises(ValueError, match=message):
      run(
        loaded,
        found,
        tmp_path,
        one_device,
        both=True,
        downstream=Downstream(*given),
      )
  assert not (tmp_path / "config.json").exists()
