"""A peer's k-means, run by the peer's own interpreter.

Reads a system and the paths of the rows and of its centroids from its
arguments. Then each line of standard input is a case, {"clusters",
"iterations", "seed", "init"}, where "init" is the path of the first centroids
or null: the system's own. It saves the last centroids and answers {"seconds",
"iterations"} in a line of JSON.
"""

import json
import sys
import time

import numpy as np


def faiss(x, case, first):
  """Centroids and iterations; it does not stop before the last."""
  import faiss

  method = faiss.Kmeans(
    x.shape[1],
    case["clusters"],
    niter=case["iterations"],
    seed=case["seed"],
    # Its default takes 256 rows of each cluster and leaves out the others.
    max_points_per_centroid=len(x),
    min_points_per_centroid=1,  # fewer than 39 only make it warn
  )
  method.train(x, init_centroids=first)
  return method.centroids, len(method.obj)


def sklearn(x, case, first):
  """Centroids and iterations; it stops where labels no longer change."""
  from sklearn.cluster import KMeans

  method = KMeans(
    case["clusters"],
    init="k-means++" if first is None else first,
    n_init=1,
    max_iter=case["iterations"],
    tol=0,
    random_state=case["seed"],
    algorithm="lloyd",
  ).fit(x)
  return method.cluster_centers_, method.n_iter_


def main():
  system, rows, out = sys.argv[1:]
  x = np.load(rows, allow_pickle=False)
  print(json.dumps({"ready": system}), flush=True)
  for line in sys.stdin:
    case = json.loads(line)
    first = case["init"] and np.load(case["init"], allow_pickle=False)
    began = time.perf_counter()
    centroids, iterations = globals()[system](x, case, first)
    seconds = time.perf_counter() - began
    np.save(out, centroids)
    print(json.dumps({"seconds": seconds, "iterations": iterations}))
    sys.stdout.flush()


if __name__ == "__main__":
  main()
