"""Jinja2 set up as transformers sets it up: what templates are compared with."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

NOW = datetime(2026, 3, 14, 15, 9, 26)


class Thrown(jinja2.TemplateError):
    """What the template raised itself, by raise_exception."""


class Spans(Extension):
    """`{% generation %}`: notes where the block's text lies in what was rendered."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.blocks: list[str] = []
        self.spans: list[tuple[int, int]] = []
        environment.extend(spans=self)

    def parse(self, parser: Parser) -> nodes.Node:
        """A call block around the body, so that the caller's text can be measured."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_note"), [], [], body).set_lineno(line)

    def _note(self, caller: Callable[[], str]) -> str:
        text = caller()
        start = sum(map(len, self.blocks))
        self.spans.append((start, start + len(text)))
        return text


class PlainDict:
    """`dict` without attributes to break out by."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        """dict.fromkeys."""
        return dict.fromkeys(*args, **kwargs)


class ShyNamespace(Namespace):
    """`namespace` that takes no name with an underscore in front."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, rest = args[0], args[1:]
        given = dict(*rest, **kwargs)
        for name in given:
            ShyNamespace._check(name)
        Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        ShyNamespace._check(name)
        Namespace.__setitem__(self, name, value)

    @staticmethod
    def _check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"underscore-prefixed attribute {name!r}")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise(message: Any) -> None:
    raise Thrown(message)


def environment() -> jinja2.Environment:
    """A fresh environment; its `spans` notes generation blocks."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Spans, loopcontrols]
    )
    made.filters["tojson"] = _to_json
    made.globals["raise_exception"] = _raise
    made.globals["strftime_now"] = NOW.strftime
    made.globals["dict"] = PlainDict()
    made.globals["namespace"] = ShyNamespace
    return made


def render(source: str, variables: Mapping[str, Any]) -> tuple[str, list[tuple[int, int]]]:
    """The text, and the spans of its generation blocks in code points."""
    made = environment()
    notes: Spans = made.spans  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        # Of escapes that Python does not know, which Jinja lets pass.
        warnings.simplefilter("ignore", DeprecationWarning)
        template = made.from_string(source)
    for block in template.generate(**variables):
        notes.blocks.append(block)
    return "".join(notes.blocks), notes.spans
