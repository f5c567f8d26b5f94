"""`longspan plan`: which models fit a length, a memory and a training time on this machine."""

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longspan.cli.console import console, print_table, say
from longspan.cli.cost import size
from longspan.cli.options import verb
from longspan.cli.outputs import check_output_folder
from longspan.errors import ConfigError, LongspanError

if TYPE_CHECKING:
    from longspan.report import Table
    from longspan.train.planning import Candidate, Needs

COMPARED = 6
"""models at most of a comparison that is proposed"""
SECONDS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86_400}


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Options of `longspan plan`."""

    length: Annotated[
        str, typer.Option("--length", metavar="N", help="Bytes of the texts to read: 65536, 200k, 1M, 128Ki.")
    ]
    memory: Annotated[
        str, typer.Option("--memory", metavar="SIZE", help="Memory of the process, to train and to read: 800MB, 16GB.")
    ]
    time: Annotated[str, typer.Option("--time", metavar="TIME", help="Time of the training: 45min, 2h, 1d.")]
    text: Annotated[
        str,
        typer.Option(
            "--text", metavar="FILE", help="Text to train on: its size limits the model, and commands name it."
        ),
    ] = ""
    mixers: Annotated[
        str,
        typer.Option(
            "--mixers", metavar="all|A,B", help="Recipes lm/NAME to consider; the fewer, the less there is to measure."
        ),
    ] = "all"
    again: Annotated[
        bool,
        typer.Option("--again", help="Measure this machine again instead of reading what an earlier plan measured."),
    ] = False
    output: Annotated[
        str, typer.Option("-o", "--output", metavar="DIR", help="Write an HTML report to this folder.")
    ] = ""
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False


@verb(PlanOptions)
def plan(options: PlanOptions) -> None:
    """Propose models for texts of a length that fit a memory and a training time, and say why others do not.

    Of every recipe lm/NAME the largest size is proposed whose training takes no longer than --time, and whose training
    and reading take no more than --memory. A model is trained on 20 bytes per parameter. Time and memory come from
    training steps on this machine, which are measured once (some seconds per recipe and size, on an idle machine) and
    saved. Models that read back to the start of a text come first, then larger ones, then those with the lower loss in
    docs/claims.md.

    Examples:
      longspan plan --length 200k --memory 16GB --time 2h
      longspan plan --length 1M --memory 4GB --time 30min --mixers infini,window,gated_delta --text book.txt
    """
    from longspan.train import planning

    if options.output:
        check_output_folder(options.output, "--output")
    needs = _needs(options)
    planner = planning.Planner(needs, say, again=options.again)
    candidates = []
    for name in chosen(options.mixers, planning.families()):
        try:
            candidates.append(planner.candidate(name))
        except LongspanError as error:
            say(f"lm/{name}: left out: {error}")
    if not candidates:
        raise ConfigError(f"--mixers {options.mixers}: no recipe is left to plan with")
    candidates.sort(key=planning.preference)
    lines, tables = _advice(candidates, needs, options), _tables(candidates, options)
    if options.output:
        path = _write_page(lines, tables, candidates, options)
    if options.as_json:
        print(json.dumps(_plain(candidates, options), indent=2))
        return
    out = console()
    for line in lines:
        out.print(line, markup=False, highlight=False)
    for table in tables:
        out.print("")
        print_table(table, out)
    if options.output:
        out.print(f"\n{path}", markup=False, highlight=False)


def _needs(options: PlanOptions) -> "Needs":
    """Parse what has to fit.

    Raises:
        ConfigError: an option that is not a number with a unit, or a text that cannot be read.
    """
    from longspan.train.planning import Needs

    text_tokens = None
    if options.text:
        path = Path(options.text)
        if not path.is_file():
            raise ConfigError(f"--text {options.text}: no such file")
        text_tokens = path.stat().st_size
    return Needs(
        length=size("--length", options.length),
        memory=size("--memory", options.memory.removesuffix("B")),
        seconds=seconds("--time", options.time),
        text_tokens=text_tokens,
    )


def seconds(option: str, text: str) -> float:
    """Parse a time such as 90s, 45min, 2h or 1.5d; raises ConfigError for others."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", text, re.IGNORECASE)
    if match is None or match[2].lower() not in SECONDS or not float(match[1]):
        raise ConfigError(f"{option} {text!r}: expected a time such as 90s, 45min, 2h or 1d")
    return float(match[1]) * SECONDS[match[2].lower()]


def chosen(text: str, known: list[str]) -> list[str]:
    """Return the names of the recipes that an option names; raises ConfigError for others."""
    from longspan.config import nearest

    if text == "all":
        return known
    names = [name.strip().removeprefix("lm/") for name in text.split(",")]
    for name in names:
        if name not in known:
            raise ConfigError(f"--mixers: no recipe lm/{name}{nearest(name, known)}")
    return list(dict.fromkeys(names))


