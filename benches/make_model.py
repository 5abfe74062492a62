"""A GGUF of a llama's shape with random blocks of any tensor type: for speed, not for sense.

    python benches/make_model.py TOKENIZER.gguf OUT.gguf [--shape 1b|7b|tiny] [--type Q4_K]

The vocabulary is another GGUF's. `--type` is that of all matrices; without it Q4_K, with Q6_K for
the head and for every second layer's value and down projections, as K-quant files have it.
Needs the package gguf. Written tensor by tensor: memory holds one of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType
from gguf.constants import GGML_QUANT_SIZES
from numpy.typing import NDArray

SCALE = 0.0005
SCALES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82),
    "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,),
}  # fmt: skip
"""Where a block has its float16 scales, in bytes; all else may be any bits."""
MXFP4_EXPONENT = 116  # of an e8m0 scale: about 0.0005
PLAIN = {"F32": np.float32, "F16": np.float16}
TYPES = ("F32", "F16", "BF16", *SCALES, "MXFP4")
FILE_TYPES = {
    "F32": "ALL_F32", "Q3_K": "MOSTLY_Q3_K_M", "Q4_K": "MOSTLY_Q4_K_M", "Q5_K": "MOSTLY_Q5_K_M",
    "MXFP4": "MOSTLY_MXFP4_MOE",
}  # fmt: skip
"""Of a whole file, where it is not called as its tensors are; openvino wants to know it."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a llama."""

    layers: int
    width: int
    ffn: int
    heads: int
    kv_heads: int


SHAPES = {
    "1b": Shape(16, 2048, 8192, 32, 8),
    "7b": Shape(32, 4096, 14336, 32, 8),
    "tiny": Shape(2, 256, 512, 4, 2),
}


def matrices(shape: Shape, vocab: int, kind: str | None) -> Iterator[tuple[str, int, int, str]]:
    """(name, rows, columns, type) of each."""
    usual, finer = kind or "Q4_K", kind or "Q6_K"
    kv = shape.width // shape.heads * shape.kv_heads
    yield "token_embd.weight", vocab, shape.width, usual
    yield "output.weight", vocab, shape.width, finer
    for layer in range(shape.layers):
        some = finer if layer % 2 else usual
        for name, rows, columns, type_ in (
            ("attn_q", shape.width, shape.width, usual),
            ("attn_k", kv, shape.width, usual),
            ("attn_v", kv, shape.width, some),
            ("attn_output", shape.width, shape.width, usual),
            ("ffn_gate", shape.ffn, shape.width, usual),
            ("ffn_up", shape.ffn, shape.width, usual),
            ("ffn_down", shape.width, shape.ffn, some),
        ):
            yield f"blk.{layer}.{name}.weight", rows, columns, type_


def norms(shape: Shape) -> list[str]:
    layers = [f"blk.{i}.{n}_norm.weight" for i in range(shape.layers) for n in ("attn", "ffn")]
    return [*layers, "output_norm.weight"]


def row_bytes(kind: str, columns: int) -> int:
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return columns // block * size


def blocks(random: np.random.Generator, rows: int, columns: int, kind: str) -> NDArray[Any]:
    """Random weights of about a hundredth, as bytes [rows, bytes of a row]."""
    width = row_bytes(kind, columns)
    if kind in PLAIN or kind == "BF16":
        numbers = random.standard_normal((rows, columns), np.float32) * np.float32(0.01)
        if kind == "BF16":  # the upper half of each float32
            plain: NDArray[Any] = numbers.view(np.uint16)[:, 1::2].copy()
        else:
            plain = numbers.astype(PLAIN[kind])
        return plain.view(np.uint8)
    raw = random.integers(0, 256, (rows, width), np.uint8)
    _, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    each = raw.reshape(rows, -1, size)
    if kind == "MXFP4":
        each[..., 0] = MXFP4_EXPONENT
    for offset in SCALES.get(kind, ()):
        each[..., offset : offset + 2] = np.array([SCALE], np.float16).view(np.uint8)
    return raw


def write(tokenizer: Path, out: Path, shape: Shape, kind: str | None) -> None:
    """The file `out` with the vocabulary of `tokenizer`; of `kind` or, without, mixed."""
    source = GGUFReader(tokenizer)
    vocab = len(source.fields["tokenizer.ggml.tokens"].data)
    writer = GGUFWriter(out, "llama")
    describe(writer, source, shape, vocab)
    of_file = FILE_TYPES.get(kind or "Q4_K", f"MOSTLY_{kind}")
    writer.add_file_type(LlamaFileType[of_file])
    writer.add_quantization_version(2)
    all_ = list(matrices(shape, vocab, kind))
    for name, rows, columns, type_ in all_:
        raw = GGMLQuantizationType[type_]
        # A shape of bytes goes with the type uint8, as the writer wants it.
        size = row_bytes(type_, columns)
        writer.add_tensor_info(name, [rows, size], np.dtype(np.uint8), rows * size, raw)
    for name in norms(shape):
        writer.add_tensor_info(name, [shape.width], np.dtype(np.float32), shape.width * 4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    random = np.random.default_rng(0)
    for _, rows, columns, type_ in all_:
        writer.write_tensor_data(blocks(random, rows, columns, type_))
    for _ in norms(shape):
        writer.write_tensor_data(np.ones(shape.width, np.float32))
    writer.close()


def describe(writer: Any, source: Any, shape: Shape, vocab: int) -> None:
    """Metadata: the other file's tokenizer, and the sizes."""
    for key, field in source.fields.items():
        if key.startswith("tokenizer."):
            if field.types[0] == GGUFValueType.ARRAY:
                writer.add_array(key, field.contents())
            else:
                writer.add_key_value(key, field.contents(), field.types[0])
    writer.add_vocab_size(vocab)
    writer.add_context_length(8192)
    writer.add_block_count(shape.layers)
    writer.add_embedding_length(shape.width)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.width // shape.heads)
    writer.add_rope_freq_base(500_000.0)
    writer.add_layer_norm_rms_eps(1e-5)


def main() -> None:
    parser = argparse.ArgumentParser(description="A model file of random weights.")
    parser.add_argument("tokenizer", type=Path, help="a GGUF whose vocabulary to take")
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--type", choices=TYPES, dest="kind")
    options = parser.parse_args()
    write(options.tokenizer, options.out, SHAPES[options.shape], options.kind)


if __name__ == "__main__":
    main()
