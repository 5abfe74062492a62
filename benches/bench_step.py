"""What a step of decoding costs: keys and values in int8 over f16, 8 requests over one.

    python benches/bench_step.py MODEL.gguf ... [--threads 2] [--rounds 5] [--depth 4096]

int8: a token at a depth of 4,096 tokens, int8 over f16. rows: a step of 8 requests over a step of
one. Each ratio is of two neighbouring runs at temperature 0. Figures go to
benches/results/step.json, a line for each model and ratio.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hfcore import _core
from hfcore.bench.machine import circumstances, moment

HERE = Path(__file__).resolve().parent
ROWS = 8
BARS = {"int8": 1.0, "rows": 1.6}


def step_ms(engine: _core.Engine, requests: int, length: int, new: int, seed: int) -> float:
    """Milliseconds of a decoding step of so many requests, each after `length` random tokens."""
    wishes = {"max_tokens": new, "temperature": 0, "ignore_eos": True}
    # Any tokens: a step costs the same for all.
    tokens = iter(1000 + (seed + 7919 * i) % 29000 for i in range(requests * length))
    prompts = [[next(tokens) for _ in range(length)] for _ in range(requests)]
    streams = [engine.submit(prompt, wishes) for prompt in prompts]
    ends = [usage for stream in streams if (usage := list(stream)[-1].usage)]
    # Nobody decodes alone: prompts are short where there are several, and all have as much to do.
    last = max(ends, key=lambda usage: usage.total_time)
    return 1e3 * (last.total_time - last.time_to_first_token) / (new - 1)


def in_turn(rounds: int, runs: Sequence[Callable[[int], float]]) -> list[list[float]]:
    """Milliseconds of each run, `rounds` times after a warm-up; who goes first alternates."""
    found: list[list[float]] = [[] for _ in runs]
    for round_ in range(rounds + 1):
        order = list(range(len(runs)))
        for i in order[::-1] if round_ % 2 else order:
            time = runs[i](round_)
            if round_ > 0:
                found[i].append(time)
    return found


def measure(model: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    opening: dict[str, Any] = {
        "threads": options.threads, "context_size": options.depth + 256, "prefix_cache": False,
        "speculation": False,
    }  # fmt: skip
    usual = _core.Engine(str(model), **opening, max_sequences=ROWS)
    small = _core.Engine(str(model), **opening, kv_cache_dtype="int8")
    try:
        deep = [
            partial(step_ms, engine, 1, options.depth, options.new) for engine in (small, usual)
        ]
        wide = [partial(step_ms, usual, rows, 16, options.new) for rows in (ROWS, 1)]
        lines = []
        for name, runs in (("int8", deep), ("rows", wide)):
            new, base = in_turn(options.rounds, runs)
            each = [a / b for a, b in zip(new, base, strict=True)]
            spread = [round(x, 3) for x in (min(each), statistics.median(each), max(each))]
            lines.append({
                "name": name, "model": model.name, "depth": options.depth if name == "int8" else 16,
                "ratio": spread, "bar": BARS[name], "met": spread[1] <= BARS[name],
                "ms": [round(x, 3) for x in new], "base_ms": [round(x, 3) for x in base],
            })  # fmt: skip
            print(
                f"{model.name}: {name} {spread[1]:.3f} ({spread[0]:.3f}-{spread[2]:.3f}),"
                f" {statistics.median(new):.2f} over {statistics.median(base):.2f} ms,"
                f" bar {BARS[name]}",
                flush=True,
            )
        return lines
    finally:
        usual.close()
        small.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--depth", type=int, default=4096)
    parser.add_argument("--new", type=int, default=32, help="tokens of each request")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "step.json")
    options = parser.parse_args()
    run = circumstances() | moment() | {"threads": options.threads, "rounds": options.rounds}
    lines = [run | line for model in options.models for line in measure(model, options)]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
