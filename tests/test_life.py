"""The life of an engine: its end by dropping it, copies and pickles, fork, and others beside it."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import hfcore.testing
from hfcore import Engine, ModelNotFoundError
from hfcore.errors import EngineClosedError
from hfcore.testing import tiny_model

FOUR = {"max_tokens": 4, "temperature": 0, "ignore_eos": True}
MB = 1 << 20


def ran(program: str, *arguments: object, seconds: float = 60) -> str:
    """What a Python program of its own prints. It must end in time and by itself."""
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True, text=True, timeout=seconds, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    return done.stdout


# the end


_DROPPED = """
import gc, os, sys
import hfcore

def threads():
    return len(os.listdir("/proc/self/task"))

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def mapped():
    return sys.argv[1] in open("/proc/self/maps").read()

def use():
    engine = hfcore.Engine(sys.argv[1], threads=3)
    stream = engine.stream("Hello", max_tokens=1000, ignore_eos=True)
    next(stream)
    engine.generate("Hello", max_tokens=2)
    assert threads() >= 3
    assert mapped()
    print(resident())

hfcore.Engine(sys.argv[2]).generate("Hello", max_tokens=2)
gc.collect()
print(threads(), resident())
for _ in range(3):
    use()
    gc.collect()
    print(threads(), resident())
    assert not mapped()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_dropped_engine_ends_its_threads_and_gives_its_memory_back(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"_WIDTH": 1024, "_FFN": 4096, "_LAYERS": 4, "_HEADS": 16, "_KV_HEADS": 4}
    for name, size in sizes.items():
        monkeypatch.setattr(hfcore.testing, name, size)
    large = tiny_model(tmp_path)
    assert large.stat().st_size > 60 * MB
    printed = ran(_DROPPED, large, tiny).splitlines()
    first, *rest = ([int(x) for x in line.split()] for line in printed)
    before_threads, before = first
    for (used,), (threads, after) in zip(rest[::2], rest[1::2], strict=True):
        assert threads == before_threads
        assert used > before + 60 * MB
        assert after < before + 16 * MB


def test_a_stream_keeps_its_engine(tiny: Path) -> None:
    stream = Engine(tiny, context_size=128).stream("Hello", **FOUR)
    gc.collect()
    assert [len(delta.token_ids) for delta in stream] == [1] * 4


# copies


def test_copies_are_the_engine_itself(tiny: Path) -> None:
    with Engine(tiny, context_size=128) as engine:
        assert copy.copy(engine) is copy.deepcopy(engine) is engine


def test_a_pickle_opens_an_engine_with_the_same_arguments(tiny: Path) -> None:
    opening: dict[str, Any] = {
        "n_ctx": 128, "max_sequences": 3, "kv_cache_dtype": "int8", "chat_template": "x",
    }  # fmt: skip
    with Engine(tiny, **opening) as engine, pickle.loads(pickle.dumps(engine)) as other:
        assert other is not engine
        assert other.info == engine.info
        assert other.model == engine.model
        assert other.chat_template.source == "x"
        assert other.generate("Hello", **FOUR).text == engine.generate("Hello", **FOUR).text
        with pickle.loads(pickle.dumps(other)) as third:
            assert third.info == engine.info


def test_a_token_is_never_in_a_pickle(tiny: Path) -> None:
    from pydantic import SecretStr

    for token in ("hf_s3cret", SecretStr("hf_s3cret")):
        with Engine(tiny, token=token, context_size=128) as engine:
            assert b"s3cret" not in pickle.dumps(engine)
            assert "s3cret" not in repr(vars(engine))


