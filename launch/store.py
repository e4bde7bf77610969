"""Looks after stores of activations.

python -m launch.store verify|info|stats|repair PATH [--json]
python -m launch.store merge TARGET SOURCE...

PATH may be a URL (gs://, s3://). verify reads everything and checks it; info
says what a store is; stats writes its statistics and draws them; repair takes
out what is damaged, for the same harvest to write it again; merge copies
stores behind another. Exit status: 0; 1 for what is damaged; 2 for an error,
as where there is no store.
"""

import collections
import json
import logging
import operator
import os
import sys

import numpy as np
import tensorstore as ts
from absl import app, flags
from absl import logging as absl_logging

from gemma_jax.activations import layout
from gemma_jax.activations.merge import merge
from gemma_jax.activations.records import write_statistics
from gemma_jax.activations.repair import repair, verify
from gemma_jax.activations.statistics import measure
from gemma_jax.activations.storage import Location
from gemma_jax.activations.store import ActivationStore, read_manifest

log = logging.getLogger("gemma_jax")

COUNTED = 2**27  # rows whose sources are counted at once: seconds
SOURCE = layout.LABELS.index("source")


# ---------------------------------------------------------- verify and repair
def _verify(where: str) -> int:
  found = verify(where)
  if JSON.value:
    print(json.dumps([damage._asdict() for damage in found], indent=2))
  elif not found:
    print(f"{where} is sound")
  else:
    _show(found)
    print(
      f"{len(found)} damages. `python -m launch.store repair {where}` takes "
      "them out; the same harvest then writes them again."
    )
  return int(bool(found))


def _show(found) -> None:
  for damage in found:
    print(damage)


def _repair(where: str) -> int:
  found = repair(where)
  left = _missing_rows(where, found)
  if JSON.value:
    damages = [damage._asdict() for damage in found]
    print(json.dumps({"damages": damages, "missing": left}, indent=2))
    return 0
  _show(found)
  for line in _done(found):
    print(line)
  for start, stop in left:
    print(f"rows {start} to {stop - 1} are to be harvested again")
  if not found and not left:
    print(f"{where} is sound; nothing was changed")
  return 0


def _missing_rows(where, found) -> list[list[int]]:
  if any(damage.key == layout.MANIFEST for damage in found):
    return []
  root, manifest = read_manifest(where)
  rows, start = [], 0
  for part in layout.parts(root, manifest):
    if part is not None:
      rows += [[start + a, start + b] for a, b in part["holes"]]
      start += part["committed"]
  return rows


def _done(found) -> list[str]:
  """What a repair has done about these damages, in words."""
  ends = [damage.key.split("/", 2)[-1] for damage in found]
  harvest = (
    "Run the same harvest (with append=True where a store has several parts)"
  )
  lines = []
  if layout.MANIFEST in ends:
    return [
      f"The manifest is set aside as {layout.MANIFEST}.damaged. {harvest}: it "
      "writes the manifest anew and finds its rows where they are. Of several "
      "harvests, run each again, in the order of their parts."
    ]
  if layout.PART in ends:
    lines.append(
      "What a part says of itself was lost (it is set aside as "
      f"{layout.PART}.damaged), and its rows with it."
    )
  if any(end.endswith("zarr.json") for end in ends):
    lines.append("The metadata of arrays are written anew.")
  if any(end.startswith("state/") for end in ends):
    lines.append(
      "The statistics are dropped: `python -m launch.store stats` measures "
      "them, when the store is complete, if the harvest does not."
    )
  if any(end.startswith("documents/") for end in ends):
    lines.append("Documents are to be named again.")
  if any("/c/" in end for end in ends):
    lines.append("Damaged shards are taken out.")
  mended = all(end.endswith("zarr.json") or "state/" in end for end in ends)
  if not mended:
    lines.append(f"{harvest}: it writes what is missing.")
  return lines


# ----------------------------------------------------------------------- info
def _info(where: str) -> int:
  facts = describe(where)
  print(json.dumps(facts, indent=2) if JSON.value else text(facts))
  return 0


