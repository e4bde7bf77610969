"""Dictionaries find the directions that the data were made of."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax import models
from gemma_jax.dictionaries import DictionaryConfig, core, linear
from gemma_jax.dictionaries.presets import preset
from trainers import dictionary_step
from trainers.dictionary_members import Member
from trainers.dictionary_plan import AXES

D, M, ACTIVE, STEPS, B = 64, 128, 3, 1_500, 512


@functools.cache
def planted():
  """Directions [M, D], and rows [65,536, D] of three of them on average."""
  rng = np.random.default_rng(0)
  truth = rng.normal(size=(M, D))
  truth /= np.linalg.norm(truth, axis=1, keepdims=True)
  acts = (rng.random((2**16, M)) < ACTIVE / M) * rng.uniform(
    0.5, 1.5, (2**16, M)
  )
  return truth, (acts @ truth).astype(np.float32)


def trained(activation):
  """Decoder rows [M, D] of the default recipe, and the last metrics."""
  _, x = planted()
  cfg = DictionaryConfig(
    d_in=D,
    d_out=D,
    width=M,
    activation=activation,
    k=float(ACTIVE),
    prefix_widths=(M,),
  )
  how = preset("default", activation, {"dead_after": 20_000})
  how = dictionary_step.in_steps(how, STEPS)
  norm = core.normalisation(linear.moments([(x, x)]), how)
  examples = x[:8192], x[:8192], np.ones(8192, bool)
  groups = [(Member("", cfg, how.rate(M), how.sparsity_coefficient, 0),)]
  carried = dictionary_step.start(
    groups, how, dictionary_step.keys(groups), norm, None, examples
  )
  step = dictionary_step.make(
    groups,
    how,
    models.make_mesh({}, jax.devices()[:1], AXES),
    steps=STEPS,
    at_once=1,
    sparse=False,
  )
  rows = jnp.asarray(x)

  @jax.jit
  def train(carried):
    def body(carried, i):
      at = i * B % (len(x) - B)
      batch = jax.lax.dynamic_slice_in_dim(rows, at, B)
      *carried, _, metrics = step(*carried, {"x": batch, "y": batch}, i)
      return tuple(carried), metrics

    return jax.lax.scan(body, carried, jnp.arange(STEPS))

  carried, metrics = train(carried)
  return np.asarray(carried[0][0]["W_dec"][0]), {
    name: float(x[-1, 0]) for name, x in metrics.items()
  }


@pytest.mark.parametrize(
  "activation",
  [pytest.param("topk", marks=pytest.mark.slow), "batchtopk", "jumprelu"],
)
def test_planted_directions_are_recovered_both_ways(activation):
  truth, _ = planted()
  found, metrics = trained(activation)
  found = found / np.linalg.norm(found, axis=1, keepdims=True)
  cosines = found @ truth.T
  # Mean over the planted ones of the nearest found, and the reverse.
  assert cosines.max(0).mean() > 0.95
  assert cosines.max(1).mean() > 0.95
  assert metrics["l0"] == pytest.approx(ACTIVE, rel=0.2)
  # Random directions come nowhere near.
  rng = np.random.default_rng(1)
  other = rng.normal(size=(M, D))
  other /= np.linalg.norm(other, axis=1, keepdims=True)
  assert (other @ truth.T).max(0).mean() < 0.5
