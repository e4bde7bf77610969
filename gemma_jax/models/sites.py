"""Named sites: what can be captured and edited, and under which names.

A site is `blocks.{l}.{name}` with a layer index or `*` for all layers. The
names of TransformerLens and of Hugging Face's Gemma modules are accepted
wherever a site is named.
"""

import dataclasses
import difflib
import re
from collections.abc import Callable

import jax

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

HUGGING_FACE = {
  "input": "resid_pre",
  "self_attn.o_proj.input": "attn_z",
  "post_attention_layernorm.output": "attn_out",
  "pre_feedforward_layernorm.input": "resid_mid",
  "pre_feedforward_layernorm.output": "mlp_in",
  "mlp.down_proj.input": "mlp_hidden",
  "mlp.output": "mlp_raw",
  "post_feedforward_layernorm.output": "mlp_out",
  "output": "resid_post",
}


@dataclasses.dataclass(frozen=True)
class Site:
  """One parsed site: `layer` is None for all layers (`blocks.*`)."""

  layer: int | None
  name: str

  def __str__(self) -> str:
    layer = "*" if self.layer is None else self.layer
    return f"blocks.{layer}.{self.name}"


@dataclasses.dataclass(frozen=True)
class Splice:
  """An edit that reads an earlier site of the same block, or the same site.

  `fn(read, value)` returns what replaces `value`; a transcoder takes the
  MLP's place with

      edits={"blocks.9.mlp_out": Splice("mlp_in", lambda x, y: transcoder(x))}

  Attributes:
    read: short name of the site to read (`mlp_in`), as edited.
    fn: pure function of two arrays, [B, T, ...] each.
  """

  read: str
  fn: Callable[[jax.Array, jax.Array], jax.Array]


# What may stand as an edit: a function of the value, or a Splice.
Edit = Callable[[jax.Array], jax.Array] | Splice


def parse(site: str, num_layers: int) -> Site:
  """Reads a site's name in any of the three spellings.

  Args:
    site: `blocks.9.mlp_in`, `blocks.*.mlp_in`, `blocks.9.hook_mlp_out`,
      `model.layers.9.post_feedforward_layernorm.output`, ...
    num_layers: layers that the model has.

  Raises:
    ValueError: no such site or layer; lists the valid ones.
  """
  match = re.fullmatch(r"(blocks|model\.layers)\.(\d+|\*)\.(.+)", site)
  if match is None:
    raise ValueError(
      f"{site!r} is not a site. Expected blocks.{{layer}}.{{name}} with a "
      f"layer of 0..{num_layers - 1} or *, and a name of {', '.join(NAMES)}."
    )
  root, layer, short = match.groups()
  own = {name: name for name in NAMES} | TRANSFORMER_LENS
  known = own if root == "blocks" else HUGGING_FACE
  if short not in known:
    near = difflib.get_close_matches(short, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(
      f"Site {site!r}: there is no {short!r} in a block.{hint} Valid: "
      f"{', '.join(known)}."
    )
  if layer != "*" and int(layer) >= num_layers:
    raise ValueError(
      f"Site {site!r}: layer {layer} does not exist; the model has "
      f"{num_layers} layers, 0..{num_layers - 1}."
    )
  return Site(None if layer == "*" else int(layer), known[short])


def last_layer(sites: tuple[str, ...], num_layers: int) -> int:
  """The number of blocks that must run to produce all of `sites`."""
  layers = [parse(site, num_layers).layer for site in sites]
  return max(num_layers if l is None else l + 1 for l in layers)
