"""A run of the harness from its arguments to its lines, table and picture."""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from .. import _core, fetch
from ..errors import InvalidRequestError, ModelNotFoundError
from . import machine, measures, model, report
from .measures import OURS, Place, Plan
from .processes import RIVALS, Reply, WorkerError, first_python, installed

Line = dict[str, Any]
_ISA = "HFCORE_ISA"

Models = Iterable[tuple[Path, Line]]
"""Files, each with what its lines say besides."""


def run(parsed: Namespace, made: Models | None = None) -> None:
    """Measure, or report. Raises HfcoreError, OSError.

    `made`: instead of the arguments' models; a file need not be there before it is asked for, nor
    after the next one is.
    """
    if parsed.picture is not None:
        report.check_picture()  # before hours of measuring
    if parsed.report and parsed.models:
        raise InvalidRequestError("--report takes no models, it measures nothing")
    lines = report.read(parsed.report) if parsed.report else _measure(parsed, made)
    text = report.table(lines)
    if parsed.table is None:
        print(text)
    else:
        parsed.table.parent.mkdir(parents=True, exist_ok=True)
        parsed.table.write_text(text, encoding="utf-8")
    if parsed.picture is not None:
        report.picture(lines, parsed.picture)


def _measure(parsed: Namespace, made: Models | None) -> list[Line]:
    """All models, one after the other; the lines, which also went to --out as they came."""
    models = _named(parsed.models) if made is None else made
    plan = Plan(
        threads=parsed.threads, rounds=parsed.rounds, new=parsed.new, prefill=parsed.prefill,
        depth=parsed.depth, batch=parsed.batch, patience=parsed.patience,
        rates_only=parsed.rates_only, stress=parsed.stress, isa=parsed.isa,
    )  # fmt: skip
    places, lacking = find(_rivals(parsed.rivals), parsed.rival_python)
    limits = partial(machine.limits, plan.threads, parsed.read_bytes)
    if parsed.out is not None:
        parsed.out.parent.mkdir(parents=True, exist_ok=True)
    with held_to(plan.isa), (parsed.out or Path(os.devnull)).open("w", encoding="utf-8") as out:
        lines = _Lines(out, places)
        for path, besides in models:
            facts = model.read(path)
            lines.progress("measuring the machine")
            lines.begin(measures.circumstances(facts, plan, limits()) | besides)
            for line in lacking:
                lines.add(line)
            measures.Bench(facts, places, plan, limits, lines.add, lines.progress).run()
    return lines.all


@contextlib.contextmanager
def held_to(isa: str | None) -> Iterator[None]:
    """hfcore's kernels, here and in processes that are started here, of one instruction set."""
    before = os.environ.get(_ISA)
    if isa is not None:
        os.environ[_ISA] = isa
    try:
        yield
    finally:
        if isa is not None:
            os.environ.pop(_ISA)
            os.environ.update({} if before is None else {_ISA: before})


class _Lines:
    """The lines of a run: completed, kept, written and shown as they come."""

    def __init__(self, out: TextIO, places: Mapping[str, Place]) -> None:
        self.all: list[Line] = []
        self._out = out
        self._run = machine.circumstances()
        self._run["versions"] = {name: place.version for name, place in places.items()}
        self._model: Line = {}

    def begin(self, circumstances: Line) -> None:
        """A model: what its lines have in common."""
        self._model = circumstances
        found = circumstances["limits"]
        self._show(
            f"{circumstances['model']}: the machine reads "
            f"{found['read_bytes_per_second'] / 1e9:.1f} GB/s and does "
            f"{found['int8_operations_per_second'] / 1e12:.2f} int8 TOPS"
        )
        self.add({"kind": "limits"} | found)

    def add(self, line: Line) -> None:
        """One more line."""
        whole = line | self._run | self._model | machine.moment()
        self.all.append(whole)
        self._out.write(json.dumps(whole) + "\n")
        self._out.flush()
        if line["kind"] != "limits":
            self._show(report.said(line))

    def progress(self, text: str) -> None:
        """What goes on, on the last line of a terminal."""
        if sys.stderr.isatty():
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

    def _show(self, text: str) -> None:
        self.progress("")
        print(text, flush=True)


def find(rivals: Sequence[str], pythons: Sequence[str]) -> tuple[dict[str, Place], list[Line]]:
    """Where hfcore and each wanted rival is; and a line for each that is nowhere."""
    places = {OURS: Place(sys.executable, _core.__version__)}
    found: dict[str, dict[str, Reply]] = {}
    for python in [*pythons, sys.executable]:
        try:
            found[python] = installed(python) if rivals else {}
        except WorkerError as error:
            raise InvalidRequestError(f"--rival-python: {error}") from error
    absent: list[Line] = []
    for name in rivals:
        try:
            places[name] = Place(*first_python(name, found))
        except WorkerError as error:
            absent.append({"kind": "absent", "engine": name, "reason": str(error)})
    return places, absent


def _named(paths: Sequence[Path]) -> Models:
    """The models of the command line, or those of the demo."""
    paths = paths or demo_models()
    for path in paths:
        if not path.is_file():
            raise ModelNotFoundError(f"{path}: no such file", path=str(path))
    return [(path, {}) for path in paths]


def demo_models() -> list[Path]:
    """Those that are fetched. Raises InvalidRequestError if none is."""
    paths = [path for path in map(fetch.path_of, fetch.DEMO_MODELS) if path.is_file()]
    if not paths:
        raise InvalidRequestError(
            "wanted a model, got none, and no demo model is fetched (python -m hfcore.fetch all)"
        )
    return paths


def _rivals(text: str) -> list[str]:
    """The rivals that --rivals means."""
    known = [name for name in RIVALS if name != OURS]
    if text in {"auto", "none"}:
        return known if text == "auto" else []
    for name in text.split(","):
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InvalidRequestError(
                f"--rivals must be auto, none, or of {', '.join(known)}, got {name!r}{hint}"
            )
    return text.split(",")
