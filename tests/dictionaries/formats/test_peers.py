"""The real SAELens, dictionary_learning and sparsify, on the same files.

    GEMMA_JAX_PEERS_PYTHON=/path/to/python python -m pytest -m peers

That Python has sae-lens 6.54, dictionary-learning 0.1.0 and eai-sparsify 1.3.3.
Files go both ways: what is written here is loaded there and computes the same,
and what they save with their own functions is loaded here.
"""

import json
import os
import pathlib
import subprocess

import numpy as np
import pytest

from gemma_jax import dictionaries
from tests.dictionaries.formats.cases import CASES
from tests.dictionaries.formats.files import inputs
from tests.dictionaries.formats.test_saving import SAVED, make

PYTHON = os.environ.get("GEMMA_JAX_PEERS_PYTHON")
pytestmark = [
  pytest.mark.peers,
  pytest.mark.torch,
  pytest.mark.usefixtures("quick_compiles"),
  pytest.mark.skipif(
    PYTHON is None, reason="GEMMA_JAX_PEERS_PYTHON names no Python"
  ),
]
# What a peer of another version cannot load.
NOT_THERE = (
  # SAELens 6 has no parameter for it.
  "sae_lens-finetuning_scale",
  # Without a threshold everything that is positive passes there; see
  # dictionary_learning/trainers/batch_top_k.py.
  "dictionary_learning-BatchTopKSAE_without_a_threshold",
)
GEMMA = {
  "gemma_scope-res": "gemma_2",
  "gemma_scope-mlp": "gemma_2",
  "gemma_scope-att": "gemma_2",
  "gemma_scope-transcoders": "gemma_2_transcoder",
  "gemma_scope_2-resid_post": "gemma_3",
  "gemma_scope_2-attn_out": "gemma_3",
  "gemma_scope_2-mlp_out": "gemma_3",
  "gemma_scope_2-transcoder": "gemma_3",
  "gemma_scope_2-affine": "gemma_3",
}


def run(library, jobs, tmp_path):
  """Runs the jobs in one process of the peers' Python."""
  file = tmp_path / "jobs.json"
  file.write_text(json.dumps(jobs))
  program = pathlib.Path(__file__).with_name("peer.py")
  done = subprocess.run(
    [PYTHON, str(program), library, str(file)],
    capture_output=True,
    text=True,
    cwd=tmp_path,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-3000:]


def compare(path, d):
  """Ours against what the peer left at a path."""
  x = np.load(path / "x.npy")
  y = np.load(path / "y.npy")
  scale = max(1.0, np.abs(y).max())
  assert np.abs(np.asarray(d.reconstruct(x)) - y).max() <= 1e-5 * scale
  if (path / "acts.npy").exists():
    acts = np.load(path / "acts.npy")
    assert 0.02 < (acts > 0).mean() < 0.95
    scale = max(1.0, acts.max())
    assert np.abs(np.asarray(d.encode(x)) - acts).max() <= 1e-5 * scale


def write_inputs(path):
  np.save(path / "x.npy", inputs())


@pytest.mark.parametrize(
  "library", ["sae_lens", "dictionary_learning", "sparsify"]
)
def test_files_in_a_layout_compute_there_what_they_do_here(library, tmp_path):
  made = {
    name: write(tmp_path / name)
    for name, write in CASES.items()
    if name.startswith(f"{library}-") and name not in NOT_THERE
  }
  assert len(made) >= 3
  jobs = [
    {"do": "read", "what": name, "path": str(written.path)}
    for name, written in made.items()
  ]
  for written in made.values():
    write_inputs(written.path)
  run(library, jobs, tmp_path)
  for written in made.values():
    compare(written.path, dictionaries.load(written.path))


def test_sae_lens_reads_gemma_scope_as_we_do(tmp_path):
  made, jobs = {}, []
  for name, loader in GEMMA.items():
    root = tmp_path / name
    made[name] = CASES[name](root)
    write_inputs(made[name].path)
    folder = made[name].path.relative_to(root)
    repo = "google/gemma-scope-2-1b-pt"
    if loader != "gemma_3":
      repo, folder = folder.parts[0], folder.relative_to(folder.parts[0])
      root = root / repo
    jobs.append(
      {
        "do": "read",
        "what": loader,
        "path": str(made[name].path),
        "root": str(root),
        "repo": repo,
        "folder": str(folder),
      }
    )
  run("sae_lens", jobs, tmp_path)
  for written in made.values():
    compare(written.path, dictionaries.load(written.path))


