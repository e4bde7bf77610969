"""The main job: train a dictionary (SAE or transcoder) on one model's sites.

  text -> tokens -> sites -> store -> dictionary -> held-out numbers -> page

`run(config, workdir)` goes all the way; each stage is cached or resumed, so
the same command goes on after an interruption.
"""

import dataclasses
import importlib.metadata
import json
import logging
import pathlib
import platform
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gemma_jax import activations, data, dictionaries, metrics, models
from gemma_jax.dictionaries import core, evaluate, linear
from gemma_jax.dictionaries.config import DictionaryConfig
from gemma_jax.dictionaries.selection import kth_largest
from gemma_jax.models import sites
from gemma_jax.report import dictionary as report
from trainers import fields, loop, track

log = logging.getLogger("gemma_jax")

OPTIONAL = (list, tuple, type(None))
FIELDS = {
  "job": str,
  "seed": int,  # of the initial latents and of the order of the batches
  "model": {
    "name": str,  # see gemma_jax.load_model
    "dtype": (str, type(None)),  # None: float32 on CPUs, else bfloat16
  },
  "mesh": {"data": int, "fsdp": int, "tensor": int},
  "data": {
    "corpus": fields.Free,  # see gemma_jax.data.load
    "seed": int,  # of the split and of the order of the documents
    "heldout_fraction": float,  # of the documents
    "context": int,  # T, with BOS
    "packing": str,  # "packed" or "document"
    "document_tokens": (int, type(None)),  # at most so many of each document
    "train_tokens": int,
    "heldout_tokens": int,
  },
  "activations": {
    "read": str,  # site of the input
    "write": str,  # site to reconstruct
    "dtype": str,  # in the store
    "batch_size": int,  # windows in a forward pass
    "buffer_rows": int,  # tokens shuffled in memory
  },
  "dictionary": {
    "width": int,  # M
    "activation": str,  # "topk" or "batchtopk"
    "k": float,
    "prefix_widths": OPTIONAL,  # nested widths, or
    "group_sizes": OPTIONAL,  # sizes of the groups
    "skip": bool,
    "aux_k": int,
    "aux_candidates": int,
    "aux_coefficient": float,
    "dead_after": int,  # tokens
    "threshold_decay": float,
  },
  "train": {
    "steps": int,
    "batch_size": int,  # tokens
    "learning_rate": float,
    "skip_learning_rate": float,  # times learning_rate
    "warmup_fraction": float,  # of the steps, linear from 0
    "decay_fraction": float,  # of the steps, linear to 0 at the end
    "beta1": float,
    "beta2": float,
    "epsilon": float,
    "normalise": str,  # "whiten" or "scale"
    "whiten_epsilon": float,
    "init": str,  # "examples" or "random"
    "encoder_norm": float,
    "decoder_norm": float,
    "log_every": int,
    "checkpoint_every": int,
    "keep": int,
  },
  "eval": {
    "splice_tokens": int,  # for cross-entropy and KL
    "splice_batch_size": int,  # windows
    "latents": int,  # on the page
    "contexts": int,  # texts for each
  },
  "track": OPTIONAL,  # some of trainers.track.KINDS
}
EXAMPLES = 65_536  # rows from which initial latents are drawn
BLOCK = 8_192  # rows in one product of second moments

SPLICE_DEFINITIONS = {
  "ce_clean": "Next-token loss of the whole model, nats per held-out token.",
  "ce_spliced": "The same with the dictionary's output in the site's place.",
  "ce_linear": "The same with the ridge map's output in the site's place.",
  "ce_ablated": "The same with the site set to zero.",
  "delta_ce": "ce_spliced - ce_clean, nats per token.",
  "ce_recovered": (
    "(ce_ablated - ce_spliced) / (ce_ablated - ce_clean); the denominator is "
    "ce_gap."
  ),
  "ce_recovered_linear": "The same for the ridge map.",
  "ce_gap": "ce_ablated - ce_clean, nats per token.",
  "kl": "Mean KL(clean || spliced) of the next-token distributions, nats.",
  "kl_linear": "The same for the ridge map.",
  "kl_ablated": "The same for the site set to zero.",
  "tokens_train": "Token vectors trained on, repeats counted.",
  "tokens_train_distinct": "Different token vectors among them.",
  "tokens_heldout": "Held-out tokens behind fvu, l0 and dead_fraction.",
  "tokens_splice": "Held-out tokens behind the ce and kl values.",
  "tokens_per_second_harvest": "While the training store was written.",
  "tokens_per_second_train": "Over the training steps, checkpoints included.",
  "l0_train": "L0 in training, over the last log interval.",
  "threshold_running": "Running inference threshold, normalised coordinates.",
  "threshold": "The one in use: calibrated on training tokens to L0 = k.",
}


