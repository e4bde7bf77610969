"""PyTorch files that are damaged, hostile, or of something else."""

import json
import sys
import zipfile

import numpy as np
import pytest

from gemma_jax import dictionaries
from tests.dictionaries.formats.cases import CASES
from tests.dictionaries.formats.files import (
  M,
  write_json,
)
from tests.dictionaries.formats.refusing import (
  archive,
  refused,
)


@pytest.fixture
def trained(tmp_path):
  return CASES["dictionary_learning-BatchTopKSAE"](tmp_path).path


def retrain(path, **changes):
  fields = json.loads((path / "config.json").read_text())
  fields["trainer"] |= changes
  write_json(path / "config.json", fields)


@pytest.mark.torch
@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"dict_class": "CrossCoder"}, "'CrossCoder' is not supported; expected"),
    ({"k": 4}, "says k=4, and the weights k=3"),
    ({"dict_size": 99}, f"M = {M}; but M = 99 in config.json's dict_size"),
    ({"dict_class": "GatedAutoEncoder"}, "Missing: decoder_bias, r_mag"),
  ],
)
def test_dictionary_learning_configs_that_do_not_fit(changes, message, trained):
  retrain(trained, **changes)
  refused(trained, message)


@pytest.mark.torch
@pytest.mark.parametrize("kept", [0, 30, 900, -40])
def test_a_truncated_torch_file_is_told(kept, trained):
  file = trained / "ae.pt"
  file.write_bytes(file.read_bytes()[:kept])
  refused(trained, "no complete PyTorch file of tensors")


@pytest.mark.torch
def test_a_torch_file_runs_no_code(trained, tmp_path):
  import torch

  witness = tmp_path / "ran"

  class Evil:
    def __reduce__(self):
      return (open, (str(witness), "w"))

  torch.save({"encoder.weight": Evil()}, trained / "ae.pt")
  refused(trained, "Files that hold other objects are not read")
  assert not witness.exists()


@pytest.mark.torch
def test_torch_tensors_are_no_larger_than_what_is_stored(trained):
  import torch

  state = torch.load(trained / "ae.pt", weights_only=True)
  state["encoder.weight"] = torch.zeros(1, 1).expand(2**20, 2**20)
  torch.save(state, trained / "ae.pt")
  refused(trained, "larger than what is stored of it")


@pytest.mark.torch
@pytest.mark.parametrize(
  ("state", "message"),
  [
    ([1, 2], "it holds a list"),
    ({"encoder.weight": 3}, "encoder.weight is a int; expected a plain tensor"),
  ],
)
def test_torch_files_of_other_things_are_refused(state, message, trained):
  import torch

  torch.save(state, trained / "ae.pt")
  refused(trained, message)


@pytest.mark.torch
def test_a_torch_archive_that_unpacks_to_far_more_is_not_unpacked(trained):
  zeros = {"archive/data.pkl": b"\0" * (4 * 2**22)}
  archive(trained / "ae.pt", zeros, zipfile.ZIP_DEFLATED)
  refused(trained, "claims to unpack to 16777216. It is no file of weights")


@pytest.mark.torch
def test_bfloat16_of_torch_is_read(trained):
  import torch

  state = torch.load(trained / "ae.pt", weights_only=True)
  before = dictionaries.load(trained).params["W_dec"]
  half = {
    name: x.bfloat16() if x.is_floating_point() else x
    for name, x in state.items()
  }
  torch.save(half, trained / "ae.pt")
  d = dictionaries.load(trained)
  assert d.provenance["dtype"] == "bfloat16"
  np.testing.assert_allclose(d.params["W_dec"], before, rtol=1e-2)


@pytest.mark.torch
def test_groups_that_do_not_add_up_are_refused(tmp_path):
  import torch

  path = CASES["dictionary_learning-MatryoshkaBatchTopKSAE"](tmp_path).path
  state = torch.load(path / "ae.pt", weights_only=True)
  state["group_sizes"] = torch.tensor([4, 4, 9])
  torch.save(state, path / "ae.pt")
  refused(path, f"add up to the width, {M}")


def test_without_torch_the_error_says_what_to_install(tmp_path, monkeypatch):
  write_json(
    tmp_path / "config.json", {"trainer": {"dict_class": "AutoEncoder"}}
  )
  (tmp_path / "ae.pt").write_bytes(b"anything")
  monkeypatch.setitem(sys.modules, "torch", None)
  refused(
    tmp_path,
    "ae.pt is a PyTorch file, .*it is not installed. pip install torch",
    ModuleNotFoundError,
  )
