"""langchain-tests for the local model: unit and integration, on the tiny model and on SmolLM2.

Tools and structured output come later. The tests that need them are the only expected failures:
they run, and must fail with NotImplementedError.
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

NEEDS_TOOLS = {
    "test_bind_tool_pydantic", "test_tool_calling", "test_tool_calling_async",
    "test_bind_runnables_as_tools", "test_tool_message_histories_string_content",
    "test_tool_message_histories_list_content", "test_tool_choice",
    "test_tool_calling_with_no_arguments", "test_tool_message_error_status",
    "test_structured_few_shot_examples", "test_anthropic_inputs", "test_agent_loop",
    "test_unicode_tool_call_integration",
}  # fmt: skip
NEEDS_SCHEMAS = {
    "test_with_structured_output", "test_structured_output", "test_structured_output_async",
    "test_structured_output_pydantic_2_v1", "test_structured_output_optional_param",
    "test_json_mode",
}  # fmt: skip


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
        name = request.node.originalname
        missing = {"tools": name in NEEDS_TOOLS, "structured output": name in NEEDS_SCHEMAS}
        for what in (what for what, needed in missing.items() if needed):
            request.applymarker(
                pytest.mark.xfail(reason=f"not supported yet: {what}", raises=NotImplementedError)
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
        return {"model": str(self.path)}


class TestIntegration(_Local, ChatModelIntegrationTests):
    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": str(self.path), "max_tokens": 32}

    @property
    def model_override_value(self) -> str:
        return str(tiny_model(self.path.parent, name="other", seed=1))


class TestIntegrationOnRealModel(TestIntegration):
    @pytest.fixture(autouse=True)
    def _real_model(self, _model_and_expectations: None, smollm2: Path) -> None:
        self.path = smollm2

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": str(self.path), "max_tokens": 32, "temperature": 0, "context_size": 1024}

    @property
    def supports_model_override(self) -> bool:
        return False
