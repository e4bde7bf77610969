"""What the doctor says, against JAX, the machine and sums done by hand."""

import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys

import jax
import pytest

from gemma_jax import models
from launch import doctor, fit

GIB = 2**30
NAMES = [name for name in models.PRESETS if not name.endswith("-tiny")]
ROOT = pathlib.Path(doctor.__file__).parent.parent


def run(*args):
  done = subprocess.run(
    [sys.executable, "-m", "launch.doctor", *args],
    cwd=ROOT,
    env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


def test_the_json_agrees_with_jax_and_the_machine(own_cache):
  facts = json.loads(run("--json"))
  devices, host, versions = (
    facts[name] for name in ("devices", "host", "versions")
  )
  assert devices["platform"] == jax.default_backend()
  assert devices["kind"] == jax.devices()[0].device_kind
  assert devices["count"] == 2
  physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  total, available = host["memory"]["total"], host["memory"]["available"]
  assert 0 < available <= total <= physical
  # Two CPU devices share the host's memory.
  assert devices["memory"]["total"] == total // 2
  assert 1 <= host["cores"] <= os.cpu_count()
  assert host["processes"] == 1
  assert host["cache"] == str(own_cache)
  free = shutil.disk_usage(own_cache).free
  assert host["cache_free"] == pytest.approx(free, abs=GIB)
  assert versions.pop("python") == platform.python_version()
  found = {
    d.name.lower(): d.version for d in importlib.metadata.distributions()
  }
  for name, version in versions.items():
    assert version == found.get(name, "not installed"), name
  assert versions["jax"] == jax.__version__
  assert facts["matmul"].keys() == {"float32"}
  assert facts["matmul"]["float32"] > 1e8
  assert facts["copy"] > 1e7
  assert [row["model"] for row in facts["models"]] == NAMES


def test_the_text_has_every_model_with_both_answers():
  lines = run().splitlines()
  for name in NAMES:
    (line,) = [line for line in lines if line.split()[:1] == [name]]
    assert line.count("fits (") + line.count("no: needs ") == 2, line
  assert any("float32" in l and "FLOP/s" in l for l in lines)
  assert any(l.startswith("copy") and "GB/s" in l for l in lines)


def test_little_memory_says_what_does_not_fit_and_what_it_needs():
  rows = {row["model"]: row for row in fit.which_models(4 * GIB, 1)}
  assert rows["gemma3-270m"]["float32"]["fits"]
  assert rows["gemma3-270m"]["float32"]["mesh"]["data"] == 1
  row = rows["gemma2-27b"]
  # The parameters that Hugging Face counts in google/gemma-2-27b.
  assert row["parameters"] == 27_227_128_320
  tokens = 8 * 1024
  for dtype, size in (("float32", 4), ("bfloat16", 2)):
    attention = 2 * (32 + 16) * 128 * size + 2 * 32 * 1024 * 4
    mlp = 3 * 36864 * size
    needs = size * 27_227_128_320
    needs += tokens * (2 * 4608 * size + max(attention, mlp))
    assert row["bytes"][dtype] == size * 27_227_128_320
    assert not row[dtype]["fits"]
    assert row[dtype]["needs"] == needs


def test_what_it_needs_is_the_least_memory_that_it_fits_into():
  def answer(memory):
    rows = {row["model"]: row for row in fit.which_models(memory, 4)}
    return rows["gemma2-9b"]["bfloat16"]

  needs = answer(GIB)["needs"]
  assert not answer(needs - 1)["fits"]
  assert answer(needs)["fits"]
  assert answer(needs)["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1}


def test_the_split_is_the_smallest_that_fits():
  rows = {row["model"]: row for row in fit.which_models(16 * GIB, 8)}
  split = {
    (name, dtype): rows[name][dtype]["mesh"]
    for name in ("gemma3-270m", "gemma2-9b", "gemma2-27b")
    for dtype in ("float32", "bfloat16")
  }
  # 34.4 GiB on two devices of 16 is too much, and 17.2 on one.
  assert split == {
    ("gemma3-270m", "float32"): {"data": 8, "fsdp": 1, "tensor": 1},
    ("gemma3-270m", "bfloat16"): {"data": 8, "fsdp": 1, "tensor": 1},
    ("gemma2-9b", "float32"): {"data": 2, "fsdp": 4, "tensor": 1},
    ("gemma2-9b", "bfloat16"): {"data": 4, "fsdp": 2, "tensor": 1},
    ("gemma2-27b", "float32"): {"data": 1, "fsdp": 8, "tensor": 1},
    ("gemma2-27b", "bfloat16"): {"data": 2, "fsdp": 4, "tensor": 1},
  }


def test_a_split_that_the_rules_refuse_is_not_offered():
  # Neither 640 nor 4 heads divide by 3.
  rows = {row["model"]: row for row in fit.which_models(GIB // 2, 3)}
  answer = rows["gemma3-270m"]["float32"]
  assert not answer["fits"]
  assert answer["mesh"] == {"data": 3, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 4, 1), (1, 4, 2)], ids=str)
def test_parameters_per_device_are_what_loading_puts_there(sizes):
  sizes = dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))
  model = models.load_model("random:gemma3-tiny", mesh=models.make_mesh(sizes))
  first = jax.devices()[0]
  held = sum(
    shard.data.size
    for x in jax.tree.leaves(model.params)
    for shard in x.addressable_shards
    if shard.device == first
  )
  assert held == fit.parameters_per_device(model.config, sizes)


@pytest.mark.parametrize(
  ("smi", "plugin", "backend", "said"),
  [
    (False, None, "cpu", "no GPU here"),
    (True, None, "cpu", "pip install -e '.[gpu]'"),
    (True, "0.10.2", "cpu", "see JAX_PLATFORMS"),
    (True, "0.10.2", "gpu", "none missing"),
  ],
)
def test_what_is_missing_for_the_gpu(
  smi, plugin, backend, said, monkeypatch, tmp_path
):
  if smi:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 580.65.06\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
  monkeypatch.setenv("PATH", str(tmp_path))
  monkeypatch.setattr(doctor.glob, "glob", lambda pattern: [])
  monkeypatch.setattr(doctor, "_version", lambda package: plugin)
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  found = doctor.gpu()
  assert said in found["note"]
  assert found["driver"] == ("580.65.06" if smi else None)


def test_a_device_file_without_nvidia_smi_is_a_gpu_too(monkeypatch, tmp_path):
  monkeypatch.setenv("PATH", str(tmp_path))
  monkeypatch.setattr(doctor.glob, "glob", lambda pattern: ["/dev/nvidia0"])
  monkeypatch.setattr(doctor, "_version", lambda package: None)
  found = doctor.gpu()
  assert found["driver"] is None
  assert "pip install -e '.[gpu]'" in found["note"]
