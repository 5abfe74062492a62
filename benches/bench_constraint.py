"""What a schema costs for each sampled token, and what forced tokens save on a whole document.

    python benches/bench_constraint.py [MODEL.gguf] [--threads 2] [--rounds 12]

Two measurements, each of two runs in turn on one model and prompt, at temperature 0:
sampled: decoding under a schema with long free strings over plain decoding, no token forced;
document: a record of twelve fields with forced tokens over the same with every token sampled.
Each ratio is of two neighbouring runs. Figures and all that is needed to judge them go to
benches/results/constraint.json. Grammars are compiled in the warm-up and not timed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from hfcore import _core, fetch

HERE = Path(__file__).resolve().parent
CONTEXT = 2048
BARS = {"sampled": 1.05, "document": 0.7}

Run = dict[str, Any]
"""One completion: its text, how many tokens, in how many deltas, and milliseconds."""


# --- the work -------------------------------------------------------------------------------------


def schema_format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "bench", "schema": schema}}


LIST = {
    "type": "object",
    "properties": {"items": {"type": "array", "items": {"type": "string"}}},
    "required": ["items"],
}
FLAG = {"type": "boolean"}
SHORT = {"type": "string", "maxLength": 12}
FIELDS: dict[str, Any] = {
    "customer_reference_number": {"type": "integer", "minimum": 1, "maximum": 99_999},
    "customer_full_name": SHORT,
    "customer_account_type": {"enum": ["private", "business", "public"]},
    "customer_is_subscribed": FLAG,
    "shipping_address_city": SHORT,
    "shipping_address_postcode": {"type": "integer", "minimum": 1000, "maximum": 99_999},
    "shipping_delivery_method": {"enum": ["standard", "express", "pickup"]},
    "order_total_quantity": {"type": "integer", "minimum": 0, "maximum": 999},
    "order_contains_fragile_items": FLAG,
    "order_payment_status": {"enum": ["paid", "pending", "refused"]},
    "invoice_currency_code": {"enum": ["EUR", "USD", "GBP"]},
    "invoice_requires_signature": FLAG,
}
RECORD = {
    "type": "object",
    "properties": FIELDS,
    "required": list(FIELDS),
    "additionalProperties": False,
}


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def list_prompt(_round: int) -> list[dict[str, str]]:
    return ask("Write a long list of animals as JSON.")


def record_prompt(round_: int) -> list[dict[str, str]]:
    """Another each round, so that no prefix cache helps but with the system prompt."""
    return ask(
        f"{1000 + round_ * 7} is the reference. Fill in the order record: Ada Park of Leeds,"
        " 90210, bought 3 fragile vases by express and paid in pounds."
    )


# --- measuring ------------------------------------------------------------------------------------


def complete(engine: _core.Engine, prompt: list[dict[str, str]], wishes: dict[str, Any]) -> Run:
    cpu = os.times()
    deltas = list(engine.submit(prompt, {"temperature": 0, **wishes}))
    used = os.times()
    usage = deltas[-1].usage
    assert usage is not None
    count = usage.completion_tokens
    decode = usage.total_time - usage.time_to_first_token
    return {
        "text": "".join(delta.text for delta in deltas),
        "tokens": count,
        "deltas": len(deltas),
        "prompt_tokens": usage.prompt_tokens,
        "per_token_ms": 1e3 * decode / (count - 1),
        "total_ms": 1e3 * usage.total_time,
        "cpu_ms": 1e3 * (used.user - cpu.user + used.system - cpu.system),
    }


def in_turn(
    name: str, rounds: int, measure: str, new: Callable[[int], Run], base: Callable[[int], Run]
) -> dict[str, Any]:
    """`new` over `base` by `measure`, round by round after one warm-up."""
    runs: dict[str, list[Run]] = {"new": [], "base": []}
    same = True
    for round_ in range(rounds + 1):
        # Alternate who goes first: a machine that warms up or slows down favours nobody.
        order = [("new", new), ("base", base)]
        pair = {which: run(round_) for which, run in (order[::-1] if round_ % 2 else order)}
        if round_ > 0:  # the first is the warm-up
            same = same and pair["new"]["text"] == pair["base"]["text"]
            for which, run_ in pair.items():
                runs[which].append(run_)
    each = [n[measure] / b[measure] for n, b in zip(runs["new"], runs["base"], strict=True)]
    best = min(r[measure] for r in runs["new"]) / min(r[measure] for r in runs["base"])
    ratio = spread(each)
    return {
        "name": name,
        "measure": measure,
        "bar": BARS[name],
        "ratio": ratio,
        "ratio_of_best": round(best, 3),
        "met": ratio[1] <= BARS[name],
        "same_text": same,
        "new": summary(runs["new"], measure),
        "base": summary(runs["base"], measure),
    }


def summary(runs: list[Run], measure: str) -> dict[str, Any]:
    return {
        "prompt_tokens": sorted({r["prompt_tokens"] for r in runs}),
        "tokens": sorted({r["tokens"] for r in runs}),
        "deltas": sorted({r["deltas"] for r in runs}),
        measure: [round(r[measure], 3) for r in runs],
        "cpu_ms": [round(r["cpu_ms"]) for r in runs],
        "last_text": runs[-1]["text"],
    }


def spread(values: list[float]) -> list[float]:
    """[least, median, most]."""
    return [round(x, 3) for x in (min(values), statistics.median(values), max(values))]


def measure_all(model: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    opening: dict[str, Any] = {
        "threads": options.threads, "context_size": CONTEXT, "prefix_cache": False,
        "speculation": False,
    }  # fmt: skip
    sampling = _core.Engine(str(model), **opening | {"forced_tokens": False})
    forcing = _core.Engine(str(model), **opening | {"forced_tokens": True})
    listing = {"max_tokens": options.new, "response_format": schema_format(LIST)}
    plain = {"max_tokens": options.new, "ignore_eos": True}
    record = {"max_tokens": 400, "response_format": schema_format(RECORD)}
    try:
        sampled = in_turn(
            "sampled", options.rounds, "per_token_ms",
            lambda i: complete(sampling, list_prompt(i), listing),
            lambda i: complete(sampling, list_prompt(i), plain),
        )  # fmt: skip
        show(sampled)
        document = in_turn(
            "document", options.rounds, "total_ms",
            lambda i: complete(forcing, record_prompt(i), record),
            lambda i: complete(sampling, record_prompt(i), record),
        )  # fmt: skip
        show(document)
    finally:
        sampling.close()
        forcing.close()
    return [sampled, document]


# --- reporting ------------------------------------------------------------------------------------


def show(result: dict[str, Any]) -> None:
    least, median, most = result["ratio"]
    print(
        f"{result['name']:9} {result['measure']:13} ratio {median:.3f} ({least:.3f}-{most:.3f}),"
        f" of best {result['ratio_of_best']:.3f}, bar {result['bar']}:"
        f" {'met' if result['met'] else 'MISSED'}"
    )
    for which in ("new", "base"):
        figures = result[which]
        low, middle, high = spread(figures[result["measure"]])
        print(
            f"  {which:5} {middle:9.2f} ms ({low:.2f}-{high:.2f})"
            f"  tokens {figures['tokens']} deltas {figures['deltas']}"
        )
    if result["name"] == "document":
        print(f"  same text: {result['same_text']}")


def circumstances(options: argparse.Namespace) -> dict[str, Any]:
    """What one must know to judge the figures."""
    info = read(Path("/proc/cpuinfo"))
    lines = [line.split(":", 1) for line in info.splitlines() if ":" in line]
    fields = {key.strip(): value.strip() for key, value in lines}
    wanted = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": head(HERE.parent / ".git")[:12],
        # The library may be newer than the commit: this says which one was timed.
        "core_sha256": options.core,
        "cpu": fields.get("model name", platform.processor()),
        "cpu_flags": [flag for flag in wanted if flag in fields.get("flags", "").split()],
        "load_average_before": options.load,
        "load_average_after": load_average(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        # Names only: where this machine keeps its files is nobody's business.
        "command": " ".join(["python", "benches/bench_constraint.py", *map(base, sys.argv[1:])]),
        "threads": options.threads,
        "new_tokens": options.new,
        "rounds": options.rounds,
    }


def head(git: Path) -> str:
    """The commit checked out, read from the files; empty where they say it another way."""
    text = read(git / "HEAD").strip()
    return read(git / text.removeprefix("ref: ")).strip() if text.startswith("ref: ") else text


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def load_average() -> str | None:
    return next(iter(read(Path("/proc/loadavg")).split()), None)


def base(argument: str) -> str:
    return Path(argument).name if Path(argument).is_absolute() else argument


def main() -> None:
    parser = argparse.ArgumentParser(description="What a schema costs, and forced tokens save.")
    parser.add_argument("model", nargs="?", type=Path, help="GGUF file (default: a demo model)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--new", type=int, default=200, help="tokens to sample (default: 200)")
    parser.add_argument("--rounds", type=int, default=12, help="after the warm-up (default: 12)")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "constraint.json")
    options = parser.parse_args()
    options.load = load_average()
    # Now: another build may replace the file while this runs.
    options.core = hashlib.sha256(Path(_core.__file__ or "").read_bytes()).hexdigest()[:16]
    model = options.model or fetch.path_of(next(iter(fetch.DEMO_MODELS)))
    print(model.name)
    results = measure_all(model, options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "circumstances": circumstances(options),
        "model": model.name,
        "bytes": model.stat().st_size,
        "results": results,
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
