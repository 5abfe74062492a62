"""Many at once: streams together, a newcomer, chats and common prompts, speculation, and a soak.

    python benches/bench_serving.py [MODEL.gguf ...] [--rival-python PATH] [--scenario NAME ...]

    streams      16 streams over one stream, and over llama-cpp-python that serves one by one
    arrival      the first token of a request that comes while 15 decode, and their worst gaps
    chat         the first token of a growing chat's tenth turn over the same one cold
    common       64 requests with one system prompt of 1,000 tokens
    speculation  200 prompts the same with and without, speed of an edit and of free chat
    soak         minutes of everything at once

Models serve streams, arrival and common: a file of 1B by make_model.py, whose noise costs as much
as sense. The others need words, and take the demo model (or --real). Figures go to
benches/results/serving.json, a line for each scenario and model in place of its line before.
"""

from __future__ import annotations

import hashlib
import json
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path

from serving.arrival import arrival
from serving.chat import chat
from serving.common import common
from serving.measure import LackingError, Line, Scenario
from serving.soak import soak
from serving.speculation import speculation
from serving.streams import streams

from hfcore import HfcoreError, _core, fetch
from hfcore.bench.machine import circumstances, moment
from hfcore.bench.session import demo_models

HERE = Path(__file__).resolve().parent
ANY: dict[str, Scenario] = {"streams": streams, "arrival": arrival, "common": common}
REAL: dict[str, Scenario] = {"chat": chat, "speculation": speculation, "soak": soak}
# The soak first: memory that others left would hide what it takes.
BOTH = {"soak": soak} | ANY | REAL


def work(options: Namespace) -> Iterator[tuple[str, Path]]:
    """Each scenario with each model that it is for."""
    for name in options.scenario or BOTH:
        for model in [options.real] if name in REAL else options.models or demo_models():
            yield name, model


def measured(name: str, model: Path, options: Namespace) -> Line:
    """A scenario's line, also where it could not be measured."""
    begun: Line = {"scenario": name, "model": model.name} | circumstances() | moment()
    begun |= {"hfcore": _core.__version__, "threads": options.threads, "rounds": options.rounds}
    begun |= {"core_sha256": options.core, "load_at_start": options.load}
    begun["command"] = begun["command"].replace("hfcore", "python benches/bench_serving.py", 1)
    try:
        return begun | BOTH[name](model, options)
    except (LackingError, HfcoreError) as error:
        return begun | {"met": False, "said": f"not measured: {error}"}


def write(out: Path, line: Line) -> None:
    """The line, in place of the same scenario's and model's."""
    before = out.read_text(encoding="utf-8").splitlines() if out.exists() else []
    lines = {key(old): old for old in map(json.loads, before)} | {key(line): line}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(line) + "\n" for line in lines.values()), encoding="utf-8")


def key(line: Line) -> tuple[str, str]:
    return line["scenario"], line["model"]


def main() -> None:
    parser = ArgumentParser(description="What serving many at once is worth.")
    add = parser.add_argument
    add("models", nargs="*", type=Path, help="default: the demo models that are there")
    add("--real", type=Path, default=fetch.path_of("smollm2"), help="default: the demo model")
    add("--scenario", nargs="+", choices=BOTH, help="default: all")
    add("--rival-python", action="append", default=[], help="a Python with llama-cpp-python")
    add("--threads", type=int, default=2)
    add("--rounds", type=int, default=5)
    add("--prompts", type=int, default=200, help="of speculation; default: 200")
    add("--minutes", type=float, default=10, help="of the soak; default: 10")
    add("--out", type=Path, default=HERE / "results" / "serving.json")
    options = parser.parse_args()
    # Now: another build may replace the file, and what runs later is our own load.
    options.core = hashlib.sha256(Path(_core.__file__ or "").read_bytes()).hexdigest()[:16]
    options.load = moment()["load_average"]
    if options.load is not None and float(options.load) > 1:
        print(f"the machine is busy, load average {options.load}: figures to try this only")
    for name, model in work(options):
        line = measured(name, model, options)
        print(f"{name} ({model.name}): {line['said']}: {'met' if line['met'] else 'NOT MET'}",
              flush=True)  # fmt: skip
        write(options.out, line)
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
