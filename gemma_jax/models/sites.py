"""Named sites: what can be captured and edited, and under which names.

A site is `blocks.{l}.{name}` with a layer index or `*` for all layers. The
names of TransformerLens and of Hugging Face's modules are accepted wherever
a site is named.
"""

import dataclasses
import difflib
import re

from gemma_jax.models import families
from gemma_jax.models.config import ModelConfig

# In the order in which a block computes them.
NAMES = (
  "resid_pre",
  "attn_z",
  "attn_out",
  "resid_mid",
  "mlp_norm",
  "mlp_in",
  "mlp_hidden",
  "mlp_raw",
  "mlp_out",
  "resid_post",
)

TRANSFORMER_LENS = {
  "hook_resid_pre": "resid_pre",
  "attn.hook_z": "attn_z",
  "hook_attn_out": "attn_out",
  "hook_resid_mid": "resid_mid",
  "ln2.hook_normalized": "mlp_norm",
  "mlp.hook_post": "mlp_hidden",
  "hook_mlp_out": "mlp_out",
  "hook_resid_post": "resid_post",
}


@dataclasses.dataclass(frozen=True)
class Site:
  """One parsed site: `layer` is None for all layers (`blocks.*`)."""

  layer: int | None
  name: str

  def __str__(self) -> str:
    layer = "*" if self.layer is None else self.layer
    return f"blocks.{layer}.{self.name}"


def names(cfg: ModelConfig) -> tuple[str, ...]:
  """The sites that a block of this model has, in order.

  A parallel block (Pythia) has no `resid_mid`: its MLP reads `resid_pre`.
  """
  if not cfg.parallel_residual:
    return NAMES
  return tuple(name for name in NAMES if name != "resid_mid")


def parse(site: str, cfg: ModelConfig) -> Site:
  """Reads a site's name in any of the three spellings.

  Args:
    site: `blocks.9.mlp_in`, `blocks.*.mlp_in`, `blocks.9.hook_mlp_out`, or
      a module of the model's family in Hugging Face's names, such as
      `model.layers.9.post_feedforward_layernorm.output`.
    cfg: the model.

  Raises:
    ValueError: no such site or layer; lists the valid ones.
  """
  family = families.of(cfg)
  roots = {"blocks", family.ROOT}
  match = re.fullmatch(
    rf"({'|'.join(map(re.escape, roots))})\.(\d+|\*)\.(.+)", site
  )
  if match is None:
    raise ValueError(
      f"{site!r} is not a site. Expected blocks.{{layer}}.{{name}} with a "
      f"layer of 0..{cfg.num_layers - 1} or *, and a name of "
      f"{', '.join(names(cfg))}."
    )
  root, layer, short = match.groups()
  if root == "blocks":
    known = {name: name for name in names(cfg)} | TRANSFORMER_LENS
    known = {k: name for k, name in known.items() if name in names(cfg)}
  else:
    known = family.SITES
  if short not in known:
    near = difflib.get_close_matches(short, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(
      f"Site {site!r}: there is no {short!r} in a {cfg.family} block.{hint} "
      f"Valid: {', '.join(known)}."
    )
  if layer != "*" and int(layer) >= cfg.num_layers:
    raise ValueError(
      f"Site {site!r}: layer {layer} does not exist; the model has "
      f"{cfg.num_layers} layers, 0..{cfg.num_layers - 1}."
    )
  return Site(None if layer == "*" else int(layer), known[short])


def width(site: str | Site, cfg: ModelConfig) -> int:
  """Length of the vectors of a site, parsed or still to `parse`."""
  if isinstance(site, str):
    site = parse(site, cfg)
  special = {
    "attn_z": cfg.num_heads * cfg.head_dim,
    "mlp_hidden": cfg.mlp_width,
  }
  return special.get(site.name, cfg.width)


def last_layer(sites: tuple[str, ...], cfg: ModelConfig) -> int:
  """The number of blocks that must run to produce all of `sites`."""
  layers = [parse(site, cfg).layer for site in sites]
  return max(cfg.num_layers if l is None else l + 1 for l in layers)