def test_sae_lens_computes_with_what_we_save_for_it(tmp_path):
  jobs, made = [], []
  for activation, kind, architecture in SAVED:
    # A transcoder there has an input as wide as ours.
    d = make(activation, kind=kind)
    path = tmp_path / f"{activation}-{kind}-{architecture}"
    d.save(path, format="sae_lens")
    write_inputs(path)
    made.append((path, d))
    jobs.append({"do": "read", "what": architecture, "path": str(path)})
  normed = make("topk", layer_norm=True)
  normed.save(tmp_path / "layer_norm", format="sae_lens")
  write_inputs(tmp_path / "layer_norm")
  made.append((tmp_path / "layer_norm", normed))
  jobs.append({"do": "read", "what": "", "path": str(tmp_path / "layer_norm")})
  run("sae_lens", jobs, tmp_path)
  for path, d in made:
    compare(path, d)


def test_sae_lens_reads_the_gemma_scope_files_that_we_save(tmp_path):
  jobs, made = [], []
  for activation in ("relu", "jumprelu", "batchtopk"):
    d = make(activation)
    root = tmp_path / activation / "gemma-scope-2b-pt-res"
    folder = "layer_3/width_16k/average_l0_3"
    d.save(root / folder, format="gemma_scope")
    write_inputs(root / folder)
    made.append((root / folder, d))
    jobs.append(
      {
        "do": "read",
        "what": "gemma_2",
        "path": str(root / folder),
        "root": str(root),
        "repo": root.name,
        "folder": folder,
      }
    )
  run("sae_lens", jobs, tmp_path)
  for path, d in made:
    compare(path, d)


def test_what_sae_lens_saves_is_loaded(tmp_path):
  specs = {
    "standard": {"apply_b_dec_to_input": True},
    "gated": {"apply_b_dec_to_input": True},
    "jumprelu": {"apply_b_dec_to_input": False},
    "topk": {"k": 3, "rescale_acts_by_decoder_norm": True},
    "transcoder": {"d_out": 5, "apply_b_dec_to_input": False},
    "skip_transcoder": {"d_out": 6, "apply_b_dec_to_input": False},
    "jumprelu_transcoder": {"d_out": 5, "apply_b_dec_to_input": False},
    "jumprelu_skip_transcoder": {"d_out": 6, "apply_b_dec_to_input": False},
  }
  jobs = [
    {
      "do": "write",
      "what": {"architecture": name, "fields": fields},
      "path": str(tmp_path / name),
    }
    for name, fields in specs.items()
  ]
  fields = {"normalize_activations": "layer_norm"}
  jobs.append(
    {
      "do": "write",
      "what": {"architecture": "standard", "fields": fields},
      "path": str(tmp_path / "layer_norm"),
    }
  )
  run("sae_lens", jobs, tmp_path)
  for job in jobs:
    d = dictionaries.load(job["path"])
    assert d.config.read == "blocks.4.resid_post"
    assert d.config.model == "gpt2"
    assert d.provenance["metadata"]["context_size"] == 99
    compare(pathlib.Path(job["path"]), d)


def test_what_dictionary_learnings_trainers_save_is_loaded(tmp_path):
  kinds = {
    "StandardTrainer": "relu",
    "GatedSAETrainer": "gated",
    "TopKTrainer": "topk",
    "BatchTopKTrainer": "batchtopk",
    "MatryoshkaBatchTopKTrainer": "batchtopk",
    "JumpReluTrainer": "jumprelu",
  }
  jobs = []
  for name in kinds:
    (tmp_path / name).mkdir()
    jobs.append({"do": "write", "what": name, "path": str(tmp_path / name)})
  run("dictionary_learning", jobs, tmp_path)
  for name, activation in kinds.items():
    d = dictionaries.load(tmp_path / name)
    assert d.config.activation == activation
    assert d.config.read == "blocks.8.resid_post"
    if name.startswith("Matryoshka"):
      assert d.config.prefix_widths == (4, 8, 16)
    compare(tmp_path / name, d)


def test_what_sparsify_saves_is_loaded(tmp_path):
  options = [
    {},
    {"transcode": True},
    {"transcode": True, "skip_connection": True},
    {"skip_connection": True},
  ]
  jobs = [
    {"do": "write", "what": what, "path": str(tmp_path / f"{i}/layers.2.mlp")}
    for i, what in enumerate(options)
  ]
  run("sparsify", jobs, tmp_path)
  for job, what in zip(jobs, options, strict=True):
    d = dictionaries.load(job["path"])
    read = "mlp_in" if what else "mlp_raw"
    assert d.config.read == f"blocks.2.{read}"
    compare(pathlib.Path(job["path"]), d)
