"""The forward pass: sites, edits, causality, continuations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax import models
from gemma_jax.models import gemma, layers
from gemma_jax.models.sites import NAMES

pytestmark = pytest.mark.usefixtures("quick_compiles")

LENGTH = 40  # beyond the tiny models' window of 12
EVERYTHING = tuple(f"blocks.*.{name}" for name in NAMES)


@pytest.fixture(scope="module")
def gemma2(one_device):
  return models.load_model("random:gemma2-tiny", mesh=one_device)


@pytest.fixture(scope="module")
def gemma3(one_device):
  return models.load_model("random:gemma3-tiny", mesh=one_device)


@pytest.fixture(scope="module", params=["gemma2", "gemma3"])
def model(request):
  return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def tokens():
  return np.random.default_rng(0).integers(4, 1000, (2, LENGTH))


@pytest.fixture(scope="module")
def full(model, tokens):
  """Logits, and {site: value in every layer, [L, B, T, ...]}."""
  return everything(model, tokens)


@pytest.fixture(scope="module")
def full2(gemma2, tokens):
  return everything(gemma2, tokens)


@pytest.fixture(scope="module")
def full3(gemma3, tokens):
  return everything(gemma3, tokens)


def everything(model, tokens, edits=None):
  # The same capture each time, so that a model compiles it once.
  logits, found = model.forward(tokens, capture=EVERYTHING, edits=edits)
  return np.asarray(logits), {
    name: np.asarray(found[f"blocks.*.{name}"]) for name in NAMES
  }


def close(got, expected):
  np.testing.assert_allclose(got, expected, atol=3e-5, rtol=1e-5)


# However it is run, the same numbers.


def test_jit_and_scan_equal_a_loop_of_blocks_with_neither(
  gemma3, tokens, full3
):
  cfg, params = gemma3.config, gemma3.params
  found = []
  with jax.disable_jit():
    ctx = layers.context(cfg, jnp.arange(LENGTH)[None], jnp.float32)
    x = params["embed"][tokens] * cfg.width**0.5
    for l in range(cfg.num_layers):
      seen = {}
      p, layer = jax.tree.map(
        lambda a, l=l: a[l], (params["blocks"], layers.stacked(cfg))
      )
      x, _ = gemma.Block(cfg).apply(
        {"params": p}, x, layer, ctx, lambda n, v, s=seen: s.setdefault(n, v)
      )
      found.append(seen)
    logits = models.unembed(cfg, params, x)
  close(full3[0], logits)
  for name in NAMES:
    close(full3[1][name], np.stack([seen[name] for seen in found]))


@pytest.mark.parametrize("layers", [(0, 1, 2, 3), (4,)])
def test_captures_of_single_layers_equal_the_stacked_ones(
  gemma2, tokens, full2, layers
):
  capture = tuple(f"blocks.{l}.{name}" for l in layers for name in NAMES)
  logits, found = gemma2.forward(tokens, capture=capture)
  close(logits, full2[0])
  assert set(found) == set(capture)
  for l in layers:
    for name in NAMES:
      close(found[f"blocks.{l}.{name}"], full2[1][name][l])


@pytest.mark.parametrize("most", [3, 5])
def test_few_and_many_single_layers_give_the_same_arrays(
  gemma3, tokens, full3, most
):
  """Up to four have a body of their own; five go through the scan."""
  many = {7: "mlp_out", 0: "mlp_in", 5: "resid_mid", 2: "attn_z", 3: "mlp_in"}
  some = list(many.items())[:most]
  capture = tuple(f"blocks.{l}.{name}" for l, name in some)
  _, found = gemma3.forward(tokens, capture=capture)
  assert set(found) == set(capture)
  for l, name in some:
    close(found[f"blocks.{l}.{name}"], full3[1][name][l])


def test_every_spelling_gives_the_same_array_under_the_name_asked_for(
  gemma2, tokens, full2
):
  """Single layers and stacks together."""
  spellings = (
    (
      full2[1]["mlp_out"][1],
      "blocks.1.mlp_out",
      "blocks.1.hook_mlp_out",
      "model.layers.1.post_feedforward_layernorm.output",
    ),
    (
      full2[1]["attn_z"],
      "blocks.*.attn_z",
      "blocks.*.attn.hook_z",
      "model.layers.*.self_attn.o_proj.input",
    ),
    (full2[1]["attn_z"][3], "blocks.3.attn_z", "blocks.3.attn.hook_z"),
  )
  capture = tuple(name for _, *names in spellings for name in names)
  _, found = gemma2.forward(tokens, capture=capture)
  assert set(found) == set(capture)
  for value, *names in spellings:
    for name in names:
      close(found[name], value)


def test_rows_of_a_batch_do_not_see_each_other(gemma3, tokens, full3):
  for row in range(len(tokens)):
    alone, _ = gemma3.forward(tokens[row : row + 1])
    close(alone[0], full3[0][row])


def test_a_mask_of_integers_hides_what_it_masks(gemma2, tokens, full2):
  mask = np.ones((2, LENGTH), np.int64)
  mask[0, 30] = 0
  logits, _ = gemma2.forward(tokens, mask=mask)
  close(logits[0, :30], full2[0][0, :30])
  close(logits[1], full2[0][1])
  assert np.all(np.abs(logits[0, 31:] - full2[0][0, 31:]).max(axis=-1) > 1e-3)


# What a block adds up to.


def test_the_residual_stream_is_the_sum_of_what_was_added(model, full):
  _, x = full
  close(x["resid_mid"], x["resid_pre"] + x["attn_out"])
  close(x["resid_post"], x["resid_mid"] + x["mlp_out"])
  np.testing.assert_array_equal(x["resid_pre"][1:], x["resid_post"][:-1])


def test_the_first_residual_is_the_scaled_embedding(model, tokens, full):
  embed = np.asarray(model.params["embed"])
  close(full[1]["resid_pre"][0], embed[tokens] * model.config.width**0.5)


def test_mlp_in_is_the_unit_norm_input_times_the_gain(model, full):
  _, x = full
  rms = np.sqrt(np.mean(x["resid_mid"] ** 2, axis=-1, keepdims=True))
  close(x["mlp_norm"], x["resid_mid"] / rms)
  gain = 1 + np.asarray(model.params["blocks"]["pre_mlp_norm"])
  close(x["mlp_in"], x["mlp_norm"] * gain[:, None, None])


def test_mlp_hidden_times_the_down_projection_is_mlp_raw(model, full):
  _, x = full
  down = np.asarray(model.params["blocks"]["down"])
  close(x["mlp_raw"], np.einsum("lbtf,lfd->lbtd", x["mlp_hidden"], down))


def test_logits_are_the_soft_capped_head_of_the_last_residual(model, full):
  logits, x = full
  cap, last = model.config.final_softcap, x["resid_post"][-1]
  normed = last / np.sqrt(np.mean(last**2, axis=-1, keepdims=True) + 1e-6)
  normed *= 1 + np.asarray(model.params["final_norm"])
  expected = normed @ np.asarray(model.params["embed"]).T
  close(logits, cap * np.tanh(expected / cap) if cap else expected)


def test_the_soft_cap_bounds_logits_that_are_larger_without_it(gemma2, full2):
  last = full2[1]["resid_post"][-1]
  low, none = (
    np.asarray(
      models.unembed(
        dataclasses.replace(gemma2.config, final_softcap=cap),
        gemma2.params,
        jnp.asarray(last),
      )
    )
    for cap in (0.5, None)
  )
  assert np.abs(low).max() <= 0.5
  assert np.abs(none).max() > 1


# Stopping early, and models that are loaded in part.


@pytest.mark.parametrize("stop_at", [3, "model.layers.2.mlp.output"])
def test_stopping_early_gives_the_same_sites_and_no_logits(
  gemma2, tokens, full2, stop_at
):
  logits, found = gemma2.forward(
    tokens, capture=("blocks.*.mlp_in", "blocks.2.mlp_out"), stop_at=stop_at
  )
  assert logits is None
  assert found["blocks.*.mlp_in"].shape == (3, 2, LENGTH, 48)
  close(found["blocks.*.mlp_in"], full2[1]["mlp_in"][:3])
  close(found["blocks.2.mlp_out"], full2[1]["mlp_out"][2])


@pytest.mark.parametrize("stop_at", [0, 5])
def test_stopping_before_or_after_all_blocks_gives_no_logits(
  gemma2, tokens, stop_at
):
  assert gemma2.forward(tokens, stop_at=stop_at) == (None, {})


@pytest.mark.parametrize("stop_at", [-1, 6])
def test_stopping_where_there_is_no_block_is_an_error(gemma2, tokens, stop_at):
  with pytest.raises(ValueError, match=rf"stop_at={stop_at} must be 0\.\.5"):
    gemma2.forward(tokens, stop_at=stop_at)


@pytest.mark.parametrize("key", ["capture", "edits"])
@pytest.mark.parametrize(
  ("site", "stop_at"), [("blocks.3.mlp_in", 3), ("blocks.*.mlp_in", 0)]
)
def test_a_site_past_the_stop_is_an_error_that_names_both(
  gemma2, tokens, key, site, stop_at
):
  asked = {"capture": (site,), "edits": {site: jnp.zeros_like}}[key]
  with pytest.raises(ValueError, match=f"{site[-6:]}'.*stop_at={stop_at}"):
    gemma2.forward(tokens, stop_at=stop_at, **{key: asked})


def test_a_model_loaded_in_part_runs_as_far_as_it_is_loaded(
  one_device, tokens, full2
):
  part = models.load_model("random:gemma2-tiny", mesh=one_device, layers=2)
  assert part.num_loaded == 2
  _, found = part.forward(tokens, capture=("blocks.1.mlp_out",), stop_at=2)
  close(found["blocks.1.mlp_out"], full2[1]["mlp_out"][1])
  for stop_at in (None, 3, "blocks.2.mlp_in"):
    with pytest.raises(ValueError, match=r"first 2 of 5 are loaded.*stop_at=2"):
      part.forward(tokens, stop_at=stop_at)
  with pytest.raises(ValueError, match="5 blocks are needed and the first 2"):
    part.generate(tokens, max_new_tokens=1)


# Edits.


def test_an_identity_edit_of_everything_changes_nothing(gemma2, tokens, full2):
  def identity(x):
    return x

  edits = dict.fromkeys(EVERYTHING, identity)
  logits, found = everything(gemma2, tokens, edits)
  close(logits, full2[0])
  for name in NAMES:
    close(found[name], full2[1][name])


def test_the_residual_of_another_text_brings_the_other_texts_future(
  gemma2, tokens, full2
):
  others = np.random.default_rng(1).integers(4, 1000, (2, LENGTH))
  other = everything(gemma2, others)
  patch = other[1]["resid_pre"][2]
  logits, found = everything(
    gemma2, tokens, {"blocks.2.resid_pre": lambda x: patch}
  )
  close(found["resid_pre"][:2], full2[1]["resid_pre"][:2])
  close(found["resid_pre"][2:], other[1]["resid_pre"][2:])
  # The block before hands over what it made of its own text.
  close(found["resid_post"][:2], full2[1]["resid_post"][:2])
  close(found["resid_post"][2:], other[1]["resid_post"][2:])
  close(logits, other[0])


def test_an_edit_shows_at_its_site_and_after_it_and_nowhere_before(
  gemma2, tokens, full2
):
  """Noise at one site of block 2, each site in turn, in one program."""

  @jax.jit
  def run(noise):
    edits = {
      f"blocks.2.{name}": lambda x, n=name: x + noise[n] for name in NAMES
    }
    return models.forward(
      gemma2.config,
      gemma2.params,
      jnp.asarray(tokens),
      capture=EVERYTHING,
      edits=edits,
    )

  rng = np.random.default_rng(2)
  zero = {name: np.zeros_like(x[2]) for name, x in full2[1].items()}
  for name in NAMES:
    noise = rng.normal(size=zero[name].shape).astype(np.float32)
    logits, found = run(zero | {name: noise})
    found = {n: np.asarray(found[f"blocks.*.{n}"]) for n in NAMES}
    for n in NAMES:
      close(found[n][:2], full2[1][n][:2])
    for n in NAMES[: NAMES.index(name)]:
      close(found[n][2], full2[1][n][2])
    close(found[name][2], full2[1][name][2] + noise)
    for n in ("resid_post", "mlp_out")[: 1 if name == "resid_post" else 2]:
      assert np.abs(found[n][2] - full2[1][n][2]).max() > 0.01
    assert np.abs(found["resid_pre"][3] - full2[1]["resid_pre"][3]).max() > 0.1
    assert np.abs(logits - full2[0]).max() > 0.1


def test_an_edit_of_all_layers_gets_each_layers_index(gemma3, tokens):
  def edit(x, layer):
    return jnp.full_like(x, layer)

  _, x = everything(gemma3, tokens, {"blocks.*.mlp_out": edit})
  index = np.arange(8)[:, None, None, None]
  np.testing.assert_array_equal(
    x["mlp_out"], np.broadcast_to(index, x["mlp_out"].shape)
  )
  close(x["resid_post"], x["resid_mid"] + index)
  assert np.abs(x["mlp_raw"]).min(axis=(1, 2, 3)).max() < 1


def test_an_edit_of_one_layer_gets_that_layers_index(gemma3, tokens, full3):
  _, found = gemma3.forward(
    tokens,
    capture=("blocks.*.mlp_out",),
    edits={"blocks.6.hook_mlp_out": lambda x, layer: x + layer},
    stop_at=7,
  )
  close(found["blocks.*.mlp_out"][:6], full3[1]["mlp_out"][:6])
  close(found["blocks.*.mlp_out"][6], full3[1]["mlp_out"][6] + 6)


def test_edits_of_two_layers_each_act_on_their_own(gemma2, tokens):
  edits = {
    "blocks.1.mlp_out": jnp.zeros_like,
    "blocks.3.mlp_out": jnp.ones_like,
  }
  _, found = gemma2.forward(
    tokens, capture=("blocks.*.mlp_out", "blocks.2.mlp_out"), edits=edits
  )
  x = np.asarray(found["blocks.*.mlp_out"])
  assert [np.ptp(layer) == 0 for layer in x] == [False, True] * 2 + [False]
  assert (x[1].max(), x[3].max()) == (0, 1)
  close(found["blocks.2.mlp_out"], x[2])


def test_edits_of_one_layer_and_of_all_apply_in_the_order_given(
  gemma2, tokens, full2
):
  one, every = "blocks.0.mlp_out", "blocks.*.mlp_out"
  clean = full2[1]["mlp_out"][0]

  def plus(x):
    return x + 1

  def times(x, factor=2.0):  # a default: not the layer's index
    return factor * x

  for edits, expected in (
    ({one: plus, every: times}, 2 * (clean + 1)),
    ({every: times, one: plus}, 2 * clean + 1),
  ):
    _, found = gemma2.forward(tokens, capture=(one,), edits=edits, stop_at=1)
    close(found[one], expected)


@pytest.mark.parametrize("layer", ["3", "*"])
def test_an_edit_of_the_wrong_shape_is_an_error_with_both_shapes(
  gemma2, tokens, layer
):
  edits = {f"blocks.{layer}.mlp_in": lambda x: x[..., :5]}
  with pytest.raises(
    ValueError, match=r"mlp_in.*\(2, 40, 5\); expected .*\(2, 40, 48\)"
  ):
    gemma2.forward(tokens, edits=edits)


def test_an_edit_that_is_no_function_is_an_error_that_names_the_site(
  gemma2, tokens
):
  with pytest.raises(ValueError, match=r"blocks\.1\.mlp_in.*got 0\.0"):
    gemma2.forward(tokens, edits={"blocks.1.mlp_in": 0.0})


def test_one_site_edited_under_two_names_is_an_error(gemma2, tokens):
  edits = {"blocks.1.mlp_out": jnp.zeros_like}
  edits |= {"blocks.1.hook_mlp_out": jnp.ones_like}
  with pytest.raises(ValueError, match=r"blocks\.1\.mlp_out is edited twice"):
    gemma2.forward(tokens, edits=edits)


# Splices.


@pytest.mark.parametrize(("layer", "blocks"), [("2", [2]), ("*", range(5))])
def test_a_splice_gets_the_earlier_site_as_edited_and_the_clean_value(
  gemma2, tokens, layer, blocks
):
  read, write = f"blocks.{layer}.mlp_in", f"blocks.{layer}.mlp_out"
  _, x = everything(
    gemma2,
    tokens,
    {
      write: models.Splice("mlp_in", lambda x, y: 2 * x + y),
      read: lambda x: x + 7,
    },
  )
  p = {
    k: np.asarray(v)[:, None, None] for k, v in gemma2.params["blocks"].items()
  }
  read = x["mlp_norm"] * (1 + p["pre_mlp_norm"]) + 7
  raw = x["mlp_raw"]
  clean = raw / np.sqrt(np.mean(raw**2, axis=-1, keepdims=True) + 1e-6)
  clean *= 1 + p["post_mlp_norm"]
  for l in range(5):
    spliced = l in blocks
    assert np.allclose(x["mlp_in"][l], read[l], atol=1e-4) == spliced
    expected = 2 * read[l] + clean[l] if spliced else clean[l]
    close(x["mlp_out"][l], expected)


def test_a_splice_of_its_own_site_gets_the_value_twice(gemma2, tokens, full2):
  splice = models.Splice("hook_mlp_out", lambda x, y: 2 * x + y)
  site = "blocks.0.mlp_out"
  _, found = gemma2.forward(
    tokens, capture=(site,), edits={site: splice}, stop_at=1
  )
  close(found[site], 3 * full2[1]["mlp_out"][0])


@pytest.mark.parametrize(
  ("read", "write"), [("resid_post", "mlp_out"), ("mlp_in", "mlp_norm")]
)
def test_a_splice_of_a_later_site_is_an_error_that_names_both(
  gemma2, tokens, read, write
):
  splice = models.Splice(read, lambda x, y: x)
  with pytest.raises(
    ValueError, match=rf"blocks\.2\.{write}' reads '{read}'.*earlier"
  ):
    gemma2.forward(tokens, edits={f"blocks.2.{write}": splice})


def test_a_splice_of_no_site_is_an_error_that_suggests_one(gemma2, tokens):
  splice = models.Splice("mlp_inn", lambda x, y: x)
  with pytest.raises(ValueError, match="Did you mean 'mlp_in'"):
    gemma2.forward(tokens, edits={"blocks.2.mlp_out": splice})


# Who sees whom, by gradient.


def test_no_logit_depends_on_a_later_position_through_any_layer(gemma3):
  """d logits[t] / d resid_pre[l, s] is zero where s > t."""
  cfg = gemma3.config
  rng = np.random.default_rng(3)
  tokens = jnp.asarray(rng.integers(4, 1000, (1, LENGTH)))
  direction = rng.normal(size=cfg.vocab_size).astype(np.float32)

  def scores(delta):
    logits, _ = models.forward(
      cfg,
      gemma3.params,
      tokens,
      edits={"blocks.*.resid_pre": lambda x, l: x + delta[l]},
    )
    return logits[0] @ direction

  zero = jnp.zeros((cfg.num_layers, LENGTH, cfg.width))
  jacobian = jax.jit(jax.jacrev(scores))(zero)  # T L S D
  seen = np.abs(jacobian).max(axis=-1).transpose(1, 0, 2) > 0  # L T S
  assert not np.any(seen & ~np.tri(LENGTH, dtype=bool))
  # From the first block, a global layer lets everything reach the end.
  np.testing.assert_array_equal(seen[0], np.tri(LENGTH, dtype=bool))


@pytest.mark.parametrize("is_global", [False, True])
def test_a_local_layer_sees_its_window_and_a_global_one_everything(
  model, is_global
):
  """d resid_post[t] / d resid_pre[s] of one layer: a band, or a triangle."""
  cfg = dataclasses.replace(
    model.config, layer_is_global=(is_global,) * model.config.num_layers
  )
  rng = np.random.default_rng(4)
  tokens = jnp.asarray(rng.integers(4, 1000, (1, LENGTH)))
  direction = rng.normal(size=cfg.width).astype(np.float32)

  def scores(delta):
    site = "blocks.0.resid_post"
    _, found = models.forward(
      cfg,
      model.params,
      tokens,
      capture=(site,),
      edits={"blocks.0.resid_pre": lambda x: x + delta},
      stop_at=1,
    )
    return found[site][0] @ direction

  jacobian = jax.jit(jax.jacrev(scores))(jnp.zeros((LENGTH, cfg.width)))
  seen = np.abs(jacobian).max(axis=-1) > 0
  expected = np.tri(LENGTH, dtype=bool)
  if not is_global:
    expected &= ~np.tri(LENGTH, k=-cfg.window, dtype=bool)
    assert (expected[20, 20 - 12], expected[20, 20 - 11]) == (False, True)
  np.testing.assert_array_equal(seen, expected)


def test_the_layers_that_look_past_the_window_are_those_that_cfg_says(
  model, full
):
  cfg = model.config

  @jax.jit
  def attn_out(x):
    tokens = jnp.zeros(x.shape[1:3], int)
    site = "blocks.*.attn_out"
    _, found = models.forward(
      cfg,
      model.params,
      tokens,
      capture=(site,),
      edits={"blocks.*.resid_pre": lambda _, l: x[l]},
      stop_at=cfg.num_layers,
    )
    return found[site]

  x = full[1]["resid_pre"]
  other = x.copy()
  other[:, :, 0] = x[:, :, 1]
  moved = np.any(attn_out(x) != attn_out(other), axis=(1, 3))  # L T
  assert moved[:, : cfg.window].all()
  for t in (cfg.window, LENGTH - 1):
    np.testing.assert_array_equal(moved[:, t], cfg.layer_is_global)


# Continuations.


def test_a_greedy_continuation_is_the_argmax_of_forward_at_each_step(
  model, tokens
):
  out = model.generate(tokens[:, :25], max_new_tokens=LENGTH - 25)
  assert out.shape == (2, LENGTH)
  assert out.dtype == np.int32
  np.testing.assert_array_equal(out[:, :25], tokens[:, :25])
  assert not np.any(out == model.config.eos_id)
  # Attention is causal: one pass over the result holds every step's logits.
  best = np.argmax(everything(model, out)[0], axis=-1)
  np.testing.assert_array_equal(out[:, 25:], best[:, 24:-1])


def test_sampling_at_a_low_temperature_is_greedy(gemma2, tokens):
  start = tokens[:, :25]
  np.testing.assert_array_equal(
    gemma2.generate(start, max_new_tokens=15, temperature=1e-5),
    gemma2.generate(start, max_new_tokens=15),
  )


def test_samples_repeat_with_the_seed_and_follow_the_softmax(
  gemma2, tokens, full2
):
  temperature, draws = 0.5, 1000
  start = np.repeat(tokens[:1, :8], draws, axis=0)

  def sample(seed):
    return gemma2.generate(
      start, max_new_tokens=1, temperature=temperature, seed=seed
    )[:, -1]

  drawn = sample(0)
  np.testing.assert_array_equal(drawn, sample(0))
  assert np.any(drawn != sample(1))
  logits = full2[0][0, 7].astype(np.float64)
  p = np.exp(logits / temperature)
  p /= p.sum()
  # The mean logit of the draws has this expectation and standard error.
  mean = p @ logits
  error = np.sqrt(p @ (logits - mean) ** 2 / draws)
  assert abs(logits[drawn].mean() - mean) < 4 * error
  # At temperature one it has another.
  flat = np.exp(logits) / np.exp(logits).sum()
  assert abs(flat @ logits - mean) > 8 * error


def test_edits_apply_at_every_step_and_a_finished_row_is_padded(gemma2, tokens):
  cfg = gemma2.config
  # The residual that the head turns into <eos>.
  eos = gemma2.params["embed"][cfg.eos_id] / (1 + gemma2.params["final_norm"])

  def say_eos(x):
    return x.at[0, 27].set(eos)

  start, edits = tokens[:, :25], {"blocks.4.resid_post": say_eos}
  # The edit names a position, so that the whole context must run each time.
  out = gemma2.generate(start, max_new_tokens=15, edits=edits, cache=False)
  clean = gemma2.generate(start, max_new_tokens=15)
  np.testing.assert_array_equal(out[0, :28], clean[0, :28])
  assert (out[0, 28], clean[0, 28] == cfg.eos_id) == (cfg.eos_id, False)
  assert np.all(out[0, 29:] == cfg.pad_id)
  np.testing.assert_array_equal(out[1], clean[1])


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"max_new_tokens": -1}, "max_new_tokens=-1"),
    ({"max_new_tokens": 1, "temperature": -1.0}, r"temperature=-1\.0"),
  ],
)
def test_a_negative_length_or_temperature_is_an_error(
  gemma2, tokens, changes, message
):
  with pytest.raises(ValueError, match=message):
    gemma2.generate(tokens, **changes)


# What is not a batch of tokens.


@pytest.mark.parametrize(
  ("wrong", "message"),
  [
    (np.full((2, 5), 1000), r"from 1000 to 1000.*0\.\.999.*tokenizer"),
    (np.array([[3, -1]]), r"from -1 to 3.*0\.\.999"),
    (np.zeros((2, 5)), r"integers \[B, T\]; got float64 of shape \(2, 5\)"),
    (np.zeros(5, int), r"integers \[B, T\]; got int64 of shape \(5,\)"),
    (np.zeros((2, 5), bool), r"integers \[B, T\]; got bool"),
    ([[1, 2], [3]], r"integers \[B, T\], rows of one length.*Pad them"),
  ],
)
def test_what_is_no_batch_of_token_ids_is_an_error(gemma2, wrong, message):
  with pytest.raises(ValueError, match=message):
    gemma2.forward(wrong)
  with pytest.raises(ValueError, match=message):
    gemma2.generate(wrong, max_new_tokens=1)


@pytest.mark.parametrize(
  ("shape", "dtype"), [((2, 5), "float32"), ((5,), "int32")]
)
def test_an_array_of_jax_that_is_no_batch_of_tokens_is_an_error(
  gemma2, shape, dtype
):
  wrong = jnp.zeros(shape, dtype)
  message = rf"integers \[B, T\]; got {dtype} of shape"
  with pytest.raises(ValueError, match=message):
    gemma2.forward(wrong)
  with pytest.raises(ValueError, match=message):
    gemma2.generate(wrong, max_new_tokens=1)
  with pytest.raises(ValueError, match=message):
    models.forward(gemma2.config, gemma2.params, wrong)


@pytest.mark.parametrize("shape", [(2, 39), (40,), (3, 40)])
def test_a_mask_of_another_shape_than_the_tokens_is_an_error(
  gemma2, tokens, shape
):
  with pytest.raises(ValueError, match=r"mask must be.*\(2, 40\); got"):
    gemma2.forward(tokens, mask=np.ones(shape, bool))


def test_token_ids_may_be_lists_and_narrow_or_unsigned(gemma2, tokens, full2):
  for same in (tokens.tolist(), tokens.astype(np.uint16)):
    np.testing.assert_array_equal(everything(gemma2, same)[0], full2[0])


def test_token_ids_out_of_the_vocabulary_are_an_error(gemma2):
  for wrong in (np.array([[5, 1000]]), jnp.array([[-1, 5]])):
    for run in (gemma2.forward, gemma2.generate):
      kwargs = {"max_new_tokens": 1} if run == gemma2.generate else {}
      with pytest.raises(ValueError, match=r"vocabulary is 0\.\.999"):
        run(wrong, **kwargs)


def test_a_row_of_padding_alone_is_an_error_that_names_it(gemma2, tokens):
  mask = np.ones((2, 40), bool)
  mask[1] = False
  for wrong in (mask, jnp.asarray(mask)):
    with pytest.raises(ValueError, match=r"Rows \[1\] .* all padding"):
      gemma2.forward(tokens, mask=wrong)
    with pytest.raises(ValueError, match=r"Rows \[1\] .* all padding"):
      gemma2.generate(tokens, mask=wrong, max_new_tokens=1)


@pytest.mark.parametrize("preset", ["gemma2", "gpt2", "neox", "llama"])
def test_a_context_longer_than_the_models_is_an_error(preset, one_device):
  model = models.load_model(f"random:{preset}-tiny", mesh=one_device)
  with pytest.raises(ValueError, match=r"257 tokens long.*longest is 256"):
    model.forward(np.zeros((1, 257), int))


@pytest.mark.parametrize(
  ("attention", "message"),
  [
    ("flash", "'flash' is unknown; expected one of auto, xla, chunked"),
    ("cudnn", r"soft-capped scores.*float32.*'cpu'.*Use 'xla', 'chunked'"),
  ],
)
def test_attention_that_lacks_a_feature_is_refused_before_loading(
  attention, message, one_device
):
  with pytest.raises(ValueError, match=message):
    models.load_model(
      "random:gemma2-tiny", mesh=one_device, attention=attention
    )


def test_a_parallel_block_has_no_residual_in_its_middle(one_device):
  model = models.load_model("random:neox-tiny", mesh=one_device)
  tokens = np.zeros((1, 5), int)
  for name in ("blocks.1.resid_mid", "blocks.*.hook_resid_mid"):
    with pytest.raises(ValueError, match=r"no '.*resid_mid' in a neox block"):
      model.forward(tokens, capture=(name,))


def test_unrolled_blocks_give_what_the_scan_gives(gemma3, tokens, full3):
  run = jax.jit(models.forward, static_argnums=0, static_argnames="unroll")
  logits, _ = run(gemma3.config, gemma3.params, tokens, unroll=True)
  close(logits, full3[0])


def test_a_single_name_is_no_capture_and_nothing_is_no_context(gemma2):
  with pytest.raises(ValueError, match="make it a list"):
    gemma2.forward(np.zeros((1, 5), int), capture="blocks.2.mlp_in")
  with pytest.raises(ValueError, match=r"empty, \[B, 0\]"):
    gemma2.forward(np.zeros((1, 0), int))
