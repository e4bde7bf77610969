"""What a study across models may say: sentences that its numbers bear out."""

from collections.abc import Mapping, Sequence
from typing import Any

NETWORKS = ("hypernetwork", "translator")
RIVALS = ("ridge", "token")


def verdicts(results: Mapping[str, Any]) -> list[str]:
  """Sentences, the most important first.

  Args:
    results: of the study, without them.
  """
  rows = results["rows"]
  out = []
  for network in dict.fromkeys((*NETWORKS, *_named(rows, "network"))):
    for rival in RIVALS:
      out += _against(rows, network, rival)
  out += _unseen(results["unseen"])
  out += _splices(results["differences"])
  out += _matches(results["matches"])
  out += _causal(results["causal"])
  return out


def _named(rows, role: str) -> list[str]:
  return list(dict.fromkeys(r["map"] for r in rows if r["role"] == role))


def _against(rows, network: str, rival: str) -> list[str]:
  """Where a network explains more of the codes than a simpler map."""
  own = [r for r in rows if r["map"] == network]
  known = [r for r in own if r[f"delta_{rival}_low"] is not None]
  if not known:
    return []
  wins = [r for r in known if r[f"delta_{rival}_low"] > 0]
  loses = [r for r in known if r[f"delta_{rival}_high"] < 0]
  what = {
    "ridge": "the ridge map through the target's encoder",
    "token": "the lookup by token",
  }[rival]
  text = (
    f"The {network} explains more of the target's codes (pooled R^2) than "
    f"{what} on {len(wins)} of {len(known)} routes, less on {len(loses)}"
  )
  deltas = [r[f"delta_{rival}"] for r in known]
  text += f" (differences {min(deltas):+.3f} to {max(deltas):+.3f})"
  for what, some in (("More on", wins), ("Less on", loses)):
    if 0 < len(some) < len(known):
      text += f". {what} " + ", ".join(r["route"] for r in some)
  return [text + "."]


def _unseen(rows) -> list[str]:
  out = []
  for route in dict.fromkeys(r["route"] for r in rows):
    fvu = {r["map"]: r["fvu"] for r in rows if r["route"] == route}
    own = fvu.pop("hypernetwork")
    ceiling = fvu.pop("fitted_ridge")
    name, best = min(fvu.items(), key=lambda item: item[1])
    word = "beats" if own < best else "does not beat"
    out.append(
      f"On the unseen {route} the hypernetwork's map (FVU {own:.3f}) {word} "
      f"the best that costs nothing ({name}, {best:.3f}); a ridge map fitted "
      f"there has {ceiling:.3f}."
    )
  return out


def _splices(rows) -> list[str]:
  """Whether transferred features recover more than controls, less than own."""
  out = []
  for first, second, text in (
    (
      "ridge",
      "dealt",
      "Transferred features recover more CE than those of another document",
    ),
    (
      "own",
      "ridge",
      "The target's own dictionary recovers more CE than transferred features",
    ),
    ("hypernetwork", "ridge", "The hypernetwork recovers more CE than ridge"),
    (
      "ridge",
      "token",
      "Transferred features recover more CE than the lookup by token",
    ),
  ):
    some = [r for r in rows if (r["first"], r["second"]) == (first, second)]
    if not some:
      continue
    clear = [r for r in some if r["clear"] and r["difference"] > 0]
    against = [r for r in some if r["clear"] and r["difference"] < 0]
    line = f"{text} on {len(clear)} of {len(some)} routes"
    if against:
      line += f", less on {len(against)}"
    ends = [r["difference"] for r in some]
    out.append(f"{line} (differences {min(ends):+.3f} to {max(ends):+.3f}).")
  return out


def _matches(rows) -> list[str]:
  return [
    f"{r['pair']}: {r['significant']} of {r['eligible']} latents that fire "
    "often enough have a partner beyond chance (FDR 5 %)"
    + (
      f"; median correlation of matched pairs {r['r_median']:.2f}, of the best "
      f"by chance {r['null_median']:.2f}."
      if r["r_median"] is not None
      else "."
    )
    for r in rows
  ]


def _causal(rows: Sequence[Mapping[str, Any]]) -> list[str]:
  out = []
  for r in rows:
    prints = r["fingerprints"]
    word = (
      "share"
      if prints["low"] is not None and prints["low"] > prints["null"]
      else "do not share"
    )
    out.append(
      f"{r['route']}: matched latents {word} their effects on documents "
      f"(correlation of ablation fingerprints {prints['matched']:.2f}, of "
      f"mismatched latents {prints['null']:.2f}, p = {prints['p']:.3g})."
    )
  return out
