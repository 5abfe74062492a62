"""langchain-tests for models elsewhere: chat over an endpoint, and embeddings of both kinds.

Against a strict server on loopback: nothing fails there. Against a real one where
HFCORE_ENDPOINT_URL names it, HFCORE_ENDPOINT_MODEL its model, and HFCORE_ENDPOINT_SERVER the kind:
what a server is known to lack must fail there, each with its reason. What a real model understands
is its own affair: those tests may fail, and say so.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_socket
from langchain_core.embeddings import Embeddings
from langchain_core.language_models import BaseChatModel
from langchain_tests.integration_tests import ChatModelIntegrationTests, EmbeddingsIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests, EmbeddingsUnitTests
from servers.recording import Recording

from hfcore import (
    ChatHuggingFace,
    HuggingFaceEmbeddings,
    HuggingFaceEndpoint,
    HuggingFaceEndpointEmbeddings,
)
from hfcore.testing import tiny_encoder

NOWHERE = "http://127.0.0.1:9/v1"
URL, MODEL = os.environ.get("HFCORE_ENDPOINT_URL"), os.environ.get("HFCORE_ENDPOINT_MODEL")
SERVER = os.environ.get("HFCORE_ENDPOINT_SERVER", "")
_SCHEMAS = "its server knows no response_format 'json_schema'"
LACKING: dict[str, dict[str, str]] = {
    "llama-cpp-python": {  # 0.3.36, with chat_format chatml-function-calling
        "test_usage_metadata_streaming": "its server counts no tokens in streams",
        "test_tool_choice": "its server knows no tool_choice 'required', only a name",
        "test_structured_output": _SCHEMAS,
        "test_structured_output_async": _SCHEMAS,
        "test_structured_output_pydantic_2_v1": _SCHEMAS,
        "test_structured_output_optional_param": _SCHEMAS,
    },
}
NEED_SENSE = (
    "test_tool_calling", "test_tool_calling_async", "test_unicode_tool_call_integration",
    "test_agent_loop", "test_json_mode",
)  # fmt: skip


@pytest.fixture
def benchmark() -> Callable[..., Any]:
    """In place of pytest-benchmark's: that the function runs is enough."""
    return lambda function, *args, **kwargs: function(*args, **kwargs)


@pytest.fixture(scope="module")
def server() -> Iterator[Recording]:
    with Recording() as server:
        yield server


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder(tmp_path_factory.mktemp("encoder"))


class _Chat:
    """What both suites are told about the model."""

    llm: HuggingFaceEndpoint

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatHuggingFace

    @property
    def has_tool_calling(self) -> bool:
        return True

    @property
    def has_tool_choice(self) -> bool:
        return True

    @property
    def has_structured_output(self) -> bool:
        return True

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supports_anthropic_inputs(self) -> bool:
        return True


class TestUnit(_Chat, ChatModelUnitTests):
    @pytest.fixture(autouse=True)
    def _no_sockets(self) -> Iterator[None]:
        pytest_socket.disable_socket(allow_unix_socket=True)
        yield
        pytest_socket.enable_socket()

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"llm": HuggingFaceEndpoint(endpoint_url=NOWHERE, model="owner/name")}

    @property
    def init_from_env_params(self) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
        return {"HF_TOKEN": "hf_of_the_environment"}, self.chat_model_params, {}


class TestIntegration(_Chat, ChatModelIntegrationTests):
    @pytest.fixture(autouse=True)
    def _server(self, server: Recording) -> None:
        self.llm = HuggingFaceEndpoint(endpoint_url=f"{server.url}/v1", model="owner/name")

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"llm": self.llm, "max_tokens": 256, "temperature": 0}

    @property
    def model_override_value(self) -> str:
        return "owner/other"


class TestIntegrationFunctionCalling(TestIntegration):
    @property
    def structured_output_kwargs(self) -> dict[str, Any]:
        return {"method": "function_calling"}


class TestIntegrationJsonSchema(TestIntegration):
    @property
    def structured_output_kwargs(self) -> dict[str, Any]:
        return {"method": "json_schema"}


if URL and MODEL:

    @pytest.mark.timeout(600)
    class TestRealServer(_Chat, ChatModelIntegrationTests):
        @pytest.fixture(autouse=True)
        def _server(self, request: pytest.FixtureRequest) -> None:
            pytest_socket.enable_socket()
            self.llm = HuggingFaceEndpoint(endpoint_url=URL, model=MODEL)
            lacking = LACKING.get(SERVER, {}).get(request.node.originalname)
            if lacking and not (lacking == _SCHEMAS and self.structured_output_kwargs):
                request.applymarker(pytest.mark.xfail(reason=lacking))
            elif request.node.originalname in NEED_SENSE:
                reason = "what the model understands is not ours to say"
                request.applymarker(pytest.mark.xfail(reason=reason, strict=False))

        @property
        def chat_model_params(self) -> dict[str, Any]:
            return {"llm": self.llm, "max_tokens": 256, "temperature": 0}

        @property
        def supports_model_override(self) -> bool:
            return False  # it has one model

    class TestRealServerFunctionCalling(TestRealServer):
        @property
        def structured_output_kwargs(self) -> dict[str, Any]:
            return {"method": "function_calling"}

else:

    def test_a_real_server() -> None:
        pytest.skip("HFCORE_ENDPOINT_URL and HFCORE_ENDPOINT_MODEL are not set")


class _Endpoint:
    """Embeddings of a server, in both forms that servers have."""

    path = "/v1"

    @pytest.fixture(autouse=True)
    def _server(self, server: Recording) -> None:
        self.url = server.url

    @property
    def embeddings_class(self) -> type[Embeddings]:
        return HuggingFaceEndpointEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {"endpoint_url": f"{self.url}{self.path}", "model": "owner/name"}


class TestEndpointEmbeddingsUnit(_Endpoint, EmbeddingsUnitTests):
    @property
    def init_from_env_params(self) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
        token = "hf_of_the_environment"  # noqa: S105  # no secret
        return {"HUGGINGFACEHUB_API_TOKEN": token}, {"repo_id": "owner/name"}, {}


class TestEndpointEmbeddings(_Endpoint, EmbeddingsIntegrationTests):
    """Of OpenAI's form."""


class TestEndpointEmbeddingsOfTei(_Endpoint, EmbeddingsIntegrationTests):
    path = "/embed"


class _Local:
    """Embeddings of the model in this process."""

    @pytest.fixture(autouse=True)
    def _model(self, encoder: Path) -> None:
        self.encoder = encoder

    @property
    def embeddings_class(self) -> type[Embeddings]:
        return HuggingFaceEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {"model_name": str(self.encoder)}


class TestLocalEmbeddingsUnit(_Local, EmbeddingsUnitTests):
    """Nothing is opened."""


class TestLocalEmbeddings(_Local, EmbeddingsIntegrationTests):
    """On a model of noise."""
