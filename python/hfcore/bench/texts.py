"""`hfcore bench --text`: tokenizers and chat templates beside their rivals; its lines, its table.

Engines are compared before they are timed, and take turns within each round, in processes of their
own (textworker.py) that are stopped while others work.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import _core
from ..errors import HfcoreError, InvalidRequestError, ModelNotFoundError
from . import machine, report
from .processes import Reply, Rival, Worker, WorkerError, first_python, installed

Line = dict[str, Any]
OURS = "hfcore"
_WORKER = Path(__file__).with_name("textworker.py")
_TOKENIZERS = ("tokenizers", "fastokens", "kitoken", "tiktoken")
_TEMPLATES = ("transformers", "jinja2", "minijinja")
_RIVALS = {name: Rival(name, (name,)) for name in (*_TOKENIZERS, *_TEMPLATES)} | {
    "transformers": Rival("transformers", ("transformers", "tokenizers", "jinja2")),
}
_MESSAGES = (3, 60)
_KINDS = ("absent", "cannot", "tokens", "template", "cold")
_PATIENCE = 600.0  # seconds for one answer
_COLD = {
    OURS: """
import sys
from hfcore import ChatTemplate, Tokenizer
template = ChatTemplate(open(sys.argv[2], encoding="utf-8").read())
prompt = template.render([{"role": "user", "content": "Hello, who are you?"}])
assert len(Tokenizer.from_path(sys.argv[1]).encode(prompt)) > 3
""",
    "transformers": """
import sys
from transformers import PreTrainedTokenizerFast
tokenizer = PreTrainedTokenizerFast(
    tokenizer_file=sys.argv[1], chat_template=open(sys.argv[2], encoding="utf-8").read())
messages = [{"role": "user", "content": "Hello, who are you?"}]
assert len(tokenizer.apply_chat_template(messages, return_dict=False)) > 3
""",
}
_PLAIN_TEMPLATE = "{% for m in messages %}{{ m.role + ': ' + m.content | trim }}\n{% endfor %}"
NOTES = """\
`hfcore bench --text TOKENIZER.json ... TEMPLATE.jinja ... TEXTS --rival-python PATH`. Every engine
has a process of its own and is stopped while another works; they take turns within each round. Ids
and texts are compared before anything is timed. A figure is the median of its rounds; "x" is the
rival's time over hfcore's, round by round: median (least-most). CPU time of one thread, but for
loading, cold starts and batches, which are by the clock. "First pass": a tokenizer that was just
loaded meets each text for the first time; "repeated": the same texts again. hfcore returns numpy
arrays, the others lists. "2 threads": how many times faster a batch of the texts is than the texts
one by one. "Cold": from a process's start to its end with one prompt rendered and encoded."""


def run(parsed: Namespace) -> None:
    """Measure, or report. Raises HfcoreError, OSError."""
    lines = report.read(parsed.report, _KINDS) if parsed.report else _Run(parsed).measure()
    text = table(lines)
    if parsed.table is None:
        sys.stdout.write(text + "\n")
    else:
        parsed.table.parent.mkdir(parents=True, exist_ok=True)
        parsed.table.write_text(text, encoding="utf-8")


