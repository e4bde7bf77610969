"""Lloyd's iteration: ours against faiss and scikit-learn.

  python benchmarks/clustering.py --peers=PYTHON --store=PATH [--json]
  python benchmarks/clustering.py --peers=PYTHON --store=PATH --quality [--all]
  python benchmarks/clustering.py --store=PATH --blocks

PYTHON is the interpreter of an environment with the peers:

  python -m venv peers
  peers/bin/pip install faiss-cpu==1.15.1 scikit-learn==1.9.1

PATH is an activation store, such as a run of `configs/gemma3_sae.py` leaves in
the cache. Peers compute on the CPU: ours must too (JAX_PLATFORMS=cpu).

All start from the same centroids on the same rows, and their inertias must
agree after as many iterations. Rows are about their mean: ours and
scikit-learn subtract it themselves, faiss does not, and its float32 distances
far from the origin lead elsewhere (inertias 1e-4 apart). They take turns.
Set-up (copies, checks, the last labels of scikit-learn) is in a run of one
iteration as well as in a longer one: their difference is iterations alone.
`--quality` compares what each finds from its own first centroids; `--blocks`
times our own pass for other sizes than those of `gemma_jax.clustering.lloyd`.
"""

import argparse
import contextlib
import functools
import itertools
import json
import pathlib
import tempfile
import time
from unittest import mock

import jax
import numpy as np
import peers

from gemma_jax import machine, tables
from gemma_jax.activations import ActivationStore
from gemma_jax.clustering import kmeans, lloyd
from gemma_jax.clustering.kmeans import Lloyd

SYSTEMS = ("faiss", "sklearn")
MOST = 25  # iterations for quality: the default of faiss
MANY = 1024  # clusters beyond which scikit-learn's k-means++ takes minutes
BLOCKS = (1 / 16, 1 / 4, 1, 4)  # times our own size
CHUNKS = (1 / 4, 1 / 2, 1, 2, 4)
COLUMNS = {
  "system": "",
  "seconds": "s/iteration",
  "microseconds": "us/row",
  "gflops": "GFLOP/s",
  "share": "of matmul",
  "times": "ours is faster",
  "inertia": "inertia",
}


class Ours:
  """Our iterations from given centroids."""

  def __init__(self, x, clusters, first):
    self.method, self.first = Lloyd(x, clusters, tol=0.0), first

  def __call__(self, iterations: int) -> tuple[float, int]:
    """Seconds, and the iterations until it converged."""
    began = time.perf_counter()
    start = self.method.start(self.first, seed=0)
    steps = itertools.islice(self.method.iterations(start), iterations)
    *_, self.last = steps
    return time.perf_counter() - began, self.last.number

  def centroids(self) -> np.ndarray:
    return self.method.finish(self.last).centroids


class Peer(peers.Server):
  """A peer's k-means."""

  def __init__(self, args, system, folder):
    self.out = f"{folder}/{system}.npy"
    script = pathlib.Path(__file__).with_name("clustering_peer.py")
    super().__init__(args.peers, script, system, f"{folder}/rows.npy", self.out)

  def __call__(
    self, iterations: int, *, clusters: int, seed: int = 0, init=None
  ) -> tuple[float, int]:
    """Seconds, and the iterations until it converged."""
    case = {
      "clusters": clusters,
      "iterations": iterations,
      "seed": seed,
      "init": init,
    }
    found = self.ask(case)
    return found["seconds"], found["iterations"]

  def centroids(self) -> np.ndarray:
    return np.load(self.out, allow_pickle=False)


def first_centroids(x, clusters: int, seed: int = 0) -> np.ndarray:
  """Different rows [C, D]: equal ones would leave a cluster empty.

  Empty clusters go elsewhere in each system, and their inertias apart.
  """
  drawn = x[np.random.default_rng(seed).permutation(len(x))[: 2 * clusters]]
  _, at = np.unique(drawn, axis=0, return_index=True)
  return drawn[np.sort(at)[:clusters]]


