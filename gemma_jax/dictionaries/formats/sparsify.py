"""sparsify (EleutherAI): a folder for each hookpoint, cfg.json beside weights.

Formulas and keys: sparsify 1.3.3, sparse_coder.py and config.py. Nothing but
the folder's name says which hook it is; it is a module's, whose output an SAE
reads, and whose input a transcoder reads and output it writes.
"""

import pathlib
import re

from gemma_jax.dictionaries.formats import hooks, tensors
from gemma_jax.dictionaries.formats.convention import (
  Convention,
  Loaded,
  finish,
)
from gemma_jax.models import safetensors

NAME = "sparsify"
CONFIG = "cfg.json"
WEIGHTS = "sae.safetensors"
FILES = (WEIGHTS,)
LAYOUT = {
  "encoder.weight": "MD",
  "encoder.bias": "M",
  "W_dec": "MD",
  "b_dec": "D",
  "W_skip": "DD",
}
CONVENTION = Convention(
  NAME, "cfg.json and the folder's name; sparsify 1.3.3, sparse_coder.py"
)


def read(path: pathlib.Path, site=None) -> Loaded:
  """The folder of one hookpoint.

  Raises:
    FileNotFoundError: one of the two files is missing.
    ValueError: an activation that is not top-k, or files that are damaged or
      contradict each other.
  """
  folder = path if path.is_dir() else path.parent
  file, cfg_file = tensors.weights(path, WEIGHTS), folder / CONFIG
  cfg = tensors.read_json(cfg_file)
  activation = tensors.field(cfg_file, cfg, "activation", str, "topk")
  if activation != "topk" or cfg.get("signed"):
    what = "signed" if activation == "topk" else activation
    raise ValueError(
      f"{cfg_file}: activation {what!r} is not supported; expected 'topk' "
      "(which keeps positive activations alone)."
    )
  d_in = tensors.field(cfg_file, cfg, "d_in", int)
  width = tensors.field(cfg_file, cfg, "num_latents", int, 0)
  width = width or d_in * tensors.field(cfg_file, cfg, "expansion_factor", int)
  transcode = tensors.field(cfg_file, cfg, "transcode", bool, False)
  skip = tensors.field(cfg_file, cfg, "skip_connection", bool, False)
  found = safetensors.open_file(file)
  layout = {k: v for k, v in LAYOUT.items() if skip or k != "W_skip"}
  known = {
    "D": (d_in, f"{CONFIG}'s d_in"),
    "M": (width, f"{CONFIG}'s num_latents"),
  }
  tensors.sizes(file, found, layout, known=known)
  run = {}
  if (folder.parent / "config.json").exists():
    run = tensors.read_json(folder.parent / "config.json")
  model = run.get("model") if isinstance(run.get("model"), str) else ""
  if site is None:
    # Versions before the flag trained transcoders that subtract b_dec.
    sites = _sites(folder.absolute().name, transcode or skip, model)
  else:
    sites = hooks.pair(site, model)
  convention = CONVENTION.at(
    *sites, subtracts_b_dec=not transcode, skip="x @ A.T" if skip else ""
  )
  w = {name: tensors.array(file, found, name) for name in layout}
  params = {
    "W_enc": w["encoder.weight"].T,
    "b_enc": w["encoder.bias"],
    "W_dec": w["W_dec"],
    "b_dec": w["b_dec"],
  }
  if skip:
    params["W_skip"] = w["W_skip"].T
  metadata = {"hookpoint": folder.absolute().name, "model_name": model}
  if isinstance(run.get("ctx_len"), int):
    metadata["context_size"] = run["ctx_len"]
  return finish(
    file,
    convention,
    tensors.fold(params, subtracts_b_dec=not transcode),
    dtype=found["W_dec"].dtype,
    metadata=metadata,
    activation="topk",
    k=tensors.field(cfg_file, cfg, "k", int),
    model=model,
  )


def _sites(hookpoint, transcoder, model) -> tuple[str, str]:
  """Our sites of a module's input and output; blank where there are none.

  An MLP's output is `mlp_raw` in every family: before Gemma's post-norm.
  Attention's is a site in models without post-norms alone.
  """
  match = re.fullmatch(r"(?:layers|h)[._](\d+)(?:[._](\w+))?", hookpoint)
  layer, module = match.groups() if match else (None, "")
  if module == "mlp":
    read = "mlp_in" if transcoder else "mlp_raw"
    return f"blocks.{layer}.{read}", f"blocks.{layer}.mlp_raw"
  if transcoder or layer is None:
    return "", ""
  if module is None:
    return (f"blocks.{layer}.resid_post",) * 2
  attention = module in ("attn", "self_attn", "attention")
  if attention and model and "gemma" not in model.lower():
    return (f"blocks.{layer}.attn_out",) * 2
  return "", ""