@dataclasses.dataclass(frozen=True)
class Plan:
  """Everything that is known before any long work, checked."""

  config: dict[str, Any]
  model: models.ModelConfig
  dictionary: DictionaryConfig
  mesh: Mesh
  depth: int  # blocks that the harvest runs


def prepare(
  config: Mapping[str, Any], model: models.ModelConfig | None = None
) -> Plan:
  """Checks a config against its model (by default, what its name tells).

  Raises:
    ValueError: unknown fields, sites, layers or sizes that do not fit.
  """
  fields.check(config, FIELDS)
  if jax.process_count() > 1:
    raise ValueError(
      "A run on several hosts is not supported yet: each would have to write "
      "its own part of the activations. Use the devices of one host."
    )
  track.check(config["track"] or ())
  model = model or models.describe(config["model"]["name"])
  acts, train = config["activations"], config["train"]
  where = {n: sites.parse(acts[n], model.num_layers) for n in ("read", "write")}
  if any(site.layer is None for site in where.values()):
    raise ValueError("activations.read and .write name one layer each, not *.")
  read, write = where["read"], where["write"]
  order = sites.NAMES.index
  if read.layer != write.layer or order(read.name) > order(write.name):
    raise ValueError(
      f"activations.read={acts['read']} and activations.write={acts['write']} "
      "must be in one block, what is read not after what is written. In "
      f"order: {', '.join(sites.NAMES)}."
    )
  if acts["dtype"] not in ("bfloat16", "float32"):
    raise ValueError(
      f"activations.dtype {acts['dtype']!r}; expected 'bfloat16' or 'float32'."
    )
  if train["init"] not in ("examples", "random"):
    raise ValueError(
      f"train.init {train['init']!r}; expected 'examples' or 'random'."
    )
  for name in ("steps", "batch_size", "log_every", "checkpoint_every", "keep"):
    if train[name] < 1:
      raise ValueError(f"train.{name}={train[name]} must be at least 1.")
  if train["batch_size"] > config["data"]["train_tokens"]:
    raise ValueError(
      f"data.train_tokens={config['data']['train_tokens']} is less than one "
      f"batch of train.batch_size={train['batch_size']} tokens."
    )
  wide = {"attn_z": model.num_heads * model.head_dim}
  wide["mlp_hidden"] = model.mlp_width
  own = dict(config["dictionary"])
  own["prefix_widths"] = dictionaries.prefix_widths(
    own["width"],
    prefix_widths=own["prefix_widths"],
    group_sizes=own.pop("group_sizes"),
  )
  dictionary = DictionaryConfig(
    **own,
    d_in=wide.get(where["read"].name, model.width),
    d_out=wide.get(where["write"].name, model.width),
    read=acts["read"],
    write=acts["write"],
    model=config["model"]["name"],
  )
  mesh = models.make_mesh(config["mesh"])
  ways = mesh.shape["data"] * mesh.shape["fsdp"]
  if train["batch_size"] % ways or acts["batch_size"] % ways:
    raise ValueError(
      f"train.batch_size={train['batch_size']} and activations.batch_size="
      f"{acts['batch_size']} must be multiples of the {ways} devices on the "
      "mesh's data and fsdp axes."
    )
  split = mesh.shape["fsdp"] * mesh.shape["tensor"]
  if dictionary.width % split:
    raise ValueError(
      f"dictionary.width={dictionary.width} does not divide over the {split} "
      "devices of the mesh's fsdp and tensor axes."
    )
  depth = sites.last_layer((acts["read"], acts["write"]), model.num_layers)
  return Plan(dict(config), model, dictionary, mesh, depth)