def _advice(candidates: "list[Candidate]", needs: "Needs", options: PlanOptions) -> list[str]:
    """Return the recommendation: what to take, why, what it costs, and the command."""
    from longspan.train.planning import decimal_bytes, duration

    fitting = [tried for tried in candidates if not tried.problem]
    what = f"texts of {needs.length:,} bytes in {options.memory} after {options.time} of training"
    if not fitting:
        fastest = sorted(candidates, key=lambda tried: tried.training_seconds)[:3]
        reasons = "; ".join(f"{tried.recipe}: {tried.problem}" for tried in fastest)
        return [f"Nothing fits {what}. {reasons}. Allow more time or memory, or read shorter texts."]
    lines: list[str] = []
    for group, why in (
        ([tried for tried in fitting if tried.sees_start], "the first in the order below that reads back to the start"),
        ([tried for tried in fitting if not tried.sees_start], "where nothing far away matters"),
    ):
        if not group:
            continue
        best = group[0]
        costs = f"trains in {duration(best.training_seconds)} and {decimal_bytes(best.training_bytes)}"
        lines += [
            f"{'Or' if lines else 'Take'} {best.recipe}, {best.parameters:,} parameters ({_shape(best)}): {why}. It "
            f"{costs}, and reads a text in {duration(best.reading_seconds)} with {_state(best)}.",
            f"  {best.command(source=options.text)}",
        ]
    return [f"For {what}, {len(fitting)} of {len(candidates)} recipes fit.", *lines, *_comparison(fitting, options)]


def _comparison(fitting: "list[Candidate]", options: PlanOptions) -> list[str]:
    """Return the command that compares what fits on a text, from a trained start, and what it is for."""
    names = ",".join(tried.recipe.removeprefix("lm/") for tried in fitting[:COMPARED])
    if len(fitting) < 2:
        return []
    return [
        "Which of them learns your text best is seen in minutes with small models that continue from a trained start:",
        f"  longspan compare --data {shlex.quote(options.text or 'FILE')} --mixers {names} --budget 5min",
    ]


def _shape(tried: "Candidate") -> str:
    """Describe a size."""
    return f"{tried.size.num_layers} layers of {tried.size.dim}"


def _state(tried: "Candidate") -> str:
    """Describe the state of a text."""
    from longspan.train.planning import decimal_bytes

    return (
        "no state: all of it at once" if tried.state_bytes is None else f"{decimal_bytes(tried.state_bytes)} of state"
    )


def _tables(candidates: "list[Candidate]", options: PlanOptions) -> "list[Table]":
    """Return the table of models that fit and that of those that do not."""
    from longspan.report import Table
    from longspan.train.planning import MEASURED_BITS, decimal_bytes, duration

    fitting, rest = ([tried for tried in candidates if bool(tried.problem) == missing] for missing in (False, True))
    rows = [
        (
            tried.recipe,
            _shape(tried),
            f"{tried.parameters:,}",
            f"{tried.tokens:,}",
            duration(tried.training_seconds),
            decimal_bytes(tried.training_bytes),
            "-" if tried.state_bytes is None else decimal_bytes(tried.state_bytes),
            duration(tried.reading_seconds),
            "yes" if tried.sees_start else "no",
            f"{bits:.3f}" if (bits := MEASURED_BITS.get(tried.recipe.removeprefix("lm/"))) is not None else "-",
        )
        for tried in fitting
    ]
    columns = ("recipe", "size", "parameters", "bytes to train on", "training", "memory", "state", "reading")
    tables = []
    if rows:
        caption = (
            f"What fits. State and reading: of a text of {options.length} bytes. Back to the start: whether a "
            "prediction depends on bytes 2,000 before it, with random weights; learned spans and retrieval may reach "
            "farther. Bits: per byte of code, at 0.8 M parameters after the same training (docs/claims.md, "
            "language-modelling)."
        )
        right = (2, 3, 4, 5, 6, 7, 9)
        tables.append(Table(columns=(*columns, "back to the start", "bits"), rows=rows, right=right, caption=caption))
    if rest:
        reasons = [(tried.recipe, _shape(tried), tried.problem) for tried in rest]
        tables.append(Table(columns=("recipe", "smallest size", "why not"), rows=reasons, caption="What does not fit."))
    return tables


def _plain(candidates: "list[Candidate]", options: PlanOptions) -> dict[str, Any]:
    """Return all figures as plain data for JSON, the best first."""
    from longspan.config import to_dict

    return {
        "length": options.length,
        "memory": options.memory,
        "time": options.time,
        "candidates": [
            {**to_dict(tried), "steps": tried.steps, "command": tried.command(source=options.text)}
            for tried in candidates
        ],
    }


def _write_page(lines: list[str], tables: "list[Table]", candidates: "list[Candidate]", options: PlanOptions) -> Path:
    """Write the HTML report: the recommendation, then the tables."""
    from longspan.report import Recommendation, Section, write_report

    # commands are indented
    texts = [line for line in lines if not line.startswith("  ")]
    commands = [line.strip() for line in lines if line.startswith("  ")]
    advice = Recommendation(answer=" ".join(texts[:2]), reasons=texts[2:], commands=commands)
    sections = [Section("What to take", [advice]), Section("All recipes", tables)]
    title = f"A model for texts of {options.length} bytes"
    return write_report(options.output, title, sections, _plain(candidates, options))
