"""Training steps by the systems' own trainers, recorded in our names.

Runs under the systems' interpreter; see `make.py`.
"""

import importlib
import importlib.metadata
import json
import os
import tempfile

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np
import torch

D, M, B, K, STEPS = 10, 36, 24, 4, 2
RATE = 0.01
THRESHOLD = 0.9  # running, of BatchTopK


def weights(seed, extra=(), dead=(), unit=False):
  """Parameters in our orientations; dead latents hardly reach the top."""
  rng = np.random.default_rng(seed)
  W_dec = rng.normal(size=(M, D))
  W_dec /= np.linalg.norm(W_dec, axis=1, keepdims=True)
  out = {
    "W_enc": 0.4 * rng.normal(size=(D, M)),
    "b_enc": 0.2 * rng.normal(size=M),
    "W_dec": W_dec if unit else W_dec * rng.uniform(0.5, 1.5, (M, 1)),
    "b_dec": 0.3 * rng.normal(size=D),
  }
  shapes = {"W_skip": (D, D), "r_mag": (M,), "b_mag": (M,)}
  for name in extra:
    if name == "threshold":
      out[name] = rng.uniform(0.2, 0.6, size=M)
    else:
      out[name] = 0.2 * rng.normal(size=shapes[name])
  dead = list(dead)
  out["W_enc"][:, dead] *= 0.15
  out["b_enc"][dead] = 0.02
  return {name: x.astype(np.float32) for name, x in out.items()}


def batches(seed):
  rng = np.random.default_rng(seed + 1000)
  x = rng.normal(size=(STEPS, B, D)) * rng.uniform(0.5, 1.5, D) + 0.3
  return x.astype(np.float32)


class Recording:
  """Watches an optimiser's steps.

  Attributes:
    named: our name -> (parameter, transposed).
    out: what goes into the file.
  """

  def __init__(self, optimizer, named, case, start):
    self.named, self.steps, self.losses, self.parts = named, 0, [], []
    self.since, self.thresholds, self.rates, self.raw = [], [], [], {}
    versions = {
      name: importlib.metadata.version(name)
      for name in ("sae-lens", "dictionary-learning", "eai-sparsify", "torch")
    }
    self.out = {
      "case": np.array(json.dumps(case)),
      "versions": np.array(json.dumps(versions)),
      **start,
    }
    for name, (parameter, _) in named.items():
      parameter.register_post_accumulate_grad_hook(
        lambda p, name=name: self.raw.update({name: p.grad.clone()})
      )
    step = optimizer.step

    def recorded(*args, **kwargs):
      for name, x in self.parameters().items():
        self.out[f"before/{self.steps}/{name}"] = x
        self.out[f"gradients/{self.steps}/{name}"] = self.ours(
          name, self.raw[name]
        )
      self.rates.append(optimizer.param_groups[0]["lr"])
      self.steps += 1
      return step(*args, **kwargs)

    optimizer.step = recorded

  def ours(self, name, tensor):
    array = tensor.detach().numpy()
    return np.array(array.T if self.named[name][1] else array)

  def parameters(self):
    return {name: self.ours(name, p) for name, (p, _) in self.named.items()}

  def set(self, values):
    with torch.no_grad():
      for name, (parameter, transposed) in self.named.items():
        value = torch.from_numpy(values[name])
        parameter.copy_(value.T if transposed else value)

  def after_step(self, since, threshold, loss, **parts):
    self.since.append(np.array(since, np.int64))
    self.thresholds.append(float(threshold))
    self.losses.append(float(loss))
    self.parts.append({name: float(x) for name, x in parts.items()})

  def save(self, path):
    out = self.out | {
      "loss": np.array(self.losses),
      "rate": np.array(self.rates),
      "since_fired_after": np.array(self.since),
      "threshold_after": np.array(self.thresholds),
    }
    for name in self.parts[0]:
      out[f"parts/{name}"] = np.array([p[name] for p in self.parts])
    for name, x in self.parameters().items():
      out[f"after/{name}"] = x
    np.savez_compressed(path, **out)


def case_of(preset, activation, changes=None, config=None):
  return {
    "preset": preset,
    "activation": activation,
    "changes": changes or {},
    "config": {"k": K} | (config or {}),
  }