def describe(where: str | os.PathLike) -> dict:
  """What a store is, complete or not, as one JSON object."""
  root, manifest = read_manifest(where)
  sites, dtype = manifest["sites"], manifest["dtype"]
  parts = layout.parts(root, manifest)
  begun = [part for part in parts if part]
  item = ts.dtype(dtype).numpy_dtype.itemsize
  rows = [
    part["committed"] - sum(stop - start for start, stop in part["holes"])
    for part in begun
  ]
  seconds = sum(part["seconds"] for part in begun)
  return {
    "store": str(where),
    "complete": all(map(layout.is_whole, parts)),
    "rows": sum(rows),
    "sites": sites,
    "dtype": dtype,
    "metadata": manifest["metadata"],
    "parts": [
      None
      if part is None
      else {
        "rows": part["committed"],
        "complete": part["complete"],
        "holes": part["holes"],
        "documents": part["documents"],
        "made_by": part["made_by"],
        "report": part["report"],
      }
      for part in parts
    ],
    "documents": sum(part["documents"] for part in begun),
    "sources": _tokens_by_source(root, manifest, parts),
    "bytes": {
      "vectors": sum(rows) * sum(sites.values()) * item,
      "stored": _size(root),
    },
    "tokens_per_second": sum(rows) / seconds if seconds else None,
  }


def _tokens_by_source(root, manifest, parts) -> dict[str, int] | None:
  """Tokens of each source; None if there are many, or some are damaged."""
  if sum(part["committed"] for part in parts if part) > COUNTED:
    return None
  kinds = layout.arrays(manifest["sites"], manifest["dtype"])
  total = collections.Counter()
  for i, part in enumerate(parts):
    if not part or not part["committed"]:
      continue
    location = Location(f"{root}/{layout.part_name(i)}")
    array = ts.open(
      location.array(layout.TOGETHER),
      open=True,
      assume_metadata=True,
      **layout.form(*kinds[layout.TOGETHER], part["committed"]),
    )
    holes = {start for start, _ in part["holes"]}
    for start in range(0, part["committed"], layout.SHARD_ROWS):
      if start in holes:
        continue
      stop = min(start + layout.SHARD_ROWS, part["committed"])
      try:
        labels = array.result()[start:stop, SOURCE].read().result()
      except ValueError:
        return None
      counts = np.bincount(labels, minlength=len(part["sources"]))
      total.update(dict(zip(part["sources"], counts.tolist(), strict=True)))
  return dict(total)


def _size(root: Location) -> int | None:
  """Bytes of all files; key-value stores elsewhere do not tell."""
  if root.path is None:
    return None
  return sum(p.stat().st_size for p in root.path.rglob("*") if p.is_file())


def text(facts: dict) -> str:
  """What `describe` found, for people."""
  size, parts = facts["bytes"], facts["parts"]
  whole = "complete" if facts["complete"] else "INCOMPLETE: harvest again"
  stored = ""
  if size["stored"] is not None:
    share = size["stored"] / max(size["vectors"], 1)
    stored = f", {_gigabytes(size['stored'])} on disk ({share:.3f} of that)"
  rate = facts["tokens_per_second"]
  lines = [
    f"rows       {facts['rows']:,} in {len(parts)} "
    f"part{'s' * (len(parts) > 1)}, {whole}",
    *_table("site", {s: f"{w:,} wide" for s, w in facts["sites"].items()}),
    f"dtype      {facts['dtype']}",
    f"size       {_gigabytes(size['vectors'])} of vectors{stored}",
    f"documents  {facts['documents']:,}",
  ]
  if facts["sources"] is not None:
    named = {s or "(one)": f"{n:,}" for s, n in facts["sources"].items()}
    lines += _table("tokens", named)
  if rate is not None:
    lines.append(f"harvested  at {rate:,.0f} tokens/s")
  lines += _table("made of", facts["metadata"])
  for i, part in enumerate(parts):
    lines.append(f"part {i}")
    if part is None:
      lines.append("  not begun")
      continue
    state = "complete" if part["complete"] else "interrupted"
    lines.append(f"  {part['rows']:,} rows, {state}")
    if part["holes"]:
      lines.append(f"  holes at rows {part['holes']}")
    for name in ("made_by", "report"):
      if part[name]:
        lines.append(f"  {name:9}{json.dumps(part[name])}")
  return "\n".join(lines)


def _table(title: str, rows: dict) -> list[str]:
  width = max(map(len, rows), default=0)
  return [
    f"{title if i == 0 else '':10} {name:{width}}  {value}"
    for i, (name, value) in enumerate(rows.items())
  ]


def _gigabytes(size: float) -> str:
  return f"{size / 1e9:.3g} GB"


