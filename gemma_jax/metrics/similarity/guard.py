"""Which measures are defined for a pair of models, and what to take instead.

A cosine between models of the same width is a number even where it means
nothing; so is the overlap of the latents of two dictionaries by index.
"""

import dataclasses

TOKENS = ("kl", "jsd", "hellinger", "top1_agreement", "topk_overlap", "rbo")
TEXTS = ("cross_likelihood", "chrf", "rouge_l", "edit_ratio")
COORDINATES = ("cosine",)
ROWS = ("linear_cka", "mutual_knn", "cknna", "rsa", "procrustes_distance")
VARIATES = ("svcca", "pwcca")
LATENTS = ("jaccard", "ruzicka", "code_cosine")
CODES = ("code_cka",)  # `linear_cka` of codes
MEASURES = (
  *TOKENS,
  *TEXTS,
  *COORDINATES,
  *ROWS,
  *VARIATES,
  *LATENTS,
  *CODES,
)

VARIATE_ROWS = 10  # for each dim of both models together


@dataclasses.dataclass(frozen=True)
class Subject:
  """What a measure must know of one model.

  Attributes:
    name: for messages.
    width: D of the activations that are compared.
    vocabulary: fingerprint of its token ids: models of one fingerprint give a
      token the same id.
    origin: models of one origin were trained on from the same weights, so that
      their coordinates mean the same. Width and architecture do not show it.
    dictionaries: fingerprints of its dictionaries, in order of depth.
  """

  name: str
  width: int
  vocabulary: str
  origin: str
  dictionaries: tuple[str, ...] = ()


def refusals(
  a: Subject, b: Subject, *, rows: int | None = None
) -> dict[str, str]:
  """Measure -> why it is not defined for this pair, and what is.

  Args:
    a: one model.
    b: the other.
    rows: that will be compared, to judge canonical correlations; None leaves
      them to the number of rows.
  """
  out = {}
  if a.vocabulary != b.vocabulary:
    out |= dict.fromkeys(
      TOKENS,
      f"{a.name} and {b.name} have different tokenizers, so their "
      "distributions are over different tokens; take cross_likelihood, in "
      "bits per byte",
    )
  if a.origin != b.origin or a.width != b.width:
    why = (
      f"widths are {a.width} and {b.width}"
      if a.width != b.width
      else f"their origins, {a.origin} and {b.origin}, differ, so that equal "
      "widths are not equal coordinates"
    )
    out |= dict.fromkeys(
      COORDINATES,
      f"{a.name} and {b.name} have no coordinates in common: {why}; take "
      "linear_cka or mutual_knn, or fit a map from one to the other on other "
      "rows first",
    )
  least = VARIATE_ROWS * (a.width + b.width)
  if rows is not None and rows < least:
    out |= dict.fromkeys(
      VARIATES,
      f"{rows} rows are too few for canonical correlations of {a.width} and "
      f"{b.width} dims, which come out near 1 whatever the rows; take at least "
      f"{least}, or debiased linear_cka",
    )
  lacking = [s.name for s in (a, b) if not s.dictionaries]
  if lacking:
    out |= dict.fromkeys(
      (*LATENTS, *CODES),
      f"{' and '.join(lacking)} without a dictionary; give one, or compare "
      "activations by linear_cka",
    )
  elif a.dictionaries != b.dictionaries:
    out |= dict.fromkeys(
      LATENTS,
      f"{a.name} and {b.name} have different dictionaries, whose latents have "
      "nothing in common by index; match the latents first, or compare codes "
      "by code_cka",
    )
  elif a.origin != b.origin or a.width != b.width:
    out |= dict.fromkeys(
      LATENTS,
      f"{a.name} and {b.name} share a dictionary but no coordinates; give each "
      "one of its own and match the latents, or take code_cka",
    )
  if a.vocabulary != b.vocabulary:
    for name in LATENTS:
      out.setdefault(
        name,
        f"{a.name} and {b.name} split text into different tokens, so that no "
        "token of one is that of the other; take code_cka of whole texts",
      )
  return out


def defined(
  a: Subject, b: Subject, *, rows: int | None = None
) -> tuple[str, ...]:
  """The measures of `MEASURES` that are defined; arguments as `refusals`."""
  refused = refusals(a, b, rows=rows)
  return tuple(name for name in MEASURES if name not in refused)


def check(
  measure: str, a: Subject, b: Subject, *, rows: int | None = None
) -> None:
  """Refuses a measure that means nothing for this pair.

  Args:
    measure: one of `MEASURES`.
    a: one model.
    b: the other.
    rows: as in `refusals`.

  Raises:
    ValueError: it is not defined; says why, and what is. Or no such measure.
  """
  if measure not in MEASURES:
    raise ValueError(
      f"expected a measure of {', '.join(MEASURES)}, got {measure!r}"
    )
  if why := refusals(a, b, rows=rows).get(measure):
    raise ValueError(f"{measure} is not defined: {why}")
