"""Embeddings of a server: what it is sent in both forms, what is made of its answers, no token."""

from __future__ import annotations

import base64
import copy
import json
import pickle
import struct
from collections.abc import Iterator
from typing import Any

import pytest
import trio
from huggingface_hub import constants
from huggingface_hub.inference._providers import PROVIDERS, hf_inference
from servers import faults
from servers.recording import Recording, vector

from hfcore import HuggingFaceEndpointEmbeddings as Embeddings
from hfcore import connection
from hfcore.errors import (
    InvalidRequestError,
    RemoteAuthenticationError,
    RemoteConnectionError,
    RemoteRequestError,
    RemoteResponseError,
    UnknownOptionError,
)

TOKEN = "hf_a_secret_of_these_tests"  # noqa: S105  # no secret
PATHS = ("/v1", "/v1/embeddings", "/embed", "/")


@pytest.fixture(autouse=True)
def _no_token_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "HUGGINGFACEHUB_API_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server() -> Iterator[Recording]:
    with Recording(serves="features") as server:
        yield server


def made(server: Recording, path: str = "/v1", **more: Any) -> Embeddings:
    return Embeddings(endpoint_url=server.url + path, **more)


@pytest.mark.parametrize("path", PATHS)
async def test_every_text_has_its_vector_in_either_form(server: Recording, path: str) -> None:
    embeddings = made(server, path)
    texts = [f"text {n}" for n in range(5)]
    assert embeddings.embed_documents(texts) == [vector(text) for text in texts]
    assert embeddings.embed_query("one") == vector("one")
    assert await embeddings.aembed_documents(texts) == [vector(text) for text in texts]
    assert await embeddings.aembed_query("one") == vector("one")


def test_trio_does_as_well(server: Recording) -> None:
    for path in PATHS:
        assert trio.run(made(server, path).aembed_query, "one") == vector("one")


def test_the_body_in_openais_form(server: Recording) -> None:
    options = {"dimensions": 4, "user": "me"}
    found = made(server, model="owner/name", model_kwargs=options).embed_documents(["a\nb", "c"])
    assert server.bodies == [
        {"model": "owner/name", "input": ["a b", "c"], "dimensions": 4, "user": "me"}
    ]
    assert server.last.path == "/v1/embeddings"
    assert [len(v) for v in found] == [4, 4]


def test_the_body_in_the_form_of_feature_extraction(server: Recording) -> None:
    options = {"normalize": True, "truncate": False, "truncation_direction": "left"}
    made(server, "/embed", model_kwargs=options).embed_documents(["a\nb"])
    assert server.bodies == [{"inputs": ["a b"], **options}]
    assert server.last.path == "/embed"


@pytest.mark.parametrize("path", ["/v1", "/embed"])
async def test_texts_go_in_batches_and_come_back_in_order(server: Recording, path: str) -> None:
    server.max_batch = 3
    embeddings, texts = made(server, path, batch_size=3), [str(n) for n in range(7)]
    expected = [vector(text) for text in texts]
    assert embeddings.embed_documents(texts) == expected
    assert await embeddings.aembed_documents(texts) == expected
    name = "input" if path == "/v1" else "inputs"
    assert [len(body[name]) for body in server.bodies] == [3, 3, 1] * 2


@pytest.mark.parametrize("path", ["/v1", "/embed"])
def test_no_texts_are_no_request(server: Recording, path: str) -> None:
    assert made(server, path).embed_documents([]) == []
    assert server.requests == []


def test_queries_have_options_of_their_own(server: Recording) -> None:
    embeddings = made(
        server, "/embed", model_kwargs={"prompt_name": "passage"},
        query_model_kwargs={"prompt_name": "query"},
    )  # fmt: skip
    assert embeddings.embed_query("q") == vector("query: q")
    assert embeddings.embed_documents(["d"]) == [vector("passage: d")]
    assert made(server, "/embed", model_kwargs={"prompt_name": "all"}).embed_query("q") == vector(
        "all: q"
    )


def test_a_server_may_answer_in_any_order(server: Recording) -> None:
    rows = [{"index": n, "embedding": [float(n)]} for n in (2, 0, 1)]
    server.script.append(faults.body({"data": rows}))
    assert made(server).embed_documents(["a", "b", "c"]) == [[0.0], [1.0], [2.0]]


def test_base64_is_read(server: Recording) -> None:
    text = base64.b64encode(struct.pack("<3f", 0.5, -1, 2)).decode()
    server.script.append(faults.body({"data": [{"index": 0, "embedding": text}]}))
    embeddings = made(server, model_kwargs={"encoding_format": "base64"})
    assert embeddings.embed_query("a") == [0.5, -1.0, 2.0]
    assert server.bodies[0]["encoding_format"] == "base64"


