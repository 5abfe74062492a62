"""Tokenizer: what its options do, segments that are not trusted, batches and streams."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hfcore import InvalidRequestError, Tokenizer

WORDS = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "a", "b", "c", "d", "é", "<tool>"]


def added(token_id: int, special: bool) -> dict[str, Any]:
    return {
        "id": token_id,
        "content": WORDS[token_id],
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": special,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of ten words, with a template for pairs."""
    file = {
        "version": "1.0",
        "added_tokens": [added(1, True), added(2, True), added(3, True), added(9, False)],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 2], "cls": ["[CLS]", 1]},
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {word: token_id for token_id, word in enumerate(WORDS)},
            "unk_token": "[UNK]",
        },
    }
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.json").write_text(json.dumps(file), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text('{"pad_token": "[PAD]"}', encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_path(folder)


def ids(array: Any) -> list[int]:
    assert array.dtype == np.uint32
    return [int(i) for i in array]


def test_a_text_or_a_pair_stands_in_its_template(tokenizer: Tokenizer) -> None:
    assert ids(tokenizer.encode("a b")) == [1, 4, 5, 2]
    assert ids(tokenizer.encode("a b", add_special_tokens=False)) == [4, 5]
    assert ids(tokenizer.encode("a", pair="b c")) == [1, 4, 2, 5, 6, 2]
    assert ids(tokenizer.encode("a", pair="b", add_special_tokens=False)) == [4, 5]
    assert ids(tokenizer.encode("")) == [1, 2]


def test_truncation_cuts_what_transformers_would(tokenizer: Tokenizer) -> None:
    text = "a b c d"
    assert ids(tokenizer.encode(text, truncation=True, max_length=4)) == [1, 4, 5, 2]
    left = tokenizer.encode(text, truncation=True, max_length=4, truncation_side="left")
    assert ids(left) == [1, 6, 7, 2]
    both = tokenizer.encode(text, pair=text, truncation=True, max_length=7)
    assert ids(both) == [1, 4, 5, 2, 4, 5, 2]
    second = tokenizer.encode("a b", pair=text, truncation="only_second", max_length=6)
    assert ids(second) == [1, 4, 5, 2, 4, 2]
    first = tokenizer.encode(text, pair="a b", truncation="only_first", max_length=6)
    assert ids(first) == [1, 4, 2, 4, 5, 2]


def test_padding_goes_where_it_is_wanted(tokenizer: Tokenizer) -> None:
    assert ids(tokenizer.encode("a", padding="max_length", max_length=5)) == [1, 4, 2, 3, 3]
    left = tokenizer.encode("a", padding="max_length", max_length=5, padding_side="left")
    assert ids(left) == [3, 3, 1, 4, 2]
    assert ids(tokenizer.encode("a", padding=True, pad_to_multiple_of=4)) == [1, 4, 2, 3]
    rows = tokenizer.encode_batch(["a", ("a b", "c")], padding=True)
    assert [ids(row) for row in rows] == [[1, 4, 2, 3, 3, 3], [1, 4, 5, 2, 6, 2]]
    assert [len(row) for row in tokenizer.encode_batch(["a", "a b"])] == [3, 4]


