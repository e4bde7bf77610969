import numpy as np
import pytest
import tokenizers

from gemma_jax.data import vocabulary

WILD = "Naïve “quotes” — 漢字 Привет 🙂 𓀀 it's\n\n\tx_1 = [2]  end\n"


@pytest.fixture(params=["smollm2", "gemma"])
def tokenizer(request):
  return request.getfixturevalue(request.param)


def test_the_bytes_of_tokens_add_up_to_the_text(tokenizer):
  ids = tokenizer(WILD, add_special_tokens=False)["input_ids"]
  pieces = vocabulary.token_bytes(tokenizer, ids)
  assert b"".join(pieces) == WILD.encode()
  # The backend alone will do.
  backend = tokenizer.backend_tokenizer
  assert vocabulary.token_bytes(backend, ids) == pieces


def test_special_tokens_are_no_text(tokenizer):
  ids = tokenizer.all_special_ids
  assert ids
  assert vocabulary.token_bytes(tokenizer, ids) == [None] * len(ids)


def test_words_are_a_space_and_letters(tokenizer):
  ids, letters = vocabulary.words(tokenizer)
  assert len(ids) > 10_000
  assert (np.diff(ids) > 0).all()
  chosen = np.random.default_rng(0).choice(len(ids), 300, replace=False)
  for i in chosen:
    # The backend's decoder, which is not ours; "a" keeps its leading space.
    a = tokenizer("a", add_special_tokens=False)["input_ids"]
    text = tokenizer.decode([*a, int(ids[i])])
    assert text[:2] == "a "
    assert text[2:].isascii()
    assert text[2:].isalpha()
    assert text[2].lower() == vocabulary.LETTERS[letters[i]]
  (the,) = tokenizer(" the", add_special_tokens=False)["input_ids"]
  assert letters[ids == the] == vocabulary.LETTERS.index("t")
  (bare,) = tokenizer("the", add_special_tokens=False)["input_ids"]
  assert bare not in ids


def test_an_id_beyond_the_vocabulary_is_refused(tokenizer):
  with pytest.raises(ValueError, match="token id 9999999 is not in"):
    vocabulary.token_bytes(tokenizer, [9_999_999])


def test_other_tokenizers_are_refused():
  model = tokenizers.models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]")
  wordpiece = tokenizers.Tokenizer(model)
  wordpiece.decoder = tokenizers.decoders.WordPiece()
  with pytest.raises(ValueError, match="got WordPiece"):
    vocabulary.token_bytes(wordpiece, [1])
  wordpiece.decoder = None
  with pytest.raises(ValueError, match="got None"):
    vocabulary.token_bytes(wordpiece, [1])
  with pytest.raises(TypeError, match="got str"):
    vocabulary.token_bytes("gemma", [1])


def test_a_metaspace_vocabulary_is_read():
  model = tokenizers.models.BPE({"▁He": 0, "llo": 1, "<0x0A>": 2}, [])
  llama = tokenizers.Tokenizer(model)
  llama.decoder = tokenizers.decoders.Sequence(
    [tokenizers.decoders.ByteFallback(), tokenizers.decoders.Metaspace()]
  )
  pieces = vocabulary.token_bytes(llama, [0, 1, 2])
  assert pieces == [b" He", b"llo", b"\n"]


def test_an_added_token_of_a_byte_level_vocabulary_is_itself():
  model = tokenizers.models.BPE({"Ġa": 0, "Ċ": 1}, [])
  bpe = tokenizers.Tokenizer(model)
  bpe.decoder = tokenizers.decoders.ByteLevel()
  bpe.add_tokens(["x y"])
  bpe.add_special_tokens(["<end>"])
  pieces = vocabulary.token_bytes(bpe, range(4))
  assert pieces == [b" a", b"\n", b"x y", None]