@pytest.mark.parametrize(
    ("path", "answer"),
    [
        ("/v1", {"data": [{"index": 0, "embedding": [0.5]}]}),
        ("/v1", {"data": [{"index": 0, "embedding": [0.5]}, {"index": 1, "embedding": [1, 2]}]}),
        ("/v1", {"data": [{"index": 0, "embedding": "?"}, {"index": 1, "embedding": "?"}]}),
        ("/v1", {"data": [{"embedding": [1]}, {"embedding": [2]}]}),
        ("/v1", {"error": "no"}),
        ("/v1", [[1], [2]]),
        ("/v1", "vectors"),
        ("/v1", {"data": [{"index": 0, "embedding": [None]}, {"index": 1, "embedding": [2]}]}),
        ("/embed", [[0.5]]),
        ("/embed", [[[0.5], [0.5]], [[0.5], [0.5]]]),
        ("/embed", [[0.5], [0.5, 0.5]]),
        ("/embed", {"error": "no"}),
        ("/embed", b"<html>"),
    ],
)
async def test_what_is_no_vector_for_each_text_is_an_error(
    server: Recording, path: str, answer: Any
) -> None:
    server.script.extend([faults.body(answer)] * 2)
    embeddings = made(server, path, max_retries=0)
    with pytest.raises(RemoteResponseError):
        embeddings.embed_documents(["a", "b"])
    with pytest.raises(RemoteResponseError):
        await embeddings.aembed_documents(["a", "b"])


@pytest.mark.parametrize("path", ["/v1", "/embed"])
def test_vectors_of_tokens_are_told_from_those_of_texts(server: Recording, path: str) -> None:
    tokens = [[0.5, 1], [1, 2]]
    answer: Any = {"data": [{"index": 0, "embedding": tokens}]} if path == "/v1" else [tokens]
    server.script.append(faults.body(answer))
    with pytest.raises(RemoteResponseError, match="the server does not pool"):
        made(server, path).embed_query("a")


@pytest.mark.parametrize("path", ["/v1", "/embed"])
async def test_a_token_goes_to_the_address_it_was_given_for(server: Recording, path: str) -> None:
    embeddings = made(server, path, huggingfacehub_api_token=TOKEN)
    embeddings.embed_query("a")
    await embeddings.aembed_query("a")
    assert [request.token for request in server.asked] == [TOKEN, TOKEN]


@pytest.mark.parametrize("path", ["/v1", "/embed"])
@pytest.mark.parametrize("name", ["HF_TOKEN", "HUGGINGFACEHUB_API_TOKEN"])
async def test_a_token_of_the_environment_stays_at_home(
    server: Recording, path: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, TOKEN)
    embeddings = made(server, path)
    embeddings.embed_query("a")
    await embeddings.aembed_query("a")
    assert not any(request.holds(TOKEN) for request in server.requests)


@pytest.mark.parametrize("path", ["/v1", "/embed"])
async def test_a_redirect_is_not_followed_with_the_token(server: Recording, path: str) -> None:
    with Recording(serves="features") as other:
        server.script.extend([faults.redirect(other.url + "/embed")] * 2)
        embeddings = made(
            server, path, huggingfacehub_api_token=TOKEN, headers={"X-Key": TOKEN}, max_retries=0
        )
        with pytest.raises(RemoteResponseError):
            embeddings.embed_query("a")
        with pytest.raises(RemoteResponseError):
            await embeddings.aembed_query("a")
        assert not any(request.holds(TOKEN) for request in other.requests)


@pytest.mark.parametrize("path", ["/v1", "/embed"])
async def test_headers_and_the_payer_are_sent_along(server: Recording, path: str) -> None:
    embeddings = made(server, path, headers={"X-Own": "mine"}, bill_to="team")
    embeddings.embed_query("a")
    await embeddings.aembed_query("a")
    for request in server.asked:
        assert (request.headers["x-own"], request.headers["x-hf-bill-to"]) == ("mine", "team")


@pytest.mark.parametrize("path", ["/v1", "/embed"])
async def test_a_busy_server_is_asked_again(server: Recording, path: str) -> None:
    server.script.extend([faults.too_many(), faults.too_many()])
    assert made(server, path).embed_query("a") == vector("a")
    server.script.extend([faults.too_many()])
    assert await made(server, path).aembed_query("a") == vector("a")
    assert len(server.asked) == 5


