"""HuggingFaceEndpointEmbeddings: LangChain's embeddings from a model elsewhere.

Names and arguments are those of langchain-huggingface. How a server is reached, tried again and
understood when it fails is `connection`'s affair.
"""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from langchain_core.embeddings import Embeddings
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, SecretStr

from . import connection, options
from .connection import Connection
from .errors import InvalidRequestError, RemoteResponseError
from .llms import plain_errors
from .urls import open_headers

TASK = "feature-extraction"
DEFAULT_MODEL = "sentence-transformers/all-mpnet-base-v2"
_FEATURES = ("normalize", "prompt_name", "truncate", "truncation_direction", "dimensions")
_OPENAI = ("dimensions", "encoding_format", "user")
_OF_CONNECTIONS = ("endpoint_url", "repo_id", "model", "provider", "headers", "bill_to", "timeout",
                   "max_retries", "client", "async_client")  # fmt: skip
_PLACES = ("model", "repo_id", "endpoint_url", "client", "async_client")
_NAMES = {
    "token": "huggingfacehub_api_token", "api_key": "huggingfacehub_api_token",
    "base_url": "endpoint_url", "model_name": "model",
}  # fmt: skip
_KEPT_BACK = ("huggingfacehub_api_token", "client", "async_client")


class HuggingFaceEndpointEmbeddings(BaseModel, Embeddings):
    """The vectors of texts, as a server makes them.

    Args:
        model or repo_id: "owner/name" of the hub, by itself all-mpnet-base-v2; beside endpoint_url
            model is the model's name there.
        provider: who of the Inference Providers runs it; None: the first that does.
        endpoint_url: a server of your own. Where the address ends in /v1 or /embeddings it is asked
            in OpenAI's form (vLLM, llama.cpp, text-embeddings-inference), elsewhere in that of
            feature extraction (text-embeddings-inference, Inference Endpoints).
        huggingfacehub_api_token: sent to that address, or to the hub. Without it
            HUGGINGFACEHUB_API_TOKEN, HF_TOKEN or the login saved here, to Hugging Face alone.
        model_kwargs: options of every request: normalize, prompt_name, truncate,
            truncation_direction, dimensions; in OpenAI's form dimensions, encoding_format, user.
        query_model_kwargs: the same for queries; empty: model_kwargs.
        task: "feature-extraction", the only one.
        batch_size: texts in one request.
        headers, bill_to: sent along. timeout: seconds that the server may be silent.
        max_retries: further attempts where the server is busy, ailing or out of reach.
        client, async_client: clients of huggingface_hub to use instead of one of ours; they know
            their address.

    Line ends in texts become spaces, as there. Unknown names raise UnknownOptionError, what servers
    say against a request is in the errors of `hfcore.errors` under RemoteError. Neither repr nor a
    pickle holds the token: who opens a pickle gives it by the environment.

    >>> embeddings = HuggingFaceEndpointEmbeddings(endpoint_url="http://127.0.0.1:8080/v1")
    >>> embeddings.batch_size, embeddings.task
    (32, 'feature-extraction')
    """

    client: Any = Field(default=None, repr=False, exclude=True)
    async_client: Any = Field(default=None, repr=False, exclude=True)
    model: str | None = None
    provider: str | None = None
    repo_id: str | None = None
    endpoint_url: str | None = None
    task: str | None = TASK
    model_kwargs: dict[str, Any] = Field(default_factory=dict)
    query_model_kwargs: dict[str, Any] = Field(default_factory=dict)
    huggingfacehub_api_token: SecretStr | None = Field(default=None, repr=False)
    headers: dict[str, str] = Field(default_factory=dict, repr=False, exclude=True)
    bill_to: str | None = None
    batch_size: int = Field(default=32, ge=1)
    timeout: float = Field(default=120.0, gt=0)
    max_retries: int = Field(default=2, ge=0)

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    _connection: Connection = PrivateAttr()

    def __init__(self, **kwargs: Any) -> None:
        given = _named(kwargs, tuple(type(self).model_fields))
        if not any(given.get(name) for name in _PLACES):
            given["model"] = DEFAULT_MODEL
        with plain_errors():
            super().__init__(**given)
        if self.task not in (None, TASK):
            raise InvalidRequestError(f"task must be {TASK!r}, got {self.task!r}")
        self._connection = connection.make(
            token=self.huggingfacehub_api_token,
            **{name: getattr(self, name) for name in _OF_CONNECTIONS},
        )
        self._check_clients()
        for asked in (self.model_kwargs, self.query_model_kwargs):
            self._checked(asked)

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """A vector for each text, `batch_size` of them in a request."""
        return [v for batch in self._batches(texts) for v in self._embed(batch, self.model_kwargs)]

    def embed_query(self, text: str) -> list[float]:
        """The vector of a question."""
        return self._embed([_line(text)], self.query_model_kwargs or self.model_kwargs)[0]

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        """As `embed_documents`, without a thread."""
        vectors: list[list[float]] = []
        for batch in self._batches(texts):
            vectors += await self._aembed(batch, self.model_kwargs)
        return vectors

    async def aembed_query(self, text: str) -> list[float]:
        """As `embed_query`, without a thread."""
        return (await self._aembed([_line(text)], self.query_model_kwargs or self.model_kwargs))[0]

    def _check_clients(self) -> None:
        """A client's model is its own affair: another name beside it would do nothing."""
        name = self.model or self.repo_id or self.endpoint_url
        for client in (self.client, self.async_client):
            theirs = getattr(client, "model", None)
            if client is not None and name is not None and theirs != name:
                raise InvalidRequestError(f"{name} was given, but the client asks for {theirs}")

    def __reduce__(self) -> Any:
        given = {name: getattr(self, name) for name in self.model_fields_set}
        for name in _KEPT_BACK:
            given.pop(name, None)
        if "headers" in given:
            given["headers"] = open_headers(self.headers)
        return _remade, (type(self), given)

    def _batches(self, texts: Sequence[str]) -> Iterator[list[str]]:
        for start in range(0, len(texts), self.batch_size):
            yield [_line(text) for text in texts[start : start + self.batch_size]]

    def _embed(self, texts: list[str], asked: Mapping[str, Any]) -> list[list[float]]:
        wishes = self._checked(asked)
        where = self._openai()
        if where is not None:
            return _read(self._connection.post_json(where, self._body(texts, wishes)), len(texts))
        found = self._connection.call(lambda client: client.feature_extraction(texts, **wishes))
        return _vectors(found, len(texts))

    async def _aembed(self, texts: list[str], asked: Mapping[str, Any]) -> list[list[float]]:
        wishes = self._checked(asked)
        where = self._openai()
        if where is not None:
            answer = await self._connection.apost_json(where, self._body(texts, wishes))
            return _read(answer, len(texts))
        found = await self._connection.acall(
            lambda client: client.feature_extraction(texts, **wishes)
        )
        return _vectors(found, len(texts))

    def _openai(self) -> str | None:
        """Where OpenAI's form is understood; None: nowhere."""
        url = self._connection.url
        if url is None or self.client is not None or self.async_client is not None:
            return None
        parts = urlsplit(url)
        path = parts.path.rstrip("/")
        if path.endswith("/v1"):
            path += "/embeddings"
        return parts._replace(path=path).geturl() if path.endswith("/embeddings") else None

    def _body(self, texts: list[str], wishes: Mapping[str, Any]) -> dict[str, Any]:
        return {"model": self._connection.model or "dummy", "input": texts, **wishes}

    def _checked(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Options that this kind of server has."""
        given = {name: value for name, value in asked.items() if value is not None}
        kind = _OPENAI if self._openai() else _FEATURES
        for name in given:
            if name in kind:
                continue
            if name in (*_OPENAI, *_FEATURES):
                forms = ("OpenAI's form", "feature extraction")
                form, other = forms if self._openai() else reversed(forms)
                raise InvalidRequestError(f"{name} belongs to {other}, and {form} is spoken here")
            raise options.unknown(name, kind)
        return given


def _named(kwargs: Mapping[str, Any], known: tuple[str, ...]) -> dict[str, Any]:
    """Constructor arguments by their own names; an address given as a model is an address."""
    given: dict[str, Any] = {}
    for name, value in kwargs.items():
        field = _NAMES.get(name, name)
        if field not in known:
            raise options.unknown(name, (*known, *_NAMES))
        if given.get(field) is not None and given[field] != value:
            raise InvalidRequestError(f"{field} is given twice, with different values")
        given[field] = value
    for name in ("model", "repo_id"):
        if isinstance(given.get(name), str) and given[name].startswith(("http://", "https://")):
            url = given.pop(name)
            if given.setdefault("endpoint_url", url) != url:
                raise InvalidRequestError(f"{name} and endpoint_url are two addresses; give one")
    defaults = ("model_kwargs", "query_model_kwargs", "headers")
    return {n: v for n, v in given.items() if v is not None or n not in defaults}


def _line(text: str) -> str:
    if not isinstance(text, str):
        raise InvalidRequestError(f"a text must be a str, got {type(text).__name__}")
    return text.replace("\n", " ")


def _read(answer: Any, count: int) -> list[list[float]]:
    """The vectors of an answer in OpenAI's form, in the order of the texts."""
    try:
        rows = sorted(answer["data"], key=lambda row: int(row["index"]))
        return _vectors([_decoded(row["embedding"]) for row in rows], count)
    except (KeyError, TypeError, ValueError, binascii.Error, struct.error) as error:
        raise RemoteResponseError(
            f"expected OpenAI's list of embeddings, got {answer!r:.200}"
        ) from error


def _decoded(embedding: Any) -> Any:
    """Numbers, or f32 in base64."""
    if not isinstance(embedding, str):
        return embedding
    data = base64.b64decode(embedding, validate=True)
    return list(struct.unpack(f"<{len(data) // 4}f", data))


def _vectors(found: Any, count: int) -> list[list[float]]:
    """As many vectors as there were texts, all of one length."""
    rows = found.tolist() if hasattr(found, "tolist") else found
    vectors = isinstance(rows, list) and all(
        isinstance(row, list) and row and all(_is_number(n) for n in row) for row in rows
    )
    if not vectors or len(rows) != count or len({len(row) for row in rows}) > 1:
        raise RemoteResponseError(
            f"expected {count} vectors, one for each text, got {_described(rows)}"
        )
    return [[float(number) for number in row] for row in rows]


def _described(rows: Any) -> str:
    """What came instead of vectors."""
    try:
        _ = rows[0][0][0]
    except (TypeError, KeyError, IndexError):
        return f"{rows!r:.100}"
    return "one for each token: the server does not pool them"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _remade(kind: type[HuggingFaceEndpointEmbeddings], given: dict[str, Any]) -> Any:
    return kind(**given)
