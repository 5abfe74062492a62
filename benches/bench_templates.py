"""Chat templates: messages to text, beside transformers' apply_chat_template or compiled jinja2.

    python benches/bench_templates.py TEMPLATES [--out results.jsonl] [--rounds 7]

TEMPLATES is a directory of .jinja files. Each conversation is rendered by all in turn, and nothing
is timed before the texts are equal. One thread; the best of the rounds, with their median.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hfcore import ChatTemplate

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
WANTED = {
    "Llama-3.1": "meta-llama-Llama-3.1-8B-Instruct",
    "Qwen3": "qwen3_training",
    "Zephyr": "zephyr-7b-beta",
}
SENTENCE = "What is the weather like in the north of Norway, and do I need a coat? "
Render = Callable[[list[dict[str, Any]], list[dict[str, Any]] | None], str]


def conversation(count: int) -> list[dict[str, Any]]:
    """A system message, then user and assistant in turn."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": "You are helpful."}]
    for i in range(count - 1):
        role = "assistant" if i % 2 else "user"
        messages.append({"role": role, "content": f"{i}: {SENTENCE * (1 + i % 4)}".strip()})
    return messages


def tools() -> list[dict[str, Any]]:
    """Three tools with a few parameters each."""
    made = []
    for name in ("weather", "coat", "route"):
        properties = {
            key: {"type": "string", "description": f"The {key} of the {name}"}
            for key in ("city", "country", "unit")
        }
        parameters = {"type": "object", "properties": properties, "required": ["city"]}
        function = {"name": name, "description": f"Finds a {name}", "parameters": parameters}
        made.append({"type": "function", "function": function})
    return made


def ours(source: str) -> Render:
    """ChatTemplate.render."""
    template = ChatTemplate(source, special_tokens=SPECIAL)
    return lambda messages, tools: template.render(
        messages, tools=tools, add_generation_prompt=True
    )


def rival(source: str) -> tuple[str, Render]:
    """apply_chat_template where transformers is there, else jinja2's compiled template alone."""
    try:
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast
    except ImportError:
        return "jinja2", _jinja2(source)
    empty = Tokenizer(models.BPE())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=empty, chat_template=source, **SPECIAL)
    return "transformers", lambda messages, tools: tokenizer.apply_chat_template(
        messages, tools=tools, add_generation_prompt=True, tokenize=False
    )


def _jinja2(source: str) -> Render:
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    import jinja_reference

    template = jinja_reference.environment().from_string(source)
    return lambda messages, tools: template.render(
        messages=messages, tools=tools, documents=None, add_generation_prompt=True, **SPECIAL
    )


def seconds(render: Render, given: tuple[Any, Any], calls: int) -> float:
    """What one call takes, over so many."""
    start = time.perf_counter()
    for _ in range(calls):
        render(*given)
    return (time.perf_counter() - start) / calls


def measure(name: str, source: str, count: int, rounds: int) -> dict[str, Any]:
    """All on one conversation, in turn."""
    given = (conversation(count), None if name == "Zephyr" else tools())
    rival_name, theirs = rival(source)
    mine = ours(source)
    text = mine(*given)
    if text != theirs(*given):
        raise SystemExit(f"{name}, {count} messages: the texts differ")
    times: dict[str, list[float]] = {"hfcore": [], rival_name: []}
    for _ in range(rounds):
        for who, render in (("hfcore", mine), (rival_name, theirs)):
            calls = max(1, int(0.1 / max(seconds(render, given, 3), 1e-7)))
            times[who].append(seconds(render, given, calls))
    ratios = [b / a for a, b in zip(times["hfcore"], times[rival_name], strict=True)]
    return {
        "template": name,
        "messages": count,
        "characters": len(text),
        "rival": rival_name,
        "us": round(1e6 * min(times["hfcore"]), 2),
        "us_median": round(1e6 * statistics.median(times["hfcore"]), 2),
        "rival_us": round(1e6 * min(times[rival_name]), 2),
        "rival_us_median": round(1e6 * statistics.median(times[rival_name]), 2),
        "ratio": round(statistics.median(ratios), 2),
        "ratio_low": round(min(ratios), 2),
        "ratio_high": round(max(ratios), 2),
    }


def main() -> None:
    """Print a line for each template and length."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("templates", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    for name, part in WANTED.items():
        found = sorted(p for p in arguments.templates.glob("*.jinja") if part in p.name)
        if not found:
            print(f"{name}: no template here")
            continue
        source = found[0].read_text(encoding="utf-8")
        for count in (3, 60):
            made = measure(name, source, count, arguments.rounds)
            print(
                f"{name:10} {count:3} messages, {made['characters']:6} characters:"
                f" hfcore {made['us']:8.2f} us, {made['rival']} {made['rival_us']:8.2f} us,"
                f" {made['ratio']:.1f} x ({made['ratio_low']:.1f} to {made['ratio_high']:.1f})",
                flush=True,
            )
            if arguments.out:
                with arguments.out.open("a", encoding="utf-8") as out:
                    out.write(json.dumps(made) + "\n")


if __name__ == "__main__":
    main()
