"""Quantisation at load: a 2 GB checkpoint in bf16, made on the spot, to Q4_K_M, Q4_0 and NF4.

    python benches/bench_load.py VOCABULARY WORK [--out load.json] [--rival-python PYTHON]

VOCABULARY is a directory with tokenizer.json, WORK a folder that is filled and emptied (6 GB).
Seconds of loading (also with a quantization_cache), the process' peak memory beside what stays
resident and the file, decoded tokens per second; the same from the GGUF that `hfcore quantize`
makes of it; NF4 beside Q4_0; and beside transformers with bitsandbytes, if PYTHON has them. A
process for each measurement, in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SHAPE = {"layers": 16, "width": 2048, "ffn": 8192, "heads": 32, "kv_heads": 8}
TOKENS = 48
ROUNDS = 3

RIVAL = """
import json, sys, time, torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
torch.set_num_threads(int(sys.argv[2]))
config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                            bnb_4bit_compute_dtype=torch.bfloat16)
start = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], quantization_config=config, dtype=torch.bfloat16, device_map="cpu")
loaded = time.perf_counter() - start
ids = torch.arange(10, 26)[None]
def run(n):
    start = time.perf_counter()
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n,
                   do_sample=False, pad_token_id=0)
    return time.perf_counter() - start
run(2)
short, long = run(2), run(14)
print(json.dumps({"load_seconds": loaded, "tokens_per_second": 12 / (long - short)}))
"""


def make(vocabulary: Path, out: Path) -> int:
    """The checkpoint; its bytes. Written tensor by tensor, of numbers that repeat."""
    import numpy as np

    out.mkdir(parents=True, exist_ok=True)
    for own in vocabulary.iterdir():
        if own.name.startswith(("tokenizer", "special", "chat_template")):
            shutil.copy(own, out)
    text = json.loads((out / "tokenizer.json").read_text(encoding="utf-8"))
    added = [token["id"] for token in text["added_tokens"]]
    vocab = -(-max(len(text["model"]["vocab"]), *(i + 1 for i in added)) // 64) * 64
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocab,
        "hidden_size": SHAPE["width"], "intermediate_size": SHAPE["ffn"],
        "num_hidden_layers": SHAPE["layers"], "num_attention_heads": SHAPE["heads"],
        "num_key_value_heads": SHAPE["kv_heads"], "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu",
        "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (out / "config.json").write_text(json.dumps(config))
    shapes = dict(_tensors(vocab))
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    whole = json.dumps(header).encode()
    whole += b" " * (-len(whole) % 8)
    random = np.random.default_rng(0)
    numbers = random.standard_normal(1 << 24, np.float32) * np.float32(0.02)
    numbers = numbers.view(np.uint16)[1::2].copy()  # the upper halves: bf16
    with (out / "model.safetensors").open("wb") as file:
        file.write(len(whole).to_bytes(8, "little") + whole)
        for shape in shapes.values():
            left = int(np.prod(shape))
            if len(shape) == 1:
                file.write(np.full(left, 0x3F80, np.uint16).tobytes())
                continue
            while left:
                first = int(random.integers(0, len(numbers) // 2))
                some = numbers[first : first + min(left, len(numbers) // 2)]
                file.write(some.tobytes())
                left -= len(some)
    return at


def _tensors(vocab: int) -> Any:
    width, ffn = SHAPE["width"], SHAPE["ffn"]
    kv = width // SHAPE["heads"] * SHAPE["kv_heads"]
    yield "model.embed_tokens.weight", [vocab, width]
    yield "lm_head.weight", [vocab, width]
    yield "model.norm.weight", [width]
    for i in range(SHAPE["layers"]):
        for name, shape in (
            ("input_layernorm", [width]), ("post_attention_layernorm", [width]),
            ("self_attn.q_proj", [width, width]), ("self_attn.k_proj", [kv, width]),
            ("self_attn.v_proj", [kv, width]), ("self_attn.o_proj", [width, width]),
            ("mlp.gate_proj", [ffn, width]), ("mlp.up_proj", [ffn, width]),
            ("mlp.down_proj", [width, ffn]),
        ):  # fmt: skip
            yield f"model.layers.{i}.{name}.weight", shape


def one(path: str, quantization: str | None, threads: int, cache: str) -> dict[str, float]:
    """Load, decode, in this process."""
    import hfcore

    start = time.perf_counter()
    with hfcore.Engine(
        path, quantization=quantization, threads=threads, context_size=512, speculation=False,
        quantization_cache=cache or None,
    ) as engine:  # fmt: skip
        loaded = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        resident = engine.metrics()["memory_bytes"]
        rates = []
        for _ in range(3):
            done = engine.generate(
                list(range(10, 26)), max_tokens=TOKENS, temperature=0, ignore_eos=True
            )
            rates.append(done.usage.tokens_per_second if done.usage else 0.0)
    return {
        "load_seconds": loaded, "peak_bytes": peak, "resident_bytes": resident,
        "tokens_per_second": max(rates),
    }  # fmt: skip


def apart(
    path: Path, quantization: str | None, threads: int, cache: Path | str = ""
) -> dict[str, float]:
    """The same in a process of its own."""
    wish = (str(path), quantization or "", str(threads), str(cache))
    command = [sys.executable, __file__, "--one", *wish]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def rival(python: str, path: Path, threads: int) -> dict[str, float] | str:
    """transformers with bitsandbytes, or why not."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [python, "-c", RIVAL, str(path), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        return done.stderr.strip().splitlines()[-1][:300] if done.stderr else "it failed"
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    import hfcore

    checkpoint, gguf = options.work / "checkpoint", options.work / "equal.gguf"
    result: dict[str, Any] = {
        "cpu": _cpu(), "threads": options.threads, "shape": SHAPE,
        "file_bytes": make(options.vocabulary, checkpoint),
    }  # fmt: skip
    start = time.perf_counter()
    hfcore.quantize(checkpoint, "q4_k_m", gguf, threads=options.threads)
    result["quantize_seconds"] = time.perf_counter() - start
    wanted = {
        "q4_k_m": (checkpoint, "q4_k_m"), "gguf": (gguf, None),
        "q4_0": (checkpoint, "q4_0"), "nf4": (checkpoint, "nf4"),
    }  # fmt: skip
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in wanted}
    for _ in range(options.rounds):
        for name, (path, quantization) in wanted.items():
            runs[name].append(apart(path, quantization, options.threads))
    result["runs"] = runs
    kept = [apart(checkpoint, "q4_k_m", options.threads, options.work / "cache")
            for _ in range(1 + options.rounds)]  # fmt: skip
    result["first_cached_load_seconds"] = kept[0]["load_seconds"]
    result["cached_load_seconds"] = statistics.median(run["load_seconds"] for run in kept[1:])
    rate = {
        name: statistics.median(r["tokens_per_second"] for r in all_) for name, all_ in runs.items()
    }
    loads = [run["load_seconds"] for run in runs["q4_k_m"]]
    most = max(run["peak_bytes"] / max(run["resident_bytes"], result["file_bytes"])
               for run in runs["q4_k_m"])  # fmt: skip
    result |= {
        "load_seconds": statistics.median(loads),
        "peak_of_larger": most,
        "decode_of_gguf": rate["q4_k_m"] / rate["gguf"],
        "nf4_of_q4_0": rate["nf4"] / rate["q4_0"],
        "tokens_per_second": rate,
    }
    if options.rival_python:
        other = rival(options.rival_python, checkpoint, options.threads)
        result["transformers_bitsandbytes"] = other
        if isinstance(other, dict):
            result["nf4_of_bitsandbytes"] = rate["nf4"] / other["tokens_per_second"]
    return result


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")),
                platform.processor())  # fmt: skip


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        path, quantization, threads, cache = sys.argv[2:]
        print(json.dumps(one(path, quantization or None, int(threads), cache)))
        return
    parser = argparse.ArgumentParser(description="Quantisation while a model is loaded.")
    parser.add_argument("vocabulary", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--rival-python")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    try:
        result = measure(options)
    finally:
        shutil.rmtree(options.work / "checkpoint", ignore_errors=True)
        shutil.rmtree(options.work / "cache", ignore_errors=True)
        (options.work / "equal.gguf").unlink(missing_ok=True)
    print(json.dumps({k: v for k, v in result.items() if k != "runs"}, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
