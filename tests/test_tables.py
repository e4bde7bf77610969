"""Tables for people."""

from gemma_jax import tables

ROWS = [{"name": "a", "fvu": 0.123456, "k": None}, {"name": "bcd", "k": 32}]


def test_columns_are_aligned_and_what_is_missing_is_a_dash():
  titles = {"name": "run", "fvu": "fvu", "k": "k"}
  assert tables.aligned(ROWS, titles).splitlines() == [
    "run     fvu   k",
    "  a  0.1235   -",
    "bcd       -  32",
  ]


def test_the_same_in_markdown():
  assert tables.markdown(ROWS, ["name", "fvu"]) == (
    "| name | fvu |\n| --- | --- |\n| a | 0.1235 |\n| bcd | - |\n"
  )
