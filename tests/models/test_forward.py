"""The forward pass: sites, edits, causality, continuations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax import models
from gemma_jax.models import gemma
from gemma_jax.models.sites import NAMES

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
  """Logits and every site of every layer, {name: [L, B, T, ...]}."""
  return everything(model, tokens)


@pytest.fixture(scope="module")
def full2(gemma2, tokens):
  return everything(gemma2, tokens)


@pytest.fixture(scope="module")
def other2(gemma2):
  """The same of other tokens."""
  tokens = np.random.default_rng(1).integers(4, 1000, (2, LENGTH))
  return everything(gemma2, tokens)


def everything(model, tokens):
  logits, sites = model.forward(tokens, capture=EVERYTHING)
  return np.asarray(logits), {
    name: np.asarray(sites[f"blocks.*.{name}"]) for name in NAMES
  }


def close(got, expected, atol=2e-5):
  np.testing.assert_allclose(got, expected, atol=atol, rtol=0)


# Execution: however it is run, the same numbers.


def test_jit_and_scan_equal_a_loop_of_blocks_without_either(
  model, tokens, full
):
  cfg, params = model.config, model.params
  found = []
  with jax.disable_jit():
    ctx = gemma.context(cfg, jnp.ones((1, LENGTH), bool), jnp.float32)
    x = params["embed"][tokens] * cfg.width**0.5
    for l in range(cfg.num_layers):
      seen = {}
      p, layer = jax.tree.map(
        lambda a, l=l: a[l], (params["blocks"], gemma.layers(cfg))
      )
      x = gemma.Block(cfg).apply(
        {"params": p}, x, layer, ctx, lambda n, v, s=seen: s.setdefault(n, v)
      )
      found.append(seen)
    logits = models.unembed(cfg, params, x)
  close(full[0], logits)
  for name in NAMES:
    close(full[1][name], np.stack([seen[name] for seen in found]))


def test_the_pure_function_without_jit_equals_the_models_method(
  gemma2, tokens, full2
):
  logits, sites = models.forward(
    gemma2.config,
    gemma2.params,
    jnp.asarray(tokens),
    capture=("blocks.2.mlp_hidden",),
  )
  close(logits, full2[0])
  close(sites["blocks.2.mlp_hidden"], full2[1]["mlp_hidden"][2])


def test_stacked_captures_equal_those_of_single_layers(model, tokens, full):
  for first in range(0, model.config.num_layers, 4):
    layers = range(first, min(first + 4, model.config.num_layers))
    capture = tuple(f"blocks.{l}.{name}" for l in layers for name in NAMES)
    logits, sites = model.forward(tokens, capture=capture)
    close(logits, full[0])
    assert tuple(sites) == capture
    for l in layers:
      for name in NAMES:
        close(sites[f"blocks.{l}.{name}"], full[1][name][l])


def test_more_single_layers_than_get_a_body_of_their_own_equal_fewer(
  gemma3, tokens
):
  many = {0: "mlp_in", 2: "attn_z", 3: "mlp_in", 5: "resid_mid", 7: "mlp_out"}
  capture = tuple(f"blocks.{l}.{name}" for l, name in many.items())
  _, sites = gemma3.forward(tokens, capture=capture)
  assert tuple(sites) == capture
  for half in (capture[:3], capture[3:]):
    _, fewer = gemma3.forward(tokens, capture=half)
    for site in half:
      close(sites[site], fewer[site])


def test_single_and_stacked_captures_can_be_asked_for_together(
  gemma2, tokens, full2
):
  capture = ("blocks.*.mlp_in", "blocks.1.mlp_in", "blocks.3.resid_mid")
  _, sites = gemma2.forward(tokens, capture=capture)
  close(sites["blocks.*.mlp_in"], full2[1]["mlp_in"])
  close(sites["blocks.1.mlp_in"], full2[1]["mlp_in"][1])
  close(sites["blocks.3.resid_mid"], full2[1]["resid_mid"][3])


def test_rows_of_a_batch_do_not_see_each_other(gemma3, tokens):
  logits, _ = gemma3.forward(tokens)
  for row in range(len(tokens)):
    alone, _ = gemma3.forward(tokens[row : row + 1])
    close(logits[row], alone[0])


def test_integers_serve_as_a_mask_as_booleans_do(gemma2, tokens, full2):
  mask = np.ones((2, LENGTH), bool)
  mask[0, 30:] = False
  some, _ = gemma2.forward(tokens, mask=mask)
  same, _ = gemma2.forward(tokens, mask=mask.astype(np.int64))
  np.testing.assert_array_equal(some, same)
  close(some[0, :30], full2[0][0, :30])
  assert np.abs(some[0, 31:] - full2[0][0, 31:]).max() > 1e-2


# Arithmetic: what a block adds up to.


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
  weight = np.asarray(model.params["blocks"]["pre_mlp_norm"])
  close(x["mlp_in"], x["mlp_norm"] * (1 + weight)[:, None, None])


def test_mlp_hidden_times_the_down_projection_is_mlp_raw(model, full):
  _, x = full
  down = np.asarray(model.params["blocks"]["down"])
  close(x["mlp_raw"], np.einsum("lbtf,lfd->lbtd", x["mlp_hidden"], down))


def test_logits_are_the_soft_capped_head_of_the_last_residual(model, full):
  logits, x = full
  cfg = model.config
  last = x["resid_post"][-1]
  normed = last / np.sqrt(np.mean(last**2, axis=-1, keepdims=True) + 1e-6)
  normed *= 1 + np.asarray(model.params["final_norm"])
  expected = normed @ np.asarray(model.params["embed"]).T
  if cfg.final_softcap:
    expected = cfg.final_softcap * np.tanh(expected / cfg.final_softcap)
  close(logits, expected)


def test_the_soft_cap_bounds_logits_and_without_it_they_are_larger(
  gemma2, tokens
):
  cfg = dataclasses.replace(gemma2.config, final_softcap=0.5)
  no_cap = dataclasses.replace(gemma2.config, final_softcap=None)
  capped, raw = (
    jax.jit(models.forward, static_argnums=0)(c, gemma2.params, tokens)[0]
    for c in (cfg, no_cap)
  )
  assert np.abs(capped).max() <= 0.5
  assert np.abs(raw).max() > 1
  close(capped, 0.5 * np.tanh(np.asarray(raw) / 0.5))


# stop_at and partly loaded models.


@pytest.mark.parametrize(
  "stop_at",
  [
    3,
    "blocks.2.resid_pre",
    "blocks.2.hook_mlp_out",
    "model.layers.2.mlp.output",
  ],
)
def test_stopping_early_gives_the_same_sites_and_no_logits(
  gemma2, tokens, full2, stop_at
):
  logits, sites = gemma2.forward(
    tokens, capture=("blocks.*.mlp_in", "blocks.2.mlp_out"), stop_at=stop_at
  )
  assert logits is None
  assert sites["blocks.*.mlp_in"].shape == (3, 2, LENGTH, 48)
  close(sites["blocks.*.mlp_in"], full2[1]["mlp_in"][:3])
  close(sites["blocks.2.mlp_out"], full2[1]["mlp_out"][2])


def test_stopping_after_all_blocks_still_gives_no_logits(gemma2, tokens):
  logits, sites = gemma2.forward(tokens, stop_at=5)
  assert logits is None
  assert sites == {}


def test_stopping_before_any_block_gives_empty_stacks(gemma2, tokens):
  logits, sites = gemma2.forward(tokens, stop_at=0)
  assert (logits, sites) == (None, {})
  with pytest.raises(ValueError, match=r"'blocks\.\*\.mlp_in'.*stop_at=0"):
    gemma2.forward(tokens, capture=("blocks.*.mlp_in",), stop_at=0)


@pytest.mark.parametrize("stop_at", [-1, 6])
def test_stopping_where_there_is_no_block_is_an_error(gemma2, tokens, stop_at):
  with pytest.raises(ValueError, match=f"stop_at={stop_at} must be 0..5"):
    gemma2.forward(tokens, stop_at=stop_at)


@pytest.mark.parametrize("what", ["capture", "edits"])
def test_a_site_past_the_stop_is_an_error_that_names_both(gemma2, tokens, what):
  site = "blocks.3.mlp_in"
  asked = {"capture": (site,), "edits": {site: jnp.zeros_like}}
  with pytest.raises(ValueError, match=r"blocks\.3\.mlp_in.*stop_at=2.*2 bl"):
    gemma2.forward(tokens, stop_at=2, **{what: asked[what]})


def test_a_partly_loaded_model_needs_a_stop_within_what_is_loaded(
  one_device, tokens, full2
):
  part = models.load_model("random:gemma2-tiny", mesh=one_device, layers=2)
  assert part.num_loaded == 2
  _, sites = part.forward(tokens, capture=("blocks.1.mlp_out",), stop_at=2)
  close(sites["blocks.1.mlp_out"], full2[1]["mlp_out"][1])
  for stop_at in (None, 3, "blocks.2.mlp_in"):
    with pytest.raises(ValueError, match="first 2 of 5 are loaded.*stop_at=2"):
      part.forward(tokens, stop_at=stop_at)
  with pytest.raises(ValueError, match="5 blocks are needed and the first 2"):
    part.generate(tokens, max_new_tokens=1)


# Names.


def test_every_spelling_gives_the_same_array_under_the_name_asked_for(
  gemma2, tokens
):
  spellings = {
    "blocks.1.mlp_out": (
      "blocks.1.hook_mlp_out",
      "model.layers.1.post_feedforward_layernorm.output",
    ),
    "blocks.1.resid_post": (
      "blocks.1.hook_resid_post",
      "model.layers.1.output",
    ),
    "blocks.*.attn_z": (
      "blocks.*.attn.hook_z",
      "model.layers.*.self_attn.o_proj.input",
    ),
  }
  capture = tuple(
    name for ours, theirs in spellings.items() for name in (ours, *theirs)
  )
  _, sites = gemma2.forward(tokens, capture=capture)
  assert tuple(sites) == capture
  for ours, theirs in spellings.items():
    for name in theirs:
      np.testing.assert_array_equal(sites[name], sites[ours])


# Edits.


def test_an_identity_edit_everywhere_changes_nothing(model, tokens, full):
  logits, sites = model.forward(
    tokens,
    capture=EVERYTHING,
    edits={site: lambda x: x for site in EVERYTHING},
  )
  close(logits, full[0])
  for name in NAMES:
    close(sites[f"blocks.*.{name}"], full[1][name])


@pytest.mark.parametrize("layer", [0, 2, 4])
def test_another_texts_residual_patched_in_gives_the_other_texts_future(
  gemma2, tokens, full2, other2, layer
):
  patch = jnp.asarray(other2[1]["resid_pre"][layer])
  logits, sites = gemma2.forward(
    tokens,
    capture=("blocks.*.resid_pre", "blocks.*.resid_post"),
    edits={f"blocks.{layer}.resid_pre": lambda x: patch},
  )
  before, after = sites["blocks.*.resid_pre"], sites["blocks.*.resid_post"]
  close(before[:layer], full2[1]["resid_pre"][:layer])
  close(before[layer:], other2[1]["resid_pre"][layer:])
  # The unedited block before hands over what it made of its own text.
  close(after[:layer], full2[1]["resid_post"][:layer])
  close(after[layer:], other2[1]["resid_post"][layer:])
  close(logits, other2[0])


@pytest.mark.parametrize("name", NAMES)
def test_an_edited_site_is_captured_as_edited_and_used_so(
  gemma2, tokens, full2, name
):
  """Replacing a site of one block with itself plus noise, then undone."""
  shape = full2[1][name].shape[1:]
  noise = np.random.default_rng(2).normal(size=shape).astype(np.float32)
  site = f"blocks.2.{name}"
  logits, sites = gemma2.forward(
    tokens, capture=(site, *EVERYTHING), edits={site: lambda x: x + noise}
  )
  close(sites[site], full2[1][name][2] + noise)
  close(sites[f"blocks.*.{name}"][2], full2[1][name][2] + noise)
  for other in NAMES[: NAMES.index(name)]:
    close(sites[f"blocks.*.{other}"][:3], full2[1][other][:3])
  for other in NAMES:
    close(sites[f"blocks.*.{other}"][:2], full2[1][other][:2])
  assert np.abs(sites["blocks.*.resid_post"][2] - full2[1]["resid_post"][2]).max() > 0.1
  assert np.abs(logits - full2[0]).max() > 0.1


def test_an_edit_of_all_layers_reaches_every_layer(model, tokens):
  _, sites = model.forward(
    tokens, capture=EVERYTHING, edits={"blocks.*.mlp_out": jnp.zeros_like}
  )
  assert not np.any(sites["blocks.*.mlp_out"])
  np.testing.assert_array_equal(
    sites["blocks.*.resid_post"], sites["blocks.*.resid_mid"]
  )
  assert np.any(sites["blocks.*.mlp_raw"])


def test_an_edit_with_two_arguments_gets_the_layers_index(
  gemma3, tokens
):
  def edit(x, layer):
    return jnp.full_like(x, layer)

  capture = ("blocks.*.mlp_out",)
  _, sites = gemma3.forward(
    tokens, capture=capture, edits={"blocks.*.mlp_out": edit}
  )
  expected = np.arange(8.0)[:, None, None, None]
  values = sites["blocks.*.mlp_out"]
  np.testing.assert_array_equal(values, np.broadcast_to(expected, values.shape))
  _, sites = gemma3.forward(
    tokens, capture=capture, edits={"blocks.6.hook_mlp_out": edit}, stop_at=7
  )
  np.testing.assert_array_equal(sites["blocks.*.mlp_out"][6], values[6])
  assert not np.any(np.all(sites["blocks.*.mlp_out"][:6] == 0, axis=(1, 2, 3)))


def test_an_argument_with_a_default_is_not_taken_for_the_layer(
  gemma2, tokens, full2
):
  _, sites = gemma2.forward(
    tokens,
    capture=("blocks.3.mlp_out",),
    edits={"blocks.3.mlp_out": lambda x, factor=2.0: x * factor},
  )
  close(sites["blocks.3.mlp_out"], 2 * full2[1]["mlp_out"][3])


def test_edits_of_one_site_and_of_all_layers_apply_in_the_order_given(
  gemma2, tokens, full2
):
  one, every = "blocks.0.mlp_out", "blocks.*.mlp_out"
  clean = full2[1]["mlp_out"][0]
  plus, double = (lambda x: x + 1), (lambda x: 2 * x)
  for edits, expected in (
    ({one: plus, every: double}, 2 * (clean + 1)),
    ({every: double, one: plus}, 2 * clean + 1),
  ):
    _, sites = gemma2.forward(tokens, capture=(one,), edits=edits, stop_at=1)
    close(sites[one], expected)


@pytest.mark.parametrize("layer", ["3", "*"])
def test_an_edit_of_the_wrong_shape_is_an_error_with_both_shapes(
  gemma2, tokens, layer
):
  edits = {f"blocks.{layer}.mlp_in": lambda x: x[..., :5]}
  with pytest.raises(
    ValueError, match=r"mlp_in.*\(2, 40, 5\); expected \(2, 40, 48\)"
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
  with pytest.raises(ValueError, match=r"blocks\.1\.mlp_out.*edited twice"):
    gemma2.forward(tokens, edits=edits)


# Splices.


@pytest.mark.parametrize("layer", ["2", "*"])
def test_a_splice_reads_the_earlier_site_as_edited(
  gemma2, tokens, layer
):
  read, write = f"blocks.{layer}.mlp_in", f"blocks.{layer}.mlp_out"
  _, sites = gemma2.forward(
    tokens,
    capture=EVERYTHING,
    edits={
      write: models.Splice("mlp_in", lambda x, y: 2 * x + y - y),
      read: lambda x: x + 7,
    },
  )
  here = slice(None) if layer == "*" else slice(2, 3)
  rows = {name: np.asarray(sites[f"blocks.*.{name}"])[here] for name in NAMES}
  weight = np.asarray(gemma2.params["blocks"]["pre_mlp_norm"])[here]
  edited = rows["mlp_norm"] * (1 + weight)[:, None, None] + 7
  close(rows["mlp_in"], edited)
  close(rows["mlp_out"], 2 * edited)
  close(rows["resid_post"], rows["resid_mid"] + 2 * edited)


def test_a_splice_hands_over_the_value_that_it_replaces(gemma2, tokens, full2):
  logits, sites = gemma2.forward(
    tokens,
    capture=("blocks.2.mlp_out",),
    edits={"blocks.2.mlp_out": models.Splice("resid_pre", lambda x, y: y)},
  )
  close(sites["blocks.2.mlp_out"], full2[1]["mlp_out"][2])
  close(logits, full2[0])


@pytest.mark.parametrize("read", ["mlp_out", "resid_post"])
def test_a_splice_of_a_later_site_is_an_error_that_names_both(
  gemma2, tokens, read
):
  splice = models.Splice(read, lambda x, y: x)
  with pytest.raises(
    ValueError, match=rf"blocks\.2\.mlp_out' reads '{read}'.*earlier"
  ):
    gemma2.forward(tokens, edits={"blocks.2.mlp_out": splice})


def test_a_splice_of_no_site_is_an_error_that_suggests_one(gemma2, tokens):
  splice = models.Splice("mlp_inn", lambda x, y: x)
  with pytest.raises(ValueError, match="Did you mean 'mlp_in'"):
    gemma2.forward(tokens, edits={"blocks.2.mlp_out": splice})


# Who sees whom, by gradient.


def test_no_position_depends_on_a_later_one_through_any_layer(model):
  """d logits[t] / d resid_pre[l, s] is zero exactly where s > t."""
  cfg = model.config
  rng = np.random.default_rng(3)
  tokens = rng.integers(4, 1000, (1, LENGTH))
  direction = rng.normal(size=cfg.vocab_size).astype(np.float32)

  def scores(delta):
    logits, _ = models.forward(
      cfg,
      model.params,
      jnp.asarray(tokens),
      edits={"blocks.*.resid_pre": lambda x, l: x + delta[l]},
    )
    return logits[0] @ direction

  zero = jnp.zeros((cfg.num_layers, LENGTH, cfg.width))
  jacobian = np.asarray(jax.jit(jax.jacrev(scores))(zero))  # T L S D
  size = np.abs(jacobian).max(axis=-1)
  later = ~np.tri(LENGTH, dtype=bool)
  assert not np.any(size.transpose(0, 2, 1)[later])
  # Position 0 is seen from the end: some path leads there.
  assert np.all(size[-1, 0] > 0)


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
    _, sites = models.forward(
      cfg,
      model.params,
      tokens,
      capture=(site,),
      edits={"blocks.0.resid_pre": lambda x: x + delta},
      stop_at=1,
    )
    return sites[site][0] @ direction

  jacobian = jax.jit(jax.jacrev(scores))(jnp.zeros((LENGTH, cfg.width)))
  seen = np.abs(jacobian).max(axis=-1) > 0
  expected = np.tri(LENGTH, dtype=bool)
  if not is_global:
    expected &= ~np.tri(LENGTH, k=-cfg.window, dtype=bool)
    assert (expected[20, 8], expected[20, 9]) == (False, True)
  np.testing.assert_array_equal(seen, expected)


def test_the_presets_layers_are_local_and_global_as_they_say(model, tokens):
  """A change of the first token reaches the last one where it is global."""
  cfg = model.config
  changed = tokens.copy()
  changed[:, 0] = (changed[:, 0] + 1) % 1000
  _, sites = model.forward(tokens, capture=EVERYTHING)
  base = np.asarray(sites["blocks.*.resid_pre"])
  bumped = base.copy()
  bumped[:, :, 0] += 1
  _, sites = model.forward(
    tokens,
    capture=("blocks.*.attn_out",),
    edits={"blocks.*.resid_pre": lambda x, l: jnp.asarray(base)[l]},
  )
  clean = np.asarray(sites["blocks.*.attn_out"])
  _, sites = model.forward(
    tokens,
    capture=("blocks.*.attn_out",),
    edits={"blocks.*.resid_pre": lambda x, l: jnp.asarray(bumped)[l]},
  )
  moved = np.any(sites["blocks.*.attn_out"] != clean, axis=(1, 3))  # L T
  np.testing.assert_array_equal(moved[:, -1], cfg.layer_is_global)
  assert moved[:, cfg.window - 1].all()
  np.testing.assert_array_equal(moved[:, cfg.window], cfg.layer_is_global)


# Continuations.


def test_a_greedy_continuation_is_the_argmax_of_forward_at_each_step(
  model, tokens
):
  out = model.generate(tokens[:, :25], max_new_tokens=LENGTH - 25)
  assert out.shape == (2, LENGTH)
  assert out.dtype == np.int32
  np.testing.assert_array_equal(out[:, :25], tokens[:, :25])
  # Causal, so one pass over the result holds every step's logits.
  logits, _ = model.forward(out)
  best = np.argmax(logits, axis=-1)
  assert not np.any(out[:, :-1] == model.config.eos_id)
  np.testing.assert_array_equal(out[:, 25:], best[:, 24:-1])


def test_sampling_is_repeatable_and_its_seed_matters(gemma2, tokens):
  def sample(seed):
    return gemma2.generate(
      tokens[:, :8], max_new_tokens=8, temperature=1.0, seed=seed
    )

  np.testing.assert_array_equal(sample(0), sample(0))
  assert np.any(sample(0) != sample(1))


def test_sampling_near_zero_temperature_is_greedy(gemma2, tokens):
  start = tokens[:, :8]
  np.testing.assert_array_equal(
    gemma2.generate(start, max_new_tokens=8, temperature=1e-5),
    gemma2.generate(start, max_new_tokens=8),
  )


def test_samples_follow_the_softmax_of_logits_over_temperature(gemma2, tokens):
  temperature, draws = 0.5, 2000
  start = np.repeat(tokens[:1, :8], draws, axis=0)
  drawn = gemma2.generate(start, max_new_tokens=1, temperature=temperature)
  drawn = drawn[:, -1]
  logits = np.asarray(gemma2.forward(start[:1])[0][0, -1], np.float64)
  p = np.exp(logits / temperature)
  p /= p.sum()
  # The mean logit of a draw has this mean and this standard error.
  mean = p @ logits
  error = np.sqrt(p @ (logits - mean) ** 2 / draws)
  assert abs(logits[drawn].mean() - mean) < 4 * error
  # And at another temperature it would not.
  flat = np.exp(logits) / np.exp(logits).sum()
  assert abs(flat @ logits - mean) > 8 * error


def test_edits_apply_at_every_step_and_a_finished_row_is_padded(
  gemma2, tokens
):
  cfg, last = gemma2.config, "blocks.4.resid_post"
  # The residual that the head turns into the logits of <eos>.
  says_eos = gemma2.params["embed"][cfg.eos_id]
  says_eos = says_eos / (1 + gemma2.params["final_norm"])

  def edit(x):
    return x.at[0, 27].set(says_eos)

  out = gemma2.generate(tokens[:, :25], max_new_tokens=15, edits={last: edit})
  clean = gemma2.generate(tokens[:, :25], max_new_tokens=15)
  np.testing.assert_array_equal(out[0, :28], clean[0, :28])
  assert out[0, 28] == cfg.eos_id
  assert np.all(out[0, 29:] == cfg.pad_id)
  np.testing.assert_array_equal(out[1], clean[1])
  assert clean[0, 28] != cfg.eos_id


def test_no_new_tokens_gives_the_tokens_back(gemma2, tokens):
  np.testing.assert_array_equal(
    gemma2.generate(tokens, max_new_tokens=0), tokens
  )


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"max_new_tokens": -1}, "max_new_tokens=-1"),
    ({"max_new_tokens": 1, "temperature": -1.0}, "temperature=-1.0"),
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
    (jnp.zeros((2, 5)), r"integers \[B, T\]; got float32 of shape \(2, 5\)"),
    (jnp.zeros(5, int), r"integers \[B, T\]; got int32 of shape \(5,\)"),
    ([[1, 2], [3]], r"tokens must be integers \[B, T\].*rows"),
  ],
)
def test_what_is_no_batch_of_token_ids_is_an_error(gemma2, wrong, message):
  with pytest.raises(ValueError, match=message):
    gemma2.forward(wrong)
  with pytest.raises(ValueError, match=message):
    gemma2.generate(wrong, max_new_tokens=1)


@pytest.mark.parametrize("shape", [(2, 39), (40,), (3, 40)])
def test_a_mask_of_another_shape_than_the_tokens_is_an_error(
  gemma2, tokens, shape
):
  with pytest.raises(ValueError, match=r"mask must be.*\(2, 40\); got"):
    gemma2.forward(tokens, mask=np.ones(shape, bool))


def test_token_ids_may_be_lists_and_narrow_or_unsigned_integers(
  gemma2, tokens, full2
):
  for same in (tokens.tolist(), tokens.astype(np.uint16), jnp.asarray(tokens)):
    close(gemma2.forward(same)[0], full2[0])
