"""Tokenizers beside each other: ids compared first, then MB/s of one thread, in turn in one run.

usage: bench_text.py TOKENIZER.json ... --texts FOLDER [--rounds N] [--batch] [--cold]

First pass: a tokenizer just loaded meets each text for the first time. Repeated: the texts again.
Rivals are what can be imported of tokenizers, tiktoken, kitoken and fastokens.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MESSAGE = "What is the weather like in Paris today? Please answer in one short sentence, thanks."
Encode = Callable[[str], Any]


def hfcore_encoder(path: str) -> Encode:
    """Ours."""
    from hfcore import Tokenizer

    tokenizer = Tokenizer.from_path(path)
    return lambda text: tokenizer.encode(text, add_special_tokens=False)


def tokenizers_encoder(path: str) -> Encode:
    """Hugging Face's."""
    tokenizer = importlib.import_module("tokenizers").Tokenizer.from_file(path)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def fastokens_encoder(path: str) -> Encode:
    """The same file, read by fastokens."""
    tokenizer = importlib.import_module("fastokens").Tokenizer.from_file(path)
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def kitoken_encoder(path: str) -> Encode:
    """The same file, read by kitoken."""
    tokenizer = importlib.import_module("kitoken").Kitoken.from_file(path)
    return lambda text: tokenizer.encode(text, True)


def byte_level(token: str) -> bytes:
    """The bytes of a token as GPT-2 spells them."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table |= {chr(256 + n): byte for n, byte in enumerate(others)}
    return bytes(table[c] for c in token)


def tiktoken_encoder(path: str) -> Encode:
    """Where merges follow the ids of byte-level tokens, as tiktoken has it."""
    tiktoken = importlib.import_module("tiktoken")
    file = json.loads(Path(path).read_text(encoding="utf-8"))
    special = {token["content"]: token["id"] for token in file["added_tokens"]}
    vocab = file["model"]["vocab"]
    ranks = {byte_level(t): rank for t, rank in vocab.items() if t not in special}
    parts = file["pre_tokenizer"].get("pretokenizers", [file["pre_tokenizer"]])
    patterns = [part["pattern"]["Regex"] for part in parts if part["type"] == "Split"]
    gpt2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    encoding = tiktoken.Encoding(
        "bench", pat_str=(patterns or [gpt2])[0], mergeable_ranks=ranks, special_tokens=special
    )
    return lambda text: encoding.encode(text, allowed_special="all")


ENCODERS: dict[str, Callable[[str], Encode]] = {
    "hfcore": hfcore_encoder,
    "tokenizers": tokenizers_encoder,
    "fastokens": fastokens_encoder,
    "kitoken": kitoken_encoder,
    "tiktoken": tiktoken_encoder,
}


def seconds(encode: Encode, texts: list[str]) -> float:
    """CPU seconds of this thread for one pass: the machine may be shared."""
    start = time.thread_time()
    for text in texts:
        encode(text)
    return time.thread_time() - start


def message_seconds(encode: Encode) -> float:
    """For one short message, met before."""
    rounds = 3000
    encode(MESSAGE)
    start = time.thread_time()
    for _ in range(rounds):
        encode(MESSAGE)
    return (time.thread_time() - start) / rounds


def compare(path: str, texts: list[str], rounds: int) -> dict[str, Any]:
    """One tokenizer, by everyone who can read it."""
    size = sum(len(text.encode()) for text in texts) / 1e6
    result: dict[str, Any] = {}
    right: list[list[int]] = []
    for name, make in {"tokenizers": ENCODERS["tokenizers"], **ENCODERS}.items():
        try:
            start = time.thread_time()
            encode = make(path)
            load = time.thread_time() - start
        except Exception as error:
            result[name] = {"cannot": f"{type(error).__name__}: {error}"[:100]}
            continue
        ids = [[int(i) for i in encode(text)] for text in texts]
        right = right or ids
        wrong = sum(a != b for a, b in zip(right, ids, strict=True))
        firsts = [seconds(make(path), texts) for _ in range(rounds)]
        result[name] = {"load_ms": load * 1e3, "wrong": wrong, "firsts": firsts, "encode": encode}
    for _ in range(rounds):
        for measures in result.values():
            if "encode" in measures:
                measures.setdefault("again", []).append(seconds(measures["encode"], texts))
    for measures in result.values():
        if "encode" in measures:
            encode = measures.pop("encode")
            measures["message_us"] = min(message_seconds(encode) for _ in range(3)) * 1e6
            firsts, again = measures.pop("firsts"), measures.pop("again")
            measures["first"], measures["repeated"] = size / min(firsts), size / min(again)
            measures["spread"] = statistics.pstdev(again) / statistics.mean(again)
    return result


def batch(path: str, texts: list[str], rounds: int) -> float:
    """How many times faster a batch is than its texts one by one, by the clock."""
    from hfcore import Tokenizer

    tokenizer = Tokenizer.from_path(path)
    texts = texts * 4
    ratios = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        for text in texts:
            tokenizer.encode(text, add_special_tokens=False)
        middle = time.perf_counter()
        tokenizer.encode_batch(texts, add_special_tokens=False)
        ratios.append((middle - start) / (time.perf_counter() - middle))
    return max(ratios[1:])


COLD = """
import sys
from hfcore import ChatTemplate, Tokenizer
template = ChatTemplate("{% for m in messages %}{{ m.role + ': ' + m.content | trim }}{% endfor %}")
prompt = template.render([{"role": "user", "content": "Hello, who are you?"}])
assert len(Tokenizer.from_path(sys.argv[1]).encode(prompt)) > 5
"""


def cold(path: str, rounds: int) -> float:
    """Milliseconds from a process's start to its end with a prompt rendered and encoded."""
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", COLD, path], check=True, env=os.environ)
        taken.append(time.perf_counter() - start)
    return min(taken) * 1e3


def main() -> None:
    """Measure and print a table per tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokenizers", nargs="+")
    parser.add_argument("--texts", type=Path, required=True, help="a folder of .txt files")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", action="store_true")
    parser.add_argument("--cold", action="store_true")
    arguments = parser.parse_args()
    unnatural = {"pathological", "unicode", "tiny"}
    files = sorted(f for f in arguments.texts.rglob("*.txt") if f.parent.name not in unnatural)
    texts = [file.read_text(encoding="utf-8") for file in files]
    print(f"{len(texts)} texts, {sum(len(text.encode()) for text in texts)} bytes")
    for path in arguments.tokenizers:
        print(f"\n{Path(path).stem:24} first MB/s  repeated    +-  message us  load ms  wrong")
        for name, row in compare(path, texts, arguments.rounds).items():
            if "cannot" in row:
                print(f"  {name:22} {row['cannot']}")
                continue
            print(
                f"  {name:22} {row['first']:10.1f} {row['repeated']:9.1f} {row['spread']:5.0%}"
                f" {row['message_us']:11.2f} {row['load_ms']:8.1f} {row['wrong']:6}"
            )
        if arguments.batch:
            print(f"  batch / one by one: {batch(path, texts, arguments.rounds):.2f}")
        if arguments.cold:
            print(f"  cold: {cold(path, arguments.rounds):.0f} ms")


if __name__ == "__main__":
    main()