def plan(config: Mapping[str, Any]) -> dict[str, Any]:
  """What a run would do and cost, for `--dry_run`; nothing is started."""
  p = prepare(config)
  task = _task(p, store=None)
  shapes = jax.eval_shape(task.init, *task.init_shapes)
  opt = jax.eval_shape(task.optimizer.init, shapes[0])
  table, state_bytes = {}, 0
  for path, x in jax.tree_util.tree_leaves_with_path((*shapes, opt)):
    name = jax.tree_util.keystr(path)
    rule = task.rule(name, x.shape)
    ways = int(
      np.prod(
        [
          p.mesh.shape[axis]
          for axes in rule
          if axes is not None
          for axis in ((axes,) if isinstance(axes, str) else axes)
        ]
      )
    )
    state_bytes += x.size * x.dtype.itemsize // ways
    if name.startswith("[0]"):
      table[name[3:].strip("[']")] = f"{x.dtype}{list(x.shape)} {rule}"
  train, m = config["train"], p.dictionary
  tokens = train["steps"] * train["batch_size"]
  rows = train["batch_size"] // (p.mesh.shape["data"] * p.mesh.shape["fsdp"])
  harvested = config["data"]["train_tokens"] + config["data"]["heldout_tokens"]
  dtype = config["model"]["dtype"] or (
    "float32" if jax.default_backend() == "cpu" else "bfloat16"
  )
  weights = p.model.num_parameters(p.depth) * jnp.dtype(dtype).itemsize
  forward = p.model.flops_per_token(
    p.depth, config["data"]["context"], unembed=False
  )
  # Encoder: forward and weight gradient. Decoder: those and the latents'.
  step = 4 * m.d_in * m.width + 6 * m.width * m.d_out
  stored = (m.d_in + m.d_out) * jnp.dtype(
    config["activations"]["dtype"]
  ).itemsize
  return {
    "model": f"{p.model.family}, {p.depth} of {p.model.num_layers} layers run",
    "mesh": dict(p.mesh.shape),
    "parameters": table,
    "prefix_widths": list(m.prefix_widths),
    "memory_per_device": {
      "model": _size(weights / (p.mesh.shape["fsdp"] * p.mesh.shape["tensor"])),
      "training state": _size(state_bytes),
      "one batch of latents": _size(4 * rows * m.width),
    },
    "store": _size(harvested * stored),
    "tokens": {"harvest": harvested, "train": tokens},
    "flops": {
      "harvest": f"{forward * harvested:.3g}",
      "train": f"{float(step) * tokens:.3g}",
    },
  }


def _size(count: float) -> str:
  return f"{count / 2**30:.2f} GiB"


