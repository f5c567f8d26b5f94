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
        str | None,
        typer.Argument(metavar="[NAME]", help="Name of a claim; without it, list all claims.", show_default=False),
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Run at the size of docs/claims.md, which takes longer.")
    ] = False,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for its runs; a second call resumes them.")
    ] = Path("out/claims"),
    docs: Annotated[
        Path | None,
        typer.Option("--docs", metavar="DIR", help="Save the numbers in DIR/claims/ and rewrite DIR/claims.md."),
    ] = None,
) -> int:
    """Reproduce a claim of a paper at a small size and print its numbers next to the paper's.

    Ctrl-C stops it; the same command resumes it. It has no option --device: recipes set the device, because
    docs/claims.md compares times of different claims.

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
            (claim.name, claim.system, *(f"{claim.minutes[size]:g} min" for size in ("small", "full")))
            for claim in map(claims.find, claims.names())
        ]
        print_table(Table(columns=("claim", "system", "small", "--full"), rows=rows, right=(2, 3)))
        return 0
    claim = claims.find(name)
    size: claims.Size = "full" if full else "small"
    console().print(f"{claim.text} ({claim.source})", markup=False)
    started = time.perf_counter()
    outcome = claim.run(output / f"{name}-{size}", size, say)
    seconds = time.perf_counter() - started
    rows = [(figure.what, figure.paper, figure.ours) for figure in outcome.figures]
    print_table(Table(columns=("measured", "paper", "here"), rows=rows))
    for line in (outcome.note, f"{outcome.verdict}; {outcome.size}"):
        if line:
            console().print(line, markup=False)
    results_folder = output if docs is None else docs / "claims"
    path = claims.save_result(results_folder, claim, size, outcome, seconds)
    console().print(f"all numbers: {path}", markup=False)
    return 0 if docs is None else _write_docs(docs)


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
