"""Accuracy: the mean negative log-likelihood of texts, hfcore's and llama.cpp's on the same ids.

    python benches/bench_nll.py MODEL.gguf ... [--rival-python PATH] [--text FILE ...]

hfcore's tokenizer makes the ids, with what begins a text as the model wants it; each engine runs
them as one prompt of at most 1,500 tokens in a process of its own. Without texts they are pieces of
this repository. Bar: the mean over the texts is within 0.5 % of llama.cpp's, or less. Without
llama-cpp-python hfcore's figures stand alone. Figures go to benches/results/nll.jsonl: a line for
each text of a model, and one for their mean.
"""

from __future__ import annotations

import json
import statistics
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hfcore import HfcoreError, InvalidRequestError, Tokenizer
from hfcore.bench import model, report, session
from hfcore.bench.machine import circumstances, moment
from hfcore.bench.measures import LLAMA, OURS, Place
from hfcore.bench.processes import Worker, WorkerError

HERE = Path(__file__).resolve().parent
BAR = 0.005
MOST_TOKENS = 1500
PIECE = 3500  # characters
PATIENCE = 600.0  # seconds for one text
PIECES = (
    ("LICENSE", 0), ("LICENSE", 1), ("LICENSE", 2), ("DESIGN.md", 0), ("README.md", 0),
    ("CHANGELOG.md", 0), ("rust/engine/src/engine.rs", 0),
)  # fmt: skip
"""Of this repository: a file, and which piece of it."""
MODES: Mapping[str, dict[str, Any]] = {OURS: {}, LLAMA: {"flash_attn": False, "logits_all": True}}

Line = dict[str, Any]


def texts(files: Sequence[Path]) -> list[tuple[str, str]]:
    """(name, text): the first piece of each file, or without files those of this repository."""
    pieces = [(path, path.name, 0) for path in files]
    found = []
    for path, name, place in pieces or [(HERE.parent / n, n, place) for n, place in PIECES]:
        begin, end = PIECE * place, PIECE * (place + 1)
        text = path.read_text(encoding="utf-8")[begin:end]
        found.append((f"{name}, characters {begin}-{end}", text))
    return found


def encoded(facts: model.Facts, wanted: Sequence[tuple[str, str]]) -> list[list[int]]:
    """The ids of each text, as many as are run. Raises InvalidRequestError for less than two."""
    tokenizer = Tokenizer.from_path(facts.path)
    most = min(MOST_TOKENS, facts.context_size - 1)
    found = []
    for name, text in wanted:
        ids: list[int] = tokenizer.encode(text).tolist()[:most]
        if len(ids) < 2:
            raise InvalidRequestError(f"{name}: wanted at least 2 tokens, got {len(ids)}")
        found.append(ids)
    return found


def nlls(
    engine: str, place: Place, path: Path, prompts: Sequence[Sequence[int]], threads: int
) -> list[float]:
    """The mean of each prompt's ids after the first. Raises WorkerError."""
    with Worker(
        engine, MODES[engine], python=place.python, model=path, threads=threads,
        context=max(map(len, prompts)) + 1,
    ) as worker:  # fmt: skip
        worker.loaded(PATIENCE)
        replies = [worker.ask({"do": "logprobs", "ids": ids}, PATIENCE) for ids in prompts]
    for ids, reply in zip(prompts, replies, strict=True):
        if len(reply["logprobs"]) != len(ids) - 1:
            raise WorkerError(f"it gave {len(reply['logprobs'])} numbers for {len(ids)} ids")
    return [-statistics.fmean(reply["logprobs"]) for reply in replies]