# ------------------------------------------------------------------ SAELens
def sae_lens(
  seed, cls, activation, *, dead=(), extra=(), changes=None, config=None, **own
):
  import sae_lens as peer
  from sae_lens.config import SAETrainerConfig
  from sae_lens.training.sae_trainer import SAETrainer

  cfg = getattr(peer, f"{cls}Config")(d_in=D, d_sae=M, **own)
  sae = getattr(peer, cls)(cfg)
  trainer = SAETrainer(
    SAETrainerConfig(STEPS * B, B, lr=RATE, lr_end=RATE), sae, None
  )
  # Two steps into a sparsity warm-up, if there is one.
  for scheduler in trainer.coefficient_schedulers.values():
    scheduler.step()
    scheduler.step()
  passes = np.full(M, 1000)  # not dead yet
  passes[list(dead)] = 1001
  trainer.n_forward_passes_since_fired[:] = torch.from_numpy(passes)
  if hasattr(sae, "topk_threshold"):
    sae.topk_threshold.fill_(THRESHOLD)
  names = {"gated": {"b_enc": "b_gate"}}.get(activation, {})
  named = {
    name: (getattr(sae, names.get(name, name)), False)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec", *extra)
  }
  x = batches(seed)
  recording = Recording(
    trainer.optimizer,
    named,
    case_of("sae_lens", activation, changes, config),
    {
      "x": x,
      "y": x,
      "since_fired": passes * B,
      "threshold": np.float64(THRESHOLD),
      "steps": np.int64(2),
    },
  )
  recording.set(weights(seed, extra, dead))
  for batch in x:
    out = trainer.step(torch.from_numpy(batch))
    trainer.n_training_steps += 1
    losses = out.losses
    inner = sum(v for name, v in losses.items() if name.startswith("inner"))
    parts = {"reconstruction": losses["mse_loss"] + inner}
    if "topk" in activation:
      parts["aux"] = losses["auxiliary_reconstruction_loss"]
    for name in ("l1_loss", "l0_loss", "pre_act_loss"):
      if name in losses:
        parts[name] = losses[name]
    recording.after_step(
      trainer.n_forward_passes_since_fired.numpy() * B,
      getattr(sae, "topk_threshold", -1.0),
      out.loss,
      **parts,
    )
  return recording


# ------------------------------------------------------ dictionary_learning
LINEAR = {
  "W_enc": ("encoder.weight", True),
  "b_enc": ("encoder.bias", False),
  "W_dec": ("decoder.weight", True),
  "b_dec": ("b_dec", False),
}
MATRICES = {name: (name, False) for name in LINEAR}


def dictionary_learning(
  seed,
  module,
  cls,
  activation,
  named,
  *,
  dead=(),
  unit=True,
  changes=None,
  config=None,
  first=1001,
  **own,
):
  trainers = importlib.import_module(f"dictionary_learning.trainers.{module}")
  trainer = getattr(trainers, cls)(
    steps=10_000,
    activation_dim=D,
    dict_size=M,
    layer=0,
    lm_name="none",
    lr=RATE,
    warmup_steps=0,
    device="cpu",
    **own,
  )
  ae = trainer.ae
  # They count a batch before they ask who is dead; at first one token lacks.
  since = np.full(M, 10_000_000 - B - 1)
  since[list(dead)] += 1
  if hasattr(trainer, "num_tokens_since_fired"):
    trainer.num_tokens_since_fired[:] = torch.from_numpy(since)
  if hasattr(ae, "threshold") and activation in ("topk", "batchtopk"):
    ae.threshold.fill_(THRESHOLD)
  parameters = dict(ae.named_parameters())
  named = {name: (parameters[n], t) for name, (n, t) in named.items()}
  x = batches(seed)
  recording = Recording(
    trainer.optimizer,
    named,
    case_of("dictionary_learning", activation, changes, config),
    {
      "x": x,
      "y": x,
      "since_fired": since,
      "threshold": np.float64(THRESHOLD),
      "steps": np.int64(first),
    },
  )
  extra = [name for name in named if name not in LINEAR]
  recording.set(weights(seed, extra, dead, unit))
  seen = {}

  def watch(name):
    function = getattr(trainer, name)

    def watched(*args, **kwargs):
      seen[name] = function(*args, **kwargs)
      return seen[name]

    setattr(trainer, name, watched)

  watch("loss")
  if hasattr(trainer, "get_auxiliary_loss"):
    watch("get_auxiliary_loss")
  for step, batch in enumerate(x):
    trainer.update(first + step, torch.from_numpy(batch))
    parts = {}
    if "get_auxiliary_loss" in seen:
      parts["aux"] = seen["get_auxiliary_loss"]
    recording.after_step(
      getattr(trainer, "num_tokens_since_fired", torch.zeros(M)).numpy(),
      ae.threshold if "topk" in activation else -1.0,
      seen["loss"],
      **parts,
    )
  return recording


