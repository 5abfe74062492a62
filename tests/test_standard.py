"""langchain-tests for the local model: unit and integration, on the tiny model and on SmolLM2.

Without any socket. The only failures that may be: tests of what a model understands, each named
with its reason for each model, and strictly: one that passes must leave the list. Which do is the
same on every machine: decoding is greedy, and a row's bits depend on neither threads nor CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import pytest_socket
from langchain_core.language_models import BaseChatModel
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

from hfcore import ChatHuggingFace
from hfcore.testing import tiny_model

NOISE = "weights of noise"
BEYOND_NOISE = {
    "test_tool_calling": f"{NOISE} call the tool, with a number that nobody said",
    "test_tool_calling_async": f"{NOISE} call the tool, with a number that nobody said",
    "test_unicode_tool_call_integration": f"{NOISE} call the tool, with a text that nobody said",
    "test_agent_loop": f"{NOISE} call no tool unless they must",
    "test_json_mode": f"{NOISE} write a JSON object, but know no jokes",
}
BEYOND_SMOLLM2 = {
    "test_json_mode": "SmolLM2-135M lacks the sense for both keys: it writes a JSON object of one",
    "test_agent_loop": "SmolLM2-135M lacks the sense to call a tool that it may call or not",
}


@pytest.fixture(autouse=True)
def _no_sockets() -> Iterator[None]:
    """No test opens one, but for the pair by which an event loop wakes itself."""
    pytest_socket.disable_socket(allow_unix_socket=True)
    yield
    pytest_socket.enable_socket()


@pytest.fixture
def benchmark() -> Callable[..., Any]:
    """In place of pytest-benchmark's: that the function runs is enough."""
    return lambda function, *args, **kwargs: function(*args, **kwargs)


class _Local:
    """What both suites are told about the model."""

    path: Path
    beyond: ClassVar[Mapping[str, str]] = {}
    """The tests that this model must fail, and why."""

    @pytest.fixture(autouse=True)
    def _model_and_expectations(self, request: pytest.FixtureRequest, tiny: Path) -> None:
        self.path = tiny
        self.other = tiny_model(tiny.parent, name="other", seed=1)
        reason = self.beyond.get(request.node.originalname)
        if reason:
            request.applymarker(pytest.mark.xfail(reason=reason))  # strict, as all are here

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


class TestUnit(_Local, ChatModelUnitTests):
    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "owner/name"}  # nothing is opened here, and a snapshot names it


class TestIntegration(_Local, ChatModelIntegrationTests):
    beyond = BEYOND_NOISE

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": str(self.path), "max_tokens": 256, "temperature": 0, "context_size": 1024}

    @property
    def model_override_value(self) -> str:
        return str(self.other)


@pytest.mark.timeout(400)  # several answers of up to 256 tokens took 90 s on a busy machine
class TestIntegrationOnRealModel(TestIntegration):
    beyond = BEYOND_SMOLLM2

    @pytest.fixture(autouse=True)
    def _real_model(self, _model_and_expectations: None, smollm2: Path) -> None:
        self.path = smollm2


class TestRealModelFunctionCalling(TestIntegrationOnRealModel):
    @property
    def structured_output_kwargs(self) -> dict[str, Any]:
        return {"method": "function_calling"}


class TestRealModelJsonSchema(TestIntegrationOnRealModel):
    @property
    def structured_output_kwargs(self) -> dict[str, Any]:
        return {"method": "json_schema"}
