"""Archives of NumPy that are damaged or hostile."""

import io
import zipfile

import numpy as np
import pytest

from gemma_jax import dictionaries
from tests.dictionaries.formats.cases import CASES
from tests.dictionaries.formats.files import (
  D,
  M,
  weights,
)
from tests.dictionaries.formats.refusing import (
  archive,
  refused,
)


@pytest.fixture
def npz(tmp_path):
  return CASES["gemma_scope-res"](tmp_path).path / "params.npz"


def gemma_scope_arrays():
  return weights(0, W_enc=(D, M), b_enc=M, W_dec=(M, D), b_dec=D, threshold=M)


@pytest.mark.parametrize("kept", [0, 10, 500, -30])
def test_a_truncated_archive_is_told(kept, npz):
  npz.write_bytes(npz.read_bytes()[:kept])
  refused(npz, "not a complete .npz archive")


def test_a_flipped_byte_is_noticed(npz):
  contents = bytearray(npz.read_bytes())
  contents[300] ^= 0xFF
  npz.write_bytes(contents)
  refused(npz, "not a complete .npz archive.*CRC")


def test_pickled_objects_are_never_loaded(npz, tmp_path):
  witness = tmp_path / "ran"

  class Evil:
    def __reduce__(self):
      return (open, (str(witness), "w"))

  arrays = gemma_scope_arrays()
  arrays["W_enc"] = np.array([[Evil()]], dtype=object)
  np.savez(npz, **arrays)
  refused(npz, "W_enc holds Python objects, which are not read")
  assert not witness.exists()


def member(shape, dtype="<f4", data=b""):
  """A .npy that claims a shape."""
  f = io.BytesIO()
  header = {"descr": dtype, "fortran_order": False, "shape": shape}
  np.lib.format.write_array_header_1_0(f, header)
  return f.getvalue() + data


@pytest.mark.parametrize("shape", [(2**20, 2**20), (-4, 4), (D, M + 1)])
def test_a_shape_beyond_the_member_takes_no_memory(shape, npz):
  archive(npz, {"W_enc.npy": member(shape, data=b"\0" * (4 * D * M))})
  refused(npz, "W_enc of shape .* needs .* bytes; the archive holds 384")


def test_an_archive_that_unpacks_to_far_more_is_not_unpacked(npz):
  zeros = b"\0" * (4 * 2**22)
  contents = {"W_enc.npy": member((2**11, 2**11), data=zeros)}
  archive(npz, contents, zipfile.ZIP_DEFLATED)
  assert npz.stat().st_size < 2**15
  refused(npz, "claims to unpack to 167.*It is no archive of weights")


@pytest.mark.parametrize(
  ("members", "message"),
  [
    ({"W_enc.txt": b"hello"}, "'W_enc.txt' twice, or no array"),
    ({"W_enc.npy": b"hello, this is no array at all"}, "magic string"),
    ({"W_enc.npy": b"\x93NUMPY\x09\x00" + b"\0" * 40}, "version"),
    ({"W_enc.npy": member((2, 2))[:40]}, "not a complete .npz"),
  ],
)
def test_members_that_are_no_arrays_are_refused(members, message, npz):
  archive(npz, members)
  refused(npz, message)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name_are_refused(npz):
  with zipfile.ZipFile(npz, "w") as z:
    for _ in range(2):
      z.writestr("b_dec.npy", member((1,), data=b"\0" * 4))
  refused(npz, "'b_dec.npy' twice")


def test_arrays_in_fortran_order_and_big_endian_are_read(npz):
  arrays = gemma_scope_arrays()
  plain = dict(arrays)
  arrays["W_enc"] = np.asfortranarray(arrays["W_enc"])
  arrays["W_dec"] = arrays["W_dec"].astype(">f4")
  np.savez(npz, **arrays)
  d = dictionaries.load(npz)
  for name, x in plain.items():
    np.testing.assert_array_equal(d.params[name], x)


def test_an_archive_lacks_or_contradicts(npz):
  arrays = gemma_scope_arrays()
  np.savez(npz, **{n: x for n, x in arrays.items() if n != "threshold"})
  refused(npz, "Missing: threshold")
  np.savez(npz, **arrays | {"b_enc": arrays["b_enc"][:-1]})
  refused(npz, f"b_enc has shape .{M - 1}.*M = {M} in W_enc")
  np.savez(npz, **arrays | {"b_enc": arrays["b_enc"] * np.nan})
  refused(npz, f"b_enc holds {M} values that are not finite")


def test_a_label_beyond_the_width_is_refused(tmp_path):
  made = CASES["gemma_scope-res"](tmp_path)
  path = made.path.with_name("average_l0_999")
  made.path.rename(path)
  refused(path, rf"k=999.0 must be in \(0, {M}\], the width")
