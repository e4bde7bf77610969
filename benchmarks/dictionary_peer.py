"""A peer's training step, run by the peer's own interpreter.

Reads {"system", "activation", "k", "learning_rate", ...} and the paths of
weights and rows from its arguments. Without "steps" it trains as many steps as
each number on standard input says and answers {"seconds", "losses"} in a line
of JSON; with "steps" it trains so many as its authors would and saves what
came of it over the weights.
"""

import json
import os
import sys
import time

# Before torch is imported: waiting threads must not take the other's turns.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch


def dictionary_learning(case, weights):
  """Their trainer, with the weights that ours starts from."""
  from dictionary_learning.trainers import batch_top_k, top_k

  topk = case["activation"] == "topk"
  trainer = (top_k.TopKTrainer if topk else batch_top_k.BatchTopKTrainer)(
    steps=case.get("steps", 1_000_000),
    activation_dim=case["d"],
    dict_size=case["width"],
    k=case["k"],
    layer=0,
    lm_name="none",
    lr=case["learning_rate"],
    warmup_steps=case.get("warmup", 0),
    decay_start=case.get("decay_start"),
    device="cpu",
  )
  if weights.get("W_dec") is None:
    return trainer.update, lambda: _plain(
      trainer.ae.encoder.weight.T,
      trainer.ae.encoder.bias,
      trainer.ae.decoder.weight.T,
      trainer.ae.b_dec,
    )
  with torch.no_grad():
    trainer.ae.encoder.weight.copy_(weights["W_enc"].T)
    trainer.ae.decoder.weight.copy_(weights["W_dec"].T)
  return trainer.update, None


def sae_lens(case, weights):
  """Their trainer, with the weights that ours starts from."""
  from sae_lens.config import SAETrainerConfig
  from sae_lens.saes import batchtopk_sae, topk_sae
  from sae_lens.training.sae_trainer import SAETrainer

  topk = case["activation"] == "topk"
  config = (
    topk_sae.TopKTrainingSAEConfig
    if topk
    else batchtopk_sae.BatchTopKTrainingSAEConfig
  )
  sae = (
    topk_sae.TopKTrainingSAE if topk else batchtopk_sae.BatchTopKTrainingSAE
  )(config(d_in=case["d"], d_sae=case["width"], k=case["k"]))
  if weights.get("W_dec") is not None:
    with torch.no_grad():
      sae.W_enc.copy_(weights["W_enc"])
      sae.W_dec.copy_(weights["W_dec"])
  trainer = SAETrainer(
    SAETrainerConfig(
      total_training_samples=case.get("steps", 10**6) * case["batch"],
      train_batch_size_samples=case["batch"],
      lr=case["learning_rate"],
      lr_end=case["learning_rate"] / 10,
      lr_warm_up_steps=case.get("warmup", 0),
      lr_decay_steps=case.get("decay", 0),
    ),
    sae,
    iter(()),
  )

  def save():
    # Ranked by activation times decoder norm: rows of norm 1 say the same.
    norms = sae.W_dec.norm(dim=1)
    return _plain(
      sae.W_enc * norms,
      sae.b_enc * norms,
      sae.W_dec / norms[:, None],
      sae.b_dec,
    )

  return lambda _, x: float(trainer._train_step(sae, x).loss.detach()), save


def _plain(W_enc, b_enc, W_dec, b_dec):
  """Both subtract the decoder's bias from the input; here it is folded in."""
  tensors = {
    "W_enc": W_enc,
    "b_enc": b_enc - b_dec @ W_enc,
    "W_dec": W_dec,
    "b_dec": b_dec,
  }
  return {n: x.detach().numpy().astype("float32") for n, x in tensors.items()}


def train(case, rows, step, save, path):
  """All steps, on rows scaled as the system wants them; saves raw weights."""
  head = rows[: 16 * case["batch"]]
  # Mean |x|^2 of 1 there, mean |x| of sqrt(D) here.
  scale = {
    "dictionary_learning": lambda x: 1 / x.pow(2).sum(1).mean().sqrt(),
    "sae_lens": lambda x: case["d"] ** 0.5 / x.norm(dim=1).mean(),
  }[case["system"]](head)
  for i in range(case["steps"]):
    x = rows[i * case["batch"] : (i + 1) * case["batch"]]
    loss = step(i, x * scale)
    if i % 50 == 0:
      print(f"{case['system']} step {i}: loss {loss:.4g}", file=sys.stderr)
  found, scale = save(), scale.numpy()
  found["W_enc"] *= scale
  for name in ("W_dec", "b_dec"):
    found[name] /= scale
  np.savez(path, **found)


def main():
  case = json.loads(sys.argv[1])
  weights = {}
  if "steps" not in case:
    stored = np.load(sys.argv[2], allow_pickle=False)
    weights = {name: torch.from_numpy(stored[name]) for name in stored.files}
  rows = torch.from_numpy(np.load(sys.argv[3], allow_pickle=False))
  torch.set_num_threads(case["threads"])
  torch.manual_seed(case.get("seed", 0))
  step, save = globals()[case["system"]](case, weights)
  if "steps" in case:
    train(case, rows, step, save, sys.argv[2])
    return
  done, batch = 0, case["batch"]
  print(json.dumps({"ready": torch.__version__}), flush=True)
  for line in sys.stdin:
    losses, began = [], time.perf_counter()
    for _ in range(int(line)):
      start = done * batch % len(rows)
      losses.append(float(step(done, rows[start : start + batch])))
      done += 1
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "losses": losses}), flush=True)


if __name__ == "__main__":
  main()
