"""Codes for vectors: one centroid, several in turn, or one for each part.

With C centroids a code of S numbers takes S log2 C bits: the currency in which
clusterings can be compared with dictionaries.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from gemma_jax import machine
from gemma_jax.activations import Normalisation
from gemma_jax.clustering.kmeans import KMeans, kmeans
from gemma_jax.clustering.lloyd import nearest
from gemma_jax.clustering.rows import ArrayRows, MappedRows, Rows, as_rows

KINDS = ("residual", "product", "spherical")
FORMAT = 1
BLOCK = 2**14  # rows that are subtracted from at once
Fit = Callable[..., KMeans]
RAW = Normalisation("none", *np.float32([0, 1, 1]))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantiser:
  """Encodes vectors as numbers of centroids, and back.

  "residual": stage s encodes what the stages before left, and a vector is the
  sum of its S centroids; one stage is plain k-means. "product": each of S
  parts of a vector has centroids of its own (Jegou, Douze and Schmid 2011).
  "spherical": the centroid of largest cosine, times the projection on it.

  Attributes:
    kind: one of `KINDS`.
    coordinates: those of the centroids; inverted when decoding.
    centroids: float32 [S, C, D], or [S, C, D / S] of "product".
  """

  kind: str = dataclasses.field(metadata={"static": True})
  coordinates: Normalisation
  centroids: jax.Array

  @property
  def stages(self) -> int:
    """S."""
    return self.centroids.shape[0]

  @property
  def clusters(self) -> int:
    """C."""
    return self.centroids.shape[1]

  @property
  def width(self) -> int:
    """D."""
    parts = self.stages if self.kind == "product" else 1
    return self.centroids.shape[2] * parts

  @property
  def bits(self) -> float:
    """Bits of a code; the gain of "spherical" is not among them."""
    return self.stages * math.log2(self.clusters)

  @property
  def parameters(self) -> int:
    """Numbers that are stored."""
    return self.centroids.size

  @property
  def encode_flops(self) -> int:
    """FLOPs to encode a vector, for the products with the centroids."""
    return 2 * self.centroids.size

  def encode(self, x: jax.Array) -> jax.Array:
    """Raw vectors [..., D] -> numbers of centroids, int32 [..., S]."""
    left = self.coordinates.apply(x)
    flat = left.reshape(-1, left.shape[-1])
    # Loops: 64 stages one after another take ten times as long to compile.
    if self.kind == "product":
      parts = flat.reshape(len(flat), self.stages, -1).swapaxes(0, 1)
      codes = jax.lax.map(lambda p: nearest(*p), (parts, self.centroids))
    else:
      # Of "spherical" all centroids have norm 1: the largest product is the
      # largest cosine.
      def stage(left, centroids):
        code = nearest(left, centroids)
        return left - centroids[code], code

      _, codes = jax.lax.scan(stage, flat, self.centroids)
    return codes.T.reshape(*left.shape[:-1], -1)

  def decode(self, codes: jax.Array) -> jax.Array:
    """Numbers of centroids [..., S] -> raw vectors [..., D].

    Of "spherical", directions: codes say nothing of the gain.
    """
    flat = codes.reshape(-1, self.stages)
    if self.kind == "product":
      made = jax.vmap(lambda c, code: c[code], (0, 1), 1)(self.centroids, flat)
    else:
      made = self._sum(flat)
    return self.coordinates.invert(made.reshape(*codes.shape[:-1], -1))

  def _sum(self, codes):
    """Centroids [n, S] added up, [n, D]."""

    def add(total, stage):
      centroids, code = stage
      return total + centroids[code], None

    none = jnp.zeros((len(codes), self.width), self.centroids.dtype)
    return jax.lax.scan(add, none, (self.centroids, codes.T))[0]

  def reconstruct(self, x: jax.Array) -> jax.Array:
    """Raw vectors [..., D] as their codes have them, raw, float32."""
    codes = self.encode(x)
    if self.kind != "spherical":
      return self.decode(codes)
    z = self.coordinates.apply(x)
    way = self.centroids[0][codes[..., 0]]
    gain = jnp.maximum(jnp.sum(z * way, axis=-1, keepdims=True), 0)
    return self.coordinates.invert(gain * way)

  def save(self, path: pathlib.Path) -> None:
    """Writes a directory: config.json and centroids.safetensors."""
    path = pathlib.Path(path)
    path.mkdir(parents=True, exist_ok=True)
    names = ("mean", "map", "inverse")
    arrays = {n: np.asarray(getattr(self.coordinates, n)) for n in names}
    arrays["centroids"] = np.asarray(self.centroids)
    save_file(arrays, path / "centroids.safetensors")
    about = {
      "format": FORMAT,
      "kind": self.kind,
      "normalise": self.coordinates.kind,
    }
    (path / "config.json").write_text(json.dumps(about, indent=2))

  @classmethod
  def load(cls, path: pathlib.Path) -> "Quantiser":
    """What `save` wrote.

    Raises:
      FileNotFoundError: nothing there.
      ValueError: it is not of this format.
    """
    path = pathlib.Path(path)
    about: dict[str, Any] = json.loads((path / "config.json").read_text())
    if about.get("format") != FORMAT or about.get("kind") not in KINDS:
      raise ValueError(
        f"{path} is no quantiser of format {FORMAT}: its config.json says "
        f"{about}. Pass what Quantiser.save wrote."
      )
    arrays = load_file(path / "centroids.safetensors")
    coordinates = Normalisation(
      about["normalise"],
      *(jnp.asarray(arrays[n]) for n in ("mean", "map", "inverse")),
    )
    return cls(about["kind"], coordinates, jnp.asarray(arrays["centroids"]))


def of_centroids(
  centroids: np.ndarray,
  coordinates: Normalisation | None = None,
  *,
  spherical: bool = False,
) -> Quantiser:
  """One number for each vector: the nearest of [C, D] centroids.

  Args:
    centroids: in the coordinates.
    coordinates: None: raw.
    spherical: whether the nearest is that of largest cosine.
  """
  if spherical:
    return Quantiser(
      "spherical", coordinates or RAW, jnp.asarray(centroids)[None]
    )
  return _about_their_mean("residual", coordinates, np.asarray([centroids]))


def _about_their_mean(kind, coordinates, centroids) -> Quantiser:
  """Far from the origin, products of float32 numbers would cancel."""
  middle = centroids.mean(axis=1, keepdims=True, dtype=np.float64)
  if kind == "residual":
    middle[1:] = 0  # what is left over has no offset
  coordinates = coordinates or RAW
  mean = coordinates.invert(middle[: None if kind == "product" else 1].ravel())
  return Quantiser(
    kind,
    dataclasses.replace(coordinates, mean=mean.astype(jnp.float32)),
    jnp.asarray((centroids - middle).astype(np.float32)),
  )


def fit_residual(
  x: np.ndarray | Rows,
  k: int,
  stages: int,
  *,
  coordinates: Normalisation | None = None,
  seed: int = 0,
  fit: Fit = kmeans,
) -> Quantiser:
  """Residual quantisation: k-means of what the stages before left.

  Args:
    x: rows [N, D] in the coordinates; what is left of them is held in memory.
    k: C, of each stage.
    stages: S.
    coordinates: those of the rows; None: raw.
    seed: of the first stage; each has another.
    fit: (rows, k, *, seed) -> `KMeans`.

  Raises:
    MemoryError: the rows do not fit.
  """
  rows: Rows = as_rows(x)
  need, free = 4 * len(rows) * rows.width, machine.host_memory()[1]
  if 2 * need > free:
    raise MemoryError(
      f"{len(rows)} rows of {rows.width} need {need / 2**30:.1f} GiB twice, "
      f"and {free / 2**30:.1f} GiB are free. Give fewer rows."
    )
  left = rows.read(0, len(rows)).copy()
  centroids = []
  for stage in range(stages):
    found = fit(ArrayRows(left), k, seed=seed + stage)
    centroids.append(found.centroids)
    for start in range(0, len(left), BLOCK):
      part = slice(start, start + BLOCK)
      left[part] -= found.centroids[found.labels[part]]
  return _about_their_mean("residual", coordinates, np.asarray(centroids))


def fit_product(
  x: np.ndarray | Rows,
  k: int,
  parts: int,
  *,
  coordinates: Normalisation | None = None,
  seed: int = 0,
  fit: Fit = kmeans,
) -> Quantiser:
  """Product quantisation: k-means of each of S equal parts of a vector.

  Args:
    x: rows [N, D] in the coordinates.
    k: C, of each part.
    parts: S.
    coordinates: as for `fit_residual`, as are the others.
    seed: see there.
    fit: see there.

  Raises:
    ValueError: S does not divide D.
  """
  rows: Rows = as_rows(x)
  width, rest = divmod(rows.width, parts)
  if rest or not width:
    raise ValueError(
      f"{parts} parts of vectors of {rows.width}: the parts must be equal."
    )
  found = []
  for part in range(parts):
    columns = slice(part * width, (part + 1) * width)
    here = MappedRows(rows, lambda z, c=columns: z[:, c], width)
    found.append(fit(here, k, seed=seed + part).centroids)
  return _about_their_mean("product", coordinates, np.asarray(found))
