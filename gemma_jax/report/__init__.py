"""Pictures and the page that a person opens after a run."""

from gemma_jax.report.page import (
  INTEREST,
  Context,
  Latent,
  select_interesting,
  write_page,
)

__all__ = [
  "INTEREST",
  "Context",
  "Latent",
  "select_interesting",
  "write_page",
]
