"""JSON schemas of Python functions, from hints and docstrings, as transformers makes them."""

from __future__ import annotations

import enum
import inspect
import json
import re
import types
from collections.abc import Callable, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .errors import InvalidRequestError

_PLAIN: dict[Any, dict[str, Any]] = {
    int: {"type": "integer"},
    float: {"type": "number"},
    str: {"type": "string"},
    bool: {"type": "boolean"},
    type(None): {"type": "null"},
    list: {"type": "array"},
    tuple: {"type": "array"},
    dict: {"type": "object"},
    Any: {},
}
_SCALARS = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}

_SUMMARY = re.compile(r"^(.*?)[\n\s]*(?:Args:|Returns:|Raises:|\Z)", re.DOTALL)
_ARGS = re.compile(r"\n\s*Args:\n(.*?)[\n\s]*(?:Returns:|Raises:|\Z)", re.DOTALL)
_RETURNS = re.compile(r"\n\s*Returns:\n\s*(.*?)[\n\s]*(?:Raises:|\Z)", re.DOTALL)
_ARG = re.compile(
    # Its indentation, its name, its description; up to the next name that is not indented deeper.
    r"(?:^|\n)([ \t]*)(\w+):\s*(.*?)\s*(?=\n(?!\1[ \t])[ \t]*\w+:|\Z)",
    re.DOTALL,
)
_CHOICES = re.compile(r"\(choices:\s*(.*?)\)\s*$", re.IGNORECASE)


def get_json_schema(function: Callable[..., Any]) -> dict[str, Any]:
    '''The tool definition of a function: its name, its docstring, its parameters' JSON schema.

    Every parameter needs a type hint and a line under `Args:`; one without a default is required.
    A line may end with `(choices: ["a", "b"])`, which become an enum. What the function returns
    stands beside the parameters, where hint and docstring say so. `self` and `cls` are left out.

    Raises:
        InvalidRequestError: A parameter without a hint or a description, or with a hint that JSON
            has no schema for; a function without a docstring.

    >>> def weather(city: str, days: int = 1) -> str:
    ...     """Tell the weather.
    ...
    ...     Args:
    ...         city: Where
    ...         days: For how long
    ...     """
    >>> made = get_json_schema(weather)["function"]["parameters"]
    >>> made["properties"]["days"], made["required"]
    ({'type': 'integer', 'description': 'For how long'}, ['city'])
    '''
    name = getattr(function, "__name__", "operation")
    doc = inspect.getdoc(function)
    if not doc:
        raise InvalidRequestError(f"a schema of {name} wants a docstring, got none")
    summary, described, returns = _read_docstring(doc.strip())
    parameters = _parameters(function, name)
    returned = parameters["properties"].pop("return", None)
    for argument, schema in parameters["properties"].items():
        if argument not in described:
            raise InvalidRequestError(
                f"the docstring of {name} must describe argument {argument!r}, got none"
            )
        _describe(schema, described[argument], f"{name}.{argument}")
    made = {"name": name, "description": summary, "parameters": parameters}
    if returned is not None:
        made["return"] = returned if returns is None else {**returned, "description": returns}
    return {"type": "function", "function": made}


def _read_docstring(doc: str) -> tuple[str | None, dict[str, str], str | None]:
    """What the function does, what its arguments are, what it returns."""
    summary, arguments, returns = (part.search(doc) for part in (_SUMMARY, _ARGS, _RETURNS))
    described = {}
    if arguments:
        lines = "\n".join(line for line in arguments[1].split("\n") if line.strip())
        for _, name, text in _ARG.findall(lines):
            described[name] = re.sub(r"\s*\n+\s*", " ", text.strip())
    return (
        summary[1].strip() if summary else None,
        described,
        returns[1].strip() if returns else None,
    )


