"""Model files with wounds: an error or a model that runs, soon, in bounded memory; never a panic.

As a program: `python tests/test_hostile_files.py [SECONDS [SEED]]` runs so long and counts. With
HFCORE_CASES the tiny checkpoints of many families are wounded too.
"""

from __future__ import annotations

import copy
import json
import os
import random
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hfcore import Engine
from hfcore.errors import HfcoreError, InternalError
from hfcore.testing import CHATML, tiny_model

MEMORY = 4 << 30
"""Address space that the program may take: the models are smaller than a MB, the caches 4 MB."""

SLOW = 10.0
"""Seconds after which opening counts as hanging."""

NUMBERS = [0, 1, -1, 2, 31, 255, 2**16, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1]
OTHERS: list[Any] = [
    None, True, "", "x" * 100_000, 0.0, -0.5, 1e-300, 1e308, 2**70, [], {}, [[]], [None] * 1000,
    {"a": {"b": 1}}, ["a"], [-1], "nan", "../../etc/passwd", "\0", [2**63] * 5,
]  # fmt: skip


def checkpoint(folder: Path) -> Path:
    """A llama of 40 kB as transformers saves one."""
    random_ = np.random.default_rng(1)
    tokens = {chr(i): i - 32 for i in range(32, 127)} | {"<s>": 95}
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": len(tokens),
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "hidden_act": "silu",
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": False, "torch_dtype": "float32", "bos_token_id": 95,
        "eos_token_id": 95, "attention_bias": False, "mlp_bias": False,
        "rope_scaling": {"rope_type": "yarn", "factor": 2.0,
                         "original_max_position_embeddings": 64},
    }  # fmt: skip
    shapes = {"model.embed_tokens": (96, 32), "lm_head": (96, 32), "model.norm": (32,)}
    for i in range(2):
        layer = f"model.layers.{i}."
        shapes |= {
            layer + "input_layernorm": (32,), layer + "post_attention_layernorm": (32,),
            layer + "self_attn.q_proj": (32, 32), layer + "self_attn.k_proj": (16, 32),
            layer + "self_attn.v_proj": (16, 32), layer + "self_attn.o_proj": (32, 32),
            layer + "mlp.gate_proj": (64, 32), layer + "mlp.up_proj": (64, 32),
            layer + "mlp.down_proj": (32, 64),
        }  # fmt: skip
    header, body = {}, b""
    for name, shape in shapes.items():
        data = random_.standard_normal(shape, np.float32).tobytes()
        places = [len(body), len(body) + len(data)]
        header[f"{name}.weight"] = {"dtype": "F32", "shape": shape, "data_offsets": places}
        body += data
    tokenizer = {
        "version": "1.0", "added_tokens": [{"id": 95, "content": "<s>", "special": True}],
        "normalizer": None, "pre_tokenizer": {"type": "Split", "pattern": {"String": ""},
                                              "behavior": "Isolated", "invert": False},
        "model": {"type": "WordLevel", "vocab": tokens, "unk_token": "<s>"},
    }  # fmt: skip
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(packed(header, body))
    for name, value in {
        "config.json": config, "tokenizer.json": tokenizer,
        "generation_config.json": {"eos_token_id": [95], "temperature": 0.7, "top_p": 0.9},
        "tokenizer_config.json": {"bos_token": "<s>", "chat_template": CHATML},
    }.items():  # fmt: skip
        (folder / name).write_text(json.dumps(value))
    return folder


def packed(header: Any, body: bytes) -> bytes:
    """A safetensors file."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all that a JSON value holds."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(items)[:50]:
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from places(inner, (*path, key))


class Wounds:
    """Makes a file worse."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)  # noqa: S311 (the same for a seed is what is wanted)

    def of(self, name: str, data: bytes) -> bytes:
        """The file with a wound of its kind, or of any."""
        kind = self.random.random()
        if kind < 0.7 and name.endswith(".json"):
            return self.text(data)
        if kind < 0.7 and name.endswith(".safetensors"):
            (length,) = struct.unpack("<Q", data[:8])
            return packed(self.text(data[8 : 8 + length]), data[8 + length :])
        return self.raw(data, name.endswith((".gguf", ".safetensors")))

    def text(self, data: bytes) -> bytes:
        """JSON with other values, or none, or two of a name."""
        try:
            value = json.loads(data)
        except ValueError:
            return self.raw(data, False)
        for _ in range(self.random.choice([1, 1, 1, 2, 5])):
            paths = list(places(value)) if isinstance(value, dict | list) else []
            if not paths:
                break
            *way, key = self.random.choice(paths)
            holder = value
            for step in way:
                holder = holder[step]
            self.change(holder, key)
        try:
            made = json.dumps(value)
        except RecursionError:
            return self.raw(data, head_first=False)
        if self.random.random() < 0.1:
            made = made[:-1] + "," + made[1:]
        return made.encode()

    def change(self, holder: Any, key: Any) -> None:
        """One place of it."""
        rng, old = self.random, holder[key]
        match rng.randrange(6):
            case 0:
                del holder[key]
            case 1:
                holder[key] = rng.choice(NUMBERS)
            case 2:
                holder[key] = copy.deepcopy(rng.choice(OTHERS))
            case 3 if isinstance(old, int | float):
                holder[key] = rng.choice([old * 2, old + 1, -old, old - 1, old * 10**6, float(old)])
            case 3 | 4 if isinstance(old, list):
                holder[key] = rng.choice([old * 2, old[::-1], old[1:], [*old, rng.choice(NUMBERS)]])
            case 4 if isinstance(holder, dict):
                holder[str(key) + "x"] = holder.pop(key)
            case _:
                nested: Any = old
                for _ in range(rng.choice([1, 3, 300])):
                    nested = [nested]
                holder[key] = nested

    def raw(self, data: bytes, head_first: bool) -> bytes:
        """Bytes cut, changed, put in."""
        rng, made = self.random, bytearray(data)
        for _ in range(rng.choice([1, 1, 2, 8])):
            end = min(len(made), 8192) if head_first and rng.random() < 0.8 else len(made)
            at = rng.randrange(end + 1)
            match rng.randrange(6):
                case 0:
                    del made[at:]
                case 1:
                    del made[at : at + rng.choice([1, 8, 100])]
                case 2:
                    made[at : at + 1] = bytes([rng.randrange(256)])
                case 3:
                    made[at : at + 8] = struct.pack("<Q", rng.choice(NUMBERS) % 2**64)
                case 4:
                    made[at : at + 4] = struct.pack("<I", rng.choice(NUMBERS) % 2**32)
                case _:
                    made[at:at] = rng.randbytes(rng.choice([1, 8, 300]))
        return bytes(made)


