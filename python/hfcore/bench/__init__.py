"""`hfcore bench`: hfcore and its rivals on the same files, in turn, beside the machine's limits.

    session     a run                                   measures    what is measured, in which order
    report      the table and the picture               processes, worker   an engine's own process
    machine     circumstances and limits                model       what a token of a file costs
    texts       tokenizers and chat templates           textworker  one of these in its own process

A run writes a line of JSON for each measurement; the table and the picture are made from those.
Here are the command's arguments alone, so that other commands load nothing of it.
"""

from __future__ import annotations

from argparse import SUPPRESS, ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable
from pathlib import Path

ISAS = ("scalar", "avx2", "avxvnni", "avx512vnni", "avx512bf16")
"""The instruction sets that hfcore has kernels for."""


def takes_options(parser: ArgumentParser) -> None:
    """The command's arguments."""
    add = parser.add_argument
    add("models", nargs="*", type=Path, metavar="MODEL.gguf",
        help="default: the demo models that are there")  # fmt: skip
    add("--text", action="store_true",
        help="tokenizers and templates instead: name tokenizer.json files or their folders, .jinja "
             "templates, and .txt texts or folders of them")  # fmt: skip
    add("--threads", type=_count, default=2, metavar="N", help="default: 2")
    add("--rivals", default="auto", metavar="NAMES",
        help="auto, none, or names with commas; default: auto, all that are known")  # fmt: skip
    add("--rival-python", action="append", default=[], metavar="PATH",
        help="a Python that has rivals; may be given often")  # fmt: skip
    add("--rounds", type=_count, default=5, metavar="N", help="default: 5")
    for name, least, default, what in (
        ("prefill", 1, "128,512,2048,4096", "prompt lengths"),
        ("depth", 0, "0,512,2048,4096", "how many tokens stand before decoding"),
        ("batch", 1, "1,4,16", "requests at once"),
    ):
        add(f"--{name}", type=_sizes(least), default=default, metavar="N,N",
            help=f"{what}, or none; default: {default}")  # fmt: skip
    add("--new", type=_count, default=48, metavar="N", help="tokens to decode; default: 48")
    add("--rates-only", action="store_true", help="no first tokens, no memory")
    add("--stress", action="store_true",
        help="also hfcore with more threads than CPUs, and beside a busy process")  # fmt: skip
    add("--isa", choices=ISAS,
        help="the instruction set of every engine; others are left out")  # fmt: skip
    add("--patience", type=float, default=300.0, metavar="SECONDS",
        help="leave out requests that would take longer; default: 300")  # fmt: skip
    add("--out", type=Path, metavar="FILE.jsonl", help="a line for each measurement")
    add("--report", type=Path, nargs="+", metavar="FILE.jsonl",
        help="measure nothing: make --table and --picture from these")  # fmt: skip
    add("--table", type=Path, metavar="FILE.md", help="default: to stdout")
    add("--picture", type=Path, metavar="FILE.png", help="needs matplotlib")
    # For tests: less than the bandwidth needs.
    add("--read-bytes", type=_count, help=SUPPRESS)


def run(parsed: Namespace) -> None:
    """The command: measure, or report. Raises HfcoreError, OSError."""
    from . import session, texts

    texts.run(parsed) if parsed.text else session.run(parsed)


def _count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"wanted a whole number of at least 1, got {text!r}")
    return int(text)


def _sizes(least: int) -> Callable[[str], tuple[int, ...]]:
    """Whole numbers of at least so much, with commas between them; or "none"."""

    def read(text: str) -> tuple[int, ...]:
        if text == "none":
            return ()
        if not all(part.isdecimal() and int(part) >= least for part in text.split(",")):
            raise ArgumentTypeError(f"wanted whole numbers of at least {least}, got {text!r}")
        return tuple(sorted({int(part) for part in text.split(",")}))

    return read