def _describe(schema: dict[str, Any], text: str, where: str) -> None:
    """Put the description into the schema, and the choices at its end."""
    choices = _CHOICES.search(text)
    if choices:
        try:
            listed = json.loads(choices[1])
        except ValueError as error:
            raise InvalidRequestError(
                f"choices of {where} must be a JSON list, got {choices[1]!r}"
            ) from error
        schema["enum"] = [c.strip() if isinstance(c, str) else c for c in listed]
        text = text[: choices.start()].strip()
    schema["description"] = text


def _parameters(function: Callable[..., Any], name: str) -> dict[str, Any]:
    try:
        hints, signature = get_type_hints(function), inspect.signature(function)
    except (NameError, TypeError, ValueError) as error:
        raise InvalidRequestError(f"the hints of {name} cannot be read: {error}") from error
    known = dict(signature.parameters)
    first = next(iter(known), None)
    if first in ("self", "cls") and known[first].annotation is inspect.Parameter.empty:
        del known[first]
        hints.pop(first, None)
    for argument, parameter in known.items():
        if parameter.annotation is inspect.Parameter.empty:
            problem = f"argument {argument!r} of {name} wants a type hint, got none"
            raise InvalidRequestError(problem)
    properties = {}
    for argument, hint in hints.items():
        try:
            properties[argument] = _schema(hint)
        except InvalidRequestError as error:
            # Nobody has to write what comes back: a hint without a schema is left out there.
            if argument != "return":
                raise InvalidRequestError(f"argument {argument!r} of {name}: {error}") from error
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    required = [n for n, p in known.items() if p.default is inspect.Parameter.empty]
    if required:
        schema["required"] = required
    return schema


def _schema(hint: Any) -> dict[str, Any]:
    """The JSON schema of a type hint, a dict of its own each time."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is None:
        return _schema_of_class(hint)
    if origin is Union or origin is types.UnionType:
        return _schema_of_union(arguments)
    if origin is Literal and arguments:
        return _schema_of_values(arguments, str(hint))
    if origin is tuple:
        return _schema_of_tuple(arguments)
    if origin is list:
        return {"type": "array", **({"items": _schema(arguments[0])} if arguments else {})}
    if origin is dict:
        values = {"additionalProperties": _schema(arguments[1])} if arguments else {}
        return {"type": "object", **values}
    raise InvalidRequestError(f"no JSON schema can be made of the hint {hint!r}")


def _schema_of_class(hint: Any) -> dict[str, Any]:
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return _schema_of_values([member.value for member in hint], hint.__name__)
    try:
        return dict(_PLAIN[hint])
    except (KeyError, TypeError) as error:
        raise InvalidRequestError(f"no JSON schema can be made of the hint {hint!r}") from error


def _schema_of_values(values: Sequence[Any], where: str) -> dict[str, Any]:
    """An enum: each JSON type that appears, once."""
    if not values or any(type(value) not in _SCALARS for value in values):
        raise InvalidRequestError(
            f"{where} must hold int, float, str, bool or None, and any at all, got {values!r:.200}"
        )
    kinds = list(dict.fromkeys(_SCALARS[type(value)] for value in values))
    return {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": list(values)}


def _schema_of_union(hints: Sequence[Any]) -> dict[str, Any]:
    kinds = [_schema(hint) for hint in hints if hint is not type(None)]
    if len(kinds) == 1:
        made = kinds[0]
    elif all(kind.keys() == {"type"} and isinstance(kind["type"], str) for kind in kinds):
        names = sorted({kind["type"] for kind in kinds})
        made = {"type": names[0] if len(names) == 1 else names}
    else:
        made = {"anyOf": kinds}
    if type(None) in hints:
        made["nullable"] = True
    return made


def _schema_of_tuple(hints: Sequence[Any]) -> dict[str, Any]:
    if len(hints) == 1 or ... in hints:
        raise InvalidRequestError(
            f"a tuple must name two types at least and no '...', got {len(hints)}; use list[...]"
        )
    if not hints:
        return {"type": "array"}
    return {"type": "array", "prefixItems": [_schema(hint) for hint in hints]}
