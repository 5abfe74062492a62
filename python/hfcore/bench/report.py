"""What a result file says: a table in Markdown and a picture, made from its lines alone.

matplotlib has its home here, and is needed for the picture only.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import HfcoreError, InvalidRequestError
from .measures import GROWS, LLAMA, OURS

Line = dict[str, Any]
_ORDER = (
    "prefill", "prefill, twice the threads", "prefill, a CPU busy", "decode",
    "decode, twice the threads", "decode, a CPU busy", "batch",
    "first token, cold", "first token, warm",
    "peak memory, first token", "peak memory, longest prompt",
)  # fmt: skip
_SIZED = {
    "prefill": "prefill, {} tokens", "decode": "decode at depth {}", "batch": "{} at once",
    "prefill, twice the threads": "prefill, {} tokens, twice the threads",
    "prefill, a CPU busy": "prefill, {} tokens, a CPU busy",
    "decode, twice the threads": "decode at depth {}, twice the threads",
    "decode, a CPU busy": "decode at depth {}, a CPU busy",
}  # fmt: skip
NOTES = """\
Every engine runs the same file in a process of its own and is stopped while another works; they
take turns within each round, after a warm-up round. A cell has the median of its rounds; "x" is
hfcore's figure over the rival's, round by round: median (least-most). Of an engine's modes the best
counts. Greedy; nothing ends early. hfcore computes every token, as the others do: it neither
guesses nor finds any in its cache. "first token, cold" is from process start, with Python and the
file in the page cache. "N at once" is all new tokens of N short prompts by all of the time.
"twice the threads": hfcore held to as many CPUs as it usually has threads, with twice the threads;
"a CPU busy": held to them too, while another process computes on one of them. Beside it is its part
of hfcore's own undisturbed figure, round by round. In brackets after a version: the instruction set
that the engine runs, where it says so.

Shares of the limit: decode reads every tensor once a token (the embedding only where it is also the
head; the KV cache is left out), against reading memory in order; prefill does two operations for
each parameter of the layers (embedding, head and attention are left out), against int8 products in
registers. What the machine can do moves, so both limits are measured just before and just after
each request, and the better of the two counts: a share is the median of its rounds (least-most).
One without a spread is from an older file, whose rounds had one limit for all."""

ACCURACY_NOTES = """\
`python benches/bench_nll.py MODEL.gguf ... --rival-python PATH`: the mean negative log-likelihood
of a text's tokens, the same ids for both engines; less is better. Here the mean over all texts
(pieces of this repository), hfcore's difference to llama.cpp's, and the least and the most of one
text."""


def read(
    paths: Iterable[Path], kinds: Collection[str] = ("measure", "absent", "nll")
) -> list[Line]:
    """The lines of result files, in order. Raises InvalidRequestError for something else."""
    lines = []
    for path in paths:
        for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                line = json.loads(text)
                kind = line["kind"]
            except (ValueError, TypeError, KeyError) as error:
                raise InvalidRequestError(
                    f"{path.name}, line {number}: wanted a line of results, got {text:.60}"
                ) from error
            if kind in kinds:
                lines.append(line)
    if not lines:
        raise InvalidRequestError("wanted at least one measurement, got none")
    return lines


# --- the table ------------------------------------------------------------------------------------


def table(lines: Sequence[Line]) -> str:
    """All models' tables in Markdown, with what was left out and the circumstances."""
    parts = ["# Side by side", NOTES]
    accuracy = [line for line in lines if line["kind"] == "nll"]
    lines = [line for line in lines if line["kind"] != "nll"]
    typed = [line for line in lines if "tensor_type" in line]
    lines = [line for line in lines if "tensor_type" not in line]
    parts += [_model_table(name, _of(lines, name)) for name in _models(lines)]
    for group in dict.fromkeys(map(_group, typed)):
        parts.append(_type_table([line for line in typed if _group(line) == group]))
    if accuracy:
        parts.append(_accuracy_table(accuracy))
    return "\n\n".join(parts) + "\n"


def _type_table(lines: Sequence[Line]) -> str:
    """A row for each tensor type of one shape: prefill and decode."""
    measured = [line for line in lines if line["kind"] == "measure"]
    engines = _engines(measured)
    columns = sorted(row for row in _rows(measured) if row[0] in {"decode", "prefill"})
    header = ["type"]
    for measure, size in columns:
        header += [_label(measure, size), "of the limit", *engines[1:]]
    rows = [header, ["---"] * len(header)]
    for kind in dict.fromkeys(line["tensor_type"] for line in measured):
        row, of_kind = [kind], [line for line in measured if line["tensor_type"] == kind]
        for measure, size in columns:
            ours, *theirs = (_best(of_kind, measure, size, engine) for engine in engines)
            row += [_figure(ours), _share(ours), *map(_rival, theirs)]
        rows.append(row)
    head = f"## Tensor types: {_group(lines[0])}"
    return "\n\n".join(filter(None, [
        head, _markdown(rows), _left_out(lines), _circumstances(measured)
    ]))  # fmt: skip


