"""The exception tree: every class pickles, is the built-in it says, and comes from the engine."""

from __future__ import annotations

import inspect
import pickle
import re
from pathlib import Path

import pytest

from hfcore import errors
from hfcore.errors import HfcoreError

CLASSES = [
    value
    for value in vars(errors).values()
    if inspect.isclass(value) and issubclass(value, HfcoreError)
]


def attributes(cls: type[HfcoreError]) -> dict[str, object]:
    """A value for each keyword of the class, of the kind its default has."""
    found: dict[str, object] = {}
    for name, parameter in inspect.signature(cls).parameters.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            default = parameter.default
            found[name] = "x" if default in ("", None) else type(default)(7)
    return found


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: str(cls.__name__))
def test_an_error_survives_pickling_with_its_message_and_attributes(cls: type[HfcoreError]) -> None:
    given = attributes(cls)
    error = cls("what came", **given)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is cls
    assert str(copy) == "what came"
    assert {name: getattr(copy, name) for name in given} == given


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: str(cls.__name__))
def test_the_tree_in_the_docstring_names_the_class_and_its_built_in(cls: type[HfcoreError]) -> None:
    drawn = inspect.getdoc(errors) or ""
    line = re.search(rf"^ *{cls.__name__}\b(.*)$", drawn, flags=re.MULTILINE)
    assert line, f"{cls.__name__} is not drawn"
    built_in = [b for b in cls.__bases__ if b.__module__ == "builtins" and b is not Exception]
    for base in built_in:
        assert base.__name__ in line.group(1)


def test_the_door_raises_only_classes_that_exist_with_the_attributes_they_have() -> None:
    door = Path(__file__).resolve().parent.parent / "rust" / "py" / "src" / "error.rs"
    source = door.read_text(encoding="utf-8")
    named = set(re.findall(r'"(\w+Error)"', source))
    assert named <= {cls.__name__ for cls in CLASSES}
    known = {name for cls in CLASSES for name in attributes(cls)}
    assert set(re.findall(r'set_item\("(\w+)"', source)) <= known
