"""`longspan reproduce`."""

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longspan.cli.console import console, print_table, say
from longspan.cli.outputs import check_output_folder
from longspan.errors import ConfigError

if TYPE_CHECKING:
    from longspan.experiments import claims


def reproduce(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="Name of a claim; without it, list all claims.", show_default=False),
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Run at the size of docs/claims.md, which takes longer: --size full.")
    ] = False,
    size: Annotated[
        str | None,
        typer.Option(
            "--size",
            metavar="tiny|small|full",
            help="How much to train and to read; tiny takes seconds and shows that the command works, so it has no "
            "verdict.",
            show_default="small",
        ),
    ] = None,
    jobs: Annotated[
        int,
        typer.Option("--jobs", metavar="N", help="Processes that train at a time, one thread each, where claims can."),
    ] = 1,
    minutes: Annotated[
        float | None,
        typer.Option(
            "--minutes",
            metavar="N",
            help="Start no run after N minutes and judge the finished ones; the same command continues with the rest.",
            show_default="no limit",
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for its runs; a second call resumes them.")
    ] = Path("out/claims"),
    docs: Annotated[
        Path | None,
        typer.Option(
            "--docs",
            metavar="DIR",
            help="Save the numbers in DIR/claims/ and rewrite DIR/claims.md; runs of language-modelling whose numbers "
            "are there already are not trained again.",
        ),
    ] = None,
) -> int:
    """Reproduce a claim of a paper at a small size and print its numbers next to the paper's.

    Ctrl-C stops it, with all its processes; the same command resumes it. It has no option --device: recipes set the
    device, because docs/claims.md compares times of different claims.

    Examples:
      longspan reproduce
      longspan reproduce rmt-flops
      longspan reproduce language-modelling --size tiny
      longspan reproduce rmt --full --docs docs
      longspan reproduce language-modelling --full --jobs 2 --minutes 60 --docs docs
    """
    check_output_folder(output, "--output")
    if docs is not None:
        check_output_folder(docs, "--docs")
    from longspan.experiments import claims
    from longspan.train.workers import Workers

    if name is None:
        return _list_claims() if docs is None else _write_docs(docs)
    claim, chosen = claims.find(name), _size(size, full)
    claim.check(chosen, jobs, minutes)
    console().print(f"{claim.text} ({claim.source})", markup=False)
    started, folder = time.perf_counter(), output / f"{name}-{chosen}"
    if docs is not None and (count := claims.restore(docs / "claims", claim, chosen, folder)):
        say(f"{count} runs are measured already, in {docs / 'claims'}")
    until = math.inf if minutes is None else time.monotonic() + 60 * minutes
    outcome = claim.run(folder, chosen, say, Workers(jobs, until))
    seconds = time.perf_counter() - started
    _print_outcome(outcome)
    results_folder = output if docs is None else docs / "claims"
    path = claims.save_result(results_folder, claim, chosen, outcome, seconds)
    page = claims.write_page(folder / "report", claim, chosen, outcome)
    console().print(f"all numbers: {path}\nreport: {page}", markup=False)
    return 0 if docs is None else _write_docs(docs)


def _list_claims() -> int:
    """Print all claims with the minutes of every size; return exit status 0."""
    from longspan.experiments import claims
    from longspan.report import Table

    rows = [
        (claim.name, claim.system, *(f"{claim.minutes[size]:g} min" for size in claims.SIZES))
        for claim in map(claims.find, claims.names())
    ]
    print_table(Table(columns=("claim", "system", *claims.SIZES), rows=rows, right=(2, 3, 4)))
    return 0


def _print_outcome(outcome: "claims.Outcome") -> None:
    """Print the tables, the note and the verdict of a claim."""
    from longspan.experiments.claims.page import figure_table

    for table in (figure_table(outcome), *outcome.tables):
        print_table(table)
    for line in (outcome.note, f"{outcome.verdict}; {outcome.size}"):
        if line:
            console().print(line, markup=False)


def _size(size: str | None, full: bool) -> "claims.Size":
    """Return the size that the options name.

    Raises:
        ConfigError: an unknown size, or both --full and another --size.
    """
    from longspan.experiments import claims

    if full and size not in (None, "full"):
        raise ConfigError(f"--full and --size {size} contradict each other; leave one out")
    if full or size is None:
        return "full" if full else "small"
    for known in claims.SIZES:
        if size == known:
            return known
    raise ConfigError(f"--size {size}: must be one of {', '.join(claims.SIZES)}")


def _write_docs(docs: Path) -> int:
    """Write `docs/claims.md` from the results in `docs/claims/`; return exit status 0.

    Raises:
        ConfigError: there are no results.
    """
    from longspan.experiments import claims
    from longspan.files import write_atomically

    records = claims.read_results(docs / "claims", claims.names())
    if not records:
        raise ConfigError(f"{docs / 'claims'}: no results yet; make one with `longspan reproduce NAME --docs {docs}`")
    text = claims.markdown(records)
    path = write_atomically(docs / "claims.md", lambda to: to.write_text(text, encoding="utf-8"))
    console().print(f"wrote {path}", markup=False)
    return 0
