"""JSON schemas of functions, and functions as tools of a chat template."""

from __future__ import annotations

import enum
import json
from collections.abc import Callable
from typing import Any, Literal, Optional, Union

import pytest

from hfcore import ChatTemplate
from hfcore.errors import InvalidRequestError
from hfcore.schemas import get_json_schema

MESSAGES = [{"role": "user", "content": "hi"}]


class Unit(enum.Enum):
    CELSIUS = "c"
    KELVIN = 1


def everything(
    city: str,
    days: list[int],
    unit: Unit,
    pair: tuple[int, str],
    maybe: Optional[float] = None,  # noqa: UP045 (both spellings)
    either: Union[int, str] = 0,  # noqa: UP007
    nested: list[str] | int | None = None,
    table: dict[str, bool] | None = None,
    mode: Literal["a", 2, None] = "a",
    anything: Any = None,
    bare: list = [],  # type: ignore[type-arg]  # noqa: B006
) -> list[str]:
    """Do everything.

    At once, over
    several lines.

    Args:
        city: Where (choices: ["Rome ", "Oslo"])
        days: Which days,
            counted from now
        unit: Unit
        pair: Two things

        maybe: Maybe: or not
        either: Either
        nested: Nested
        table: A table
        mode: The mode (choices: [1])
        anything: Anything
        bare: Bare

    Returns:
        A list, of
        words

    Raises:
        ValueError: Never
    """
    raise ValueError


def test_a_schema_follows_hints_and_docstring() -> None:
    made = get_json_schema(everything)
    assert made["type"] == "function"
    function = made["function"]
    assert function["name"] == "everything"
    assert function["description"] == "Do everything.\n\nAt once, over\nseveral lines."
    assert function["return"] == {
        "type": "array",
        "items": {"type": "string"},
        "description": "A list, of\n    words",
    }
    assert function["parameters"]["required"] == ["city", "days", "unit", "pair"]
    assert function["parameters"]["properties"] == {
        "city": {"type": "string", "enum": ["Rome", "Oslo"], "description": "Where"},
        "days": {
            "type": "array",
            "items": {"type": "integer"},
            "description": "Which days, counted from now",
        },
        "unit": {"type": ["string", "integer"], "enum": ["c", 1], "description": "Unit"},
        "pair": {
            "type": "array",
            "prefixItems": [{"type": "integer"}, {"type": "string"}],
            "description": "Two things",
        },
        "maybe": {"type": "number", "nullable": True, "description": "Maybe: or not"},
        "either": {"type": ["integer", "string"], "description": "Either"},
        "nested": {
            "anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "integer"}],
            "nullable": True,
            "description": "Nested",
        },
        "table": {
            "type": "object",
            "additionalProperties": {"type": "boolean"},
            "nullable": True,
            "description": "A table",
        },
        "mode": {"type": ["string", "integer", "null"], "enum": [1], "description": "The mode"},
        "anything": {"description": "Anything"},
        "bare": {"type": "array", "description": "Bare"},
    }


def test_a_methods_receiver_is_no_argument() -> None:
    class Shop:
        def buy(self, what: str) -> None:
            """Buy.

            Args:
                what: What
            """

    for method in (Shop().buy, Shop.buy):
        made = get_json_schema(method)["function"]
        assert list(made["parameters"]["properties"]) == ["what"]
        assert made["return"] == {"type": "null"}


def no_docstring(a: int) -> None: ...


def no_hint(a) -> None:  # type: ignore[no-untyped-def]
    """Do.

    Args:
        a: A
    """


def no_description(a: int) -> None:
    """Do."""


def odd_hint(a: Callable[[], int]) -> None:
    """Do.

    Args:
        a: A
    """


def one_tuple(a: tuple[int]) -> None:
    """Do.

    Args:
        a: A
    """


def bad_choices(a: int) -> None:
    """Do.

    Args:
        a: A (choices: [1)
    """


@pytest.mark.parametrize(
    ("function", "complaint"),
    [
        (no_docstring, "wants a docstring"),
        (no_hint, "argument 'a' of no_hint wants a type hint"),
        (no_description, "must describe argument 'a'"),
        (odd_hint, "argument 'a' of odd_hint: no JSON schema"),
        (one_tuple, "two types at least"),
        (bad_choices, "must be a JSON list"),
    ],
)
def test_what_has_no_schema_is_refused(function: Callable[..., Any], complaint: str) -> None:
    with pytest.raises(InvalidRequestError, match=complaint):
        get_json_schema(function)


def test_a_template_takes_functions_as_tools() -> None:
    def add(a: int, b: int) -> int:
        """Add.

        Args:
            a: One
            b: Other
        """
        return a + b

    text = ChatTemplate("{{ tools | tojson }}").render(MESSAGES, tools=[add, {"type": "x"}])
    assert json.loads(text) == [get_json_schema(add), {"type": "x"}]
