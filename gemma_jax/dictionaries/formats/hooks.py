"""Names of hooks in other libraries, and our sites that they are."""

import re
from collections.abc import Sequence

from gemma_jax.models import gemma, gpt2, llama, neox
from gemma_jax.models.sites import NAMES, TRANSFORMER_LENS

# Not in TransformerLens itself: SAELens and circuit-tracer put them there.
# `hook_mlp_in` is left out on purpose: TransformerLens means the residual
# before the norm by it, and SAELens what the MLP reads.
ADDED = {"mlp.hook_in": "mlp_in", "mlp.hook_out": "mlp_raw"}
OURS = {name: name for name in NAMES}
# Whether a norm's gain is in a site, where there is a norm.
GAIN = {"mlp_norm": False, "mlp_in": True}


def to_ours(hook: str, model: str = "") -> str:
  """Our site from a hook's name in any spelling, or "" if it has none.

  Args:
    hook: such as "blocks.9.hook_resid_post", "blocks.9.mlp_out" or
      "model.layers.9.output"; of a crosscoder, several joined by "+".
    model: its name, on which Hugging Face's spellings depend.
  """
  if "+" in hook:
    parts = [to_ours(part, model) for part in hook.split("+")]
    return "+".join(parts) if all(parts) else ""
  if hook == "hook_embed":  # elsewhere positions are added to it first
    return "blocks.0.resid_pre" if _is_gemma(model) else ""
  match = re.fullmatch(r"([a-z_.]+?)\.(\d+)\.(.+)", hook)
  if match is None:
    return ""
  root, layer, short = match.groups()
  if root == "blocks":
    known = OURS | TRANSFORMER_LENS | ADDED
  else:
    known = _modules(root, model)
  return f"blocks.{int(layer)}.{known[short]}" if short in known else ""


def _is_gemma(model):
  return "gemma" in model.lower()


def _modules(root, model):
  """{module: site} of the family that a root and a model's name tell."""
  if root == gemma.ROOT == llama.ROOT:
    return gemma.SITES if _is_gemma(model) else llama.SITES
  return {gpt2.ROOT: gpt2.SITES, neox.ROOT: neox.SITES}.get(root, {})


def pair(site: str | Sequence[str], model: str = "") -> tuple[str, str]:
  """(read, write) from what a caller passes as `site`.

  Args:
    site: one site, or what is read and what is written.
    model: see `to_ours`.

  Raises:
    ValueError: it names no site.
  """
  sites = (site, site) if isinstance(site, str) else tuple(site)
  found = tuple(to_ours(s, model) for s in sites if isinstance(s, str))
  if len(sites) != 2 or len(found) != 2 or not all(found):
    raise ValueError(
      f"site={site!r} names no site. Expected 'blocks.12.resid_post' (with a "
      f"name of {', '.join(NAMES)}), or a pair of them for a transcoder: what "
      "it reads and what it writes."
    )
  return found


def to_transformer_lens(site: str) -> str:
  """The hook's name in TransformerLens, as SAELens writes it."""
  root, layer, name = site.split(".", 2)
  names = {ours: theirs for theirs, ours in (TRANSFORMER_LENS | ADDED).items()}
  return f"{root}.{layer}.{names[name]}"