def test_encodings_hold_all_that_belongs_to_the_ids(tokenizer: Tokenizer) -> None:
    one, two = tokenizer.encodings([("é b", "c"), "d"], padding="longest")
    assert ids(one["input_ids"]) == [1, 8, 5, 2, 6, 2]
    assert ids(one["token_type_ids"]) == [0, 0, 0, 0, 1, 1]
    assert ids(one["special_tokens_mask"]) == [1, 0, 0, 1, 0, 1]
    assert one["offset_mapping"] == [(0, 0), (0, 1), (2, 3), (0, 0), (0, 1), (0, 0)]
    assert ids(two["attention_mask"]) == [1, 1, 1, 0, 0, 0]
    assert ids(two["input_ids"]) == [1, 7, 2, 3, 3, 3]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"truncation": True}, "truncation needs a max_length"),
        ({"truncation": "first"}, "truncation must be one of longest_first"),
        ({"truncation": True, "max_length": 2}, "more than the 2 special tokens"),
        ({"truncation": "only_second", "max_length": 9}, "needs a pair"),
        ({"max_length": 9}, "max_length needs a truncation"),
        ({"padding": "max_length"}, "needs a max_length"),
        ({"padding": "most"}, "padding must be one of longest"),
        ({"padding": "max_length", "max_length": 1 << 40}, "1 to 1048576"),
        ({"padding": True, "pad_to_multiple_of": 0}, "1 to 1048576"),
        ({"pad_to_multiple_of": 8}, "need a padding"),
        ({"padding_side": "left"}, "need a padding"),
        ({"padding": True, "padding_side": "top"}, "padding_side must be one of left, right"),
        ({"truncation_side": "left"}, "truncation_side needs a truncation"),
    ],
)
def test_an_option_that_cannot_act_raises(
    tokenizer: Tokenizer, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(InvalidRequestError, match=said):
        tokenizer.encode("a", **options)
    with pytest.raises(InvalidRequestError, match=said):
        tokenizer.encodings(["a"], **options)


def test_padding_without_a_padding_token_raises(folder: Path) -> None:
    alone = Tokenizer.from_path(folder / "tokenizer.json")
    with pytest.raises(InvalidRequestError, match="names none"):
        alone.encode("a", padding=True)


def test_what_is_no_text_is_refused_by_its_type(tokenizer: Tokenizer) -> None:
    texts: Any = ["a", 3]
    with pytest.raises(InvalidRequestError, match="a str or a tuple of two, got int"):
        tokenizer.encode_batch(texts)


def test_lists_and_streams_decode_as_one_list_does(tokenizer: Tokenizer) -> None:
    lists = [[1, 4, 5, 2], [8]]
    assert tokenizer.decode_batch(lists) == ["a b", "é"]
    assert tokenizer.decode_batch(lists, skip_special_tokens=False) == ["[CLS] a b [SEP]", "é"]
    stream = tokenizer.decode_stream()
    assert [stream.push(i) for i in lists[0]] == ["", "a", " b", ""]
    assert stream.finish() == ""


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Byte-level BPE with two tokens that mean something."""
    alphabet = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in alphabet] + [chr(256 + n) for n in range(68)]
    vocab = {letter: token_id for token_id, letter in enumerate(letters)}
    vocab |= {"<|": 256, "|>": 257, "<|e": 258, "<|e|>": 259}
    special = added(1, True) | {"id": 259, "content": "<|e|>"}
    tool = added(1, False) | {"id": 260, "content": "<tool>"}
    file = {
        "version": "1.0",
        "added_tokens": [special, tool],
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        },
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {
            "type": "BPE",
            "vocab": vocab,
            "merges": [["<", "|"], ["|", ">"], ["<|", "e"], ["<|e", "|>"]],
        },
    }
    path = tmp_path_factory.mktemp("chat") / "tokenizer.json"
    path.write_text(json.dumps(file), encoding="utf-8")
    return Tokenizer.from_path(path)


def test_what_a_user_wrote_becomes_no_control_token(chat: Tokenizer) -> None:
    assert {259, 260} <= set(ids(chat.encode("x<|e|><tool>")))
    safe = ids(chat.encode_segments([("hi", False), ("<|e|>", True), ("x<|e|><tool>", False)]))
    assert safe.count(259) == 1  # merges alone would make another
    assert 260 not in safe
    assert chat.decode(safe, skip_special_tokens=False) == "hi<|e|>x<|e|><tool>"
    # Neither can a text finish what a template began.
    assert 259 not in ids(chat.encode_segments([("<|e", True), ("|>", False)]))


def test_segments_are_one_text_when_nobody_writes_a_token(chat: Tokenizer) -> None:
    parts = [("<|e|>user\n", True), ("|", False), (">|", True), ("> é", False)]
    whole = "".join(text for text, _ in parts)
    expected = ids(chat.encode(whole, add_special_tokens=False))
    assert ids(chat.encode_segments(parts)) == expected
