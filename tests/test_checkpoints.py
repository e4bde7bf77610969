"""Checkpoints survive what happens to disks."""

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax import checkpoints, models
from gemma_jax.checkpoints import Checkpoints


@pytest.fixture(scope="module")
def shardings():
  mesh = models.make_mesh({"fsdp": 4}, jax.devices()[:4])
  split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  return {"w": split, "count": whole, "half": whole}


def make_state(step, shardings):
  state = {
    "w": np.random.default_rng(step).normal(size=(8, 3)).astype(np.float32),
    "count": np.asarray(step, np.int32),
    "half": np.arange(4).astype(jnp.bfloat16) * step,
  }
  return jax.device_put(state, shardings)


def save(directory, steps, shardings, keep=3):
  c = Checkpoints(directory, keep=keep)
  for step in steps:
    c.save(step, make_state(step, shardings))
  c.close()


def restore(directory, shardings, keep=3):
  c = Checkpoints(directory, keep=keep)
  try:
    abstract = checkpoints.abstract(make_state(0, shardings), shardings)
    return c.restore(abstract)
  finally:
    c.close()


def assert_is(state, step, shardings):
  for name, x in make_state(step, shardings).items():
    np.testing.assert_array_equal(state[name], x)
    assert state[name].dtype == x.dtype
    assert state[name].sharding == shardings[name]


def damage(directory, how):
  """Spoils every file of one checkpoint that holds arrays."""
  files = [p for p in directory.rglob("*") if p.is_file()]
  assert files
  for path in files:
    if how == "empty":
      path.write_bytes(b"")
    elif how == "gone":
      path.unlink()
    else:
      data = path.read_bytes()
      path.write_bytes(data[: len(data) // 2])


def test_the_newest_comes_back_with_its_shardings(tmp_path, shardings):
  save(tmp_path, [5, 10], shardings)
  state, step = restore(tmp_path, shardings)
  assert step == 10
  assert_is(state, 10, shardings)


def test_without_checkpoints_there_is_no_state(tmp_path, shardings):
  assert restore(tmp_path / "new", shardings) == (None, 0)


def test_only_the_newest_are_kept(tmp_path, shardings):
  save(tmp_path, [1, 2, 3, 4], shardings, keep=2)
  kept = {path.name for path in tmp_path.iterdir() if path.name.isdigit()}
  assert kept == {"3", "4"}


def test_saving_a_step_again_replaces_it(tmp_path, shardings):
  save(tmp_path, [3], shardings)
  c = Checkpoints(tmp_path, keep=2)
  c.save(3, make_state(99, shardings))
  assert c.count() == 1
  c.close()
  assert_is(restore(tmp_path, shardings)[0], 99, shardings)


@pytest.mark.parametrize("how", ["empty", "half", "gone"])
def test_a_damaged_newest_checkpoint_costs_only_its_own_steps(
  how, tmp_path, shardings, caplog
):
  save(tmp_path, [5, 10, 15], shardings)
  damage(tmp_path / "15", how)
  with caplog.at_level(logging.WARNING, "gemma_jax"):
    state, step = restore(tmp_path, shardings)
  assert step == 10
  assert_is(state, 10, shardings)
  assert "15 cannot be read" in caplog.text


def test_training_goes_on_past_a_damaged_checkpoint(tmp_path, shardings):
  save(tmp_path, [5, 10], shardings)
  damage(tmp_path / "10", "half")
  c = Checkpoints(tmp_path, keep=3)
  abstract = checkpoints.abstract(make_state(0, shardings), shardings)
  assert c.restore(abstract)[1] == 5
  c.save(10, make_state(10, shardings))
  c.close()
  state, step = restore(tmp_path, shardings)
  assert step == 10
  assert_is(state, 10, shardings)


def test_when_none_can_be_read_it_says_so(tmp_path, shardings):
  save(tmp_path, [5, 10], shardings)
  for step in ("5", "10"):
    damage(tmp_path / step, "half")
  with pytest.raises(ValueError, match=r"None of the checkpoints \[10, 5\]"):
    restore(tmp_path, shardings)


def test_what_an_interrupted_save_left_behind_does_no_harm(tmp_path, shardings):
  save(tmp_path, [5], shardings)
  left = tmp_path / "10.orbax-checkpoint-tmp-1700000000000000"
  left.mkdir()
  (left / "_METADATA").write_text(json.dumps({"half": "written"}))
  state, step = restore(tmp_path, shardings)
  assert step == 5
  assert_is(state, 5, shardings)
  save(tmp_path, [10], shardings)
  assert_is(restore(tmp_path, shardings)[0], 10, shardings)


def test_a_state_may_be_changed_once_save_has_returned(tmp_path, shardings):
  c = Checkpoints(tmp_path, keep=1)
  state = make_state(7, shardings)
  c.save(7, state)
  double = jax.jit(lambda s: jax.tree.map(lambda x: x * 2, s), donate_argnums=0)
  jax.block_until_ready(double(state))
  c.close()
  assert_is(restore(tmp_path, shardings)[0], 7, shardings)


def test_a_checkpoint_does_not_depend_on_the_mesh(tmp_path, shardings):
  save(tmp_path, [4], shardings)
  mesh = models.make_mesh({"tensor": 2}, jax.devices()[:2])
  spec = jax.sharding.PartitionSpec
  other = {
    "w": jax.sharding.NamedSharding(mesh, spec("tensor")),
    "count": jax.sharding.NamedSharding(mesh, spec()),
    "half": jax.sharding.NamedSharding(mesh, spec("tensor")),
  }
  assert_is(restore(tmp_path, other)[0], 4, other)
