"""The harness's end of a worker: started, asked, stopped while others work, ended; and who is here.

Nothing here knows what is measured.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self

Reply = dict[str, Any]
WORKER = Path(__file__).with_name("worker.py")
_REASON = 300  # characters of what an engine said that a result file keeps
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")


class WorkerError(Exception):
    """A worker did not answer; the message is the reason, one line. `alive`: it can be asked on."""

    def __init__(self, reason: str, *, alive: bool = False) -> None:
        super().__init__(reason)
        self.alive = alive


@dataclass(frozen=True)
class Rival:
    """An engine that can be timed.

    `modules` it needs, the first of them its own; `modes` by name, of which the best counts.
    `memory`: bytes it needs for each byte of the file and each parameter, a cautious guess.
    """

    name: str
    modules: tuple[str, ...]
    modes: Mapping[str, Reply] = field(default_factory=lambda: {"": {}})
    memory: tuple[float, float] = (1.2, 0.0)


RIVALS = {
    rival.name: rival
    for rival in (
        Rival("hfcore", ("hfcore",)),
        Rival(
            "llama-cpp-python",
            ("llama_cpp",),
            {"flash attention": {"flash_attn": True}, "plain attention": {"flash_attn": False}},
        ),
        Rival("mistralrs", ("mistralrs",), memory=(2.0, 0.0)),
        Rival("openvino-genai", ("openvino_genai",), memory=(3.5, 0.0)),
        Rival(
            "transformers",
            ("transformers", "torch", "gguf", "accelerate"),
            {"bfloat16": {"dtype": "bfloat16"}, "float32": {"dtype": "float32"}},
            memory=(1.0, 5.0),
        ),
    )
}

_PROBE = """
import importlib.metadata, importlib.util, json, sys
found = {}
for name, modules in json.loads(sys.argv[1]).items():
    lacking = [m for m in modules if importlib.util.find_spec(m) is None]
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        version = "of unknown version"
    found[name] = {"lacking": lacking, "version": version}
print(json.dumps(found))
"""


def installed(python: str, rivals: Mapping[str, Rival] | None = None) -> dict[str, Reply]:
    """For each rival, what this Python lacks of it, and its version. Raises WorkerError."""
    wanted = json.dumps({rival.name: rival.modules for rival in (rivals or RIVALS).values()})
    try:
        run = subprocess.run(  # noqa: S603 - a Python that the user named, our own program
            [python, "-c", _PROBE, wanted], capture_output=True, text=True, timeout=60
        )
        found: dict[str, Reply] = json.loads(run.stdout)
    except (OSError, subprocess.TimeoutExpired, ValueError) as error:
        raise WorkerError(f"{Path(python).name} does not run as a Python: {error}") from error
    return found


def free_memory() -> int | None:
    """Bytes that can be had without swapping; None where the system does not say."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"^MemAvailable:\s+(\d+) kB", text, flags=re.MULTILINE)
    return int(found.group(1)) * 1024 if found else None


def usable_cpus() -> list[int]:
    """The CPUs of this process; none where the system cannot hold a process to some of them."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


_SPIN = """
import os, sys
while os.getppid() == int(sys.argv[1]):
    for _ in range(100_000):
        pass