def inertia(x, centroids, block: int = 2**12) -> float:
  """float32 finds the nearest centroid, float64 measures how far it is."""
  total, half = 0.0, 0.5 * np.einsum("cd,cd->c", centroids, centroids)
  for start in range(0, len(x), block):
    part = x[start : start + block]
    nearest = np.argmax(part @ centroids.T - half, axis=1)
    apart = part.astype(np.float64) - centroids[nearest]
    total += np.einsum("nd,nd->", apart, apart)
  return float(total)


def per_iteration(run, iterations: int) -> float:
  """Seconds, without what a run of half as many takes as well.

  Not of a single one: scikit-learn's takes longer than several.
  """
  (less, _), (more, done) = run(iterations), run(2 * iterations)
  if done < 2 * iterations:
    raise SystemExit(
      f"It converged after {done} iterations, before {2 * iterations}. Ask for "
      "fewer, or for more rows."
    )
  return (more - less) / iterations


def speed(args, x, systems, clusters, folder) -> dict:
  """All from the same centroids, by turns."""
  init = f"{folder}/first.npy"
  first = first_centroids(x, clusters)
  np.save(init, first)
  ours = Ours(x, clusters, first)
  runs = {"ours": ours} | {
    system: functools.partial(peer, clusters=clusters, init=init)
    for system, peer in systems.items()
  }
  for run in runs.values():
    run(1)
  seconds, rates = {system: [] for system in runs}, []
  for _ in range(args.rounds):
    rates.append(machine.matmul_rate())
    for system, run in runs.items():
      seconds[system].append(per_iteration(run, args.iterations))
  seconds = {system: float(np.median(s)) for system, s in seconds.items()}
  found = {
    system: inertia(x, run.centroids())
    for system, run in {"ours": ours, **systems}.items()
  }
  gap = max(abs(own / found["ours"] - 1) for own in found.values())
  rows, d = x.shape
  rate = float(np.median(rates))
  name = f"Lloyd's iteration, N = {rows}, C = {clusters}, D = {d}"
  return {
    **peers.compared(name, "s/iteration", seconds, smaller=True),
    "equal": gap < args.tolerance,
    "relative_gap": gap,
    "matmul_gflops_per_second": rate / 1e9,
    "systems": [
      {
        "system": system,
        "seconds": own,
        "microseconds": own / rows * 1e6,
        "gflops": 2 * rows * clusters * d / own / 1e9,
        "share": 2 * rows * clusters * d / own / rate,
        "times": own / seconds["ours"],
        "inertia": found[system],
      }
      for system, own in seconds.items()
    ],
  }


def quality(args, x, systems, clusters) -> dict:
  """Inertia from first centroids of their own, over seeds."""
  found = {"ours": []}
  for seed in range(args.seeds):
    result = kmeans(x, clusters, seed=seed, max_iter=MOST, tol=0.0)
    found["ours"].append(inertia(x, result.centroids))
    for system, peer in systems.items():
      if system == "sklearn" and clusters > MANY and not args.all:
        continue
      peer(MOST, clusters=clusters, seed=seed)
      found.setdefault(system, []).append(inertia(x, peer.centroids()))
  mean = {system: float(np.mean(own)) for system, own in found.items()}
  sd = {
    system: float(np.std(own, ddof=args.seeds > 1))
    for system, own in found.items()
  }
  name = f"inertia after {MOST} iterations, N = {len(x)}, C = {clusters}"
  out = peers.compared(name, "inertia", mean, smaller=True)
  best = min(out["peers"], key=out["peers"].get)
  # Two standard errors of the difference: seeds alone make as much.
  error = np.hypot(sd["ours"], sd[best]) / np.sqrt(args.seeds)
  return {
    **out,
    "sd": sd,
    "no_worse": bool(mean["ours"] <= mean[best] + 2 * error),
  }


