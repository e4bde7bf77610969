"""Stores of paired rows whose maps are known, and dictionaries for them."""

import numpy as np

from gemma_jax.activations import ActivationStore, Writer
from gemma_jax.activations.layout import LABELS
from gemma_jax.alignment.hypernetwork import SiteScale
from gemma_jax.alignment.objective import code_statistics
from gemma_jax.dictionaries import Dictionary, DictionaryConfig
from trainers import paired

WIDTHS = {"a": 12, "b": 10}
COMMON = 6  # dims that all sites have in common
NOISE = 0.03  # variance of what they have not, as a share of the whole


def site(model, layer):
  return f"{model}:blocks.{layer}.resid_post"


def rows(sites, n=2_048, seed=0):
  """x = s W + e, where s is the same for all sites and W changes with depth."""
  s = np.random.default_rng((seed, 1)).normal(size=(n, COMMON))
  out = {}
  for name in sites:
    model, layer = name[0], int(name.split(".")[1])
    width = WIDTHS[model]
    rng = np.random.default_rng(ord(model))  # one W for all layers, and a turn
    start, end = rng.normal(size=(2, COMMON, width))
    x = s @ (start + layer / 3 * end)
    noise = np.random.default_rng((seed, layer, ord(model)))
    share = np.sqrt(NOISE / (1 - NOISE) * x.var(0).sum() / width)
    out[name] = x + share * noise.normal(size=x.shape) + 1
  return {name: x.astype(np.float32) for name, x in out.items()}


def write(where, arrays):
  """A store of those rows."""
  n = len(next(iter(arrays.values())))
  labels = {name: np.zeros(n, np.int32) for name in LABELS}
  sites = {name: x.shape[1] for name, x in arrays.items()}
  with Writer(where, sites=sites, dtype="float32", metadata={}) as writer:
    writer.append(arrays | labels, documents=[("0", "", "text")])
  return ActivationStore.open(where)


def dictionary(x, width=32, activation="jumprelu", seed=0, **changes):
  """Random latents of which about one in six fires on x."""
  rng = np.random.default_rng(seed)
  d = x.shape[1]
  directions = rng.normal(size=(d, width)) / x.std()
  z = (x - x.mean(0)) @ directions
  cut = np.quantile(z, 5 / 6, axis=0)
  params = {
    "W_enc": directions,
    "b_enc": -x.mean(0) @ directions,
    "W_dec": directions.T,
    "b_dec": np.zeros(d),
  }
  if activation in ("batchtopk", "jumprelu"):
    params["threshold"] = cut
  else:
    params["b_enc"] -= cut
  if activation == "gated":
    params |= {"r_mag": np.zeros(width), "b_mag": params["b_enc"] + 1}
  return Dictionary(
    DictionaryConfig(d, d, width, activation, 5, (width,), **changes),
    {name: np.asarray(x, np.float32) for name, x in params.items()},
  )


def statistics(own, x):
  return code_statistics([own.encode(x)])


def scale(x):
  return SiteScale.of(x.mean(0), x.var(0))


def interrupt(monkeypatch, at):
  """Lets a training fail before batch number `at`."""
  real = paired.Rows.batches

  def broken(self, config, seed):
    def batches(start, sharding):
      for number, batch in enumerate(
        real(self, config, seed)(start, sharding), start
      ):
        if number == at:
          raise InterruptedError
        yield batch

    return batches

  monkeypatch.setattr(paired.Rows, "batches", broken)