async def test_what_the_server_says_is_in_the_error(server: Recording) -> None:
    server.token, server.max_batch = TOKEN, 1
    with pytest.raises(RemoteAuthenticationError, match="Invalid username"):
        await made(server).aembed_query("a")
    with pytest.raises(RemoteRequestError, match="maximum allowed batch size 1") as caught:
        made(server, "/embed", token=TOKEN).embed_documents(["a", "b"])
    assert (caught.value.status, caught.value.request_id) == (422, "rec-2")
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "kind", "words"),
    [
        ({"batchsize": 3}, UnknownOptionError, "did you mean 'batch_size'"),
        ({"batch_size": 0}, InvalidRequestError, "batch_size"),
        ({"timeout": 0}, InvalidRequestError, "timeout"),
        ({"max_retries": -1}, InvalidRequestError, "max_retries"),
        ({"task": "translation"}, InvalidRequestError, "feature-extraction"),
        ({"model_kwargs": {"dimension": 3}}, UnknownOptionError, "dimensions"),
        ({"model_kwargs": {"normalize": True}}, InvalidRequestError, "belongs to feature"),
        ({"query_model_kwargs": {"truncate": True}}, InvalidRequestError, "OpenAI's form is"),
        ({"model": "http://127.0.0.1:9/v1"}, InvalidRequestError, "two addresses"),
        ({"token": "a", "api_key": "b"}, InvalidRequestError, "given twice"),
    ],
)
def test_arguments_are_checked_at_once(given: dict[str, Any], kind: Any, words: str) -> None:
    with pytest.raises(kind, match=words):
        Embeddings(endpoint_url="http://127.0.0.1:8/v1", **given)


def test_an_option_of_the_other_form_is_named_as_such() -> None:
    with pytest.raises(InvalidRequestError, match="belongs to OpenAI's form"):
        Embeddings(endpoint_url="http://127.0.0.1:8/embed", model_kwargs={"user": "me"})


def test_an_address_may_be_given_as_the_model(server: Recording) -> None:
    assert Embeddings(model=f"{server.url}/embed").embed_query("a") == vector("a")


@pytest.mark.parametrize("name", ["repo_id", "model"])
async def test_a_repository_is_asked_for_at_hugging_face(
    server: Recording, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = PROVIDERS["hf-inference"]["feature-extraction"]
    monkeypatch.setattr(task, "base_url", server.url)
    monkeypatch.setattr(hf_inference, "_check_supported_task", lambda *_: None)
    embeddings = Embeddings(**{name: "owner/name"}, provider="hf-inference", token=TOKEN)
    assert embeddings.embed_query("a") == await embeddings.aembed_query("a") == vector("a")
    for request in server.asked:
        assert request.path == "/models/owner/name/pipeline/feature-extraction"
        assert (request.json, request.token) == ({"inputs": ["a"]}, TOKEN)


def test_a_repository_needs_a_token_and_a_way_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "saved_token", lambda: None)
    with pytest.raises(RemoteAuthenticationError, match="HF_TOKEN"):
        Embeddings().embed_query("a")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RemoteConnectionError, match="HF_HUB_OFFLINE"):
        Embeddings(token=TOKEN).embed_query("a")


@pytest.mark.parametrize("path", ["/v1", "/embed"])
def test_offline_switches_do_not_reach_loopback(
    server: Recording, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert made(server, path).embed_query("a") == vector("a")


def test_a_text_that_is_none_is_refused(server: Recording) -> None:
    wrong: Any = [3]
    with pytest.raises(InvalidRequestError, match="must be a str, got int"):
        made(server).embed_documents(wrong)


async def test_a_client_of_the_users_is_used() -> None:
    class Client:
        token = None
        model = "own"

        def feature_extraction(self, texts: list[str], **options: Any) -> list[list[float]]:
            return [[float(len(text)), float(options["dimensions"])] for text in texts]

    class AsyncClient:
        token = None
        model = "own"

        async def feature_extraction(self, *args: Any, **options: Any) -> list[list[float]]:
            return Client().feature_extraction(*args, **options)

    options = {"dimensions": 2}
    embeddings = Embeddings(client=Client(), async_client=AsyncClient(), model_kwargs=options)
    assert embeddings.embed_query("abc") == [3.0, 2.0]
    assert await embeddings.aembed_query("abcd") == [4.0, 2.0]


def test_a_clients_model_is_its_own() -> None:
    class Client:
        model = "owner/theirs"

    assert Embeddings(client=Client(), model="owner/theirs").model == "owner/theirs"
    with pytest.raises(InvalidRequestError, match="the client asks for owner/theirs"):
        Embeddings(client=Client(), repo_id="owner/name")


def test_no_form_of_the_object_holds_the_token(server: Recording) -> None:
    embeddings = made(
        server, huggingfacehub_api_token=TOKEN, headers={"Authorization": f"Key {TOKEN}"}
    )
    forms = [repr(embeddings), str(embeddings), repr(embeddings.model_dump()),
             embeddings.model_dump_json(), repr(embeddings._connection),
             pickle.dumps(embeddings).decode("latin-1")]  # fmt: skip
    assert not [form for form in forms if TOKEN in form]


def test_a_pickle_works_and_a_copy_keeps_the_token(server: Recording) -> None:
    embeddings = made(server, token=TOKEN, headers={"X-Own": "mine"}, batch_size=2)
    again = pickle.loads(pickle.dumps(embeddings))
    assert again.embed_query("a") == vector("a")
    assert again.batch_size == 2
    assert server.last.token is None
    copy.deepcopy(embeddings).embed_query("a")
    assert server.last.token == TOKEN
    assert json.loads(server.last.body)["input"] == ["a"]