def blocks(args, x, clusters) -> dict:
  """Our pass with other rows in a block and other centroids in a chunk."""
  first = first_centroids(x, clusters)
  mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
  own = lloyd.block_size(mesh), min(lloyd.chunk_size(clusters), clusters)
  sizes = [int(own[0] * times) for times in BLOCKS]
  chunks = {min(int(lloyd.chunk_size(clusters) * t), clusters) for t in CHUNKS}
  seconds = {pair: [] for pair in itertools.product(sizes, sorted(chunks))}
  for _ in range(args.rounds):
    for (size, chunk), found in seconds.items():
      jax.clear_caches()  # what was compiled has the sizes of before
      with (
        mock.patch.object(lloyd, "block_size", return_value=size),
        mock.patch.object(lloyd, "chunk_size", return_value=chunk),
      ):
        run = Ours(x, clusters, first)
        run(1)
        found.append(run(1)[0])
  jax.clear_caches()
  micro = {p: float(np.median(s)) / len(x) * 1e6 for p, s in seconds.items()}
  names = {p: "ours" if p == own else f"{p[0]}, {p[1]}" for p in micro}
  name = f"rows of a block, centroids of a chunk, N = {len(x)}, C = {clusters}"
  scores = {names[pair]: value for pair, value in micro.items()}
  return {
    **peers.compared(name, "us/row", scores, smaller=True),
    "equal": True,
    "own": own,
    "passes": [
      {"block": size} | {c: micro[size, c] for c in sorted(chunks)}
      for size in sizes
    ],
  }


def show(result) -> None:
  """For people."""
  print(result["name"])
  if "systems" in result:
    print(tables.aligned(result["systems"], COLUMNS))
    print(
      f"  matmul: {result['matmul_gflops_per_second']:.4g} GFLOP/s; inertias "
      f"differ by {result['relative_gap']:.1e}"
    )
  elif "sd" in result:
    means = {"ours": result["ours"], **result["peers"]}
    for system, mean in means.items():
      print(f"  {system:8} {mean:.6g} +- {result['sd'][system]:.2g}")
    print(f"  ratio {result['ratio']:.4f}; no worse: {result['no_worse']}")
  else:
    columns = {name: str(name) for name in result["passes"][0]}
    columns["block"] = "us/row"
    print(tables.aligned(result["passes"], columns))
    print(
      "  ours: {}, {}; {:.4g} us/row".format(*result["own"], result["ours"])
    )
  print(end="", flush=True)


def results(args, x):
  """Yields what was asked for."""
  if args.blocks:
    for clusters in args.clusters:
      yield blocks(args, x, clusters)
    return
  with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
    np.save(f"{folder}/rows.npy", x)
    systems = {system: Peer(args, system, folder) for system in SYSTEMS}
    for peer in systems.values():
      stack.callback(peer.close)
    for clusters in args.clusters:
      if args.quality:
        yield quality(args, x, systems, clusters)
      else:
        yield speed(args, x, systems, clusters, folder)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--peers", help="python of an environment with them")
  parser.add_argument("--store", required=True, help="an activation store")
  parser.add_argument("--site", help="of it; default: its first")
  parser.add_argument("--rows", type=int, default=204800, help="its first")
  parser.add_argument(
    "--clusters",
    type=lambda text: [int(c) for c in text.split(",")],
    default=[256, 4096],
  )
  parser.add_argument("--iterations", type=int, default=5, help="in a turn")
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--tolerance", type=float, default=1e-4)
  parser.add_argument("--quality", action="store_true")
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--all", action="store_true", help="slow peers too")
  parser.add_argument("--blocks", action="store_true")
  parser.add_argument("--json", action="store_true")
  args = parser.parse_args()
  if not (args.peers or args.blocks):
    parser.error("give --peers or --blocks")
  store = ActivationStore.open(pathlib.Path(args.store).expanduser())
  site = args.site or next(iter(store.sites))
  x = np.asarray(store.read(0, args.rows, site), np.float32)
  x -= x.mean(0, dtype=np.float64).astype(np.float32)
  wrong = []
  for result in results(args, x):
    if args.json:
      print(json.dumps(result), flush=True)
    else:
      show(result)
    if not result.get("equal", True):
      wrong.append(f"{result['name']}: not the same inertia")
    if not result.get("no_worse", True):
      wrong.append(f"{result['name']}: ours is worse than a peer's")
  if wrong:
    raise SystemExit("; ".join(wrong))


if __name__ == "__main__":
  main()
