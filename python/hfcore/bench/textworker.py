"""One tokenizer or chat template in a process of its own; requests and replies are lines of JSON.

    python textworker.py ENGINE FILE 1 0 MODE

It stands alone: another Python runs it, which has a rival and no hfcore, so nothing of hfcore is
imported here but by the adapter that needs it. The first reply is {"load", "instruction_set"}; MODE
may have "texts", paths of what a tokenizer is to encode. Then, of a tokenizer,

    {"do": "hashes"}    {"hashes": [...], "bytes"}    of each text's ids
    {"do": "load"}      {"seconds"}                   to read the file once more
    {"do": "first"}     {"seconds"}                   for all texts, by one that was just loaded
    {"do": "again"}     {"seconds"}                   by one that has met them
    {"do": "message"}   {"seconds"}                   for one short message, met before
    {"do": "batch"}     {"alone", "batch"}            by the clock, one by one and at once

and of a template {"do": "hash", "messages": n} -> {"hash", "characters"} and {"do": "render",
"messages": n} -> {"seconds"} for one. Seconds are the process's CPU time unless by the clock.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import sys
import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

Reply = dict[str, Any]
Encode = Callable[[str], Any]
Render = Callable[[list[Reply], Any], str]
MESSAGE = "What is the weather like in Paris today? Please answer in one short sentence, thanks."
SENTENCE = "What is the weather like in the north of Norway, and do I need a coat? "
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
_LEAST = 0.05  # seconds that a repeated call is timed for, and calls at least
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class Tokens:
    """A tokenizer: ids without special tokens around them."""

    def __init__(self, path: str) -> None:
        raise NotImplementedError

    def encode(self, text: str) -> Any:
        """The ids of a text, as the engine gives them."""
        raise NotImplementedError

    def batch(self, texts: list[str]) -> Any:
        """Of several, on all CPUs."""
        raise NotImplementedError("it has no batches")


class _Hfcore(Tokens):
    def __init__(self, path: str) -> None:
        self._tokenizer = importlib.import_module("hfcore").Tokenizer.from_path(path)

    def encode(self, text: str) -> Any:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def batch(self, texts: list[str]) -> Any:
        return self._tokenizer.encode_batch(texts, add_special_tokens=False)


class _Tokenizers(Tokens):
    def __init__(self, path: str) -> None:
        self._tokenizer = importlib.import_module("tokenizers").Tokenizer.from_file(path)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def encode(self, text: str) -> Any:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def batch(self, texts: list[str]) -> Any:
        return self._tokenizer.encode_batch(texts, add_special_tokens=False)


class _Fastokens(Tokens):
    def __init__(self, path: str) -> None:
        self._tokenizer = importlib.import_module("fastokens").Tokenizer.from_file(path)

    def encode(self, text: str) -> Any:
        return self._tokenizer.encode(text, add_special_tokens=False).ids


class _Kitoken(Tokens):
    def __init__(self, path: str) -> None:
        self._tokenizer = importlib.import_module("kitoken").Kitoken.from_file(path)

    def encode(self, text: str) -> Any:
        return self._tokenizer.encode(text, True)


class _Tiktoken(Tokens):
    """Where merges follow the ids of byte-level tokens, as tiktoken has it."""

    def __init__(self, path: str) -> None:
        file = json.loads(Path(path).read_text(encoding="utf-8"))
        special = {token["content"]: token["id"] for token in file["added_tokens"]}
        vocab = file["model"]["vocab"]
        ranks = {_bytes_of(t): rank for t, rank in vocab.items() if t not in special}
        parts = file["pre_tokenizer"].get("pretokenizers", [file["pre_tokenizer"]])
        patterns = [part["pattern"]["Regex"] for part in parts if part["type"] == "Split"]
        self._encoding = importlib.import_module("tiktoken").Encoding(
            "bench", pat_str=(patterns or [_GPT2])[0], mergeable_ranks=ranks, special_tokens=special
        )

    def encode(self, text: str) -> Any:
        return self._encoding.encode(text, allowed_special="all")


@functools.cache
def _alphabet() -> dict[str, int]:
    """The byte that each letter of a byte-level token stands for, as GPT-2 spells them."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + n): byte for n, byte in enumerate(others)
    }


def _bytes_of(token: str) -> bytes:
    table = _alphabet()
    return bytes(table[c] for c in token)


def _hfcore_template(source: str) -> Render:
    template = importlib.import_module("hfcore").ChatTemplate(source, special_tokens=SPECIAL)
    return lambda messages, tools: str(
        template.render(messages, tools=tools, add_generation_prompt=True)
    )


def _transformers_template(source: str) -> Render:
    tokenizers = importlib.import_module("tokenizers")
    tokenizer = importlib.import_module("transformers").PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE()),
        chat_template=source,
        **SPECIAL,
    )
    return lambda messages, tools: str(
        tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=True, tokenize=False
        )
    )


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> None:
    raise ValueError(message)


def _now(form: str) -> str:
    return time.strftime(form)


def _jinja2_template(source: str) -> Render:
    """The compiled template alone, without what transformers does around it."""
    sandbox = importlib.import_module("jinja2.sandbox")
    made = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    made.filters["tojson"] = _to_json
    made.globals.update(raise_exception=_raise, strftime_now=_now)
    template = made.from_string(source)
    return lambda messages, tools: str(template.render(_given(messages, tools)))


