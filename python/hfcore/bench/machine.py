"""The machine that a run was made on: what one must know to judge its figures, and its limits."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .. import _core
from .processes import free_memory

HERE = Path(__file__).resolve().parent
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_LEAST_READ = 256 << 20  # bytes
_FLAGS = (
    "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm",
)  # fmt: skip


def circumstances() -> dict[str, Any]:
    """Of all measurements of a run: commit, CPU, system, command."""
    cpu = _cpu()
    flags = f"{cpu.get('flags', '')} {cpu.get('Features', '')}".split()
    return {
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "changed_files": len(_git("status", "--porcelain", "--untracked-files=no").splitlines()),
        "cpu": cpu.get("model name") or platform.processor() or platform.machine(),
        "cpu_flags": [flag for flag in _FLAGS if flag in flags],
        "platform": platform.platform(),
        "python": platform.python_version(),
        # Names only: where this machine keeps its files is nobody's business.
        "command": " ".join(["hfcore", *map(_base_name, sys.argv[1:])]),
    }


def moment() -> dict[str, Any]:
    """Of one measurement: when, and how busy the machine was."""
    load = Path("/proc/loadavg")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "load_average": load.read_text(encoding="utf-8").split()[0] if load.exists() else None,
    }


def limits(threads: int, size: int | None = None) -> dict[str, Any]:
    """What the machine can do at most with so many threads, by reading `size` bytes; now.

    Without a size it is eight times the last cache and at least 256 MiB, which takes about a
    quarter of a second; less is read where less is free.
    """
    wanted = size or max(_LEAST_READ, 8 * _last_cache())
    free = free_memory()
    wanted = wanted if free is None else min(wanted, free // 4)
    return _core.limits(threads, read_bytes=wanted) | {"read_bytes": wanted}


def best_limits(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """The better of two measurements: what disturbs one can only make it less.

    >>> best_limits({"threads": 2, "x_per_second": 5.0}, {"threads": 2, "x_per_second": 4.0})
    {'threads': 2, 'x_per_second': 5.0}
    """
    return {
        key: max(value, before[key]) if key.endswith("_per_second") else value
        for key, value in after.items()
    }


def _last_cache() -> int:
    """Bytes of the largest cache of the first CPU; 0 where the system does not say."""
    sizes = [path.read_text(encoding="utf-8").strip() for path in _CACHES.glob("index*/size")]
    return max((int(size[:-1]) << 10 for size in sizes if re.fullmatch(r"\d+K", size)), default=0)


def _cpu() -> dict[str, str]:
    """Fields of the first CPU; none where the system does not list them."""
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return dict(re.findall(r"^(.+?)\s*: (.*)$", text.split("\n\n", 1)[0], flags=re.MULTILINE))


def _base_name(argument: str) -> str:
    return Path(argument).name if Path(argument).is_absolute() else argument


def _git(*arguments: str) -> str:
    """What git says of the tree that this file is in; nothing outside of one."""
    try:
        run = subprocess.run(  # noqa: S603 - our own list
            ["git", *arguments], cwd=HERE, capture_output=True, text=True  # noqa: S607 - the user's git
        )  # fmt: skip
    except OSError:
        return ""
    return run.stdout.rstrip() if run.returncode == 0 else ""