def run(config: Mapping[str, Any], workdir: str | pathlib.Path) -> dict:
  """Trains and evaluates; see the module's docstring.

  Args:
    config: with exactly the fields of `FIELDS`.
    workdir: where everything of this run goes.

  Returns:
    The contents of results.json.
  """
  workdir = pathlib.Path(workdir)
  config = json.loads(json.dumps(dict(config)))
  prepare(config)
  fields.claim(workdir, config)
  if (workdir / "results.json").exists():
    log.info("%s is finished; nothing to do", workdir)
    return json.loads((workdir / "results.json").read_text())
  # ------------------------------------------------------- text and tokens
  directory = models.resolve(config["model"]["name"])
  p = prepare(config, models.read_config(directory))
  windows = _windows(p, models.load_tokenizer(directory))
  # ----------------------------------------------------------- activations
  stores = _harvest(p, directory, windows)
  # -------------------------------------------------------------- training
  moments = _Moments(stores["train"], p.dictionary)
  state = loop.train(
    _task(p, stores["train"], moments),
    workdir,
    mesh=p.mesh,
    **{
      name: config["train"][name]
      for name in (
        "steps",
        "batch_size",
        "log_every",
        "checkpoint_every",
        "keep",
      )
    },
    track=tuple(config["track"] or ()),
  )
  dictionary, thresholds = _finish(p, state, stores["train"])
  dictionary.save(workdir / "dictionary")
  # ------------------------------------------------------------ evaluation
  numbers, latents, norms = evaluate.evaluate(
    dictionary,
    stores["heldout"],
    moments.ridge,
    moments.total.mean_y,
    top=max(16, config["eval"]["contexts"]),
  )
  model = models.load_model(
    directory, dtype=config["model"]["dtype"], mesh=p.mesh
  )
  numbers |= _splice(p, model, dictionary, moments.ridge, windows["heldout"])
  rows = loop.read_metrics(workdir / "metrics.jsonl")
  results = {
    "model": config["model"]["name"],
    "sites": [p.dictionary.read, p.dictionary.write],
    **numbers,
    **thresholds,
    "l0_train": rows[-1]["l0"],
    "tokens_train": config["train"]["steps"] * config["train"]["batch_size"],
    "tokens_train_distinct": len(stores["train"]),
    "tokens_heldout": len(stores["heldout"]),
    "tokens_per_second_harvest": stores["train"].tokens_per_second,
    "tokens_per_second_train": rows[-1]["tokens"] / rows[-1]["seconds"],
    "memory": loop.memory(),
    "dtypes": {
      "model": str(model.params["embed"].dtype),
      "store": config["activations"]["dtype"],
      "metrics": "float32 values, float64 sums",
    },
    "seeds": {"train": config["seed"], "data": config["data"]["seed"]},
    "definitions": evaluate.DEFINITIONS | SPLICE_DEFINITIONS,
    "versions": versions(),
  }
  # --------------------------------------------------------------- reports
  shown = report.latents(
    dictionary,
    latents,
    stores["heldout"],
    windows["heldout"],
    model,
    count=config["eval"]["latents"],
    contexts=config["eval"]["contexts"],
  )
  page = report.write(
    workdir,
    results=results,
    config=config,
    metrics=rows,
    statistics=latents,
    norms=norms,
    shown=shown,
  )
  _write_json(workdir / "results.json", results)
  log.info("report: %s", page)
  return results


def _windows(p: Plan, tokenizer) -> dict[str, data.Windows]:
  """Token windows of both sides of the split."""
  own = p.config["data"]
  if tokenizer is None:
    raise FileNotFoundError(
      f"{p.config['model']['name']} has no tokenizer.json; text cannot be "
      "tokenised. Put the model's tokenizer beside its weights."
    )
  documents = data.load(own["corpus"])
  sides = data.split(
    documents, heldout_fraction=own["heldout_fraction"], seed=own["seed"]
  )
  least = {"train": p.config["train"]["batch_size"], "heldout": 1}
  windows = {}
  for name, side in zip(("train", "heldout"), sides, strict=True):
    windows[name] = data.make_windows(
      data.sample(side, seed=own["seed"]),
      tokenizer.backend_tokenizer,
      context=own["context"],
      max_tokens=own[f"{name}_tokens"],
      bos_id=p.model.bos_id,
      pad_id=p.model.pad_id,
      packing=own["packing"],
      special_ids=(p.model.eos_id,),
      document_tokens=own["document_tokens"],
    )
    got, wanted = windows[name].num_tokens, own[f"{name}_tokens"]
    if got < least[name]:
      raise ValueError(
        f"The {name} side of the corpus has {got} tokens, fewer than one "
        f"batch of {least[name]}. Give more text or a smaller batch."
      )
    log.info(
      "%s: %d tokens of %d wanted, from %d documents",
      name,
      got,
      wanted,
      len(windows[name].documents),
    )
  return windows


def _harvest(p: Plan, directory, windows):
  """Both stores; the model is loaded only if one of them is incomplete."""
  own = p.config["activations"]
  capture = tuple(dict.fromkeys((own["read"], own["write"])))
  dtype = p.config["model"]["dtype"] or (
    "float32" if jax.default_backend() == "cpu" else "bfloat16"
  )
  stores, model = {}, None
  for name, side in windows.items():
    path = activations.store_path(
      directory, side, capture, dtype=own["dtype"], compute_dtype=dtype
    )
    if not activations.is_complete(path) and model is None:
      model = models.load_model(
        directory, dtype=dtype, mesh=p.mesh, layers=p.depth
      )
    stores[name] = activations.harvest(
      model,
      side,
      capture,
      path,
      batch_size=own["batch_size"],
      dtype=own["dtype"],
    )
  return stores