def _minijinja_template(source: str) -> Render:
    made = importlib.import_module("minijinja").Environment(
        templates={"chat": source}, filters={"tojson": _to_json}, trim_blocks=True,
        lstrip_blocks=True, globals={"raise_exception": _raise, "strftime_now": _now},
    )  # fmt: skip
    return lambda messages, tools: str(made.render_template("chat", **_given(messages, tools)))


def _given(messages: list[Reply], tools: Any) -> Reply:
    more = {"documents": None, "add_generation_prompt": True}
    return {"messages": messages, "tools": tools, **more, **SPECIAL}


TOKENIZERS: dict[str, type[Tokens]] = {
    "hfcore": _Hfcore,
    "tokenizers": _Tokenizers,
    "fastokens": _Fastokens,
    "kitoken": _Kitoken,
    "tiktoken": _Tiktoken,
}
TEMPLATES: dict[str, Callable[[str], Render]] = {
    "hfcore": _hfcore_template,
    "transformers": _transformers_template,
    "jinja2": _jinja2_template,
    "minijinja": _minijinja_template,
}


def conversation(count: int) -> list[Reply]:
    """A system message, then user and assistant in turn."""
    messages: list[Reply] = [{"role": "system", "content": "You are helpful."}]
    for i in range(count - 1):
        role = "assistant" if i % 2 else "user"
        messages.append({"role": role, "content": f"{i}: {SENTENCE * (1 + i % 4)}".strip()})
    return messages


def tools() -> list[Reply]:
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


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _cpu_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def _one(call: Callable[[], object]) -> float:
    """CPU seconds of one call, over many."""
    calls = max(1, int(_LEAST / max(_cpu_seconds(lambda: [call() for _ in range(5)]) / 5, 1e-7)))
    start = time.process_time()
    for _ in range(calls):
        call()
    return (time.process_time() - start) / calls


def _each(encode: Encode, texts: Iterable[str]) -> None:
    for text in texts:
        encode(text)


class TokenJob:
    """What is asked of a tokenizer."""

    def __init__(self, engine: str, path: str, texts: Sequence[str]) -> None:
        self._make = TOKENIZERS[engine]
        self._path = path
        self._tokenizer = self._make(path)
        self._texts = [Path(text).read_text(encoding="utf-8") for text in texts]

    def hashes(self, _: Reply) -> Reply:
        """Of each text's ids."""
        ids = (array("I", map(int, self._tokenizer.encode(text))) for text in self._texts)
        size = sum(len(text.encode()) for text in self._texts)
        return {"hashes": [_hash(some.tobytes()) for some in ids], "bytes": size}

    def load(self, _: Reply) -> Reply:
        """Read the file once more."""
        return {"seconds": _clock_seconds(lambda: self._make(self._path))}

    def first(self, _: Reply) -> Reply:
        """All texts, by a tokenizer that has met none."""
        fresh = self._make(self._path)
        return {"seconds": _cpu_seconds(lambda: _each(fresh.encode, self._texts))}

    def again(self, _: Reply) -> Reply:
        """All texts, by one that has met them."""
        return {"seconds": _cpu_seconds(lambda: _each(self._tokenizer.encode, self._texts))}

    def message(self, _: Reply) -> Reply:
        """One short message."""
        return {"seconds": _one(lambda: self._tokenizer.encode(MESSAGE))}

    def batch(self, _: Reply) -> Reply:
        """One by one and at once, by the clock; each by a tokenizer that has met none."""
        one, many = self._make(self._path), self._make(self._path)
        start = time.perf_counter()
        _each(one.encode, self._texts)
        middle = time.perf_counter()
        many.batch(self._texts)
        return {"alone": middle - start, "batch": time.perf_counter() - middle}


def _clock_seconds(work: Callable[[], object]) -> float:
    """By the clock: some read a file on several threads."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class TemplateJob:
    """What is asked of a template."""

    def __init__(self, engine: str, path: str) -> None:
        source = Path(path).read_text(encoding="utf-8")
        self._render = TEMPLATES[engine](source)
        self._tools = tools() if "tools" in source else None

    def hash(self, request: Reply) -> Reply:
        """Of the text."""
        text = self._render(conversation(request["messages"]), self._tools)
        return {"hash": _hash(text.encode()), "characters": len(text)}

    def render(self, request: Reply) -> Reply:
        """From Python's objects to the text."""
        messages = conversation(request["messages"])
        return {"seconds": _one(lambda: self._render(messages, self._tools))}


def serve(job: TokenJob | TemplateJob, requests: TextIO, replies: TextIO) -> None:
    """Answer until nothing more is asked."""
    for line in requests:
        request = json.loads(line)
        try:
            reply = getattr(job, request["do"])(request)
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        _put(replies, reply)


def _put(replies: TextIO, reply: Reply) -> None:
    replies.write(json.dumps(reply) + "\n")
    replies.flush()


def main() -> None:
    """The program."""
    engine, path, mode = sys.argv[1], sys.argv[2], json.loads(sys.argv[5])
    replies, sys.stdout = sys.stdout, sys.stderr  # what an engine prints is no reply
    start = time.perf_counter()
    is_template = path.endswith(".jinja")
    job: TemplateJob | TokenJob
    job = TemplateJob(engine, path) if is_template else TokenJob(engine, path, mode["texts"])
    reply = {"load": time.perf_counter() - start, "instruction_set": None}
    _put(replies, reply)
    serve(job, sys.stdin, replies)


if __name__ == "__main__":
    main()
