"""JumpReLU and the step function, with straight-through estimators.

Neither has a useful derivative with respect to the threshold t. Rajamanoharan
et al. 2024 (arXiv 2407.14435) estimate that of an expectation by a rectangle
kernel K(u) = [|u| < 1/2] of bandwidth e around it:
  d jump / dt = -(t / e) K((z - t) / e)    d step / dt = -(1 / e) K((z - t) / e)
and let d jump / dz = [z > t], d step / dz = 0. As both depend on z - t where
they jump, the estimate can also be given to z, with the other sign.
"""

import functools

import jax
import jax.numpy as jnp


def _kernel(z, threshold, bandwidth):
  return (jnp.abs(z - threshold) < bandwidth / 2).astype(z.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def jump(z, threshold, bandwidth: float, to_input: bool = False) -> jax.Array:
  """z where z > threshold, else 0.

  Args:
    z: [B, M].
    threshold: [M].
    bandwidth: of the estimator.
    to_input: whether it reaches z too.
  """
  return jnp.where(z > threshold, z, 0)


def _jump_forward(z, threshold, bandwidth, to_input):
  return jump(z, threshold, bandwidth, to_input), (z, threshold)


def _jump_backward(bandwidth, to_input, kept, g):
  z, threshold = kept
  estimate = threshold / bandwidth * _kernel(z, threshold, bandwidth) * g
  to_z = jnp.where(z > threshold, g, 0)
  return to_z + estimate if to_input else to_z, -estimate.sum(0)


jump.defvjp(_jump_forward, _jump_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def step(z, threshold, bandwidth: float, to_input: bool = False) -> jax.Array:
  """1 where z > threshold, else 0; arguments as for `jump`."""
  return (z > threshold).astype(z.dtype)


def _step_forward(z, threshold, bandwidth, to_input):
  return step(z, threshold, bandwidth, to_input), (z, threshold)


def _step_backward(bandwidth, to_input, kept, g):
  z, threshold = kept
  estimate = _kernel(z, threshold, bandwidth) / bandwidth * g
  return estimate if to_input else jnp.zeros_like(z), -estimate.sum(0)


step.defvjp(_step_forward, _step_backward)