class _Run:
    """One run: who is there, and the lines as they come."""

    def __init__(self, parsed: Namespace) -> None:
        files = [path for path in parsed.models for path in _files(path)]
        self._templates = [path for path in files if path.suffix == ".jinja"]
        self._texts = [path for path in files if path.suffix == ".txt"]
        self._tokenizers = [path for path in files if path.suffix == ".json"]
        if not self._tokenizers and not self._templates:
            raise InvalidRequestError(
                "--text wants a tokenizer.json or a .jinja template, got none"
            )
        if self._tokenizers and not self._texts:
            raise InvalidRequestError("--text wants .txt files for the tokenizers, got none")
        self._rounds = parsed.rounds
        self._out = parsed.out
        self._lines: list[Line] = []
        self._places = {OURS: (sys.executable, _core.__version__)}
        self._absent: dict[str, str] = {}
        self._find(parsed.rivals, [*parsed.rival_python, sys.executable])

    def _find(self, rivals: str, pythons: Sequence[str]) -> None:
        wanted = [*_RIVALS] if rivals == "auto" else [n for n in rivals.split(",") if n != "none"]
        unknown = [name for name in wanted if name not in _RIVALS]
        if unknown:
            known = ", ".join(_RIVALS)
            raise InvalidRequestError(f"--rivals must be of {known}, got {unknown[0]!r}")
        try:
            found = {python: installed(python, _RIVALS) for python in pythons}
        except WorkerError as error:
            raise InvalidRequestError(f"--rival-python: {error}") from error
        for name in wanted:
            try:
                self._places[name] = first_python(name, found)
            except WorkerError as error:
                self._absent[name] = str(error)

    def measure(self) -> list[Line]:
        """Everything; returns the lines."""
        if self._out is not None:
            self._out.parent.mkdir(parents=True, exist_ok=True)
            self._out.write_text("", encoding="utf-8")
        for name, reason in self._absent.items():
            self._add({"kind": "absent", "engine": name, "reason": reason})
        for path in self._tokenizers:
            self._tokenizer(path)
        for path in self._templates:
            self._template(path)
        for path in self._tokenizers:
            self._cold(path)
        return self._lines

    def _add(self, line: Line) -> None:
        versions = {name: version for name, (_, version) in self._places.items()}
        whole = line | machine.circumstances() | {"versions": versions} | machine.moment()
        self._lines.append(whole)
        said = {key: value for key, value in line.items() if key not in {"kind", "rounds"}}
        sys.stderr.write(f"{line['kind']}: {said}\n")
        if self._out is not None:
            with self._out.open("a", encoding="utf-8") as out:
                out.write(json.dumps(whole) + "\n")

    def _workers(
        self,
        stack: contextlib.ExitStack,
        names: Iterable[str],
        path: Path,
        mode: Reply,
        threads: int = 1,
    ) -> dict[str, Worker]:
        """Those of the engines that can open the file; a line for each that cannot."""
        workers = {}
        for name in (OURS, *names):
            if name not in self._places:
                continue
            worker = stack.enter_context(
                Worker(
                    name, mode, python=self._places[name][0], model=path, threads=threads,
                    context=0, program=_WORKER,
                )
            )  # fmt: skip
            try:
                worker.loaded(_PATIENCE)
                worker.stop()
                workers[name] = worker
            except WorkerError as error:
                self._cannot(name, path, error)
        return workers

    def _cannot(self, engine: str, path: Path, error: WorkerError) -> None:
        reason = str(error)
        self._add({"kind": "cannot", "engine": engine, "file": name_of(path), "reason": reason})

    def _in_turn(self, workers: Mapping[str, Worker], request: Reply) -> dict[str, list[Reply]]:
        """The answers of all, round by round; none of who fails."""
        answers: dict[str, list[Reply]] = {name: [] for name in workers}
        for _ in range(self._rounds):
            for name, worker in workers.items():
                with contextlib.suppress(WorkerError):
                    answers[name].append(worker.ask(request, _PATIENCE))
        return {name: all_ for name, all_ in answers.items() if len(all_) == self._rounds}

    def _tokenizer(self, path: Path) -> None:
        texts = {"texts": [str(text.resolve()) for text in self._texts]}
        with contextlib.ExitStack() as stack:
            workers = self._workers(stack, _TOKENIZERS, path, texts)
            hashes = self._answers(workers, {"do": "hashes"}, path)
            workers = {name: workers[name] for name in hashes}
            right = hashes.get("tokenizers", hashes[OURS])["hashes"]
            for name, answer in hashes.items():
                wrong = sum(a != b for a, b in zip(answer["hashes"], right, strict=True))
                hashes[name] = {"bytes": answer["bytes"], "texts": len(right), "wrong": wrong}
            for what in ("load", "first", "again", "message"):
                for name, answers in self._in_turn(workers, {"do": what}).items():
                    rounds = [answer["seconds"] for answer in answers]
                    self._tokens(path, name, what, rounds, hashes[name])
        with contextlib.ExitStack() as stack:
            workers = self._workers(stack, ("tokenizers",), path, texts, threads=2)
            for name, answers in self._in_turn(workers, {"do": "batch"}).items():
                rounds = [answer["alone"] / answer["batch"] for answer in answers]
                self._tokens(path, name, "batch", rounds, hashes.get(name, {}))

    def _tokens(self, path: Path, engine: str, what: str, rounds: list[float], ids: Line) -> None:
        line = {"kind": "tokens", "file": name_of(path), "engine": engine, "what": what}
        self._add(line | {"rounds": rounds} | ids)

    def _template(self, path: Path) -> None:
        with contextlib.ExitStack() as stack:
            workers = self._workers(stack, _TEMPLATES, path, {})
            for count in _MESSAGES:
                made = self._answers(workers, {"do": "hash", "messages": count}, path)
                right = made.get("transformers", made.get("jinja2", made[OURS]))["hash"]
                able = {name: workers[name] for name in made}
                request = {"do": "render", "messages": count}
                for name, answers in self._in_turn(able, request).items():
                    self._add({
                        "kind": "template", "file": name_of(path), "engine": name,
                        "messages": count, "characters": made[name]["characters"],
                        "wrong": int(made[name]["hash"] != right),
                        "rounds": [answer["seconds"] for answer in answers],
                    })  # fmt: skip

    def _answers(
        self, workers: Mapping[str, Worker], request: Reply, path: Path
    ) -> dict[str, Reply]:
        """Of each once; a line for each that fails."""
        made = {}
        for name, worker in workers.items():
            try:
                made[name] = worker.ask(request, _PATIENCE)
            except WorkerError as error:
                self._cannot(name, path, error)
        if OURS not in made:
            raise HfcoreError(f"hfcore itself cannot be measured on {path}")
        return made

    def _cold(self, path: Path) -> None:
        """Process starts, in turn."""
        taken: dict[str, list[float]] = {name: [] for name in _COLD if name in self._places}
        with tempfile.TemporaryDirectory() as folder:
            plain = Path(folder) / "plain.jinja"
            plain.write_text(_PLAIN_TEMPLATE, encoding="utf-8")
            template = self._templates[0] if self._templates else plain
            for _ in range(self._rounds):
                for name, times in taken.items():
                    command = [self._places[name][0], "-c", _COLD[name], str(path), str(template)]
                    start = time.perf_counter()
                    done = subprocess.run(command, capture_output=True)  # noqa: S603 - ours
                    if done.returncode == 0:
                        times.append(time.perf_counter() - start)
        for name, times in taken.items():
            if times:
                self._add({"kind": "cold", "file": name_of(path), "engine": name, "rounds": times})


