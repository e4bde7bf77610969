"""Blocks run in pieces, from any block on, in every family."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax import models
from gemma_jax.models import PerLayer, Splice
from gemma_jax.models.forward import embed, run_blocks
from gemma_jax.models.head import unembed

pytestmark = pytest.mark.usefixtures("quick_compiles")

FAMILIES = ("gemma2", "gemma3", "gpt2", "neox", "llama")


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, one_device):
  return models.load_model(f"random:{request.param}-tiny", mesh=one_device)


@pytest.fixture(scope="module")
def batch():
  tokens = np.random.default_rng(0).integers(4, 1000, (3, 30))
  mask = np.ones((3, 30), bool)
  mask[1, :7] = False
  return tokens, mask


def test_pieces_make_the_whole(model, batch):
  tokens, mask = batch
  expected, _ = model.forward(tokens, mask=mask)

  @jax.jit
  def logits(cut):
    x = embed(model.config, model.params, tokens, mask=mask)
    for first, last in ((0, cut), (cut, model.config.num_layers)):
      x = run_blocks(
        model.config, model.params, x, first, last, mask=jnp.asarray(mask)
      )
    return unembed(model.config, model.params, x)

  for cut in (0, 2, model.config.num_layers):
    got = logits(cut)
    np.testing.assert_allclose(
      np.asarray(got)[mask], np.asarray(expected)[mask], atol=2e-4, rtol=1e-4
    )
  assert logits._cache_size() == 1  # one program, wherever it is cut


def test_an_edit_that_looks_at_the_layer_is_that_of_forward(model, batch):
  tokens, _ = batch
  vector = np.random.default_rng(1).normal(size=model.config.width)

  def change(here, hidden, raw, x):
    on = here == 2
    bonus = hidden[..., :1] * vector + 0.1 * raw
    return x + jnp.where(on, bonus, 0).astype(x.dtype)

  edit = Splice(
    ("mlp_hidden", "mlp_raw"),
    PerLayer(change, jnp.arange(model.config.num_layers)),
  )
  expected, _ = model.forward(tokens, edits={"blocks.*.mlp_out": edit})
  plain, _ = model.forward(tokens)
  x = embed(model.config, model.params, tokens)
  for first, last, edits in ((0, 1, {}), (1, None, {"blocks.*.mlp_out": edit})):
    last = model.config.num_layers if last is None else last
    x = run_blocks(model.config, model.params, x, first, last, edits=edits)
  got = unembed(model.config, model.params, x)
  np.testing.assert_allclose(got, expected, atol=2e-4, rtol=1e-4)
  assert np.abs(np.asarray(expected - plain)).max() > 1e-2


def test_an_edit_of_one_layer_by_number_is_refused(model, batch):
  x = embed(model.config, model.params, batch[0])
  with pytest.raises(ValueError, match=r"expected blocks\.\* alone"):
    run_blocks(
      model.config,
      model.params,
      x,
      0,
      1,
      edits={"blocks.0.mlp_out": lambda x: x},
    )


def test_a_splice_that_reads_several_sites_must_read_earlier_ones(model, batch):
  edit = Splice(("mlp_hidden", "resid_post"), lambda a, b, x: x)
  with pytest.raises(ValueError, match="reads 'resid_post', which a block"):
    model.forward(batch[0], edits={"blocks.0.mlp_out": edit})
