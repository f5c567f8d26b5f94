"""`longspan reproduce`."""

import time
from pathlib import Path
from typing import Annotated

import typer

from longspan.cli.console import console, print_table, say
from longspan.cli.outputs import check_output_folder
from longspan.errors import ConfigError


def reproduce(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="A claim; none lists them.", show_default=False)
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="At the size that docs/claims.md reports, which takes longer.")
    ] = False,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Where its runs go; a second call goes on from them.")
    ] = Path("out/claims"),
    docs: Annotated[
        Path | None,
        typer.Option("--docs", metavar="DIR", help="Put the result into DIR/claims/ and write DIR/claims.md anew."),
    ] = None,
) -> int:
    """Re-enact a claim of a paper, and say what came out beside what the paper says.

    Ctrl-C stops it; the same command goes on where it stopped. There is no --device: what a claim measures, clocks
    among it, belongs to the device its recipes name, and docs/claims.md compares it with that of others.

    Examples:
      longspan reproduce
      longspan reproduce rmt-flops
      longspan reproduce rmt --full --docs docs
    """
    check_output_folder(output, "--output")
    if docs is not None:
        check_output_folder(docs, "--docs")
    from longspan.experiments import claims
    from longspan.report import Table

    if name is None:
        if docs is not None:
            return _write_docs(docs)
        rows = [
            (
                each,
                claims.find(each).system,
                *(f"{claims.find(each).minutes[size]:g} min" for size in ("small", "full")),
            )
            for each in claims.names()
        ]
        print_table(Table(columns=("claim", "system", "small", "--full"), rows=rows, right=(2, 3)))
        return 0
    claim, size = claims.find(name), "full" if full else "small"
    console().print(f"{claim.text} ({claim.source})", markup=False)
    started = time.perf_counter()
    outcome = claim.run(output / f"{name}-{size}", size, say)  # type: ignore[arg-type]
    seconds = time.perf_counter() - started
    rows = [(figure.what, figure.paper, figure.ours) for figure in outcome.figures]
    print_table(Table(columns=("measured", "paper", "here"), rows=rows))
    for line in (outcome.note, f"{outcome.verdict}; {outcome.size}"):
        if line:
            console().print(line, markup=False)
    results_folder = output if docs is None else docs / "claims"
    path = claims.save_result(results_folder, claim, size, outcome, seconds)  # type: ignore[arg-type]
    console().print(f"all numbers: {path}", markup=False)
    return 0 if docs is None else _write_docs(docs)


def _write_docs(docs: Path) -> int:
    from longspan.experiments import claims
    from longspan.files import write_atomically

    records = claims.read_results(docs / "claims", claims.names())
    if not records:
        raise ConfigError(f"{docs / 'claims'}: no results yet; `longspan reproduce NAME --docs {docs}` makes one")
    text = claims.markdown(records)
    path = write_atomically(docs / "claims.md", lambda to: to.write_text(text, encoding="utf-8"))
    console().print(f"wrote {path}", markup=False)
    return 0
