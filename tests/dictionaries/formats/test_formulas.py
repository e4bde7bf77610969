"""Every format's own layout and formulas."""

import numpy as np
import pytest

from gemma_jax import dictionaries
from tests.dictionaries.formats.cases import CASES, EVERY
from tests.dictionaries.formats.files import inputs

pytestmark = pytest.mark.usefixtures("quick_compiles")

# The skips that no shape can tell from their transpose.
TURNABLE = (
  "gemma_scope_2-affine",
  "gemma_scope_2-crosscoder_affine",
  "sae_lens-skip_transcoder",
  "sae_lens-jumprelu_skip_transcoder",
  "sparsify-skip_transcoder",
  "circuit_tracer-skip",
)


@pytest.mark.parametrize("name", EVERY)
def test_latents_and_output_are_those_of_the_formats_formula(name, tmp_path):
  made = CASES[name](tmp_path)
  d = dictionaries.load(made.path, site=made.site)
  assert d.provenance["format"] == name.split("-")[0]
  x = inputs(width=d.config.d_in)
  acts, y = made.formula(x)
  # Enough latents are on and off for the comparison to tell.
  assert 0.02 < (acts > 0).mean() < 0.9
  np.testing.assert_allclose(d.encode(x), acts, atol=2e-5)
  np.testing.assert_allclose(d.reconstruct(x), y, atol=5e-5)


@pytest.mark.parametrize("name", TURNABLE)
def test_a_square_skip_is_not_turned(name, tmp_path):
  made = CASES[name](tmp_path)
  d = dictionaries.load(made.path)
  skip = d.params["W_skip"]
  turned = dictionaries.Dictionary(d.config, {**d.params, "W_skip": skip.T})
  x = inputs(width=d.config.d_in)
  _, y = made.formula(x)
  assert np.abs(d.reconstruct(x) - y).max() < 5e-5
  assert np.abs(turned.reconstruct(x) - y).max() > 1
  # Where the file's own matrix is applied turned, ours is its transpose.
  assert d.provenance["convention"]["skip"] == (
    "x @ A" if name.startswith("gemma_scope_2") else "x @ A.T"
  )


@pytest.mark.parametrize("name", EVERY)
def test_a_loaded_dictionary_is_saved_with_where_it_came_from(name, tmp_path):
  made = CASES[name](tmp_path / "there")
  d = dictionaries.load(made.path, site=made.site)
  d.save(tmp_path / "ours")
  again = dictionaries.load(tmp_path / "ours")
  assert again.config == d.config
  assert again.provenance == d.provenance
  assert again.provenance["path"].startswith(str(made.path))
  assert again.provenance["dtype"] == "float32"
  assert set(again.provenance["convention"]) == {
    "format",
    "source",
    "read",
    "write",
    "gain",
    "subtracts_b_dec",
    "input_scale",
    "skip",
    "note",
  }
  for key, x in d.params.items():
    np.testing.assert_array_equal(again.params[key], x)
