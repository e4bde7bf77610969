"""What a study across models may say: sentences that its numbers bear out."""

from collections.abc import Mapping, Sequence
from typing import Any

NETWORKS = ("hypernetwork", "translator")
RIVALS = ("ridge", "token")
LEVEL = 0.05  # of a permutation test


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
    out += _firing(rows, network)
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


def _firing(rows, network: str) -> list[str]:
  """Whether a network says better than ridge which latents fire."""
  found = []
  for name, text in (
    ("auroc_median", "median AUROC of firing"),
    ("top_k_recall", "top-k recall"),
  ):
    known = {
      (r["map"], r["route"]): r[name] for r in rows if r[name] is not None
    }
    pairs = [
      (value, known["ridge", route])
      for (one, route), value in known.items()
      if one == network and ("ridge", route) in known
    ]
    if pairs:
      more = sum(own > other for own, other in pairs)
      found.append(f"{text} on {more} of {len(pairs)} routes")
  if not found:
    return []
  return [
    f"The {network} has more than the ridge map, as values without intervals: "
    + ", ".join(found)
    + "."
  ]


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
    ("translator", "ridge", "The translator recovers more CE than ridge"),
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
    line += f" (differences {min(ends):+.3f} to {max(ends):+.3f})"
    if 0 < len(clear) < len(some):
      line += ". More on " + ", ".join(r["route"] for r in clear)
    out.append(line + ".")
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
  out, said = [], set()
  for r in rows:
    prints, pair = r["fingerprints"], frozenset(r["route"].split(" > "))
    if pair not in said:  # the same latents both ways
      said.add(pair)
      word = "share" if prints["p"] <= LEVEL else "are not shown to share"
      out.append(
        f"{r['route'].replace(' > ', ' | ')}: matched latents {word} their "
        "effects on documents (correlation of ablation fingerprints "
        f"{_interval(prints, 'matched')}, of mismatched latents "
        f"{prints['null']:.2f}; matches dealt anew p = {prints['p']:.3g})."
      )
    out += _injection(r["route"], r["inject"])
    out += _substitution(r["route"], r["substitution"])
  return out


def _injection(route: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
  """At the highest dose."""
  if not rows:
    return []
  dose = max(r["dose"] for r in rows)
  own = {r["vector"]: r for r in rows if r["dose"] == dose}
  moved, other = own["transferred"], own["other"]["effect"]
  more = moved["low"] is not None and moved["low"] > other
  return [
    f"{route}: added at dose {dose:g}, a match's direction raises the native "
    f"latent's words by {_interval(moved, 'effect')} nats, "
    f"{'more' if more else 'not shown to be more'} than that of another match "
    f"({other:.2f}); the native by {own['native']['effect']:.2f}, one at "
    f"random by {own['random']['effect']:.2f}."
  ]


def _substitution(route: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
  """Of as many latents as were tried."""
  if not rows:
    return []
  count = max(r["count"] for r in rows)
  own = {r["codes"]: r for r in rows if r["count"] == count}
  return [
    f"{route}: codes of {count} latents from their matches keep "
    f"{_interval(own['matched'], 'recovered')} of the KL that their means "
    f"lose, those of matches dealt anew {own['dealt']['recovered']:.2f}."
  ]


def _interval(row: Mapping[str, Any], name: str) -> str:
  """A value and its 95 % interval, where it has one."""
  if row["low"] is None:
    return f"{row[name]:.2f}"
  return f"{row[name]:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