def _accuracy_table(lines: Sequence[Line]) -> str:
    """A row for each model: what benches/bench_nll.py found over all of its texts."""
    rows = [["", OURS, LLAMA, "difference", "of the texts"], ["---"] * 5]
    for line in (line for line in lines if line["text"] is None):
        texts = [other for other in lines if other["model"] == line["model"] and other["text"]]
        each = [text["difference"] for text in texts if text.get("difference") is not None]
        there = line["difference"] is not None
        rows.append([
            line["model"], f"{line['nll'][OURS]:.4f}",
            f"{line['nll'][LLAMA]:.4f}" if there else line["reason"],
            f"{line['difference']:+.2%}" if there else "-",
            f"{min(each):+.2%} to {max(each):+.2%}" if each else "-",
        ])  # fmt: skip
    last = lines[-1]
    versions = ", ".join(f"{name} {version}" for name, version in last["versions"].items())
    end = f"{last['cpu']}; {versions}; commit {last['commit'] or 'unknown'}; {last['date'][:10]}."
    return "\n\n".join(["## Accuracy", ACCURACY_NOTES, _markdown(rows), end])


def _group(line: Line) -> str:
    """The shape of a model that was made for its types."""
    return f"random weights of shape {line['shape']}{_held(line)}"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table of a header, a ruler and rows; nothing without rows."""
    if len(rows) <= 2:
        return ""
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _model_table(name: str, lines: Sequence[Line]) -> str:
    measured = [line for line in lines if line["kind"] == "measure"]
    engines = _engines(measured)
    header = ["", *engines[:1], "of the limit", *engines[1:]]
    rows = [header, ["---"] * len(header)]
    for measure, size in _rows(measured):
        found = {engine: _best(measured, measure, size, engine) for engine in engines}
        ours = found.pop(OURS, None)
        rows.append(
            [_label(measure, size), _ours(ours), _share(ours), *map(_rival, found.values())]
        )
    head = f"## {name} ({lines[0]['model_bytes'] / 1e6:,.0f} MB)"
    return "\n\n".join(
        filter(None, [head, _markdown(rows), _left_out(lines), _circumstances(measured)])
    )


def _figure(line: Line | None) -> str:
    if line is None:
        return "-"
    value, unit = line["median"], line["unit"]
    if unit == "bytes":
        return f"{value / 1e6:,.0f} MB"
    return f"{value:,.2f} s" if unit == "s" else f"{value:,.0f} tok/s"


def _ours(line: Line | None) -> str:
    """Where hfcore was disturbed, with its part of the undisturbed figure."""
    if line is None or "of_undisturbed" not in line:
        return _figure(line)
    part = line["of_undisturbed"]
    spread = f"{part['least']:.2f}-{part['most']:.2f}"
    return f"{_figure(line)}, {part['median']:.2f} of undisturbed ({spread})"


def _share(line: Line | None) -> str:
    """The median of the rounds' shares of the limits beside them, and the spread."""
    if line is None or "share" not in line:
        return ""
    share = line["share"]
    if not isinstance(share, dict):  # files of runs that had one limit for all rounds
        return f"{share:.0%}"
    return f"{share['median']:.0%} ({100 * share['least']:.0f}-{100 * share['most']:.0f})"


def _rival(line: Line | None) -> str:
    if line is None or "ratio" not in line:
        return _figure(line)
    ratio = line["ratio"]
    return f"{_figure(line)}, {ratio['median']:.2f}x ({ratio['least']:.2f}-{ratio['most']:.2f})"


def _left_out(lines: Sequence[Line]) -> str:
    said: dict[str, None] = {}
    for line in lines:
        if line["kind"] == "absent":
            kind = line.get("tensor_type")
            said[f"- {f'{kind}: ' if kind else ''}{_what(line)}: {line['reason']}"] = None
    return "\n".join(["Not measured:", "", *said]) if said else ""


def _circumstances(lines: Sequence[Line]) -> str:
    if not lines:
        return ""
    last = lines[-1]
    versions = dict.fromkeys(map(_version, lines))
    files = {line["model_sha256"] for line in lines}
    sha256 = f"; sha256 {last['model_sha256']}" if len(files) == 1 else ""
    return (
        f"{last['threads']} threads of {last['cpu']} ({', '.join(last['cpu_flags'])}), which read "
        f"{_reached(lines, 'read_bytes_per_second', 1e9, 1)} GB/s and do "
        f"{_reached(lines, 'int8_operations_per_second', 1e12, 2)} int8 TOPS; "
        f"{', '.join(versions)}; "
        f"commit {last['commit'] or 'unknown'}; {last['date'][:10]}; {len(last['rounds'])} rounds; "
        f"{last['new_tokens']} tokens decoded{sha256}."
    )


def _reached(lines: Sequence[Line], limit: str, unit: float, digits: int) -> str:
    """What the machine could do beside the rounds: the least and the most."""
    beside = (line.get("limit_rounds", {}).get(limit, []) for line in lines)
    found = [value for rounds in beside for value in rounds] or [lines[-1]["limits"][limit]]
    ends = dict.fromkeys(f"{end(found) / unit:.{digits}f}" for end in (min, max))
    return "-".join(ends)


