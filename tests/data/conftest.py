"""What the tests of the data package share: it is slow to make twice."""

import json

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


@pytest.fixture(scope="session")
def path(tmp_path_factory, builtin):
  """Three sources of unequal size; real text, with letters beyond ASCII."""
  path = tmp_path_factory.mktemp("stream") / "mix.jsonl"
  text = "".join(document.text for document in builtin[:600])
  sizes = {"web": 300, "code": 80, "books": 150}
  records, at = [], 0
  for number in range(max(sizes.values())):
    for source, count in sizes.items():
      if number < count:
        length = 200 + 37 * (number % 11) + len(source) * 20
        piece = f"{source} ñ{number} 漢: {text[at : at + length]}"
        at += length
        records.append({"text": piece, "meta": {"set": source}})
  path.write_text("\n".join(json.dumps(r) for r in records), "utf-8")
  return path


@pytest.fixture(scope="session")
def corpus(path):
  return data.load({"kind": "jsonl", "path": path, "source_field": "meta.set"})