# ---------------------------------------------------------------------- stats
def _stats(where: str) -> int:
  root = Location(where)
  out = OUT.value or (root.path and root.path / "plots")
  if not out:
    raise ValueError(f"{where} is a URL: say where the pictures go, --out=DIR.")
  store = ActivationStore.open(where)
  found = write_statistics(
    store, {site: _statistics(store, site) for site in store.sites}
  )
  # Late: they take longer to import than the rest takes to run.
  from gemma_jax.report import activations as pictures

  paths = [str(path) for path in pictures.write(found, out)]
  table = {site: _row(summary) for site, summary in found.items()}
  if JSON.value:
    written = {"stats": f"{root}/stats.json", "pictures": paths, "sites": table}
    print(json.dumps(written, indent=2))
    return 0
  for site, row in table.items():
    print(site)
    outliers = row.pop("outliers")
    for name, value in row.items():
      print(f"  {name:20} {_number(value)}")
    for o in outliers[:5]:
      name = o["name"] or o["id"] or f"document {o['document']}"
      print(
        f"  outlier              norm {o['norm']:.4g} (z {o['z']:.3g}) at "
        f"position {o['position']} of {name}"
      )
  print(f"{root}/stats.json", *paths)
  return 0


def _statistics(store: ActivationStore, site: str):
  """Those of the harvest; measured where it took none, or not these."""
  try:
    found = store.statistics(site)
  except (OSError, ValueError) as e:  # damaged, or parts not taken alike
    log.warning("%s The rows are measured.", e)
    found = None
  if found is None or (COVARIANCE.value and found.covariance is None):
    found = measure(store, site, covariance=COVARIANCE.value)
  return found


def _row(summary: dict) -> dict:
  largest = summary["drift"]["largest"]
  return {
    "tokens": summary["tokens"],
    "mean norm": summary["mean_norm"],
    "mean square": summary["mean_square"],
    "participation ratio": summary["participation_ratio"],
    "massive share": summary["massive"]["share"],
    "largest drift": largest and largest["shift"],
    "outliers": summary["outliers"]["largest"],
  }


def _number(value) -> str:
  if value is None:
    return "-"
  return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


# ---------------------------------------------------------------------- merge
def _merge(target: str, *sources: str) -> int:
  store = merge(target, sources)
  rows, parts = len(store), len(store.parts)
  if JSON.value:
    print(json.dumps({"store": target, "rows": rows, "parts": parts}))
  else:
    print(f"{target} has {rows:,} rows in {parts} parts")
  return 0


COMMANDS = {
  "verify": (_verify, "PATH", operator.eq, 1),
  "info": (_info, "PATH", operator.eq, 1),
  "stats": (_stats, "PATH", operator.eq, 1),
  "repair": (_repair, "PATH", operator.eq, 1),
  "merge": (_merge, "TARGET SOURCE...", operator.ge, 2),
}


def main(argv) -> None:
  name, *args = argv[1:] or [""]
  if name not in COMMANDS:
    raise app.UsageError(
      f"Expected one of {', '.join(COMMANDS)}, got {name!r}.", exitcode=2
    )
  command, expected, compare, count = COMMANDS[name]
  if not compare(len(args), count):
    raise app.UsageError(f"Expected {name} {expected}, got {args}.", exitcode=2)
  absl_logging.set_verbosity(absl_logging.WARNING)
  log.setLevel(logging.INFO)
  try:
    status = command(*args)
  except (ValueError, OSError, KeyError) as e:
    if TRACEBACK.value:
      raise
    print(f"error: {e}\n(--traceback shows where.)", file=sys.stderr)
    status = 2
  sys.exit(status)


def _parse(argv):
  flags.FLAGS.set_gnu_getopt(True)  # flags may stand behind the paths
  return app.parse_flags_with_usage(argv)


if __name__ == "__main__":
  # Not above: others that import this file have a --json of their own.
  JSON = flags.DEFINE_bool("json", False, "Print one JSON object.")
  COVARIANCE = flags.DEFINE_bool(
    "covariance", False, "stats: with the covariance, measured if need be."
  )
  OUT = flags.DEFINE_string(
    "out", None, "stats: where the pictures go; default PATH/plots."
  )
  TRACEBACK = flags.DEFINE_bool(
    "traceback", False, "Show where an error came from."
  )
  app.run(main, flags_parser=_parse)
