"""What a model answers and makes of texts, against its plain forward pass."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from configs import convergence as config_file
from gemma_jax import dictionaries
from gemma_jax.dictionaries.config import DictionaryConfig
from studies import prompts, readings, subjects

pytestmark = pytest.mark.usefixtures("quick_compiles")

TEXTS = ["yes", "no, it is not", "perhaps", "of course", "never"]


@pytest.fixture(scope="module")
def config():
  c = json.loads(config_file.get_config("smoke").to_json_best_effort())
  c["answers"]["batch_size"] = 2  # the last batch is not full
  c["reading"]["batch_size"] = 2
  return c


@pytest.fixture(scope="module")
def found():
  return prompts.load((), ("configs/prompts_example.jsonl",), 0)[:5]


@pytest.fixture(scope="module")
def subject(config, tmp_path_factory):
  spec = config["models"]["gemma"]
  bare = subjects.prepare("gemma", {**spec, "dictionaries": []}, {})
  width = bare.config.width
  cfg = DictionaryConfig(
    d_in=width,
    d_out=width,
    width=96,
    activation="relu",
    k=None,
    prefix_widths=(96,),
    read="blocks.1.resid_post",
    write="blocks.1.resid_post",
  )
  rng = np.random.default_rng(0)
  params = {
    n: jax.numpy.asarray(rng.normal(size=s), jax.numpy.float32)
    for n, s in cfg.shapes().items()
  }
  path = tmp_path_factory.mktemp("dictionary")
  dictionaries.Dictionary(cfg, params).save(path)
  return dataclasses.replace(bare, dictionaries=(str(path),))


@pytest.fixture(scope="module")
def model(subject, config):
  return subject.load(config)


@pytest.fixture(scope="module")
def reading(subject, model, found, config):
  return readings.read(
    subject, model, found, TEXTS, config, what="texts", capture=True
  )


def plain(subject, model, prompt, text, config):
  """Tokens, where the text begins, logits and sites, without padding."""
  before = subjects.prompt_tokens(
    subject, prompt, config["prompts"]["template"]
  )
  own = subjects.text_tokens(subject, text)
  tokens = np.array([[*before, *own]])
  logits, sites = model.forward(tokens, capture=("blocks.*.resid_post",))
  return tokens[0], len(before), logits[0], sites["blocks.*.resid_post"][:, 0]


def test_bits_pooled_rows_and_codes_are_those_of_each_text_alone(
  subject, model, found, config, reading
):
  assert reading["count"].tolist() == [len(text) for text in TEXTS]
  (dictionary,) = subject.load_dictionaries()
  start = 0
  for i, (prompt, text) in enumerate(zip(found, TEXTS, strict=True)):
    tokens, first, logits, sites = plain(subject, model, prompt, text, config)
    assert tokens[0] == model.config.bos_id
    log_probs = jax.nn.log_softmax(logits[first - 1 : -1])
    own = np.take_along_axis(np.asarray(log_probs), tokens[first:, None], 1)
    bits = -own.sum() / np.log(2) / len(text.encode())
    assert reading["bits"][i] == pytest.approx(bits, rel=1e-5)
    np.testing.assert_allclose(
      reading["pooled"][:, i], sites[:, first:].mean(1), rtol=2e-4, atol=2e-5
    )
    rows = slice(start, start + len(text))
    np.testing.assert_allclose(
      reading["last"][rows], sites[-1, first - 1 : -1], rtol=2e-4, atol=2e-5
    )
    np.testing.assert_allclose(
      reading["codes"][0][rows].toarray(),
      dictionary.encode(sites[1, first:]),
      rtol=2e-3,
      atol=2e-4,
    )
    start += len(text)


def test_answers_are_what_the_model_generates(subject, model, found, config):
  answers = readings.answers(subject, model, found, config)
  new = config["answers"]["max_new_tokens"]
  for prompt, answer in zip(found, answers, strict=True):
    tokens = subjects.prompt_tokens(
      subject, prompt, config["prompts"]["template"]
    )
    made = model.generate(np.array([tokens]), max_new_tokens=new)
    made = made[0, len(tokens) :].tolist()
    ends = [i for i, t in enumerate(made) if t in model.config.eos_ids]
    made = made[: ends[0]] if ends else made
    assert answer == subject.tokenizer.decode(made, skip_special_tokens=True)


def test_nan_names_the_model_and_the_prompt(subject, model, found, config):
  params = {**model.params, "final_norm": model.params["final_norm"]}
  params["embed"] = params["embed"].at[:].set(np.nan)
  broken = dataclasses.replace(model, params=params)
  with pytest.raises(FloatingPointError, match=r"gemma gave NaN.*naming-"):
    readings.read(subject, broken, found, TEXTS, config, what="texts")


def test_files_hold_all_that_was_read(reading, tmp_path):
  path = tmp_path / "reading.npz"
  readings.save(path, reading)
  back = readings.load(path)
  for name in ("bits", "last", "count", "pooled"):
    np.testing.assert_array_equal(back[name], reading[name])
  (code,) = back["codes"]
  np.testing.assert_array_equal(code.toarray(), reading["codes"][0].toarray())
  assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("keep", [0, 100, -100])
def test_a_truncated_file_is_named(reading, tmp_path, keep):
  path = tmp_path / "reading.npz"
  readings.save(path, reading)
  path.write_bytes(path.read_bytes()[:keep])
  with pytest.raises(ValueError, match=r"reading.npz is damaged.*Delete it"):
    readings.load(path)


def test_chat_templates_go_before_the_answer(subject, found):
  subject.tokenizer.chat_template = (
    "{% for m in messages %}<bos>[{{ m.content }}]{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
  )
  try:
    chat = dataclasses.replace(subject, spec={**subject.spec, "chat": True})
    tokens = subjects.prompt_tokens(chat, found[0], "unused {prompt}")
  finally:
    subject.tokenizer.chat_template = None
  assert tokens[0] == subject.config.bos_id
  assert subject.tokenizer.decode(tokens[1:]) == f"[{found[0].prompt}]>"
