"""What the tests of the data package share: it is slow to make twice."""

import pytest
import tokenizers

from gemma_jax import data


@pytest.fixture(scope="session")
def builtin():
  return data.builtin()


@pytest.fixture(scope="session")
def tokenizer(builtin):
  """A byte-level BPE: lossless, so that detokenised text can be compared."""
  texts = [d.text for d in builtin if d.source == "reference"][:40]
  bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
  bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  bpe.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=600,
    special_tokens=["<pad>", "<eos>", "<bos>"],
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  bpe.train_from_iterator(texts, trainer)
  return bpe
