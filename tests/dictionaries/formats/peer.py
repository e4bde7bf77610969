"""Runs in the peers' environment: loads files there, or writes its own.

Usage: python peer.py LIBRARY JOBS.json. A job is {"do": "read" or "write",
"what": a case, "path": a directory}. "read" loads the path with the library and
writes x.npy through it to y.npy and acts.npy; "write" makes a dictionary with
the library, saves it there and does the same.
"""

import json
import os
import pathlib
import sys

import numpy as np
import torch

D, M, K = 6, 16, 3


def randomise(module, seed):
  """Values of a size at which all that a formula does can be seen."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, x in module.named_parameters():
      x.copy_(torch.randn(x.shape, generator=generator))
      if "threshold" in name:
        x.copy_(torch.rand(x.shape, generator=generator) + 0.2)


def finish(job, x, acts, y):
  path = pathlib.Path(job["path"])
  np.save(path / "y.npy", y.detach().numpy())
  if acts is not None:
    np.save(path / "acts.npy", acts.detach().numpy())


def given(job):
  path = pathlib.Path(job["path"]) / "x.npy"
  if job["do"] == "write":
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((40, D), generator=generator) + 0.5
    np.save(path, x.numpy())
  return torch.tensor(np.load(path))


# ------------------------------------------------------------------ SAELens
def sae_lens(jobs):
  from sae_lens import SAE
  from sae_lens.loading import pretrained_sae_loaders as loaders
  from sae_lens.registry import SAE_CLASS_REGISTRY
  from sae_lens.saes.sae import SAEMetadata
  from sae_lens.training.activation_scaler import ActivationScaler
  from safetensors.numpy import load_file

  def gemma(job):
    """SAELens' own loaders of Gemma Scope, with the hub on this disk."""
    root, folder = job["root"], job["folder"]
    repo = job["repo"]

    def local(repo_id, filename, subfolder=None, **_):
      parts = [p for p in (subfolder, filename) if p]
      return str(pathlib.Path(root, *parts))

    def shapes(_, filename):
      file = pathlib.Path(root) / filename
      return {name: list(x.shape) for name, x in load_file(file).items()}

    loaders.hf_hub_download = local
    loaders.get_safetensors_tensor_shapes = shapes
    load = {
      "gemma_2": loaders.gemma_2_sae_huggingface_loader,
      "gemma_2_transcoder": loaders.gemma_2_transcoder_huggingface_loader,
      "gemma_3": loaders.gemma_3_sae_huggingface_loader,
    }[job["what"]]
    sizes = {"d_in": D, "d_sae": M}
    if job["what"] == "gemma_2_transcoder":
      sizes["d_out"] = D
    overrides = None if job["what"] == "gemma_3" else sizes

    def converter(path, device, cfg_overrides=None):
      cfg, state, _ = load(repo, folder, "cpu", cfg_overrides=overrides)
      cfg["reshape_activations"] = "none"  # rows, not heads
      return cfg, state

    return SAE.load_from_disk("unused", converter=converter)

  def written(job):
    spec = job["what"]
    sae_class, cfg_class = SAE_CLASS_REGISTRY[spec["architecture"]]
    metadata = SAEMetadata(
      model_name="gpt2",
      hook_name="blocks.4.hook_resid_post",
      hook_name_out="blocks.4.hook_mlp_out",
      context_size=99,
    )
    fields = {"d_in": D, "d_sae": M, "metadata": metadata, **spec["fields"]}
    sae = sae_class(cfg_class(**fields))
    randomise(sae, len(spec["architecture"]))
    sae.save_model(job["path"])
    return sae

  for job in jobs:
    x = given(job)
    path = pathlib.Path(job["path"])
    if job["do"] == "write":
      sae = written(job)
    elif "root" in job:
      sae = gemma(job)
    else:
      sae = SAE.load_from_disk(path)
      scaler = path / "activation_scaler.json"
      if scaler.exists():
        made = ActivationScaler()
        made.load(scaler)
        sae.fold_activation_norm_scaling_factor(made.scaling_factor)
    finish(job, x, sae.encode(x), sae(x))


# -------------------------------------------------------- dictionary_learning
def dictionary_learning(jobs):
  from dictionary_learning import trainers
  from dictionary_learning.trainers import (
    batch_top_k,
    matryoshka_batch_top_k,
    top_k,
  )
  from dictionary_learning.utils import load_dictionary

  common = {
    "steps": 20_000,  # more than any warm-up
    "activation_dim": D,
    "dict_size": M,
    "layer": 8,
    "lm_name": "EleutherAI/pythia-160m",
    "submodule_name": "resid_post_layer_8",
    "device": "cpu",
    "seed": 0,
  }

  def trainer(name):
    if name == "TopKTrainer":
      return top_k.TopKTrainer(**common, k=K)
    if name == "BatchTopKTrainer":
      return batch_top_k.BatchTopKTrainer(**common, k=K)
    if name == "MatryoshkaBatchTopKTrainer":
      return matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer(
        **common, k=K, group_fractions=[0.25, 0.25, 0.5]
      )
    aim = {"target_l0": 4} if name == "JumpReluTrainer" else {}
    return getattr(trainers, name)(**common, **aim)

  for job in jobs:
    x = given(job)
    path = pathlib.Path(job["path"])
    if job["do"] == "write":
      made = trainer(job["what"])
      randomise(made.ae, 3)
      if "threshold" in dict(made.ae.named_buffers()):
        made.ae.threshold.fill_(0.8)
      made.ae.scale_biases(1.5)  # as its training does before it saves
      state = {name: v.cpu() for name, v in made.ae.state_dict().items()}
      torch.save(state, path / "ae.pt")
      buffer = {"io": "out", "ctx_len": 64}
      config = {"trainer": made.config, "buffer": buffer}
      (path / "config.json").write_text(json.dumps(config))
      ae = made.ae
    else:
      ae, _ = load_dictionary(str(path), "cpu")
    acts = ae.encode(x)
    if job["do"] == "read" and type(ae).__name__ == "AutoEncoder":
      acts = None  # its loader turns decoder norms into activations
    finish(job, x, acts, ae(x))


# ------------------------------------------------------------------ sparsify
def sparsify(jobs):
  os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # which needs a GPU
  from sparsify import SparseCoder, SparseCoderConfig

  for job in jobs:
    x = given(job)
    if job["do"] == "write":
      cfg = SparseCoderConfig(num_latents=M, k=K, **job["what"])
      coder = SparseCoder(D, cfg)
      randomise(coder, 5)
      coder.save_to_disk(job["path"])
    else:
      coder = SparseCoder.load_from_disk(job["path"])
    with torch.no_grad():
      finish(job, x, None, coder(x).sae_out)


if __name__ == "__main__":
  library, file = sys.argv[1:]
  jobs = json.loads(pathlib.Path(file).read_text())
  {
    "sae_lens": sae_lens,
    "dictionary_learning": dictionary_learning,
    "sparsify": sparsify,
  }[library](jobs)
