"""Sentence encoders: both devices, sentence-transformers' files, LangChain's embeddings."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import tiny_embedders

from hfcore import (
    Engine,
    HuggingFaceEmbeddings,
    InvalidRequestError,
    ModelFileError,
    SentenceEncoder,
    UnknownOptionError,
    UnsupportedModelError,
)  # fmt: skip
from hfcore.testing import tiny_encoder

TEXTS = ["a", "A longer text, of more words.", "", "naïve café — 東京 🙂", "x" * 500, "two\nlines"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture
def other(folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return tiny_encoder(tmp_path)


def put(folder: Path, name: str, content: object) -> None:
    (folder / name).write_text(json.dumps(content))


def test_the_fast_device_gives_the_vectors_of_the_exact_one(folder: Path) -> None:
    fast = SentenceEncoder(folder, threads=2).encode(TEXTS, normalize=True)
    exact = SentenceEncoder(folder, device="reference").encode(TEXTS, normalize=True)
    assert fast.shape == exact.shape == (len(TEXTS), 32)
    assert ((fast * exact).sum(axis=1) > 0.9999).all()


def test_a_vector_does_not_depend_on_its_company(folder: Path) -> None:
    encoder = SentenceEncoder(folder, threads=2)
    many = TEXTS * 100
    together = encoder.encode(many)
    for text, vector in zip(TEXTS, together, strict=False):
        assert np.array_equal(encoder.encode([text])[0], vector)
    assert np.array_equal(together[: len(TEXTS)], together[-len(TEXTS) :])


def test_what_lies_beyond_max_tokens_does_not_count(folder: Path) -> None:
    encoder = SentenceEncoder(folder)
    assert encoder.info["max_tokens"] == 64
    # 62 bytes and two special tokens.
    cut = encoder.encode(["x" * 62, "x" * 61, "x" * 500])
    assert np.array_equal(cut[0], cut[2])
    assert not np.array_equal(cut[1], cut[2])
    shorter = SentenceEncoder(folder, max_tokens=10).encode(["x" * 8, "x" * 500])
    assert np.array_equal(shorter[0], shorter[1])
    with pytest.raises(InvalidRequestError, match="special tokens"):
        SentenceEncoder(folder, max_tokens=2)


def test_pooling_and_unit_length_come_from_the_files_or_the_caller(other: Path) -> None:
    mean = SentenceEncoder(other).encode(["a text"])
    put(other, "1_Pooling/config.json", {"pooling_mode_cls_token": True})
    modules = json.loads((other / "modules.json").read_text())
    put(other, "modules.json", [*modules, {"type": "sentence_transformers.models.Normalize"}])
    cls = SentenceEncoder(other).encode(["a text"])
    assert np.isclose((cls**2).sum(), 1)
    assert not np.isclose((mean**2).sum(), 1)
    own = SentenceEncoder(other, pooling="mean", normalize=False)
    assert np.array_equal(own.encode(["a text"]), mean)
    assert not np.array_equal(SentenceEncoder(other, normalize=False).encode(["a text"]), mean)
    with pytest.raises(UnsupportedModelError, match=r"pooling .*middle.*lasttoken"):
        SentenceEncoder(other, pooling="middle").encode(["a"])


def test_prompts_stand_before_the_text(other: Path) -> None:
    config = {"prompts": {"query": "query: ", "none": ""}, "default_prompt_name": None}
    put(other, "config_sentence_transformers.json", config)
    encoder = SentenceEncoder(other)
    named = encoder.encode(["x"], prompt_name="query")
    assert np.array_equal(named, encoder.encode(["query: x"]))
    assert np.array_equal(named, encoder.encode(["x"], prompt="query: "))
    default = SentenceEncoder(other, default_prompt_name="query").encode(["x"])
    assert np.array_equal(named, default)
    with pytest.raises(InvalidRequestError, match="'query', 'none'"):
        encoder.encode(["x"], prompt_name="quest")


def test_progress_is_told_and_may_end_the_work(folder: Path) -> None:
    told: list[tuple[int, int]] = []
    encoder = SentenceEncoder(folder)
    encoder.encode(["x" * 60] * 2000, progress=lambda done, whole: told.append((done, whole)))
    assert told[0] == (0, 2000)
    assert told[-1] == (2000, 2000)
    assert len(told) > 3

    def stop(done: int, whole: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encoder.encode(["x"], progress=stop)
    assert encoder.encode([]).shape == (0, 32)


@pytest.mark.parametrize(
    ("name", "content", "error", "words"),
    [
        ("config.json", {"model_type": "t5"}, UnsupportedModelError, "t5.*mpnet.*qwen3"),
        ("config.json", {"model_type": "bert"}, ModelFileError, "hidden_size"),
        ("modules.json", [{"type": "a.CNN", "path": "2_CNN"}], UnsupportedModelError, "CNN.*Dense"),
        (
            "modules.json",
            [{"type": "a.Normalize"}, {"type": "a.Dense", "path": "3_Dense"}],
            UnsupportedModelError,
            "after Normalize",
        ),
        ("modules.json", {"type": "x"}, ModelFileError, "list of objects"),
        ("modules.json", [{"type": "a.Pooling", "path": "../x"}], ModelFileError, "below"),
        ("1_Pooling/config.json", {}, ModelFileError, "pooling_mode"),
        ("sentence_bert_config.json", {"do_lower_case": True}, UnsupportedModelError, "do_lower"),
    ],
)
def test_what_is_not_known_is_refused(
    other: Path, name: str, content: object, error: type[Exception], words: str
) -> None:
    put(other, name, content)
    with pytest.raises(error, match=words):
        SentenceEncoder(other)


@pytest.mark.parametrize("family", tiny_embedders.FAMILIES)
@pytest.mark.parametrize(("device", "least"), [("reference", 0.9999999), ("cpu", 0.99999)])
def test_every_family_gives_the_vectors_of_transformers(
    family: str, device: str, least: float, tmp_path: Path
) -> None:
    encoder = SentenceEncoder(tiny_embedders.write(tmp_path, family), device=device, threads=2)
    for text, ids in zip(
        tiny_embedders.TEXTS,
        encoder._encoder.tokenizer.encode_batch(tiny_embedders.TEXTS),
        strict=True,
    ):
        assert list(ids) == tiny_embedders.ids(family, text)
    vectors = encoder.encode(tiny_embedders.TEXTS)
    golden = np.array(json.loads(tiny_embedders.GOLDENS.read_text())[family])
    assert vectors.shape == golden.shape
    assert ((vectors * golden).sum(axis=1) > least).all()


@pytest.mark.parametrize("family", ["mpnet", "modernbert", "qwen3", "gemma3_text"])
def test_no_familys_vectors_depend_on_their_company(family: str, tmp_path: Path) -> None:
    encoder = SentenceEncoder(tiny_embedders.write(tmp_path, family), threads=2)
    many = [text[i:] for text in TEXTS for i in range(20)]
    together = encoder.encode(many)
    for i in (0, 25, 70, 99):
        assert np.array_equal(encoder.encode([many[i]])[0], together[i])


def test_a_model_that_sees_both_ways_makes_vectors_alone(tmp_path: Path) -> None:
    folder = tiny_embedders.write(tmp_path, "gemma3_text")
    assert SentenceEncoder(folder).encode(["a"]).shape == (1, tiny_embedders.DENSE)
    with pytest.raises(UnsupportedModelError, match=r"bidirectional.*SentenceEncoder"):
        Engine(folder)


def test_poolings_stand_side_by_side(other: Path) -> None:
    alone = [SentenceEncoder(other, pooling=p).encode(["a text"]) for p in ("cls", "max")]
    modes = {"pooling_mode_max_tokens": True, "pooling_mode_cls_token": True}
    put(other, "1_Pooling/config.json", modes)
    encoder = SentenceEncoder(other)
    assert encoder.info["width"] == 64
    assert np.array_equal(encoder.encode(["a text"]), np.hstack(alone))


def test_a_prompt_may_be_left_out_of_the_pooling(other: Path) -> None:
    put(other, "1_Pooling/config.json", {"pooling_mode_mean_tokens": True, "include_prompt": False})
    encoder = SentenceEncoder(other)
    # Of the tokens [CLS] a b [SEP] the last alone is left.
    last = SentenceEncoder(other, pooling="lasttoken").encode(["ab"])
    assert np.array_equal(encoder.encode([""], prompt="ab"), last)
    counted = encoder.encode(["ab"], prompt="")
    assert np.array_equal(counted, SentenceEncoder(other, pooling="mean").encode(["ab"]))


def test_texts_must_be_a_list_of_str(folder: Path) -> None:
    encoder = SentenceEncoder(folder)
    with pytest.raises(InvalidRequestError, match="got a str"):
        encoder.encode("text")
    with pytest.raises(InvalidRequestError, match="int in it"):
        encoder.encode([1])  # type: ignore[list-item]


def test_a_forked_child_embeds(folder: Path) -> None:
    encoder = SentenceEncoder(folder, threads=2)
    mine = encoder.encode(TEXTS)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, b"same" if np.array_equal(encoder.encode(TEXTS), mine) else b"other")
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 10) == b"same"


def test_langchain_embeddings_are_the_encoders(folder: Path) -> None:
    embeddings = HuggingFaceEmbeddings(
        model_name=str(folder), model_kwargs={"threads": 1},
        encode_kwargs={"normalize_embeddings": True, "batch_size": 2},
        query_encode_kwargs={"prompt": "q: "},
    )  # fmt: skip
    encoder = SentenceEncoder(folder)
    documents = embeddings.embed_documents(TEXTS)
    texts = [text.replace("\n", " ") for text in TEXTS]
    assert documents == encoder.encode(texts, normalize=True).tolist()
    assert embeddings.embed_query("x") == encoder.encode(["q: x"])[0].tolist()
    assert all(isinstance(x, float) for x in documents[0])


def test_queries_and_documents_take_the_models_own_prompts_where_none_is_named(other: Path) -> None:
    prompts = {"query": "q: ", "passage": "p: ", "other": "o: "}
    put(other, "config_sentence_transformers.json", {"prompts": prompts})
    encoder = SentenceEncoder(other)

    def vector(text: str) -> list[float]:
        found: list[float] = encoder.encode([text])[0].tolist()
        return found

    own = HuggingFaceEmbeddings(model=str(other))
    assert own.embed_query("x") == vector("q: x")
    assert own.embed_documents(["x"]) == [vector("p: x")]
    named = HuggingFaceEmbeddings(model=str(other), encode_kwargs={"prompt_name": "other"})
    assert named.embed_query("x") == named.embed_documents(["x"])[0] == vector("o: x")
    none = HuggingFaceEmbeddings(model=str(other), query_encode_kwargs={"prompt": ""})
    assert none.embed_query("x") == vector("x")
    assert none.embed_documents(["x"]) == [vector("p: x")]
    assert none.encoder.encode(["x"]).dtype == np.float32


def test_embeddings_options_act_or_raise(folder: Path) -> None:
    model = str(folder)
    with pytest.raises(UnknownOptionError, match="normalize_embeddings"):
        HuggingFaceEmbeddings(model=model, encode_kwargs={"normalise_embeddings": True})
    with pytest.raises(UnknownOptionError, match="cache_folder"):
        HuggingFaceEmbeddings(model=model, cache_foldr="x")
    with pytest.raises(InvalidRequestError, match="precision must be 'float32'"):
        HuggingFaceEmbeddings(model=model, encode_kwargs={"precision": "int8"})
    with pytest.raises(InvalidRequestError, match="trust_remote_code"):
        HuggingFaceEmbeddings(model=model, model_kwargs={"trust_remote_code": True})
    with pytest.raises(InvalidRequestError, match="multi_process"):
        HuggingFaceEmbeddings(model=model, multi_process=True)
    short = HuggingFaceEmbeddings(model=model, model_kwargs={"truncate_dim": 8})
    assert len(short.embed_query("x")) == 8
    secret = HuggingFaceEmbeddings(model=model, model_kwargs={"token": "hf_secret"})
    assert "hf_secret" not in repr(secret)
