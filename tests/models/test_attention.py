"""The implementations of attention against JAX's own and each other."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax import models
from gemma_jax.models import attention, random

pytestmark = pytest.mark.usefixtures("quick_compiles")

LENGTH = 700  # six chunks, the last one not full
GEMMA2 = dataclasses.replace(models.PRESETS["gemma2-tiny"], max_context=1024)
GEMMA3 = dataclasses.replace(models.PRESETS["gemma3-tiny"], max_context=1024)


def relative(x, y):
  x, y = np.asarray(x), np.asarray(y)
  return np.abs(x - y).max() / np.abs(y).max()


def draw(cfg, length, batch=1):
  """Random q, k, v."""
  keys = jax.random.split(jax.random.key(0), 3)
  heads = cfg.num_heads, cfg.num_kv_heads, cfg.num_kv_heads
  return [
    jax.random.normal(key, (batch, length, n, cfg.head_dim))
    for key, n in zip(keys, heads, strict=True)
  ]


@functools.partial(jax.jit, static_argnums=(0, 1))
def attend(cfg, implementation, q, k, v, is_global, start=0, valid=None):
  return attention.attend(
    cfg,
    q,
    k,
    v,
    is_global,
    start=start,
    valid=valid,
    implementation=implementation,
  )


# A window within a chunk, one over two chunks, one that is no limit.
WINDOWS = pytest.mark.parametrize("window", [100, 256, 300, 900])
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["xla", "chunked"])


@WINDOWS
@IMPLEMENTATIONS
def test_without_a_soft_cap_attention_is_that_of_jax(implementation, window):
  cfg = dataclasses.replace(GEMMA3, window=window)
  q, k, v = draw(cfg, LENGTH)
  for is_global in (False, True):
    expected = jax.nn.dot_product_attention(
      q,
      k,
      v,
      scale=cfg.query_scale,
      is_causal=True,
      local_window_size=None if is_global else (window - 1, 0),
      implementation="xla",
    )
    got = attend(cfg, implementation, q, k, v, jnp.array(is_global))
    assert relative(got, expected) < 2e-6


@pytest.mark.parametrize("window", [100, 300])
def test_gradients_through_chunks_equal_those_through_all_scores(window):
  cfg = dataclasses.replace(GEMMA2, window=window)
  qkv = draw(cfg, LENGTH)
  weights = jax.random.normal(jax.random.key(1), qkv[0].shape)

  def gradients(implementation, is_global):
    def loss(qkv):
      return jnp.vdot(weights, attend(cfg, implementation, *qkv, is_global))

    return jax.grad(loss)(qkv)

  for is_global in (jnp.array(False), jnp.array(True)):
    expected = gradients("xla", is_global)
    got = gradients("chunked", is_global)
    assert max(map(relative, got, expected)) < 5e-6


def test_chunks_of_which_several_share_their_keys_equal_all_scores():
  length = 9000
  assert length > 2 * attention.SLICES * attention.CHUNK
  cfg = dataclasses.replace(
    GEMMA2, num_heads=2, num_kv_heads=1, head_dim=8, window=1000
  )
  q, k, v = draw(cfg, length)
  valid = jnp.arange(length)[None] >= 300
  for is_global in (jnp.array(False), jnp.array(True)):
    got = attend(cfg, "chunked", q, k, v, is_global, valid=valid)
    assert got.shape == q.shape
    # Some of the queries, with all of their scores.
    for start in (300, 700, 4000, 8900):
      some = slice(start, start + 100)
      expected = attend(cfg, "xla", q[:, some], k, v, is_global, start, valid)
      assert relative(got[:, some], expected) < 5e-6


@pytest.mark.parametrize(
  ("cfg", "window", "padding"),
  [
    (GEMMA2, 300, 300),
    (GEMMA3, 100, 300),
    pytest.param(GEMMA2, 100, 0, marks=pytest.mark.slow),
    pytest.param(GEMMA3, 300, 0, marks=pytest.mark.slow),
  ],
  ids=["gemma2-300-300", "gemma3-100-300", "gemma2-100-0", "gemma3-300-0"],
)
def test_a_model_with_chunks_equals_the_one_with_all_scores(
  cfg, window, padding
):
  cfg = dataclasses.replace(cfg, window=window)
  params = random.init_quickly(cfg, jax.random.key(0))
  tokens = jax.random.randint(jax.random.key(1), (2, LENGTH), 4, 1000)
  # One row padded on its left, one not.
  mask = jnp.arange(LENGTH) >= jnp.array([[padding], [0]])
  forward = jax.jit(
    models.forward, static_argnums=0, static_argnames="attention"
  )
  got, expected = (
    forward(
      cfg, params, tokens, mask=mask if padding else None, attention=name
    )[0]
    for name in ("chunked", "xla")
  )
  assert got.shape == (2, LENGTH, 1000)
  assert relative(got[mask], expected[mask]) < 2e-6


def test_a_loaded_model_runs_the_attention_that_it_was_loaded_with(
  one_device, monkeypatch
):
  tokens = np.random.default_rng(0).integers(4, 1000, (1, 41))
  ran = []
  attend = attention.attend

  def spy(*args, implementation, **kwargs):
    ran.append(implementation)
    return attend(*args, implementation=implementation, **kwargs)

  monkeypatch.setattr(attention, "attend", spy)
  logits = []
  for name in ("xla", "chunked"):
    model = models.load_model(
      "random:gemma2-tiny", mesh=one_device, attention=name
    )
    logits.append(model.forward(tokens)[0])
    assert set(ran) == {name}
    ran.clear()
  assert relative(*logits) < 2e-6


# Which one runs.


def test_auto_takes_chunks_for_contexts_of_more_than_one():
  one = attention.CHUNK
  for length, expected in ((1, "xla"), (one, "xla"), (one + 1, "chunked")):
    assert attention.choose(GEMMA2, "auto", length, "bfloat16") == expected


@IMPLEMENTATIONS
def test_what_has_every_feature_is_taken_as_asked(implementation):
  for dtype in ("float32", "bfloat16"):
    got = attention.choose(GEMMA2, implementation, 10_000, dtype)
    assert got == implementation


LLAMA = models.PRESETS["llama-tiny"]


@pytest.mark.parametrize(
  ("cfg", "dtype", "device", "lacks"),
  [
    (GEMMA2, "bfloat16", "gpu", [r"soft-capped scores (attn_softcap=5.0)"]),
    (LLAMA, "float32", "gpu", ["float32 (only bfloat16 and float16)"]),
    (LLAMA, "float16", "cpu", ["a device of kind 'cpu' (only GPUs)"]),
    (
      dataclasses.replace(LLAMA, head_dim=20),
      "bfloat16",
      "gpu",
      ["heads of 20 (a multiple of 8, up to 256)"],
    ),
    (
      dataclasses.replace(LLAMA, head_dim=512),
      "bfloat16",
      "gpu",
      ["heads of 512 (a multiple of 8, up to 256)"],
    ),
    (GEMMA2, "float32", "cpu", ["soft-capped", "float32", "'cpu'"]),
    (LLAMA, "bfloat16", "gpu", []),
  ],
)
def test_cudnn_is_refused_by_the_name_of_what_it_lacks(
  monkeypatch, cfg, dtype, device, lacks
):
  monkeypatch.setattr(jax, "default_backend", lambda: device)
  if not lacks:
    assert attention.choose(cfg, "cudnn", 40, dtype) == "cudnn"
    return
  with pytest.raises(ValueError, match="Use 'xla', 'chunked' or 'auto'") as e:
    attention.choose(cfg, "cudnn", 40, dtype)
  message = str(e.value)
  assert all(text in message for text in lacks)
  listed = message.removeprefix("attention='cudnn' lacks what this model needs")
  assert listed.split(". Use")[0].count(";") == len(lacks) - 1


def test_an_attention_that_a_model_cannot_have_is_an_error_when_it_is_loaded():
  with pytest.raises(ValueError, match=r"soft-capped.*float32.*'cpu'"):
    models.load_model("random:gemma2-tiny", attention="cudnn")
  with pytest.raises(
    ValueError, match="'flash' is unknown; expected one of auto, xla, chunked"
  ):
    models.load_model("random:gemma2-tiny", attention="flash")