def models(folder: Path) -> list[Path]:
    """Directories with a model each."""
    gguf = folder / "gguf"
    gguf.mkdir()
    tiny_model(gguf)
    found = [gguf, checkpoint(folder / "llama")]
    if cases := os.environ.get("HFCORE_CASES"):
        configs = sorted(Path(cases, "families").rglob("config.json"))
        for i, config in enumerate(c for c in configs if "Pooling" not in str(c)):
            keep = [p for p in config.parent.iterdir() if p.suffix in {".json", ".safetensors"}]
            (folder / f"case{i}").mkdir()
            for path in keep:
                if path.name != "golden.json":
                    shutil.copy(path, folder / f"case{i}" / path.name)
            found.append(folder / f"case{i}")
        for i, path in enumerate(sorted(Path(cases, "families", "gguf").glob("*.gguf"))):
            (folder / f"gguf{i}").mkdir()
            found.append(Path(shutil.copy(path, folder / f"gguf{i}")).parent)
    return found


def wounded(seed: int, model: Path, folder: Path) -> Path:
    """The model, with one file of it made worse."""
    wounds = Wounds(seed)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(model, folder)
    files = sorted(p for p in folder.iterdir() if p.suffix in {".json", ".safetensors", ".gguf"})
    path = wounds.random.choice(files)
    path.write_bytes(wounds.of(path.name, path.read_bytes()))
    return folder


def outcome(folder: Path) -> str:
    """What became of opening it: it runs, an error, or what must not be."""
    start = time.monotonic()
    try:
        with Engine(folder, threads=1, kv_cache_bytes=4 << 20, max_sequences=1) as engine:
            engine.generate("Hello", max_tokens=3)
            kind = "runs"
    except InternalError as error:
        kind = f"panic: {error}"
    except HfcoreError:
        kind = "error"
    except BaseException as error:
        kind = f"{type(error).__name__}: {error}"
    return kind if time.monotonic() - start < SLOW else f"slow {kind}"


def main(seconds: float, seed: int, count: int | None = None) -> int:
    """Run so long, or so many; print what must not be, with its seed."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    kinds: Counter[str] = Counter()
    end, slowest, number = time.monotonic() + seconds, 0.0, seed
    with tempfile.TemporaryDirectory() as folder:
        found = models(Path(folder))
        while time.monotonic() < end and (count is None or number < seed + count):
            made = wounded(number, found[number % len(found)], Path(folder) / "wounded")
            # Said first: what kills the process names its seed all the same.
            print(f"\r{number}", end="", file=sys.stderr, flush=True)
            start = time.monotonic()
            kind = outcome(made)
            slowest = max(slowest, time.monotonic() - start)
            kinds[kind] += 1
            if kind not in ("runs", "error"):
                print(f"seed {number} of {found[number % len(found)].name}: {kind}", flush=True)
            number += 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(f"{number - seed} files from {seed}: {dict(kinds)}; slowest {slowest:.1f} s, {peak} MB")
    return 0 if set(kinds) <= {"runs", "error"} else 1


def test_wounded_files_are_an_error_or_run() -> None:
    count = os.environ.get("HFCORE_FUZZ", "160")
    done = subprocess.run(
        [sys.executable, __file__, "240", "0", count],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert f"{count} files" in done.stdout
    assert "'runs'" in done.stdout, "wounds that do not matter"
    assert "'error'" in done.stdout


if __name__ == "__main__":
    arguments = [int(text) for text in sys.argv[1:4]]
    sys.exit(main(*(arguments + [60, 0][len(arguments) :])))