# ----------------------------------------------------------------- sparsify
class Tiny(torch.nn.Module):
  """A "language model": tokens are rows of x, and one module maps x to y."""

  def __init__(self, x, to):
    super().__init__()
    self.embed = torch.nn.Embedding.from_pretrained(torch.from_numpy(x))
    self.mlp = torch.nn.Linear(D, D, bias=False)
    self.mlp.weight.data = torch.from_numpy(to)
    self.dummy_inputs = {"input_ids": torch.zeros((1, 1), dtype=torch.long)}
    self.device = torch.device("cpu")

  @property
  def base_model(self):
    return self

  def forward(self, input_ids):
    return self.mlp(self.embed(input_ids))


class Windows(torch.utils.data.Dataset):
  """Batch number i is window i."""

  def __len__(self):
    return STEPS

  def __getitem__(self, i):
    if i >= STEPS:
      raise IndexError(i)
    return {"input_ids": torch.arange(i * B, (i + 1) * B)}

  def select(self, numbers):
    return self


def sparsify(
  seed,
  *,
  transcode=False,
  skip=False,
  dead=(),
  start=False,
  changes=None,
  own=None,
  **train,
):
  from sparsify import SparseCoderConfig, TrainConfig, Trainer

  rng = np.random.default_rng(seed + 2000)
  x = batches(seed)
  to = np.eye(D, dtype=np.float32)
  if transcode:
    to = (rng.normal(size=(D, D)) / D**0.5).astype(np.float32)
  model = Tiny(x.reshape(-1, D), to)
  cfg = TrainConfig(
    SparseCoderConfig(
      num_latents=M,
      k=K,
      transcode=transcode,
      skip_connection=skip,
      **(own or {}),
    ),
    batch_size=1,
    optimizer="adam",
    lr=RATE,
    lr_warmup_steps=0,
    hookpoints=["mlp"],
    log_to_wandb=False,
    save_dir=tempfile.mkdtemp(),
    # Anything here keeps the biases as they are.
    finetune=None if start else "weights",
    **train,
  )
  trainer = Trainer(cfg, Windows(), model)
  (sae,) = trainer.saes.values()
  since = np.full(M, 10_000_000)  # not dead yet
  since[list(dead)] += 1
  trainer.num_tokens_since_fired["mlp"][:] = torch.from_numpy(since)
  named = {
    "W_enc": (sae.encoder.weight, True),
    "b_enc": (sae.encoder.bias, False),
    "W_dec": (sae.W_dec, False),
    "b_dec": (sae.b_dec, False),
  }
  if skip:
    named["W_skip"] = (sae.W_skip, True)
  name = "sparsify_transcoder" if transcode else "sparsify"
  config = {"skip": skip}
  if transcode:
    config |= {"read": "a", "write": "b"}
  with torch.no_grad():
    y = model.mlp(torch.from_numpy(x)).numpy()
  recording = Recording(
    trainer.optimizers[0],
    named,
    case_of(name, "topk", changes, config),
    {
      "x": x,
      "y": y,
      "since_fired": since,
      "threshold": np.float64(-1),
      "steps": np.int64(0),
    },
  )
  if not start:
    recording.set(weights(seed, ["W_skip"] if skip else [], dead))
  outputs = []
  sae.register_forward_hook(lambda module, args, out: outputs.append(out))
  trainer.fit()
  assert len(outputs) == STEPS
  count = since
  for out in outputs:
    fired = np.zeros(M, bool)
    fired[out.latent_indices.flatten().numpy()] = True
    count = np.where(fired, 0, count + B)
    loss = out.fvu + cfg.auxk_alpha * out.auxk_loss + out.multi_topk_fvu / 8
    parts = {"reconstruction": out.fvu}
    if cfg.auxk_alpha:
      parts["aux"] = out.auxk_loss
    recording.after_step(count, -1.0, loss, **parts)
  assert (count == trainer.num_tokens_since_fired["mlp"].numpy()).all()
  return recording
