"""What is measured of a machine is what XLA and JAX say of it."""

import types

import jax
import jax.numpy as jnp
import pytest

from gemma_jax import machine


def test_the_work_that_is_timed_is_what_xla_counts():
  ticks = iter([0.0, 3.0, 3.0, 4.0, 4.0, 6.0])
  rate = machine.matmul_rate(size=192, clock=lambda: next(ticks))
  x = jnp.ones((192, 192))
  counted = jax.jit(jnp.matmul).lower(x, x).compile().cost_analysis()["flops"]
  assert rate == counted  # in the one second of the best of three
  ticks = iter([0.0, 3.0, 3.0, 3.5, 3.5, 6.0])
  rate = machine.copy_bandwidth(size=4096, clock=lambda: next(ticks))
  assert rate == 2 * 4096 / 0.5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_measured_rate_is_positive(dtype):
  assert 0 < machine.matmul_rate(dtype, size=128) < float("inf")


def test_memory_is_what_jax_may_use_of_the_fullest_device(monkeypatch):
  stats = [{"bytes_limit": 10, "bytes_in_use": u} for u in (1, 4, 0)]
  devices = [types.SimpleNamespace(memory_stats=lambda s=s: s) for s in stats]
  monkeypatch.setattr(jax, "local_devices", lambda: devices)
  assert machine.device_memory() == (10, 6)
