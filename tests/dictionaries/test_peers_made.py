"""The recorded steps are what the systems do; needs them installed."""

import os
import pathlib
import subprocess

import numpy as np
import pytest

PEERS = pathlib.Path(__file__).parent / "peers"
PYTHON = os.environ.get("GEMMA_JAX_PEERS_PYTHON")


@pytest.mark.peers
@pytest.mark.skipif(not PYTHON, reason="GEMMA_JAX_PEERS_PYTHON is not set")
def test_the_recorded_steps_are_what_the_systems_do(tmp_path):
  subprocess.run([PYTHON, PEERS / "make.py", tmp_path], check=True)
  made = {path.name for path in tmp_path.glob("*.npz")}
  assert made == {path.name for path in PEERS.glob("*.npz")}
  for name in made:
    with (
      np.load(PEERS / name, allow_pickle=False) as stored,
      np.load(tmp_path / name, allow_pickle=False) as new,
    ):
      assert stored.files == new.files
      for key in stored.files:
        if stored[key].dtype.kind == "U":
          assert str(stored[key]) == str(new[key])
        else:
          np.testing.assert_allclose(
            new[key], stored[key], rtol=1e-5, atol=1e-6, err_msg=f"{name} {key}"
          )
