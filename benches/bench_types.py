"""Every tensor type on a model of random weights: prefill and decode, hfcore and llama.cpp in turn.

    python benches/bench_types.py [VOCABULARY.gguf] [--types Q4_0,Q8_0] [--shape 1b] [...]

Further options are those of `hfcore bench`, which measures and writes the lines; a file is made in
a temporary folder when its turn comes, and deleted after. Needs the package gguf.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import make_model

from hfcore import HfcoreError, bench
from hfcore.bench import session


def made(
    vocabulary: Path, shape: str, kinds: Sequence[str]
) -> Generator[tuple[Path, dict[str, Any]]]:
    """A file of each type, as long as nobody asks for the next."""
    for kind in kinds:
        with TemporaryDirectory() as folder:
            path = Path(folder) / f"{shape}-{kind}.gguf"
            make_model.write(vocabulary, path, make_model.SHAPES[shape], kind)
            yield path, {"tensor_type": kind, "shape": shape}


def types(text: str) -> Sequence[str]:
    """Tensor types with commas between them, or "all"."""
    kinds = make_model.TYPES if text == "all" else text.split(",")
    for kind in kinds:
        if kind not in make_model.TYPES:
            known = ", ".join(make_model.TYPES)
            raise ArgumentTypeError(f"wanted all, or some of {known}, got {kind!r}")
    return kinds


def main() -> int:
    parser = ArgumentParser(description="Every tensor type, hfcore beside llama.cpp.")
    parser.add_argument("--types", type=types, default="all", metavar="TYPE,TYPE")
    parser.add_argument("--shape", choices=make_model.SHAPES, default="1b")
    bench.takes_options(parser)
    parser.set_defaults(
        rivals="llama-cpp-python", prefill=(512,), depth=(0,), batch=(), rates_only=True
    )
    parsed = parser.parse_args()
    try:
        vocabulary = (parsed.models or session.demo_models())[0]
        with closing(made(vocabulary, parsed.shape, parsed.types)) as models:
            session.run(parsed, models)
    except (HfcoreError, OSError) as error:
        print(f"bench_types: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
