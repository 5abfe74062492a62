"""Quantised safetensors checkpoints against their formats' definitions, in numpy; and hostile ones.

The definitions are written here as the libraries' dequantisation has them, in float32. The matrices
are noise: what is tested is where each bit goes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hfcore import _core, errors

Array = NDArray[Any]
NAME = "model.layers.0.self_attn.q_proj"

# bfloat16 and floats of 8 bits as the bits that they are stored in.
BITS = {"BF16": np.uint16, "F8_E4M3": np.uint8, "F8_E8M0": np.uint8}
DTYPES = {"f4": "F32", "f2": "F16", "i8": "I64", "i4": "I32", "i1": "I8", "u1": "U8"}


@dataclass(frozen=True)
class Stored:
    """One tensor of a file: its bits, and their dtype where numpy has none."""

    bits: Array
    dtype: str = ""

    def name(self) -> str:
        return self.dtype or DTYPES[self.bits.dtype.str[1:]]


@dataclass(frozen=True)
class Case:
    """A configuration, the parts of a matrix by the ends of their names, and its numbers."""

    config: Mapping[str, Any]
    parts: Mapping[str, Stored]
    numbers: Array
    others: Mapping[str, Stored] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        header: dict[str, Any] = {}
        data = b""
        named = {f"{NAME}.{end}": part for end, part in self.parts.items()}
        for name, part in {**named, **self.others}.items():
            offsets = [len(data), len(data) + part.bits.nbytes]
            entry = {"dtype": part.name(), "shape": list(part.bits.shape), "data_offsets": offsets}
            header[name] = entry
            data += part.bits.tobytes()
        text = json.dumps(header).encode()
        (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
        config = {"model_type": "llama", "quantization_config": self.config}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return folder


def random() -> np.random.Generator:
    return np.random.default_rng(3)


def codes(shape: tuple[int, ...], bits: int) -> NDArray[np.uint32]:
    return random().integers(0, 1 << bits, shape, dtype=np.uint32)


def scales(*shape: int) -> NDArray[np.float32]:
    return random().uniform(0.001, 0.02, shape).astype(np.float32)


def packed(values: NDArray[np.uint32], bits: int, axis: int) -> Stored:
    """Codes side by side in words of 32 bits, the first lowest."""
    values = np.moveaxis(values, axis, -1)
    per = 32 // bits
    short = -values.shape[-1] % per
    values = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, short)])
    groups = values.reshape(*values.shape[:-1], -1, per)
    shifts = np.arange(per, dtype=np.uint32) * bits
    words = np.bitwise_or.reduce(groups << shifts, axis=-1).astype(np.uint32)
    return Stored(np.ascontiguousarray(np.moveaxis(words, -1, axis)).view(np.int32))


def bfloat16(numbers: Array) -> tuple[Stored, NDArray[np.float32]]:
    """Cut to bfloat16; and the same as numbers."""
    bits = (numbers.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return Stored(bits, "BF16"), (bits.astype(np.uint32) << 16).view(np.float32)


# GPTQ ------------------------------------------------------------------------------------------


def gptq(
    bits: int = 4,
    group: int = 32,
    *,
    sym: bool = False,
    order: bool = False,
    version: int = 1,
    index: bool = True,
    shape: tuple[int, int] = (64, 96),
) -> Case:
    outputs, inputs = shape
    each = group if group > 0 else inputs
    groups = -(-inputs // each)
    weight = codes((inputs, outputs), bits)
    zeros = codes((groups, outputs), bits)
    if sym:
        zeros[:] = 1 << (bits - 1)
    stored = (zeros - np.uint32(version == 1)) % np.uint32(1 << bits)
    scale = scales(groups, outputs).astype(np.float16)
    of = np.arange(inputs) // each
    if order:
        of = random().permutation(of)
    difference = weight.astype(np.int32) - zeros[of].astype(np.int32)
    numbers = difference.astype(np.float32) * scale[of].astype(np.float32)
    parts = {
        "qweight": packed(weight, bits, 0),
        "qzeros": packed(stored, bits, 1),
        "scales": Stored(scale),
    }
    if index:
        parts["g_idx"] = Stored(of.astype(np.int32))
    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "sym": sym,
        "desc_act": order,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
    }
    return Case(config, parts, numbers.T)


# AWQ -------------------------------------------------------------------------------------------


def awq(group: int = 32, shape: tuple[int, int] = (64, 96)) -> Case:
    outputs, inputs = shape
    each = group if group > 0 else inputs
    weight, zeros = codes((inputs, outputs), 4), codes((inputs // each, outputs), 4)
    scale = scales(inputs // each, outputs).astype(np.float16)
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def interleaved(values: NDArray[np.uint32]) -> Stored:
        return packed(values.reshape(len(values), -1, 8)[:, :, order].reshape(values.shape), 4, 1)

    of = np.arange(inputs) // each
    difference = weight.astype(np.int32) - zeros[of].astype(np.int32)
    numbers = difference.astype(np.float32) * scale[of].astype(np.float32)
    parts = {
        "qweight": interleaved(weight),
        "qzeros": interleaved(zeros),
        "scales": Stored(scale),
    }
    config = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group,
        "version": "GEMM",
        "zero_point": True,
        "modules_to_not_convert": None,
    }
    return Case(config, parts, numbers.T)


# bitsandbytes ----------------------------------------------------------------------------------

# fmt: off
NF4 = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
], np.float32)
_FP4 = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], np.float32) / np.float32(12)
FP4 = np.concatenate([_FP4, -_FP4])
# fmt: on


def bitsandbytes(
    kind: str = "nf4",
    *,
    nested: bool = False,
    block: int = 64,
    storage: str = "",
    shape: tuple[int, int] = (48, 96),
) -> Case:
    count = shape[0] * shape[1]
    blocks = -(-count // block)
    flat = codes((count,), 4).astype(np.uint8)
    parts: dict[str, Stored] = {}
    state: dict[str, Any] = {
        "quant_type": kind,
        "blocksize": block,
        "dtype": "bfloat16",
        "shape": list(shape),
    }
    if nested:
        absmax_codes = codes((blocks,), 8).astype(np.uint8)
        table = np.sort(random().uniform(-1, 1, 256)).astype(np.float32)
        outer = scales(-(-blocks // 256))
        offset = 0.03441810607910156
        state |= {"nested_blocksize": 256, "nested_offset": offset, "nested_dtype": "float32"}
        parts["weight.absmax"] = Stored(absmax_codes)
        parts["weight.nested_absmax"] = Stored(outer)
        parts["weight.nested_quant_map"] = Stored(table)
        absmax = table[absmax_codes] * np.repeat(outer, 256)[:blocks] + np.float32(offset)
    else:
        absmax = scales(blocks)
        parts["weight.absmax"] = Stored(absmax)
    table = NF4 if kind == "nf4" else FP4
    numbers = table[flat] * np.repeat(absmax, block)[:count]
    pairs = flat[::2] << 4 | flat[1::2]
    wide = pairs.view(np.uint16) if storage else pairs
    parts["weight"] = Stored(wide[:, None], storage)
    parts["weight.quant_map"] = Stored(table)
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    parts[f"weight.quant_state.bitsandbytes__{kind}"] = Stored(text)
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    return Case(config, parts, numbers.reshape(shape))


def llm_int8(method: str | None = "bitsandbytes") -> Case:
    weight = random().integers(-127, 128, (48, 96), dtype=np.int8)
    scb = scales(48) * np.float32(20)
    numbers = weight * scb[:, None] / np.float32(127)
    parts = {
        "weight": Stored(weight),
        "SCB": Stored(scb),
        "weight_format": Stored(np.zeros((), np.uint8)),
    }
    config = {"load_in_8bit": True, "llm_int8_skip_modules": ["lm_head"]}
    return Case({**config, "quant_method": method} if method else config, parts, numbers)


# compressed-tensors ----------------------------------------------------------------------------


def compressed(scheme: str, **weights: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": scheme,
        "ignore": ["lm_head", "re:.*gate$"],
        "config_groups": {"group_0": {"targets": ["re:.*proj$"], "weights": weights}},
    }


def pack_quantized(
    bits: int = 4,
    group: int = 32,
    *,
    asymmetric: bool = False,
    order: bool = False,
    shape: tuple[int, int] = (48, 96),
) -> Case:
    outputs, inputs = shape
    each = group if group > 0 else inputs
    groups = inputs // each
    weight, zeros = codes(shape, bits), codes((outputs, groups), bits)
    if not asymmetric:
        zeros[:] = 1 << (bits - 1)
    stored, scale = bfloat16(scales(outputs, groups))
    of = np.arange(inputs) // each
    if order:
        of = random().permutation(of)
    difference = weight.astype(np.int32) - zeros[:, of].astype(np.int32)
    parts = {
        "weight_packed": packed(weight, bits, 1),
        "weight_scale": stored,
        "weight_shape": Stored(np.array(shape, np.int64)),
    }
    if asymmetric:
        parts["weight_zero_point"] = packed(zeros, bits, 0)
    if order:
        parts["weight_g_idx"] = Stored(of.astype(np.int32))
    else:
        parts["weight_g_idx"] = Stored(np.full(inputs, -1, np.int32))
    config = compressed("pack-quantized", num_bits=bits, type="int", symmetric=not asymmetric)
    return Case(config, parts, difference.astype(np.float32) * scale[:, of])


def int_quantized(
    grid: tuple[int, ...], *, zero: bool = False, scheme: str = "int-quantized"
) -> Case:
    weight = random().integers(-128, 128, (48, 96), dtype=np.int8)
    scale = scales(*grid)
    zeros = random().integers(-128, 128, grid, dtype=np.int8)
    wide = np.reshape(scale, grid if len(grid) == 2 else (-1, 1))
    repeat = np.repeat(np.repeat(wide, 48 // wide.shape[0], 0), 96 // wide.shape[1], 1)
    off = np.reshape(zeros, wide.shape).astype(np.int32) * zero
    off = np.repeat(np.repeat(off, 48 // wide.shape[0], 0), 96 // wide.shape[1], 1)
    parts = {"weight": Stored(weight), "weight_scale": Stored(scale)}
    parts["input_scale"] = Stored(np.ones(1, np.float32))
    if zero:
        parts["weight_zero_point"] = Stored(zeros)
    numbers = (weight.astype(np.int32) - off).astype(np.float32) * repeat
    return Case(compressed(scheme, num_bits=8, type="int"), parts, numbers)


# Floats of 8 bits ------------------------------------------------------------------------------


def e4m3(bits: NDArray[np.uint8]) -> NDArray[np.float32]:
    sign = np.where(bits >> 7, -1.0, 1.0)
    exponent, mantissa = (bits >> 3 & 15).astype(int), (bits & 7).astype(float)
    normal = (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return (sign * np.where(exponent > 0, normal, mantissa / 8 * 2.0**-6)).astype(np.float32)


def float_quantized(
    grid: tuple[int, ...],
    block: tuple[int, int],
    config: Mapping[str, Any],
    *,
    shape: tuple[int, int] = (48, 96),
    name: str = "weight_scale",
    powers: bool = False,
) -> Case:
    bits = random().integers(0, 256, shape, dtype=np.uint8)
    bits[bits & 0x7F == 0x7F] = 0x30
    if powers:
        exponents = random().integers(110, 130, grid, dtype=np.uint8)
        stored, scale = Stored(exponents, "F8_E8M0"), (2.0 ** (exponents - 127.0)).astype("f4")
    else:
        stored, scale = bfloat16(scales(*grid))
    wide = scale.reshape(grid if len(grid) == 2 else (-1, 1))
    wide = np.repeat(np.repeat(wide, block[0], 0), block[1], 1)[: shape[0], : shape[1]]
    parts = {"weight": Stored(bits, "F8_E4M3"), name: stored}
    return Case(config, parts, e4m3(bits) * wide)


FP8 = {"quant_method": "fp8", "weight_block_size": [32, 32]}
CT8 = compressed("float-quantized", num_bits=8, type="float", block_structure=[32, 32])

CASES: dict[str, Callable[[], Case]] = {
    "gptq": gptq,
    "gptq 2 bits": lambda: gptq(2),
    "gptq 8 bits": lambda: gptq(8),
    "gptq 8 bits sym": lambda: gptq(8, sym=True),
    "gptq sym": lambda: gptq(sym=True),
    "gptq one group": lambda: gptq(group=-1),
    "gptq last group short": lambda: gptq(group=64),
    "gptq without index": lambda: gptq(index=False),
    "gptq in another order": lambda: gptq(order=True),
    "gptq v2": lambda: gptq(version=2),
    "gptq v2 8 bits in another order": lambda: gptq(8, version=2, order=True),
    "gptq of many bands": lambda: gptq(shape=(160, 64)),
    "awq": awq,
    "awq one group": lambda: awq(-1),
    "awq of 24 outputs": lambda: awq(16, (24, 32)),
    "nf4": bitsandbytes,
    "nf4 nested": lambda: bitsandbytes(nested=True),
    "nf4 nested, many": lambda: bitsandbytes(nested=True, shape=(160, 256)),
    "nf4 in rows of whole blocks": lambda: bitsandbytes(shape=(40, 128)),
    "nf4 whose last block is short": lambda: bitsandbytes(shape=(5, 34)),
    "nf4 stored as bf16": lambda: bitsandbytes(storage="BF16"),
    "nf4 blocks of 256": lambda: bitsandbytes(block=256),
    "fp4": lambda: bitsandbytes("fp4"),
    "fp4 nested": lambda: bitsandbytes("fp4", nested=True, block=128),
    "int8": llm_int8,
    "int8 of old": lambda: llm_int8(None),
    "w4a16": pack_quantized,
    "w4a16 asymmetric": lambda: pack_quantized(asymmetric=True),
    "w4a16 channels": lambda: pack_quantized(group=-1),
    "w4a16 channels asymmetric": lambda: pack_quantized(group=-1, asymmetric=True, shape=(44, 96)),
    "w4a16 in another order": lambda: pack_quantized(order=True, asymmetric=True),
    "w4a16 of 34 inputs": lambda: pack_quantized(group=17, shape=(48, 34)),
    "w8a16": lambda: pack_quantized(8),
    "w8a16 asymmetric": lambda: pack_quantized(8, asymmetric=True),
    "w8a8 tensor": lambda: int_quantized((1,)),
    "w8a8 channels": lambda: int_quantized((48, 1)),
    "w8a8 groups": lambda: int_quantized((48, 3), scheme="naive-quantized"),
    "w8a8 asymmetric": lambda: int_quantized((48, 1), zero=True),
    "w8a8 tensor asymmetric": lambda: int_quantized((1,), zero=True),
    "ct fp8 tensor": lambda: float_quantized((1,), (48, 96), CT8),
    "ct fp8 channels": lambda: float_quantized((48, 1), (1, 96), CT8),
    "ct fp8 blocks": lambda: float_quantized((2, 3), (32, 32), CT8),
    "fp8 blocks": lambda: float_quantized((2, 3), (32, 32), FP8, name="weight_scale_inv"),
    "fp8 scalar": lambda: float_quantized(
        (), (48, 96), {"quant_method": "fp8"}, name="weight_scale_inv"
    ),
    "fp8 powers of two": lambda: float_quantized(
        (2, 3), (32, 32), FP8, name="weight_scale_inv", powers=True
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_every_number_is_the_librarys(name: str, tmp_path: Path) -> None:
    case = CASES[name]()
    numbers = _core.read_tensor(case.write(tmp_path), f"{NAME}.weight")
    assert numbers.dtype == np.float32
    np.testing.assert_array_equal(numbers, case.numbers)


def test_what_is_not_quantised_stays_as_it_is(tmp_path: Path) -> None:
    bias = Stored(np.arange(3, dtype=np.float16))
    case = replace(gptq(), others={"lm_head.bias": bias})
    folder = case.write(tmp_path)
    np.testing.assert_array_equal(_core.read_tensor(folder, "lm_head.bias"), [0, 1, 2])
    with pytest.raises(errors.ModelFileError, match=r"has no tensor .*g_idx"):
        _core.read_tensor(folder, f"{NAME}.g_idx")


# Hostile ones ----------------------------------------------------------------------------------


def without(case: Case, end: str) -> Case:
    return replace(case, parts={e: part for e, part in case.parts.items() if e != end})


def having(case: Case, end: str, bits: Array, dtype: str = "") -> Case:
    return replace(case, parts={**case.parts, end: Stored(bits, dtype)})


def configured(case: Case, **changes: Any) -> Case:
    return replace(case, config={**case.config, **changes})


def state(case: Case, **changes: Any) -> Case:
    end = "weight.quant_state.bitsandbytes__nf4"
    known = json.loads(case.parts[end].bits.tobytes())
    text = json.dumps({**known, **changes}).encode()
    return having(case, end, np.frombuffer(text, np.uint8))


HUGE = 1 << 62
I32, U8, F32 = np.int32, np.uint8, np.float32

HOSTILE: dict[str, tuple[Callable[[], Case], str]] = {
    "no zero points": (lambda: without(gptq(), "qzeros"), "qzeros"),
    "no scales": (lambda: without(gptq(), "scales"), "scales"),
    "codes of one dimension": (
        lambda: having(gptq(), "qweight", np.zeros(768, I32)),
        "wanted a matrix of I32",
    ),
    "codes of another dtype": (
        lambda: having(gptq(), "qweight", np.zeros((12, 64), F32)),
        "is F32 .*wanted a matrix of I32",
    ),
    "no codes": (lambda: having(gptq(), "qweight", np.zeros((0, 64), I32)), "wanted a matrix"),
    "scales of another shape": (
        lambda: having(gptq(), "scales", np.zeros((3, 63), np.float16)),
        r"scales.* is F16 \[3, 63\], wanted F32 or F16 or BF16 \[3, 64\]",
    ),
    "scales of another dtype": (
        lambda: having(gptq(), "scales", np.zeros((3, 64), I32)),
        "scales.* is I32",
    ),
    "zero points of 3 bits": (
        lambda: having(gptq(), "qzeros", np.zeros((3, 6), I32)),
        "not of 2, 4 or 8 bits",
    ),
    "a group too many": (
        lambda: having(gptq(), "g_idx", np.full(96, 3, I32)),
        "names the group 3, there are 3",
    ),
    "a group below 0": (
        lambda: having(gptq(), "g_idx", np.full(96, -2, I32)),
        "names the group -2",
    ),
    "an index of another length": (
        lambda: having(gptq(), "g_idx", np.zeros(95, I32)),
        r"g_idx.* is I32 \[95\], wanted I32 or I64 \[96\]",
    ),
    "gptq in a GPU's order": (lambda: configured(gptq(), checkpoint_format="marlin"), "marlin"),
    "gptq of 3 bits": (lambda: configured(gptq(), bits=3), "GPTQ bits .*supported: 2, 4, 8"),
    "awq for one row": (lambda: configured(awq(), version="gemv"), "gemv"),
    "awq zero points": (
        lambda: having(awq(), "qzeros", np.zeros((3, 7), I32)),
        r"wanted I32 \[3, 8\]",
    ),
    "awq groups": (
        lambda: having(
            having(awq(), "qzeros", np.zeros((5, 8), I32)), "scales", np.zeros((5, 64), F32)
        ),
        "5 groups of 96 inputs",
    ),
    "a state that is no JSON": (
        lambda: having(bitsandbytes(), "weight.quant_state.bitsandbytes__nf4", np.full(9, 255, U8)),
        "the state of .* is wrong",
    ),
    "a huge shape": (lambda: state(bitsandbytes(), shape=[HUGE, HUGE]), "wanted a matrix"),
    "a shape of no numbers": (lambda: state(bitsandbytes(), shape=[0, 4]), "wanted a matrix"),
    "a shape of three": (lambda: state(bitsandbytes(), shape=[2, 2, 2]), "wanted a matrix"),
    "another shape": (lambda: state(bitsandbytes(), shape=[48, 97]), "2304 bytes, wanted 2328"),
    "blocks of nothing": (lambda: state(bitsandbytes(), blocksize=0), "in blocks of 0"),
    "other blocks": (lambda: state(bitsandbytes(), blocksize=32), r"absmax.* wanted .* \[144\]"),
    "nested scales without a word": (
        lambda: state(bitsandbytes(nested=True), nested_offset=None),
        "says nothing of its nested scales",
    ),
    "nested blocks of nothing": (
        lambda: state(bitsandbytes(nested=True), nested_blocksize=0),
        "nested_blocksize of 0",
    ),
    "a short map": (
        lambda: having(bitsandbytes(nested=True), "weight.nested_quant_map", np.zeros(255, F32)),
        r"wanted .* \[256\]",
    ),
    "no codes of 4 bits": (lambda: without(bitsandbytes(), "weight"), "has no tensor"),
    "int8 without codes": (lambda: without(llm_int8(), "weight"), "has no tensor"),
    "int8 in a GPU's order": (
        lambda: having(llm_int8(), "weight_format", np.array(2, U8)),
        "weight_format",
    ),
    "int8 scales": (lambda: having(llm_int8(), "SCB", np.zeros(47, F32)), "SCB"),
    "int8 without scales": (lambda: without(llm_int8(), "SCB"), "I8 of"),
    "no shape": (lambda: without(pack_quantized(), "weight_shape"), "weight_shape"),
    "a negative shape": (
        lambda: having(pack_quantized(), "weight_shape", np.array([-1, 96])),
        "not of 2, 4 or 8 bits",
    ),
    "a shape too large": (
        lambda: having(pack_quantized(), "weight_shape", np.array([HUGE, 96])),
        "wanted I32",
    ),
    "a shape too wide": (
        lambda: having(pack_quantized(), "weight_shape", np.array([48, HUGE])),
        "not of 2, 4 or 8 bits",
    ),
    "scales that do not divide": (
        lambda: having(pack_quantized(), "weight_scale", np.zeros((48, 7), F32)),
        "so many scales do not divide",
    ),
    "zero points of 8 bits for 4": (
        lambda: having(pack_quantized(), "weight_zero_point", np.zeros((48, 3), np.int8)),
        "is I8, wanted I32",
    ),
    "zero points for other groups": (
        lambda: having(pack_quantized(asymmetric=True), "weight_zero_point", np.zeros((6, 2), I32)),
        r"wanted I32 \[6, 3\]",
    ),
    "an unknown packing": (
        lambda: configured(pack_quantized(), format="nvfp4-pack-quantized"),
        "nvfp4-pack-quantized",
    ),
    "sparse ones": (
        lambda: configured(pack_quantized(), sparsity_config={"format": "sparse-24-bitmask"}),
        "sparse-24-bitmask",
    ),
    "fp8 without scales": (
        lambda: without(CASES["fp8 blocks"](), "weight_scale_inv"),
        "weight_scale",
    ),
    "fp8 with whole scales": (
        lambda: having(CASES["fp8 blocks"](), "weight_scale_inv", np.zeros((2, 3), I32)),
        "floats or powers of two",
    ),
    "fp8 with no scales": (
        lambda: having(CASES["fp8 blocks"](), "weight_scale_inv", np.zeros((0, 3), F32)),
        "do not divide",
    ),
    "an unknown method": (lambda: configured(gptq(), quant_method="aqlm"), "aqlm.*bitsandbytes"),
    "no method": (lambda: replace(gptq(), config={"bits": 4}), "without a quant_method"),
    "a method for other parts": (lambda: configured(gptq(), quant_method="fp8"), "I32 of"),
    "a matrix twice": (
        lambda: having(gptq(), "weight", np.zeros((64, 96), F32)),
        "quantised and a second time",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_checkpoint_that_is_not_whole_is_an_error_that_says_what_is_wrong(
    name: str, tmp_path: Path
) -> None:
    make, words = HOSTILE[name]
    with pytest.raises((errors.ModelFileError, errors.UnsupportedModelError), match=words):
        _core.read_tensor(make().write(tmp_path), f"{NAME}.weight")
