"""Texts per second of a sentence encoder beside transformers with torch; how near its vectors are.

    python benches/bench_embeddings.py MODEL --rival-python PYTHON [--threads 2] [--out FILE]

MODEL is a directory with a BERT encoder, such as all-MiniLM-L6-v2. The texts are sentences and
paragraphs of this repository's own documents, so of natural lengths. Both sides take them by
length, longest first (the rival 32 at a time, as sentence-transformers does), tokenizing included.
A process each, the other stopped by a signal while one works; rounds in turn. Texts per second, the
ratio of a round's times (of the clock, and of the CPU: that is left alone by what else runs) with
its spread, and the smallest cosine between the vectors of 200 texts go to benches/results.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
COMPARED = 200

WORKER = r"""
import json, sys, time
model, threads, ours = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "ours"
if ours:
    import hfcore
    encoder = hfcore.SentenceEncoder(model, threads=threads, max_tokens=256)
    def embed(texts):
        return encoder.encode(texts, normalize=True).tolist()
    versions = {"hfcore": hfcore.__version__}
else:
    import torch, transformers
    torch.set_num_threads(threads)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    net = transformers.AutoModel.from_pretrained(model, dtype=torch.float32).eval()
    def embed(texts):
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        vectors = [None] * len(texts)
        with torch.inference_mode():
            for at in range(0, len(order), 32):
                some = order[at:at + 32]
                batch = tokenizer([texts[i] for i in some], padding=True, truncation=True,
                                  max_length=256, return_tensors="pt")
                mask = batch["attention_mask"].unsqueeze(-1).float()
                hidden = net(**batch).last_hidden_state
                pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
                pooled = torch.nn.functional.normalize(pooled, dim=1)
                for i, vector in zip(some, pooled.tolist()):
                    vectors[i] = vector
        return vectors
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
print(json.dumps(versions), flush=True)
for line in sys.stdin:
    texts, wanted = json.loads(line)
    start, used = time.perf_counter(), time.process_time()
    vectors = embed(texts)
    seconds, used = time.perf_counter() - start, time.process_time() - used
    answer = {"seconds": seconds, "cpu_seconds": used, "vectors": vectors[:wanted]}
    print(json.dumps(answer), flush=True)
"""


class Worker:
    """One side, in a process of its own that stands still while it is not asked."""

    def __init__(self, python: str, model: Path, threads: int, side: str) -> None:
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true",
            "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        if side != "ours":
            environment.pop("PYTHONPATH", None)
        command = [python, "-c", WORKER, str(model), str(threads), side]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.versions: dict[str, str] = self._line()
        self._process.send_signal(signal.SIGSTOP)

    def embed(self, texts: list[str], wanted: int = 0) -> dict[str, Any]:
        """Seconds, and the first `wanted` vectors."""
        self._process.send_signal(signal.SIGCONT)
        time.sleep(0.05)
        into = self._pipe(self._process.stdin)
        into.write(json.dumps([texts, wanted]) + "\n")
        into.flush()
        answer = self._line()
        self._process.send_signal(signal.SIGSTOP)
        return answer

    def close(self) -> None:
        self._process.send_signal(signal.SIGCONT)
        self._pipe(self._process.stdin).close()
        self._process.wait()

    def _line(self) -> dict[str, Any]:
        return dict(json.loads(self._pipe(self._process.stdout).readline()))

    @staticmethod
    def _pipe(pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe


def texts(count: int) -> list[str]:
    """Paragraphs of the documents here, and sentences of them, in turn."""
    paragraphs: list[str] = []
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]):
        blocks = re.split(r"\n\s*\n|\n- ", path.read_text(encoding="utf-8"))
        paragraphs += [" ".join(block.split()) for block in blocks if len(block.split()) > 4]
    sentences = [
        part for whole in paragraphs for part in re.split(r"(?<=[.:;]) ", whole)
        if len(part.split()) > 2
    ]  # fmt: skip
    mixed = [text for pair in zip(paragraphs, sentences, strict=False) for text in pair]
    mixed += sentences[len(paragraphs) :]
    return list(dict.fromkeys(mixed))[:count]


def cosine(one: list[list[float]], other: list[list[float]]) -> float:
    """The smallest between vectors of unit length."""
    pairs = zip(one, other, strict=True)
    return min(sum(a * b for a, b in zip(u, v, strict=True)) for u, v in pairs)


def measure(model: Path, rival: str, threads: int, rounds: int, count: int) -> dict[str, Any]:
    some = texts(count)
    sides = {
        "hfcore": Worker(sys.executable, model, threads, "ours"),
        "rival": Worker(rival, model, threads, "rival"),
    }
    first = {name: side.embed(some[:COMPARED], COMPARED)["vectors"] for name, side in sides.items()}
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            answers[name].append(side.embed(some))
    for side in sides.values():
        side.close()

    def times(name: str, kind: str) -> list[float]:
        return [answer[kind] for answer in answers[name]]

    def ratios(kind: str) -> list[float]:
        pairs = zip(times("hfcore", kind), times("rival", kind), strict=True)
        return sorted(b / a for a, b in pairs)

    def spread(kind: str) -> dict[str, float]:
        of = ratios(kind)
        named = {"least": of[0], "median": statistics.median(of), "most": of[-1]}
        return {name: round(ratio, 2) for name, ratio in named.items()}

    words = sorted(len(text.split()) for text in some)
    return {
        "texts": len(some), "words": {"median": statistics.median(words), "most": words[-1]},
        "threads": threads, "rounds": rounds,
        "versions": {k: v for side in sides.values() for k, v in side.versions.items()},
        "texts_per_second": {
            name: round(len(some) / statistics.median(times(name, "seconds")), 1) for name in sides
        },
        "ratio": spread("seconds"), "cpu_ratio": spread("cpu_seconds"),
        "smallest_cosine": round(cosine(first["hfcore"], first["rival"]), 7),
        "compared": min(COMPARED, len(some)),
    }  # fmt: skip


def where() -> dict[str, Any]:
    """The machine and the commit."""
    about = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    found = re.search(r"^model name\s*: (.*)$", about, re.MULTILINE)
    flags = re.search(r"^flags\s*: (.*)$", about, re.MULTILINE)
    wanted = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16")
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    changed = subprocess.run(
        [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
    )
    return {
        "commit": commit.stdout.strip()[:12], "changed_files": len(changed.stdout.splitlines()),
        "cpu": found[1] if found else platform.processor(),
        "cpu_flags": [flag for flag in wanted if flags and flag in flags[1].split()],
        "platform": platform.platform(), "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
        "load_average": f"{os.getloadavg()[0]:.2f}",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rival-python", required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--texts", type=int, default=600)
    parser.add_argument("--out", type=Path, default=ROOT / "benches/results/embeddings.json")
    given = parser.parse_args()
    before = where()
    found = measure(given.model, given.rival_python, given.threads, given.rounds, given.texts)
    weights = (given.model / "model.safetensors").read_bytes()
    model = {
        "model": json.loads((given.model / "config.json").read_text())["model_type"],
        "model_sha256": hashlib.sha256(weights).hexdigest()[:16],
    }
    result = {**before, **model, **found}
    given.out.write_text(json.dumps(result) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
