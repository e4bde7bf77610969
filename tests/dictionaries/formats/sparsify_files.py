"""sparsify, in its own layout."""

from tests.dictionaries.formats.files import (
  D,
  K,
  M,
  Written,
  case,
  relu,
  top,
  weights,
  wide,
  write_json,
  write_safetensors,
)


def sparsify(
  root, hookpoint, *, transcode=False, skip=False, seed=0, **changes
):
  w = weights(
    seed, **{"encoder.weight": (M, D), "encoder.bias": M}, W_dec=(M, D), b_dec=D
  )
  if skip:
    w |= weights(seed + 1, W_skip=(D, D))
  path = root / "run" / hookpoint
  write_safetensors(path / "sae.safetensors", w)
  cfg = {
    "activation": "topk",
    "expansion_factor": 32,
    "normalize_decoder": True,
    "num_latents": M,
    "k": K,
    "multi_topk": False,
    "skip_connection": skip,
    "transcode": transcode,
    "d_in": D,
  }
  write_json(path / "cfg.json", cfg | changes)
  write_json(
    root / "run" / "config.json",
    {"model": "EleutherAI/pythia-70m", "ctx_len": 9},
  )
  w = wide(w)

  def formula(x):
    read = x if transcode else x - w["b_dec"]
    acts = top(relu(read @ w["encoder.weight"].T + w["encoder.bias"]))
    y = acts @ w["W_dec"] + w["b_dec"]
    return acts, y + (x @ w["W_skip"].T if skip else 0)

  return Written(path, formula)


@case("sparsify-sae")
def _(root):
  return sparsify(root, "layers.3", seed=30)


@case("sparsify-transcoder")
def _(root):
  return sparsify(root, "layers.3.mlp", transcode=True, seed=31)


@case("sparsify-skip_transcoder")
def _(root):
  return sparsify(root, "layers.3.mlp", transcode=True, skip=True, seed=32)