def measure(
    path: Path,
    wanted: Sequence[tuple[str, str]],
    places: Mapping[str, Place],
    absent: str,
    threads: int,
) -> list[Line]:
    """A line for each text, then their mean. `absent`: why nobody is in llama.cpp's place.

    Raises HfcoreError where hfcore itself cannot run the model.
    """
    facts = model.read(path)
    ids = encoded(facts, wanted)
    found: dict[str, list[float]] = {}
    for engine, place in places.items():
        try:
            found[engine] = nlls(engine, place, path, ids, threads)
        except WorkerError as error:
            if engine == OURS:
                raise HfcoreError(f"{path.name}: {error}") from error
            absent = str(error)
    names = [*(name for name, _ in wanted), None]
    rows = [dict(zip(found, row, strict=True)) for row in zip(*found.values(), strict=True)]
    rows.append({engine: statistics.fmean(each) for engine, each in found.items()})
    counts = [*map(len, ids), sum(map(len, ids))]
    of_model: Line = {"kind": "nll", "model": path.name, "model_sha256": facts.sha256}
    lines = [
        of_model | {"text": name, "tokens": count} | compared(row, absent)
        for name, count, row in zip(names, counts, rows, strict=True)
    ]
    if lines[-1]["difference"] is not None:
        lines[-1] |= {"bar": BAR, "met": lines[-1]["difference"] <= BAR}
    return lines


def compared(nll: Mapping[str, float], absent: str) -> Line:
    """Each engine's figure, and how much more hfcore's is as a part of llama.cpp's."""
    line: Line = {"nll": {engine: round(value, 6) for engine, value in nll.items()}}
    if LLAMA not in nll:
        return line | {"difference": None, "reason": absent}
    return line | {"difference": round(nll[OURS] / nll[LLAMA] - 1, 6)}


def said(line: Line) -> str:
    """A line as the terminal shows it."""
    text = f"  {line['text'] or 'mean of the texts':44} {line['tokens']:6,} tokens"
    text += f"  {OURS} {line['nll'][OURS]:.5f}"
    if line["difference"] is not None:
        text += f"  {LLAMA} {line['nll'][LLAMA]:.5f}  {line['difference']:+.3%}"
    if "met" in line:
        text += f", bar {line['bar']:+.1%}: {'met' if line['met'] else 'NOT MET'}"
    return text


def run(options: Namespace) -> None:
    """All models; the lines are shown, and written. Raises HfcoreError, OSError."""
    wanted = texts(options.text)
    places, absent = session.find([LLAMA], options.rival_python)
    for line in absent:
        print(report.said(line), flush=True)
    reason = absent[0]["reason"] if absent else ""
    of_run = circumstances() | {"threads": options.threads}
    of_run["command"] = of_run["command"].replace("hfcore", "python benches/bench_nll.py", 1)
    of_run["versions"] = {name: place.version for name, place in places.items()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", encoding="utf-8") as out:
        for path in options.models or session.demo_models():
            print(path.name, flush=True)
            lines = measure(path, wanted, places, reason, options.threads)
            if not absent and lines[-1]["difference"] is None:
                print(f"  not measured: {LLAMA}: {lines[-1]['reason']}")
            for line in lines:
                print(said(line), flush=True)
                out.write(json.dumps(line | of_run | moment()) + "\n")
            out.flush()
    print(f"written: {options.out}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(description="Mean NLL of texts, hfcore's beside llama.cpp's.")
    add = parser.add_argument
    add("models", nargs="*", type=Path, metavar="MODEL.gguf",
        help="default: the demo models that are there")  # fmt: skip
    add("--rival-python", action="append", default=[], metavar="PATH",
        help="a Python that has llama-cpp-python; may be given often")  # fmt: skip
    add("--text", type=Path, nargs="+", default=[], metavar="FILE",
        help=f"the first {PIECE} characters of each; default: this repository's")  # fmt: skip
    add("--threads", type=int, default=2, metavar="N", help="default: 2")
    add("--out", type=Path, default=HERE / "results" / "nll.jsonl", metavar="FILE.jsonl")
    try:
        run(parser.parse_args(arguments))
    except (HfcoreError, OSError) as error:
        print(f"bench_nll: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
