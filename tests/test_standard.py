"""langchain-tests for the local model: unit and integration, on the tiny model and on SmolLM2.

The only failures that may be: tests of what a model understands.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

from hfcore import ChatHuggingFace
from hfcore.testing import tiny_model

NEEDS_SENSE = {
    "test_tool_calling", "test_tool_calling_async", "test_json_mode", "test_agent_loop",
    "test_unicode_tool_call_integration",
}  # fmt: skip
"""Tests of what a model understands. Weights of noise understand nothing, SmolLM2-135M little."""


@pytest.fixture
def benchmark() -> Callable[..., Any]:
    """In place of pytest-benchmark's: that the function runs is enough."""
    return lambda function, *args, **kwargs: function(*args, **kwargs)


class _Local:
    """What both suites are told about the model."""

    path: Path

    @pytest.fixture(autouse=True)
    def _model_and_expectations(self, request: pytest.FixtureRequest, tiny: Path) -> None:
        self.path = tiny
        if request.node.originalname in NEEDS_SENSE:
            request.applymarker(
                pytest.mark.xfail(reason="the model lacks the sense for it", strict=False)
            )

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
    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": str(self.path), "max_tokens": 256}

    @property
    def model_override_value(self) -> str:
        return str(tiny_model(self.path.parent, name="other", seed=1))


class TestIntegrationOnRealModel(TestIntegration):
    @pytest.fixture(autouse=True)
    def _real_model(self, _model_and_expectations: None, smollm2: Path) -> None:
        self.path = smollm2

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": str(self.path), "max_tokens": 256, "temperature": 0, "context_size": 1024}

    @property
    def supports_model_override(self) -> bool:
        return False


class TestRealModelFunctionCalling(TestIntegrationOnRealModel):
    @property
    def structured_output_kwargs(self) -> dict[str, Any]:
        return {"method": "function_calling"}


class TestRealModelJsonSchema(TestIntegrationOnRealModel):
    @property
    def structured_output_kwargs(self) -> dict[str, Any]:
        return {"method": "json_schema"}
