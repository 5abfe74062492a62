"""What a model takes of memory: the weights once, whatever the file's pages took while loading."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import hfcore.testing

MB = 1 << 20

_LOAD = """
import sys
import hfcore

def status(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))

before = status("VmRSS")
with hfcore.Engine(sys.argv[1], threads=2) as engine:
    completion = engine.generate("Hello", max_tokens=2, temperature=0, ignore_eos=True)
    assert completion.usage.completion_tokens == 2
    print(1024 * (status("VmHWM") - before), 1024 * (status("VmRSS") - before))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_are_resident_once_while_loading_and_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"_WIDTH": 1024, "_FFN": 4096, "_LAYERS": 4, "_HEADS": 16, "_KV_HEADS": 4}
    for name, size in sizes.items():
        monkeypatch.setattr(hfcore.testing, name, size)
    path = hfcore.testing.tiny_model(tmp_path)
    size = Path(path).stat().st_size
    assert 60 * MB < size < 70 * MB
    run = subprocess.run(
        [sys.executable, "-c", _LOAD, str(path)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    peak, after = map(int, run.stdout.split())
    # The program itself, what is read of the file besides tensors, one slice of it, activations.
    assert size < after <= peak < size + 32 * MB, (size, peak, after)