class _Moments:
  """Second moments of the training store, taken when first asked for."""

  def __init__(self, store, cfg: DictionaryConfig):
    self._store, self._cfg = store, cfg
    self._cached = None

  def _compute(self):
    if self._cached is None:
      rows = len(self._store)
      cut = rows - rows // 10  # the last tenth chooses the ridge penalty
      fit = linear.moments(self._blocks(0, cut))
      shift = fit.shift_x, fit.shift_y
      validation = linear.moments(self._blocks(cut, rows), shift=shift)
      self._cached = fit + validation, linear.fit_ridge(fit, validation)
    return self._cached

  def _blocks(self, start, stop):
    for at in range(start, stop, BLOCK):
      end = min(at + BLOCK, stop)
      yield tuple(
        np.asarray(self._store.read(at, end, site), np.float32)
        for site in (self._cfg.read, self._cfg.write)
      )

  @property
  def total(self) -> linear.Moments:
    return self._compute()[0]

  @property
  def ridge(self) -> linear.Ridge:
    return self._compute()[1]


def _task(p: Plan, store, moments: _Moments | None = None) -> loop.Task:
  cfg, train = p.dictionary, p.config["train"]
  d, e = cfg.d_in, cfg.d_out
  f32 = jnp.float32
  shape = jax.ShapeDtypeStruct
  rows = max(EXAMPLES, cfg.width)
  if store is not None:
    rows = min(rows, len(store))
  from_examples = train["init"] == "examples"
  norm_shapes = core.Normalisation(
    *(shape(s, f32) for s in ((d,), (d, d), (e,), ()))
  )
  ridge_shapes = (shape((d, e), f32), shape((e,), f32))
  example_shapes = (
    shape((rows, d), f32),
    shape((rows, e), f32),
    shape((rows,), bool),
  )
  key_shape = jax.eval_shape(lambda: jax.random.key(0))

  def init(key, norm, ridge, examples):
    return core.init(
      cfg,
      key,
      norm,
      linear.Ridge(*ridge, 0.0) if cfg.skip else None,
      examples if from_examples else None,
      encoder_norm=train["encoder_norm"],
      decoder_norm=train["decoder_norm"],
    )

  def init_args():
    norm = core.normalisation(
      moments.total, train["normalise"], epsilon=train["whiten_epsilon"]
    )
    batch = next(store.stream(rows, p.config["seed"] + 1))
    x, y = (np.asarray(batch[s], np.float32) for s in (cfg.read, cfg.write))
    first = np.zeros(rows, bool)
    first[np.unique(x, axis=0, return_index=True)[1]] = True
    ridge = (moments.ridge.linear, moments.ridge.bias)
    return jax.random.key(p.config["seed"]), norm, ridge, (x, y, first)

  def loss(params, state, batch):
    hyper = {"aux_coefficient": cfg.aux_coefficient}
    return core.loss(cfg, params, state, batch, hyper)

  def batches(start):
    stream = store.stream(
      train["batch_size"],
      p.config["seed"],
      sites=tuple(dict.fromkeys((cfg.read, cfg.write))),
      start=start,
      buffer_rows=p.config["activations"]["buffer_rows"],
    )
    try:
      for batch in stream:
        yield {"x": batch[cfg.read], "y": batch[cfg.write]}
    finally:
      stream.close()

  return loop.Task(
    init=init,
    init_args=init_args,
    init_shapes=(key_shape, norm_shapes, ridge_shapes, example_shapes),
    loss=loss,
    optimizer=_optimizer(train),
    learning_rate=_schedule(train),
    batches=batches,
    rule=_rule,
    shown=("loss", "fvu", "l0", "dead_fraction"),
  )


def _rule(path: str, shape: tuple[int, ...]) -> P:
  """Latents are split over fsdp and tensor, everything else is whole."""
  axes = ("fsdp", "tensor")
  if "W_enc" in path:  # D M
    return P(None, axes)
  if "W_dec" in path:  # M E
    return P(axes, None)
  if "b_enc" in path or "since_fired" in path:  # M
    return P(axes)
  return P()