def _files(path: Path) -> list[Path]:
    """The files that an argument means. Raises ModelNotFoundError."""
    if path.is_dir():
        inside = [path / "tokenizer.json"] if (path / "tokenizer.json").is_file() else []
        return inside or sorted([*path.rglob("*.txt"), *path.glob("*.jinja")])
    if not path.is_file():
        raise ModelNotFoundError(f"{path}: no such file", path=str(path))
    return [path]


def name_of(path: Path) -> str:
    """What a file is called: its folder's name where all have the same.

    >>> name_of(Path("llama3/tokenizer.json")), name_of(Path("chat.jinja"))
    ('llama3', 'chat')
    """
    return path.parent.name if path.stem in {"tokenizer", "chat_template"} else path.stem


# --- the table ---


def table(lines: Sequence[Line]) -> str:
    """What the lines say, in Markdown."""
    parts = ["# Templates and tokens", "", NOTES, ""]
    first = lines[0] if lines else {}
    if first:
        versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
        where = f"{first['cpu']}, Python {first['python']}, commit {first['commit']}"
        parts += [f"{where}; {versions}.", ""]
    for line in lines:
        if line["kind"] == "absent":
            parts.append(f"- {line['engine']}: {line['reason']}")
        elif line["kind"] == "cannot":
            parts.append(f"- {line['engine']} cannot do {line['file']}: {line['reason']}")
    parts += ["", *_token_table(lines), "", *_template_table(lines), "", *_cold_table(lines), ""]
    return "\n".join(parts)


def _token_table(lines: Sequence[Line]) -> list[str]:
    known = {
        (line["file"], line["engine"], line["what"]): line
        for line in lines
        if line["kind"] == "tokens"
    }
    if not known:
        return []
    rows = [
        "| tokenizer | engine | other ids | first pass MB/s | x | repeated MB/s | x | message us"
        " | x | load ms | 2 threads |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for file, engine in dict.fromkeys(key[:2] for key in known):
        mine, theirs = (
            {what: known.get((file, who, what)) for what in ("load", "first", "again", "message",
                                                            "batch")}
            for who in (OURS, engine)
        )  # fmt: skip
        any_line = next(line for line in theirs.values() if line)
        cells = [file, engine, f"{any_line.get('wrong', '?')} of {any_line.get('texts', '?')}"]
        for what in ("first", "again"):
            cells += [_speed(theirs[what]), _ratio(mine[what], theirs[what], engine)]
        cells.append(_middle(theirs["message"], 1e6))
        cells.append(_ratio(mine["message"], theirs["message"], engine))
        cells += [_middle(theirs["load"], 1e3), _middle(theirs["batch"], 1, "{:.2f}")]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _template_table(lines: Sequence[Line]) -> list[str]:
    known = {
        (line["file"], line["messages"], line["engine"]): line
        for line in lines
        if line["kind"] == "template"
    }
    if not known:
        return []
    rows = [
        "| template | messages | characters | engine | us | x | same text |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (file, count, engine), line in known.items():
        mine = known.get((file, count, OURS))
        cells = [file, str(count), str(line["characters"]), engine, _middle(line, 1e6)]
        cells += [_ratio(mine, line, engine), "no" if line["wrong"] else "yes"]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _cold_table(lines: Sequence[Line]) -> list[str]:
    known = [line for line in lines if line["kind"] == "cold"]
    if not known:
        return []
    rows = ["| cold, tokenizer | engine | ms (least-most) |", "| --- | --- | --- |"]
    for line in known:
        rounds = [1e3 * seconds for seconds in line["rounds"]]
        middle = statistics.median(rounds)
        spread = f"{middle:.0f} ({min(rounds):.0f}-{max(rounds):.0f})"
        rows.append(f"| {line['file']} | {line['engine']} | {spread} |")
    return rows


def _middle(line: Line | None, scale: float, form: str = "{:.1f}") -> str:
    return form.format(scale * statistics.median(line["rounds"])) if line else ""


def _speed(line: Line | None) -> str:
    return f"{line['bytes'] / 1e6 / statistics.median(line['rounds']):.1f}" if line else ""


def _ratio(mine: Line | None, theirs: Line | None, engine: str) -> str:
    """The rival's time over hfcore's, round by round."""
    if mine is None or theirs is None or engine == OURS:
        return ""
    ratios = [b / a for a, b in zip(mine["rounds"], theirs["rounds"], strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
