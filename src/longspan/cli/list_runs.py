"""`longspan runs`: what became of every run below a folder."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from longspan.cli.console import console, print_table
from longspan.errors import CheckpointError

if TYPE_CHECKING:
    from longspan.train.run_summary import RunSummary

_LEAST, _PREFERRED = 8, 20
"""Least and preferred width of the column of paths."""
_COLORS = {"finished": "", "running": "pass", "interrupted": "note", "damaged": "fail"}


def runs(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(metavar="DIR", help="Runs, or folders to search for runs.", show_default="runs"),
    ] = None,
    sort: Annotated[
        Literal["name", "date", "loss"],
        typer.Option("--sort", help="By path; by the last change, newest first; or by the best held-out loss."),
    ] = "name",
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """List all runs and attention transfers below a folder: model, steps, state, held-out loss.

    Running: a process is training in the folder. Interrupted: --resume continues it. Damaged: it can be neither used
    nor resumed; a line below the table says why. Minutes are training time, without evaluation. Losses are those of the
    evaluations on held-out text in the log; of a transfer, the mean relative error over layers.

    Examples:
      longspan runs
      longspan runs runs out --sort loss
      longspan runs --json
    """
    from longspan.train.run_summary import summarize_runs

    folders = folders or [Path("runs")]
    by_folder = {folder: summarize_runs(folder) for folder in folders}
    unique = {(str(run.folder), run.mechanism): run for summaries in by_folder.values() for run in summaries}
    summaries = _sorted(list(unique.values()), sort)
    if summaries:
        _print(summaries, as_json)
    empty = [folder for folder, inside in by_folder.items() if not inside]
    if empty:
        missing = "contains no run" if empty[0].is_dir() else "no such folder"
        others = f" (and {len(empty) - 1} more)" if len(empty) > 1 else ""
        raise CheckpointError(f"{empty[0]}{others}: {missing}; give a run, or a folder above runs")


def _sorted(summaries: "list[RunSummary]", sort: str) -> "list[RunSummary]":
    """Sort summaries as `--sort` says; losses of different units are not compared, runs without one come last."""
    summaries = sorted(summaries, key=lambda run: str(run.folder))
    if sort == "date":
        return sorted(summaries, key=lambda run: run.changed, reverse=True)
    if sort == "loss":
        return sorted(summaries, key=lambda run: (not run.loss_unit, run.loss_unit, run.best_loss or 0.0))
    return summaries


def _print(summaries: "list[RunSummary]", as_json: bool) -> None:
    """Print summaries as JSON, or as a table with the problems of damaged runs below it."""
    from longspan.report import Table

    if as_json:
        print(json.dumps([run.plain() for run in summaries], indent=2))
        return
    out = console()
    cells = [(_model(run), _steps(run), _minutes(run), _loss(run), _state(run)) for run in summaries]
    width = _room(cells, out.width)
    rows = [(_broken(_name(run), width), *others) for run, others in zip(summaries, cells, strict=True)]
    columns = ("run", "model", "steps", "minutes", "held-out loss", "state")
    print_table(Table(columns=columns, rows=rows, state=[_COLORS[run.state] for run in summaries]), out)
    for run in summaries:
        if run.problem:
            out.print(run.problem, markup=False)


def _room(cells: Sequence[Sequence[str]], width: int) -> int:
    """Return the number of columns that the other cells of a table leave for the first one, at least _LEAST.

    Args:
        cells: the other cells, by row.
        width: of the terminal.
    """
    columns = list(zip(*cells, strict=True))
    # two edges, and two spaces between columns
    room = width - 2 - 2 * len(columns)
    lines = [max(len(line) for cell in column for line in cell.splitlines()) for column in columns]
    words = [max(len(word) for cell in column for word in cell.split()) for column in columns]
    return max(room - sum(lines), min(_PREFERRED, room - sum(words)), _LEAST)


def _broken(text: str, width: int) -> str:
    """Return lines broken behind slashes and spaces, so that none is longer than `width`."""
    lines = []
    for line in text.splitlines():
        current = ""
        for part in re.findall(r"[^/ ]*[/ ]?", line):
            if current and len(current) + len(part.rstrip()) > width:
                lines.append(current.rstrip())
                current = ""
            while len(part.rstrip()) > width:
                lines.append(part[:width])
                part = part[width:]
            current += part
        lines.append(current)
    return "\n".join(lines)


def _name(run: "RunSummary") -> str:
    """Return the path of a run, and below it its task."""
    corpus = ", ".join(Path(name).name or name for name in run.corpus.split(", "))
    return f"{run.folder}\n{run.task}: {corpus}" if corpus else f"{run.folder}\n{run.task or '?'}"


def _model(run: "RunSummary") -> str:
    """Describe the model of a run."""
    size = f"{run.num_layers} x {run.dim}" if run.num_layers and run.dim else ""
    return "\n".join(text for text in (run.mechanism, size) if text)


def _steps(run: "RunSummary") -> str:
    """Describe the progress of a run in steps and tokens."""
    planned = f" of {run.planned_steps:,}" if run.planned_steps is not None else ""
    return f"{run.step:,}{planned}" + ("" if run.tokens is None else f"\n{_short(run.tokens)} tokens")


def _minutes(run: "RunSummary") -> str:
    """Describe the training time of a run."""
    planned = f"\nof {run.planned_minutes:g}" if run.planned_minutes is not None else ""
    return f"{run.seconds / 60:.1f}{planned}"


def _loss(run: "RunSummary") -> str:
    """Describe the last held-out loss of a run, and the best one if it is another."""
    if run.last_loss is None or run.best_loss is None:
        return "-"
    best = "" if run.best_loss == run.last_loss else f"\nbest {run.best_loss:.4f}"
    return f"{run.last_loss:.4f} {run.loss_unit.replace('bits per ', 'bits/')}{best}"


def _state(run: "RunSummary") -> str:
    """Describe the state of a run, and when it last changed."""
    return f"{run.state}\n{run.changed:%Y-%m-%d %H:%M}"


def _short(count: int) -> str:
    """Format a number with three digits: `950`, `12.3 k`, `8.19 M`."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)