def test_a_pickle_whose_files_are_gone_asks_for_the_model_by_name(tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    with Engine(model, context_size=128) as engine:
        pickled = pickle.dumps(engine)
    model.unlink()
    with pytest.raises(ModelNotFoundError, match=r"tiny\.gguf"):
        pickle.loads(pickled)


def test_a_closed_engine_has_no_pickle(tiny: Path) -> None:
    engine = Engine(tiny, context_size=128)
    engine.close()
    with pytest.raises(EngineClosedError, match="cannot be pickled"):
        pickle.dumps(engine)


_SPAWNS = """
import multiprocessing
import os
import sys

import hfcore

def answer(engine):
    return os.getpid(), engine.generate("Hello", max_tokens=4, temperature=0).text

if __name__ == "__main__":
    with hfcore.Engine(sys.argv[1], context_size=128) as engine:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            pid, text = pool.apply(answer, (engine,))
        assert pid != os.getpid()
        assert text == answer(engine)[1]
"""


def test_a_spawned_process_opens_its_own_engine(tiny: Path, tmp_path: Path) -> None:
    program = tmp_path / "spawns.py"
    program.write_text(_SPAWNS)
    done = subprocess.run(
        [sys.executable, str(program), str(tiny)],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])


# others beside it


def test_two_engines_run_at_once(tmp_path: Path) -> None:
    paths = [tiny_model(tmp_path, seed=seed, name=f"seed{seed}") for seed in (0, 1)]
    engines = [Engine(path, context_size=256) for path in paths]
    request = {"max_tokens": 60, "temperature": 0, "ignore_eos": True}
    alone = [engine.generate("Hello", **request).text for engine in engines]
    assert alone[0] != alone[1]
    texts: list[list[str]] = [[], []]

    def ask(which: int) -> None:
        for _ in range(5):
            texts[which].append(engines[which].generate("Hello", **request).text)

    threads = [threading.Thread(target=ask, args=(n % 2,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == [[text] * 15 for text in alone]
    engines[0].close()
    assert engines[1].generate("Hello", **request).text == alone[1]
    engines[1].close()


_FORKED = """
import asyncio, gc, os, sys, threading
import hfcore

REQUEST = {"max_tokens": 4, "temperature": 0, "ignore_eos": True}
engine = hfcore.Engine(sys.argv[1], threads=2)
text = engine.generate("Hello", **REQUEST).text
asyncio.run(engine.agenerate("Hello", **REQUEST))
ended = threading.Event()

def work():
    while not ended.is_set():
        engine.generate("Hello " * 100, max_tokens=100, ignore_eos=True)

def child():
    try:
        next(inherited)
    except hfcore.InvalidRequestError as error:
        assert "not to its fork" in str(error)
    assert engine.generate("Hello", **REQUEST).text == text
    assert asyncio.run(engine.agenerate("Hello", **REQUEST)).text == text
    inherited.close()
    with engine:
        pass
    gc.collect()

threads = [threading.Thread(target=work) for _ in range(3)]
for thread in threads:
    thread.start()
for _ in range(8):
    inherited = engine.stream("Hello", max_tokens=1500, ignore_eos=True)
    next(inherited)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            child()
            code = 0
        finally:
            print("child", code, flush=True)
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    next(inherited)
ended.set()
for thread in threads:
    thread.join()
assert engine.generate("Hello", **REQUEST).text == text
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_fork_while_requests_run_gets_threads_of_its_own_and_harms_nobody(tiny: Path) -> None:
    printed = ran(_FORKED, tiny, seconds=100)
    assert printed.split("\n")[:-1] == ["child 0"] * 8


_INTERPRETERS = """
import sys
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters
if sys.argv[2] == "after":
    import hfcore._core
program = '''
import sys
sys.path[:] = %r
try:
    import hfcore
    with hfcore.Engine(%r, context_size=128) as engine:
        assert engine.generate("Hello", max_tokens=2, ignore_eos=True).token_ids
        print("works", flush=True)
except ImportError as error:
    assert "interpreter" in str(error), error
    print("refused", flush=True)
''' % (sys.path, sys.argv[1])
for _ in range(2):
    interpreter = interpreters.create()
    problem = interpreters.run_string(interpreter, program)
    assert problem is None, problem
    interpreters.destroy(interpreter)
"""


@pytest.mark.parametrize("order", ["after", "before"])
def test_a_second_interpreter_works_or_is_refused(tiny: Path, order: str) -> None:
    pytest.importorskip(
        "_interpreters" if sys.version_info >= (3, 13) else "_xxsubinterpreters",
        reason="this Python has no other interpreters",
    )
    printed = ran(_INTERPRETERS, tiny, order).split()
    assert len(printed) == 2
    assert set(printed) <= {"works", "refused"}
