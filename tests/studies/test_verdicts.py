"""What may be claimed, on numbers whose answer is known."""

import numpy as np
import pytest

from studies import verdicts


def row(values, floor=0.2, identity=1.0, **changes):
  values = np.asarray(values, float)
  options = {
    "identity": identity,
    "floor": np.broadcast_to(floor, values.shape),
    "null": None,
    "chance": None,
    "margin": 0.1,
    "resamples": 500,
  }
  return verdicts.row(values, **{**options, **changes})


def around(mean, n=40, spread=0.05, seed=0):
  return np.random.default_rng(seed).normal(mean, spread, n)


def decided(*rows, alpha=0.05, capability="all"):
  rows = [{**r, "primary": True, "capability": capability} for r in rows]
  verdicts.decide(rows, alpha)
  return [r["verdict"] for r in rows]


def test_the_share_is_the_way_from_the_floor_to_identity():
  found = row(around(0.6))
  assert found["share"] == pytest.approx((found["value"] - 0.2) / 0.8)
  assert found["share_low"] < found["share"] < found["share_high"]
  assert found["low"] < found["value"] < found["high"]
  distance = row(around(0.6), floor=0.8, identity=0.0)
  assert distance["share"] == pytest.approx(1 - distance["value"] / 0.8)


def test_verdicts():
  same, near, far, below = (row(around(m)) for m in (0.98, 0.6, 0.21, 0.05))
  assert decided(same, near, far, below) == [
    "equivalent",
    "convergent",
    "not shown",
    "not shown",
  ]


def test_a_model_is_equivalent_to_itself():
  assert decided(row(np.ones(12))) == ["equivalent"]
  assert decided(row(np.zeros(12), floor=0.7, identity=0.0)) == ["equivalent"]


def test_a_significant_but_small_share_is_no_convergence():
  found = row(around(0.24, n=200, spread=0.01))  # a share of .05
  assert found["share_low"] > 0
  assert decided(found) == ["not shown"]


def test_correction_counts_what_decides_apart():
  rows = [{**row(around(0.6, n=8, seed=i)), "primary": True} for i in range(10)]
  for i, one in enumerate(rows):
    one["capability"] = "all" if i < 2 else "uncertainty"
  verdicts.decide(rows, 0.05)
  least = 1 / 2**8
  assert [r["p"] for r in rows] == pytest.approx([least] * 10)
  assert rows[0]["p_corrected"] == pytest.approx(2 * least)
  assert rows[5]["p_corrected"] == pytest.approx(least)


def test_on_the_edge_of_the_hypothesis_few_are_called_convergent():
  # A share that is the margin: .2 + .1 x .8.
  p = np.array(
    [row(around(0.28, n=12, seed=s), resamples=9)["p"] for s in range(300)]
  )
  assert (p <= 0.05).mean() <= 0.05 + 2 * np.sqrt(0.05 / 300)
  assert (p <= 0.5).mean() == pytest.approx(0.5, abs=0.1)


def test_null_and_chance():
  values = around(0.6)
  found = row(values, null=around(0.3, seed=1))
  assert found["null"] == pytest.approx(0.3, abs=0.05)
  assert found["null_p"] < 0.001
  distance = row(values, null=around(0.3, seed=1), floor=0.9, identity=0.0)
  assert distance["null_p"] > 0.99
  assert row(values, chance=(0.1, 0.02))["null_p"] == 0.02


def test_without_room_above_the_floor_there_is_no_share():
  found = row(around(0.6), floor=1.0)
  assert found["share"] is None
  assert found["floor"] == 1
  assert decided(found) == ["not shown"]
