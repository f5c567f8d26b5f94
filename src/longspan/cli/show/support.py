"""`longspan show support`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longspan.cli.console import console, print_table, reading_progress
from longspan.cli.options import DeviceOption, DtypeOption, PageOption, RunArgument
from longspan.cli.runs import open_any_run

if TYPE_CHECKING:
    from longspan.report import Block


def support(
    run: RunArgument,
    tokens: Annotated[
        int, typer.Option("--tokens", min=1, help="Number of held-out tokens to read, from randomly chosen documents.")
    ] = 8192,
    head: Annotated[
        int, typer.Option("--head", min=0, help="Read only the first tokens of each document, this many. 0: all.")
    ] = 1024,
    output: PageOption = Path("out/support"),
    device: DeviceOption = "auto",
    dtype: DtypeOption = "",
) -> None:
    """Report how sparse each head of a trained model is: its alpha, and how many keys get a weight above zero.

    For runs with layers of entmax: alpha = 1 is softmax, where every visible key has a weight, alpha = 2 is sparsemax.
    The model reads held-out documents, and nonzero attention weights are counted. Writes report.html, report.json and
    figures.

    Examples:
      longspan train lm/entmax -o runs/entmax
      longspan show support runs/entmax
      longspan show support runs/entmax --tokens 20000 --head 2048
    """
    from longspan.cli.show.heads import find_mechanisms
    from longspan.cli.show.reading import chosen
    from longspan.mechanisms.entmax.layer import EntmaxMechanism
    from longspan.report import Section, Text, number, write_report
    from longspan.report.heads import head_figure, head_table
    from longspan.train.layer_hooks import head_supports

    model, task = open_any_run(run, device=device, dtype=dtype)
    mechanisms = find_mechanisms(model, EntmaxMechanism, run, "entmax")
    documents, chunk = chosen(model, task, run, tokens=tokens, head=head)
    cores = [mechanism.core for mechanism in mechanisms]
    with reading_progress("counting keys") as show:
        read, counted = head_supports(model, documents, cores, chunk=chunk, unit=task.unit, progress=show)
    alphas = [(mechanism, mechanism.core.alpha.tolist()) for mechanism in mechanisms]
    sizes = [(mechanism, support.sizes) for mechanism, support in zip(mechanisms, counted, strict=True)]
    shares = [(mechanism, support.shares) for mechanism, support in zip(mechanisms, counted, strict=True)]
    everything = sum(float(count.kept.sum()) for count in counted) / sum(float(count.seen.sum()) for count in counted)
    words = (
        f"{int(read.tokens.sum()):,} tokens of {len(read.names):,} held-out document(s): {everything:.1%} of the "
        "visible keys have a nonzero weight."
    )
    tables = [
        head_table(alphas, lambda value: number(value, 3), "alpha: 1 is softmax, 2 is sparsemax"),
        head_table(sizes, lambda value: number(value, 1), "keys with nonzero weight per query"),
        head_table(shares, lambda value: f"{value:.1%}", "share of visible keys with nonzero weight"),
    ]
    blocks: list[Block] = [
        Text(words),
        head_figure("alpha", alphas, ylabel="alpha", ylim=(0.95, 2.05)),
        head_figure("support", sizes, ylabel="keys with nonzero weight per query"),
        *tables,
    ]
    data = {
        "run": run,
        "tokens": int(read.tokens.sum()),
        "documents": list(read.names),
        "heads": [
            {"layer": mechanism.layer, "first_head": mechanism.first, "alpha": alpha, "support": size, "share": share}
            for (mechanism, alpha), (_, size), (_, share) in zip(alphas, sizes, shares, strict=True)
        ],
    }
    path = write_report(output, f"longspan: sparsity of {run}", [Section("Support", blocks)], data)
    for table in tables:
        print_table(table)
    console().print(words, markup=False)
    console().print(f"wrote {path}", markup=False)
