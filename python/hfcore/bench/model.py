"""What the harness must know of a GGUF file: its sizes, and what a token costs to read and compute.

It reads the header alone, whatever the tensor types.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import ModelFileError, UnsupportedModelError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
            12: "d"}  # fmt: skip
_STRING, _ARRAY = 8, 9
_MOST = 1 << 24  # of tensors, keys, or items of an array: more is a broken file


@dataclass(frozen=True)
class Facts:
    """A model file.

    `parameters`: all of them. `layer_parameters`: those that every token of a prompt is multiplied
    with, so neither the embedding nor the head, which only the last token needs. `token_bytes`:
    read for each decoded token. Of experts, only as many as are used count in the last two.
    """

    path: Path
    size: int
    sha256: str
    architecture: str
    context_size: int
    vocab_size: int
    parameters: int
    layer_parameters: int
    token_bytes: int


@dataclass(frozen=True)
class Tensor:
    """A tensor as the header has it; `bytes` includes what pads it to the next one."""

    name: str
    shape: tuple[int, ...]
    bytes: int


def read(path: Path) -> Facts:
    """The facts of a file. Raises ModelFileError, UnsupportedModelError for a split one."""
    try:
        with path.open("rb") as file:
            values, tensors = _header(file, path.stat().st_size)
    except (struct.error, UnicodeDecodeError, ValueError, KeyError) as error:
        raise ModelFileError(
            f"{path.name}: wanted a GGUF file, got something else or less: {error}", path=str(path)
        ) from error
    if values.get("split.count", 1) > 1:
        raise UnsupportedModelError(
            f"the harness times files that are whole, {path.name} is one of several",
            what="model file", name=path.name,
        )  # fmt: skip
    architecture = str(values.get("general.architecture", ""))
    used = values.get(f"{architecture}.expert_used_count", 1)
    part = used / max(1, values.get(f"{architecture}.expert_count", used))
    tied = all(tensor.name != "output.weight" for tensor in tensors)
    return Facts(
        path=path,
        size=path.stat().st_size,
        sha256=_sha256(path),
        architecture=architecture,
        context_size=int(values.get(f"{architecture}.context_length", 0)),
        vocab_size=int(values.get("tokenizer.ggml.tokens", 0)),
        parameters=sum(math.prod(tensor.shape) for tensor in tensors),
        layer_parameters=sum(_multiplied(tensor, part) for tensor in tensors),
        token_bytes=sum(_read(tensor, part, tied) for tensor in tensors),
    )


def _multiplied(tensor: Tensor, part: float) -> int:
    if len(tensor.shape) < 2 or tensor.name in {"token_embd.weight", "output.weight"}:
        return 0
    return round(math.prod(tensor.shape) * _used(tensor, part))


def _read(tensor: Tensor, part: float, tied: bool) -> int:
    """The embedding is read as a whole only where it is the head too; else a row of it."""
    if tensor.name == "token_embd.weight" and not tied:
        return 0
    return round(tensor.bytes * _used(tensor, part))


def _used(tensor: Tensor, part: float) -> float:
    return part if "_exps." in tensor.name else 1.0


def _header(file: BinaryIO, size: int) -> tuple[dict[str, Any], list[Tensor]]:
    """Metadata (of an array only its length) and tensors."""
    magic, version, tensor_count, value_count = _take(file, "4sIQQ")
    if magic != b"GGUF" or version not in {2, 3}:
        raise ValueError(f"magic {magic!r}, version {version}")
    values = {}
    for _ in range(_checked(value_count)):
        key = _string(file)
        values[key] = _value(file, *_take(file, "I"))
    entries = [_entry(file) for _ in range(_checked(tensor_count))]
    alignment = max(1, int(values.get("general.alignment", 32)))
    start = -(-file.tell() // alignment) * alignment
    # A tensor ends where the next one begins: no table of types is needed.
    entries.sort(key=lambda entry: entry[2])
    ends = [offset for _, _, offset in entries[1:]] + [size - start]
    return values, [
        Tensor(name, shape, end - offset)
        for (name, shape, offset), end in zip(entries, ends, strict=True)
    ]


def _entry(file: BinaryIO) -> tuple[str, tuple[int, ...], int]:
    name = _string(file)
    (count,) = _take(file, "I")
    if count > 8:
        raise ValueError(f"{name:.80} has {count} dimensions")
    shape = _take(file, f"{count}Q")
    _, offset = _take(file, "IQ")
    return name, shape, offset


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(file)
    if kind != _ARRAY:
        return _take(file, _SCALARS[kind])[0]
    item, count = _take(file, "IQ")
    _checked(count)
    if item in _SCALARS:
        file.seek(struct.calcsize(f"<{_SCALARS[item]}") * count, 1)
        return count
    if item != _STRING:
        raise ValueError(f"an array of type {item}")
    for _ in range(count):
        file.seek(_take(file, "Q")[0], 1)
    return count


def _string(file: BinaryIO) -> str:
    (length,) = _take(file, "Q")
    return file.read(_checked(length)).decode()


def _take(file: BinaryIO, form: str) -> tuple[Any, ...]:
    return struct.unpack(f"<{form}", file.read(struct.calcsize(f"<{form}")))


def _checked(count: int) -> int:
    if count > _MOST:
        raise ValueError(f"a count of {count}")
    return count


def _sha256(path: Path) -> str:
    """The first 16 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        read: Callable[[], bytes] = lambda: file.read(1 << 20)  # noqa: E731 - typed for iter
        for block in iter(read, b""):
            digest.update(block)
    return digest.hexdigest()[:16]