def _schedule(train) -> optax.Schedule:
  """Linear warm-up from zero and linear decay to zero at the last step."""
  steps = train["steps"]
  warmup = max(1, round(train["warmup_fraction"] * steps))
  decay = max(1, round(train["decay_fraction"] * steps))

  def schedule(step):
    shape = jnp.minimum((step + 1) / warmup, (steps - step) / decay)
    return train["learning_rate"] * jnp.clip(shape, 0, 1)

  return schedule


def _optimizer(train) -> optax.GradientTransformation:
  def slower_skip(updates, params):
    slow = train["skip_learning_rate"]
    return {n: u * (slow if n == "W_skip" else 1) for n, u in updates.items()}

  return optax.chain(
    optax.scale_by_adam(train["beta1"], train["beta2"], train["epsilon"]),
    optax.stateless(slower_skip),
    optax.scale_by_learning_rate(_schedule(train)),
  )


def _finish(p: Plan, state: loop.State, store):
  """The trained dictionary on raw activations, and its thresholds."""
  cfg = p.dictionary
  extra = jax.device_get(state.extra)
  params = jax.device_get(state.params)
  calibrated, found = None, {}
  if cfg.activation == "batchtopk":
    rows = min(len(store), max(1024, 2**25 // cfg.width))
    batch = next(store.stream(rows, p.config["seed"] + 2, sites=(cfg.read,)))[
      cfg.read
    ]

    @jax.jit
    def calibrate(params, norm, x):
      x = (x.astype(jnp.float32) - norm.x_mean) @ norm.x_map
      return kth_largest(core.pre_activations(params, x), cfg.k * len(x))

    calibrated = float(calibrate(params, extra.norm, jnp.asarray(batch)))
    found = {
      "threshold": calibrated,
      "threshold_running": float(extra.threshold),
    }
  folded = core.fold(cfg, params, extra.norm, calibrated)
  folded = {name: jnp.asarray(x) for name, x in folded.items()}
  return dictionaries.Dictionary(cfg, folded), found


def _splice(p: Plan, model, dictionary, ridge, windows) -> dict[str, Any]:
  """What the model loses with the dictionary in the site's place."""
  own = p.config["eval"]
  enough = np.cumsum(windows.mask.sum(1)) >= own["splice_tokens"]
  count = int(np.argmax(enough)) + 1 if enough.any() else len(enough)
  ways = p.mesh.shape["data"] * p.mesh.shape["fsdp"]
  linear_map = jnp.asarray(ridge.linear), jnp.asarray(ridge.bias)
  loss = metrics.spliced_cross_entropy(
    model,
    windows.tokens[:count],
    windows.mask[:count],
    {
      "spliced": lambda x, y: dictionary.reconstruct(x).astype(y.dtype),
      "linear": lambda x, y: (
        x.astype(jnp.float32) @ linear_map[0] + linear_map[1]
      ).astype(y.dtype),
      "ablated": lambda x, y: jnp.zeros_like(y),
    },
    read=p.dictionary.read,
    write=p.dictionary.write,
    batch_size=-(-own["splice_batch_size"] // ways) * ways,
  )
  ce = {name: value["ce"] for name, value in loss.items()}
  recovered = metrics.ce_recovered
  return {
    **{f"ce_{name}": value for name, value in ce.items()},
    "ce_gap": ce["ablated"] - ce["clean"],
    "delta_ce": ce["spliced"] - ce["clean"],
    "ce_recovered": recovered(ce["clean"], ce["spliced"], ce["ablated"]),
    "ce_recovered_linear": recovered(ce["clean"], ce["linear"], ce["ablated"]),
    "kl": loss["spliced"]["kl"],
    "kl_linear": loss["linear"]["kl"],
    "kl_ablated": loss["ablated"]["kl"],
    "tokens_splice": loss["clean"]["tokens"],
  }


def versions() -> dict[str, str]:
  """Of Python and of what computed the results."""
  names = (
    "gemma_jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "tensorstore",
    "numpy",
    "transformers",
  )
  out = {"python": platform.python_version()}
  for name in names:
    try:
      out[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue  # running from a checkout that is not installed
  return out


def _write_json(path: pathlib.Path, contents) -> None:
  partial = path.with_name(f".{path.name}")
  partial.write_text(json.dumps(contents, indent=2))
  partial.rename(path)
