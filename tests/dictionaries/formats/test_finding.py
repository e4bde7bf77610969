"""Which format lies at a path, and where."""

import pytest

from gemma_jax import dictionaries
from gemma_jax.dictionaries import formats
from tests.dictionaries.formats.cases import CASES, EVERY
from tests.dictionaries.formats.files import M
from tests.dictionaries.formats.sae_lens_files import sae_lens
from tests.dictionaries.formats.sparsify_files import sparsify


def test_a_run_of_one_hookpoint_is_searched_and_of_several_listed(tmp_path):
  made = sparsify(tmp_path, "layers.3")
  assert (
    dictionaries.load(tmp_path / "run").config.read == "blocks.3.resid_post"
  )
  sparsify(tmp_path, "layers.4.mlp")
  with pytest.raises(
    ValueError, match=r"holds 2 dictionaries: .*layers\.3 "
  ) as e:
    dictionaries.load(tmp_path / "run")
  assert "layers.4.mlp (sparsify)" in str(e.value)
  assert dictionaries.load(made.path).config.read == "blocks.3.resid_post"


def test_a_sweep_s_workdir_lists_its_dictionaries(tmp_path):
  made = dictionaries.load(sae_lens(tmp_path / "made", "jumprelu").path)
  for member in ("k=4", "k=8"):
    made.save(tmp_path / "run" / "members" / member / "dictionary")
  with pytest.raises(ValueError, match=r"holds 2 dictionaries: .*k=4/dict"):
    dictionaries.load(tmp_path / "run")


def test_two_formats_in_one_directory_are_told_apart_by_name(tmp_path):
  made = sae_lens(tmp_path, "jumprelu")
  dictionaries.load(made.path).save(made.path)
  with pytest.raises(ValueError, match="format= tells them apart"):
    dictionaries.load(made.path)
  ours = dictionaries.load(made.path, format="gemma_jax")
  theirs = dictionaries.load(made.path, format="sae_lens")
  assert ours.config == theirs.config


@pytest.mark.parametrize("name", EVERY)
def test_a_format_may_be_named(name, tmp_path):
  made = CASES[name](tmp_path)
  format = name.split("-")[0]
  found = dictionaries.load(made.path, site=made.site)
  named = dictionaries.load(made.path, site=made.site, format=format)
  assert named.config == found.config


def test_a_file_of_another_name_needs_its_format(tmp_path):
  made = CASES["gemma_scope-res"](tmp_path)
  path = made.path / "weights.npz"
  (made.path / "params.npz").rename(path)
  with pytest.raises(
    ValueError, match=r"no name of a dictionary's file.*format="
  ):
    dictionaries.load(path)
  assert dictionaries.load(path, format="gemma_scope").config.width == M


def test_all_formats_have_what_a_format_has():
  assert set(formats.FORMATS) == {name.split("-")[0] for name in CASES} | {
    "gemma_jax"
  }
  for name, module in formats.FORMATS.items():
    assert name == module.NAME
    assert module.FILES
    if name != "gemma_jax":
      assert module.CONVENTION.format == name
      assert module.CONVENTION.source
