"""What a checkpoint is quantised to while it is loaded, as hfcore and as transformers say it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import InvalidRequestError, UnknownOptionError

_KINDS = {"nf4": "NF4", "fp4": "FP4"}

_DEFAULTS: dict[str, Any] = {
    "quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": False,
    "llm_int8_threshold": 6.0, "llm_int8_skip_modules": None,
    "llm_int8_enable_fp32_cpu_offload": False, "llm_int8_has_fp16_weight": False,
    "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False,
    "bnb_4bit_compute_dtype": "float32", "bnb_4bit_quant_storage": "uint8",
}  # fmt: skip
"""The keys of a BitsAndBytesConfig, and what one that is not there means."""

_FIXED = {
    "quant_method": "other methods need a checkpoint that was made by them",
    "llm_int8_threshold": "all inputs are multiplied in 8 bits, outliers too",
    "llm_int8_enable_fp32_cpu_offload": "everything runs on the CPU, nothing is offloaded",
    "llm_int8_has_fp16_weight": "8-bit weights are kept in 8 bits",
    "bnb_4bit_quant_storage": "codes are kept in bytes",
}
"""Those that have one value, and why."""

_COMPUTE = ("float32", "float16", "bfloat16")
_PATTERN = set("*+?[](){}|^$\\")


@dataclass(frozen=True)
class AtLoad:
    """`name`: a mixture, such as "Q4_K_M" or "NF4". `nested`: bitsandbytes' double quantisation.

    `skip`: modules that stay as they are.
    """

    name: str
    nested: bool = False
    skip: tuple[str, ...] = ()


def config(given: Any) -> dict[str, Any]:
    """A quantization_config as a dict of plain values, checked.

    `given`: transformers' BitsAndBytesConfig (or whatever has its `to_dict()`), or an equal dict.
    Raises UnknownOptionError (with the nearest known key) and InvalidRequestError for a value that
    cannot act.

    >>> config({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})
    {'load_in_4bit': True, 'bnb_4bit_quant_type': 'nf4'}
    """
    to_dict = getattr(given, "to_dict", None)
    plain = given if isinstance(given, Mapping) else to_dict() if callable(to_dict) else None
    if not isinstance(plain, Mapping):
        raise InvalidRequestError(
            "quantization_config must be a BitsAndBytesConfig or an equal dict,"
            f" got {type(given).__name__}"
        )
    whole = {_known(key): _value(_known(key), value) for key, value in plain.items()}
    _at_load(_DEFAULTS | whole)
    return {key: value for key, value in whole.items() if value != _DEFAULTS[key]}


def wanted(quantization: str | AtLoad | None, given: Any = None) -> AtLoad | None:
    """One wish of two: hfcore's short name, or a quantization_config. Both are an error.

    >>> wanted(None, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})
    AtLoad(name='NF4', nested=False, skip=('lm_head',))
    """
    if given is None:
        return AtLoad(quantization) if isinstance(quantization, str) else quantization
    if quantization is not None:
        raise InvalidRequestError(
            f"quantization={_name(quantization)!r} and quantization_config are one wish: give one"
        )
    return _at_load(_DEFAULTS | config(given))


def _name(quantization: str | AtLoad) -> str:
    return quantization if isinstance(quantization, str) else quantization.name


def _known(key: object) -> str:
    name = str(key)
    # What to_dict() of some versions has beside the same without an underscore.
    name = name[1:] if name in ("_load_in_4bit", "_load_in_8bit") else name
    if name not in _DEFAULTS:
        near = difflib.get_close_matches(name, _DEFAULTS, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UnknownOptionError(
            f"unknown key {name!r} of quantization_config{hint}",
            name=name, nearest=near[0] if near else None,
        )  # fmt: skip
    return name


def _value(key: str, value: Any) -> Any:
    """A value as plain as JSON: torch's types and enums by their names."""
    value = getattr(value, "value", value)
    if value is None:
        return _DEFAULTS[key]
    if key.endswith(("_dtype", "_storage")):
        value = str(value).removeprefix("torch.")
    default = _DEFAULTS[key]
    if isinstance(default, bool) and not isinstance(value, bool):
        raise InvalidRequestError(f"{key} must be True or False, got {value!r:.200}")
    if key == "llm_int8_skip_modules":
        return _modules(value)
    if key in _FIXED and value != default:
        raise InvalidRequestError(f"{key} must be {default!r}, got {value!r:.200}: {_FIXED[key]}")
    if key == "bnb_4bit_quant_type" and value not in _KINDS:
        raise InvalidRequestError(f"{key} must be one of 'nf4', 'fp4', got {value!r:.200}")
    if key == "bnb_4bit_compute_dtype" and value not in _COMPUTE:
        raise InvalidRequestError(f"{key} must be one of {', '.join(_COMPUTE)}, got {value!r:.200}")
    return value


def _modules(value: Any) -> list[str]:
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise InvalidRequestError(
            f"llm_int8_skip_modules must be a list of names, got {value!r:.200}"
        )
    for name in value:
        if not name or _PATTERN & set(name):
            raise InvalidRequestError(
                f"llm_int8_skip_modules must name modules, or what their names end with,"
                f" got {name!r:.200}: patterns are not supported"
            )
    return list(value)


def _at_load(whole: Mapping[str, Any]) -> AtLoad:
    four, eight = whole["load_in_4bit"], whole["load_in_8bit"]
    if four == eight:
        raise InvalidRequestError(
            "quantization_config must have load_in_4bit or load_in_8bit,"
            f" got {'both' if four else 'neither'}"
        )
    if eight and whole["bnb_4bit_use_double_quant"]:
        raise InvalidRequestError(
            "bnb_4bit_use_double_quant=True has nothing to act on: load_in_8bit nests no scales"
        )
    name = _KINDS[whole["bnb_4bit_quant_type"]] if four else "Q8_0"
    skip = whole["llm_int8_skip_modules"]
    # As transformers has it: who names modules names the head too, or has it quantised.
    return AtLoad(
        name, whole["bnb_4bit_use_double_quant"], ("lm_head",) if skip is None else tuple(skip)
    )
