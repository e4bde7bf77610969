"""A peer's training step, run by the peer's own interpreter.

Reads {"system", "activation", "k", "learning_rate"} and the paths of weights
and rows from its arguments; then, for each number of steps on standard input,
trains so many and answers {"seconds", "losses"} in a line of JSON.
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
    steps=1_000_000,
    activation_dim=weights["W_enc"].shape[0],
    dict_size=weights["W_enc"].shape[1],
    k=case["k"],
    layer=0,
    lm_name="none",
    lr=case["learning_rate"],
    warmup_steps=0,
    device="cpu",
  )
  with torch.no_grad():
    trainer.ae.encoder.weight.copy_(weights["W_enc"].T)
    trainer.ae.decoder.weight.copy_(weights["W_dec"].T)
  return trainer.update


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
  )(
    config(
      d_in=weights["W_enc"].shape[0],
      d_sae=weights["W_enc"].shape[1],
      k=case["k"],
    )
  )
  with torch.no_grad():
    sae.W_enc.copy_(weights["W_enc"])
    sae.W_dec.copy_(weights["W_dec"])
  trainer = SAETrainer(
    SAETrainerConfig(
      total_training_samples=10**9,
      train_batch_size_samples=case["batch"],
      lr=case["learning_rate"],
      lr_end=case["learning_rate"],
    ),
    sae,
    iter(()),
  )
  return lambda _, x: float(trainer._train_step(sae, x).loss.detach())


def main():
  case = json.loads(sys.argv[1])
  stored = np.load(sys.argv[2], allow_pickle=False)
  weights = {name: torch.from_numpy(stored[name]) for name in stored.files}
  rows = torch.from_numpy(np.load(sys.argv[3], allow_pickle=False))
  torch.set_num_threads(case["threads"])
  step = globals()[case["system"]](case, weights)
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
