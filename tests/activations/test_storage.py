"""Keys and documents, wherever they are."""

import pathlib

import pytest

from gemma_jax.activations.storage import Conflict, Document, Location


def test_a_key_holds_what_was_last_written_to_it(place):
  location = Location(place)
  assert location.read("a/b") is None
  location.write("a/b", b"one")
  location.write("a/b", b"two")
  assert Location(place).read("a/b") == b"two"
  location.delete("a/b")
  location.delete("a/b")
  assert location.read("a/b") is None


def test_keys_are_listed_by_how_they_start(place):
  location = Location(place)
  for key in ("a/2", "a/1", "ab", "b/é"):
    location.write(key, b"x")
  assert location.keys("") == ["a/1", "a/2", "ab", "b/é"]
  assert location.keys("a/") == ["a/1", "a/2"]


def test_a_document_comes_back_as_json_has_it(place):
  document = Document(Location(place), "d.json")
  assert document.value is None
  document.replace({"name": "ñ", "range": [1, 2], "rate": 0.1})
  again = Document(Location(place), "d.json")
  assert again.value == {"name": "ñ", "range": [1, 2], "rate": 0.1}
  again.replace({})
  assert document.reload().value == {}


def test_of_two_who_replace_a_document_the_second_is_told(place):
  first, second = (Document(Location(place), "d.json") for _ in range(2))
  first.replace({"by": 1})
  with pytest.raises(Conflict, match="written by another"):
    second.replace({"by": 2})
  assert second.reload().value == {"by": 1}
  second.replace({"by": 2})
  with pytest.raises(Conflict, match="written by another"):
    first.replace({"by": 1})
  first.remove()  # it is no longer the one that it knows
  assert second.reload().value == {"by": 2}
  second.remove()
  assert second.reload().value is None


def test_a_document_with_a_changed_letter_is_damaged(place):
  location = Location(place)
  Document(location, "d.json").replace({"rows": 128})
  text = location.read("d.json")
  location.write("d.json", text.replace(b"128", b"129"))
  with pytest.raises(ValueError, match=r"d\.json is damaged .*checksum"):
    Document(location, "d.json")


def test_numbers_that_json_lacks_are_refused(tmp_path):
  with pytest.raises(ValueError, match="not JSON compliant"):
    Document(Location(tmp_path), "d.json").replace({"rate": float("nan")})
  assert not list(tmp_path.iterdir())


def test_a_path_may_be_written_in_several_ways(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("HOME", str(tmp_path))
  (tmp_path / "s").mkdir()
  (tmp_path / "s" / "key").write_bytes(b"x")
  for where in ("s", "s/", "~/s", tmp_path / "s", f"file://{tmp_path}/s"):
    location = Location(where)
    assert location.read("key") == b"x"
    assert location.path == pathlib.Path(tmp_path / "s")


@pytest.mark.parametrize("where", ["ftp://host/s", "S3://bucket/s", "://s"])
def test_an_unknown_scheme_lists_those_that_are_known(where):
  with pytest.raises(ValueError, match="file://, gs://, s3://, memory://"):
    Location(where)