def _version(line: Line) -> str:
    """An engine, its version, and what it computes with where it says so."""
    found = line.get("instruction_set")
    return f"{line['engine']} {line['version']}" + (f" ({found})" if found else "")


def _held(line: Line) -> str:
    """The instruction set that a run was held to."""
    return f", {line['isa']} alone" if line.get("isa") else ""


# --- the picture ----------------------------------------------------------------------------------


def check_picture() -> None:
    """Raise HfcoreError if no picture can be made here."""
    if importlib.util.find_spec("matplotlib") is None:
        raise HfcoreError("the picture needs matplotlib: pip install 'hfcore[bench]'")


def picture(lines: Sequence[Line], path: Path) -> None:
    """Bars of tokens/s, a row for each model; the machine's limit as a line. No tensor types.

    Raises HfcoreError without matplotlib, InvalidRequestError without measurements.
    """
    check_picture()
    from matplotlib.figure import Figure

    lines = [line for line in lines if line["kind"] != "nll" and "tensor_type" not in line]
    models = _models(line for line in lines if line["kind"] == "measure")
    panels = ("prefill", "decode", "batch")
    if not models:
        raise InvalidRequestError("wanted at least one model's measurements to draw, got none")
    figure = Figure(figsize=(15, 3 * len(models)), layout="constrained")
    axes = figure.subplots(len(models), len(panels), squeeze=False)
    for row, model in zip(axes, models, strict=True):
        measured = [line for line in _of(lines, model) if line["kind"] == "measure"]
        for panel, measure in zip(row, panels, strict=True):
            _bars(panel, measured, measure)
        row[0].set_ylabel(f"{model}\ntokens/s")
        row[0].legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


def _bars(panel: Any, lines: Sequence[Line], measure: str) -> None:
    """A group of bars for each size, a bar for each engine."""
    sizes = [size for name, size in _rows(lines) if name == measure]
    if not sizes:
        panel.set_axis_off()
        return
    engines = _engines(lines)
    width = 0.8 / max(1, len(engines))
    for place, engine in enumerate(engines):
        found = [_best(lines, measure, size, engine) for size in sizes]
        middles = [group + (place - (len(engines) - 1) / 2) * width for group in range(len(sizes))]
        heights = [line["median"] if line else 0 for line in found]
        panel.bar(middles, heights, width, label=engine, color=f"C{place}")
    limits = [line["limit"] for line in lines if line["measure"] == measure and "limit" in line]
    if limits:
        panel.axhline(max(limits), color="black", linestyle="--", linewidth=1)
        panel.annotate("limit of the machine", (0, max(limits)), fontsize="small", va="bottom")
    panel.set_title(
        {"decode": "decode, by depth", "batch": "several at once"}.get(measure, measure)
    )
    panel.set_xticks(range(len(sizes)), [f"{size:,}" for size in sizes])


# --- looking lines up -----------------------------------------------------------------------------


def _model(line: Line) -> str:
    return f"{line['model']}{_held(line)}"


def _models(lines: Iterable[Line]) -> list[str]:
    return list(dict.fromkeys(map(_model, lines)))


def _of(lines: Iterable[Line], model: str) -> list[Line]:
    return [line for line in lines if _model(line) == model]


def _engines(lines: Iterable[Line]) -> list[str]:
    """In order of their first line, ours first."""
    found = dict.fromkeys([OURS, *(line["engine"] for line in lines)])
    return list(found)


def _rows(lines: Iterable[Line]) -> list[tuple[str, int | None]]:
    """Measures and sizes that somebody has, in the table's order."""
    found = {(line["measure"], line["size"]) for line in lines}
    return sorted(found, key=lambda row: (_ORDER.index(row[0]), row[1] or 0))


def _label(measure: str, size: int | None) -> str:
    return _SIZED.get(measure, measure).format(size)


def _best(lines: Iterable[Line], measure: str, size: int | None, engine: str) -> Line | None:
    """The line of the engine's best mode."""
    wanted = (measure, size, engine)
    found = [line for line in lines if (line["measure"], line["size"], line["engine"]) == wanted]
    if not found:
        return None
    choose: Callable[..., Line] = max if found[0]["unit"] in GROWS else min
    return choose(found, key=lambda line: statistics.median(line["rounds"]))


def _what(line: Line) -> str:
    """Which engine, mode and measure a line is about, as far as it says."""
    who = " ".join(filter(None, [line.get("engine"), line.get("mode")]))
    return ", ".join(filter(None, [who, line.get("measure")]))


def said(line: Line) -> str:
    """A line as the terminal shows it."""
    if line["kind"] == "absent":
        return f"  not measured: {_what(line)}: {line['reason']}"
    who = " ".join(filter(None, [line["engine"], line["mode"]]))
    share = f", {_share(line)} of the limit" if "share" in line else ""
    ratio = line.get("ratio")
    against = ""
    if ratio:
        spread = f"{ratio['least']:.2f}-{ratio['most']:.2f}"
        against = f", hfcore has {ratio['median']:.2f}x ({spread})"
    label = f"{_label(line['measure'], line['size']):38} {who:34}"
    return f"  {label} {_ours(line)}{share}{against}"
