"""The command `hfcore`: chat, demo, tokenize, render, info, quantize, bench.

LangChain is not loaded by any of it.

Exit status: 0, 1 for a model that does not work, 2 for a wrong command line, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from . import bench
from .errors import HfcoreError, InvalidRequestError, NoChatTemplateError

if TYPE_CHECKING:
    from .engine import Engine, Usage

QUESTION = "Name three rivers of Europe."
_SAMPLING = ("max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "timeout")
_OPENING = ("device", "context_size", "threads", "kv_cache_dtype")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; its exit status."""
    parsed = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], None] = parsed.run
    try:
        run(parsed)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader had enough, e.g. `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (HfcoreError, OSError) as error:
        print(f"hfcore: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, InvalidRequestError) else 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hfcore", description="Hugging Face models in this process, without torch."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    chat = commands.add_parser("chat", help="ask a model; without PROMPT, talk to it")
    _takes_model(chat)
    chat.add_argument(
        "prompt", nargs="?", metavar="PROMPT", help="what to ask; - reads it from stdin"
    )
    _takes_options(chat)
    chat.set_defaults(run=_chat)

    demo = commands.add_parser("demo", help="ask a small model that is fetched if need be")
    demo.add_argument("prompt", nargs="?", metavar="PROMPT", default=QUESTION)
    demo.add_argument("--model", default="smollm2", metavar="NAME", help="default: smollm2")
    _takes_options(demo)
    demo.set_defaults(run=_demo)

    tokenize = commands.add_parser("tokenize", help="a text's tokens: id, a tab, token")
    _takes_model(tokenize)
    tokenize.add_argument("text", metavar="TEXT")
    tokenize.set_defaults(run=_tokenize)

    render = commands.add_parser("render", help="a conversation as the model's prompt")
    _takes_model(render)
    render.add_argument(
        "messages", metavar="MESSAGES", help="a question, or a JSON list of messages; - is stdin"
    )
    render.add_argument("--system", metavar="TEXT", help="a system message before it")
    render.set_defaults(run=_render)

    info = commands.add_parser("info", help="what a model is")
    _takes_model(info)
    info.set_defaults(run=_info)

    smaller = commands.add_parser("quantize", help="a GGUF model in other types, such as q4_k_m")
    _takes_model(smaller)
    smaller.add_argument("--to", required=True, metavar="TYPE", help="q4_k_m, q8_0, ...")
    smaller.add_argument("-o", "--out", required=True, type=Path, metavar="FILE.gguf")
    smaller.add_argument(
        "--imatrix", type=Path, metavar="FILE.gguf", help="what llama-imatrix says of the inputs"
    )
    smaller.add_argument(
        "--allow-requantize", action="store_true", help="also a model that is quantised already"
    )
    smaller.add_argument("--threads", type=int, metavar="N")
    smaller.add_argument(
        "--text", type=Path, metavar="FILE", help="say how much worse this text is predicted"
    )
    smaller.set_defaults(run=_quantize)

    measure = commands.add_parser(
        "bench", help="hfcore and its rivals on the same files, beside the machine's limits"
    )
    bench.takes_options(measure)
    measure.set_defaults(run=bench.run)
    return parser


def _takes_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="a .gguf file, a directory, owner/name or owner/name:Q4_K_M"
    )


def _takes_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--system", metavar="TEXT", help="a system message before the question")
    add("--max-tokens", type=int, default=512, metavar="N", help="default: 512")
    add("--temperature", type=float, metavar="T", help="0 is greedy; default: as the model says")
    add("--top-p", type=float, metavar="P")
    add("--top-k", type=int, metavar="K")
    add("--seed", type=int, metavar="N")
    add("--stop", action="append", metavar="TEXT", help="ends the answer; may be given often")
    add("--timeout", type=float, metavar="SECONDS", help="for the whole answer")
    add("--raw", action="store_true", help="the prompt is text to go on with, no conversation")
    add("--device", default="cpu", metavar="NAME", help="cpu or reference; default: cpu")
    add("--context-size", type=int, metavar="N")
    add("--threads", type=int, metavar="N")
    add("--kv-cache-dtype", metavar="TYPE", help="f16 or int8, in half the memory; default: f16")


def _chat(parsed: argparse.Namespace) -> None:
    prompt = sys.stdin.read() if parsed.prompt == "-" else parsed.prompt
    with _opened(parsed.model, parsed) as engine:
        if prompt is not None:
            _answer(engine, _conversation(parsed, prompt), parsed, sys.stderr)
            return
        _talk(engine, parsed)


def _talk(engine: Engine, parsed: argparse.Namespace) -> None:
    """Question after question until the input ends; the model sees all of the conversation."""
    messages: list[dict[str, Any]] = _system(parsed)
    for question in _questions():
        messages.append({"role": "user", "content": question})
        prompt = question if parsed.raw else messages
        text = _answer(engine, prompt, parsed, sys.stderr)
        messages.append({"role": "assistant", "content": text})


def _questions() -> Iterable[str]:
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def _demo(parsed: argparse.Namespace) -> None:
    from .fetch import fetch

    with _opened(fetch(parsed.model), parsed) as engine:
        _answer(engine, _conversation(parsed, parsed.prompt), parsed, sys.stdout)


def _tokenize(parsed: argparse.Namespace) -> None:
    from . import _core, hub

    tokenizer = _core.Tokenizer.from_path(hub.resolve(parsed.model))
    for token_id in tokenizer.encode(parsed.text, add_special_tokens=False):
        print(f"{int(token_id)}\t{tokenizer.id_to_token(int(token_id))}")


def _render(parsed: argparse.Namespace) -> None:
    from . import _core, hub

    path = hub.resolve(parsed.model)
    template = _core.Tokenizer.from_path(path).chat_template
    if template is None:
        raise NoChatTemplateError(f"{path} has no chat template", model=str(path))
    given = sys.stdin.read() if parsed.messages == "-" else parsed.messages
    messages = _system(parsed) + _messages(given)
    print(template.render(messages, add_generation_prompt=True), end="")


def _info(parsed: argparse.Namespace) -> None:
    with _opened(parsed.model, parsed) as engine:
        for name, value in engine.info.items():
            print(f"{name}: {value}")


def _quantize(parsed: argparse.Namespace) -> None:
    from .quantization import mean_nll, quantize

    made = quantize(
        parsed.model, parsed.to, parsed.out, imatrix=parsed.imatrix,
        allow_requantize=parsed.allow_requantize, threads=parsed.threads,
    )  # fmt: skip
    print(f"{made.path}: {made.tensors} tensors, {made.bytes_before} -> {made.bytes} bytes")
    if parsed.text is not None:
        text = parsed.text.read_text(encoding="utf-8")
        before, after = (mean_nll(file, text) for file in (parsed.model, made.path))
        print(f"mean NLL {before:.4f} -> {after:.4f}, {100 * (after / before - 1):+.2f} %")


def _messages(given: str) -> list[dict[str, Any]]:
    """A JSON list of messages, or else a question as it stands."""
    if not given.lstrip().startswith("["):
        return [{"role": "user", "content": given}]
    try:
        messages = json.loads(given)
    except ValueError as error:
        raise InvalidRequestError(
            f"messages must be a JSON list, got {given:.60}: {error}"
        ) from error
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise InvalidRequestError(f"messages must be a JSON list of objects, got {given:.60}")
    return messages


def _system(parsed: argparse.Namespace) -> list[dict[str, Any]]:
    return [{"role": "system", "content": parsed.system}] if parsed.system else []


def _conversation(parsed: argparse.Namespace, prompt: str) -> str | list[dict[str, Any]]:
    return prompt if parsed.raw else [*_system(parsed), {"role": "user", "content": prompt}]


def _opened(model: str | Path, parsed: argparse.Namespace) -> Engine:
    from .engine import Engine

    opening: dict[str, Any] = {name: getattr(parsed, name, None) for name in _OPENING}
    return Engine(model, **opening)


def _answer(
    engine: Engine, prompt: str | list[dict[str, Any]], parsed: argparse.Namespace, to: TextIO
) -> str:
    """Stream the answer to stdout, then the line of figures to `to`; the answer."""
    options = {name: getattr(parsed, name) for name in _SAMPLING}
    texts = []
    usage = None
    with engine.stream(prompt, **options) as deltas:
        for delta in deltas:
            print(delta.text, end="", flush=True)
            texts.append(delta.text)
            usage = delta.usage
    print(flush=True)
    if usage is not None:
        print(_figures(usage), file=to)
    return "".join(texts)


def _figures(usage: Usage) -> str:
    return (
        f"[{usage.prompt_tokens} prompt tokens, {usage.completion_tokens} completion tokens,"
        f" first token after {usage.time_to_first_token:.2f} s,"
        f" {usage.tokens_per_second:.1f} tokens/s]"
    )
