"""circuit-tracer, in its own layout."""

from tests.dictionaries.formats.files import (
  D,
  K,
  M,
  Written,
  case,
  relu,
  top,
  weights,
  wide,
  write_safetensors,
)


def circuit_tracer(root, *, skip=False, threshold=False, seed=0, config=""):
  w = weights(seed, W_enc=(M, D), W_dec=(M, D), b_enc=M, b_dec=D)
  if threshold:
    name = "activation_function.threshold"
    w |= weights(seed + 1, **{name: M})
  if skip:
    w |= weights(seed + 2, W_skip=(D, D))
  path = root / "transcoders"
  write_safetensors(path / "layer_4.safetensors", w)
  (path / "config.yaml").write_text(
    'model_name: "meta-llama/Llama-3.2-1B"\n'
    'model_kind: "transcoder_set"\n'
    'feature_input_hook: "mlp.hook_in"\n'
    'feature_output_hook: "hook_mlp_out"\n'
    'scan: "llama"\n' + config
  )
  w = wide(w)

  def formula(x):
    z = x @ w["W_enc"].T + w["b_enc"]
    if "topk" in config:
      acts = top(z)
    else:
      acts = relu(z) * (z > w.get("activation_function.threshold", 0))
    y = acts @ w["W_dec"] + w["b_dec"]
    return acts, y + (x @ w["W_skip"].T if skip else 0)

  return Written(path, formula)


for name, options in {
  "relu": {},
  "skip": {"skip": True},
  "jumprelu_skip": {"skip": True, "threshold": True},
  "topk": {"config": f"activation: topk\nk: {K}\n"},
}.items():

  @case(f"circuit_tracer-{name}")
  def _(root, name=name, options=options):
    return circuit_tracer(root, seed=40 + len(name), **options)