"""


@contextlib.contextmanager
def busy(cpus: Collection[int]) -> Iterator[int]:
    """One process, its id, that computes on one of these CPUs, whichever, until the block ends."""
    command = [sys.executable, "-c", _SPIN, str(os.getpid())]
    process = subprocess.Popen(command, start_new_session=True)  # noqa: S603 - our own program
    try:
        os.sched_setaffinity(process.pid, cpus)
        time.sleep(0.1)  # Python's own start
        yield process.pid
    finally:
        process.kill()
        process.wait()


class Worker:
    """An engine on a model, in a process of its own, stopped unless it is asked."""

    def __init__(
        self, engine: str, mode: Reply, *, python: str, model: Path, threads: int, context: int,
        cpus: Collection[int] = (), program: Path = WORKER,
    ) -> None:  # fmt: skip
        command = [python, str(program), engine, str(model), str(threads), str(context)]
        self._model = model
        self.instruction_set: str | None = None  # as it says when it has loaded
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `end`
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._process = subprocess.Popen(  # noqa: S603 - as in `installed`
            [*command, json.dumps(mode)], text=True, encoding="utf-8",
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said,
            env=os.environ | {name: str(threads) for name in _THREADS} | {"HF_HUB_OFFLINE": "1"},
            # Ctrl-C is for the harness, which then ends its workers, stopped ones too.
            start_new_session=True,
        )  # fmt: skip
        if cpus:  # now, while it has one thread
            os.sched_setaffinity(self._process.pid, cpus)
        threading.Thread(target=self._listen, args=(self._process.stdout,), daemon=True).start()

    def _listen(self, replies: IO[str]) -> None:
        for line in replies:
            self._lines.put(line)
        self._lines.put(None)

    def loaded(self, patience: float) -> float:
        """Wait until the model is open; the seconds that it took, without starting Python."""
        reply = self._reply(patience)
        self.instruction_set = reply["instruction_set"]
        return float(reply["load"])

    def send(self, request: Reply) -> None:
        """Put a request; `receive` has its answer."""
        stdin = self._process.stdin
        try:
            if stdin is not None:
                stdin.write(json.dumps(request) + "\n")
                stdin.flush()
        except OSError as error:
            raise self._ended() from error

    def receive(self, patience: float) -> Reply:
        """The answer to the oldest open request. Raises WorkerError after `patience` seconds."""
        return self._reply(patience)

    def ask(self, request: Reply, patience: float) -> Reply:
        """Let it run, ask, and stop it again."""
        self._signal("SIGCONT")
        self.send(request)
        reply = self._reply(patience)
        self.stop()
        return reply

    def stop(self) -> None:
        """Take the CPU from it until it is asked: a worker may not disturb another."""
        self._signal("SIGSTOP")

    def end(self) -> None:
        """End it and all it started, now."""
        if self._process.poll() is None:
            if hasattr(os, "killpg"):
                with contextlib.suppress(OSError):
                    os.killpg(self._process.pid, signal.SIGKILL)
            self._process.kill()
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._said):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()

    def _reply(self, patience: float) -> Reply:
        try:
            line = self._lines.get(timeout=patience)
        except queue.Empty:
            self.end()
            raise WorkerError(f"no answer within {patience:.0f} s") from None
        if line is None:
            raise self._ended()
        reply: Reply = json.loads(line)
        if "error" in reply:
            raise WorkerError(self._one_line(reply["error"]), alive=True)
        return reply

    def _ended(self) -> WorkerError:
        """It died: how, and the last it said."""
        try:
            status = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:  # it closed its output and lives on
            self._process.kill()
            status = self._process.wait()
        how = f"signal {-status}" if status < 0 else f"status {status}"
        if status == -signal.SIGKILL:
            how += ", perhaps for want of memory"
        self._said.seek(0, os.SEEK_END)
        self._said.seek(max(0, self._said.tell() - 16_384))
        said = self._said.read().decode(errors="replace").strip()
        self.end()
        lines = said.splitlines()
        return WorkerError(
            self._one_line(f"ended with {how}" + (f": {lines[-1]}" if lines else ""))
        )

    def _one_line(self, text: str) -> str:
        """Without colours, and without where this machine keeps its files."""
        text = re.sub(r"\x1b\[[0-9;]*m", "", " ".join(text.split()))
        text = text.replace(str(self._model), self._model.name)
        text = text.replace(str(self._model.parent), "...").replace(str(Path.home()), "~")
        return text[:_REASON]

    def _signal(self, name: str) -> None:
        if hasattr(signal, name) and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, getattr(signal, name))


def first_python(name: str, found: Mapping[str, Mapping[str, Reply]]) -> tuple[str, str]:
    """(Python, version) of the first that has the rival. Raises WorkerError: what it lacks.

    `found` has `installed` for each Python.
    """
    for python, rivals in found.items():
        if not rivals[name]["lacking"]:
            return python, str(rivals[name]["version"])
    lacking = min((rivals[name]["lacking"] for rivals in found.values()), key=len)
    raise WorkerError(f"not installed (no module {', '.join(lacking)})")
