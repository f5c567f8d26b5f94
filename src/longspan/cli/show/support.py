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
        int, typer.Option("--tokens", min=1, help="Read so many held-back tokens, of documents drawn at random.")
    ] = 8192,
    head: Annotated[
        int, typer.Option("--head", min=0, help="Read only the first so many tokens of each document. 0: all.")
    ] = 1024,
    output: PageOption = Path("out/support"),
    device: DeviceOption = "auto",
    dtype: DtypeOption = "",
) -> None:
    """Show how sparse each head of a trained model has become: its alpha, and how many keys get a weight at all.

    Of a run with layers of entmax: alpha = 1 is the softmax, where every key has a weight, 2 the sparsemax. The model
    reads held-back documents, and the weights that are not zero are counted, of the keys that a token could see.
    Writes report.html, report.json and figures.

    Examples:
      longspan train lm/entmax -o runs/entmax
      longspan show support runs/entmax
      longspan show support runs/entmax --tokens 20000 --head 2048
    """
    from longspan.cli.show.heads import find
    from longspan.cli.show.reading import chosen
    from longspan.mechanisms.entmax.layer import EntmaxMechanism
    from longspan.report import Section, Text, number, write_report
    from longspan.report.heads import head_figure, head_table
    from longspan.train.layer_hooks import head_supports

    model, task = open_any_run(run, device=device, dtype=dtype)
    mechanisms = find(model, EntmaxMechanism, run, "entmax")
    documents, chunk = chosen(model, task, run, tokens=tokens, head=head)
    cores = [mechanism.core for mechanism in mechanisms]
    with reading_progress("counting keys") as show:
        read, counted = head_supports(model, documents, cores, chunk=chunk, unit=task.unit, progress=show)
    alphas = [(mechanism, mechanism.core.alpha.tolist()) for mechanism in mechanisms]
    sizes = [(mechanism, support.sizes) for mechanism, support in zip(mechanisms, counted, strict=True)]
    shares = [(mechanism, support.shares) for mechanism, support in zip(mechanisms, counted, strict=True)]
    everything = sum(float(count.kept.sum()) for count in counted) / sum(float(count.seen.sum()) for count in counted)
    words = (
        f"{int(read.tokens.sum()):,} tokens of {len(read.names):,} held-back document(s): {everything:.1%} of the keys "
        "that could be seen have a weight."
    )
    tables = [
        head_table(alphas, lambda value: number(value, 3), "alpha: 1 is the softmax, 2 the sparsemax"),
        head_table(sizes, lambda value: number(value, 1), "keys with a weight, a query"),
        head_table(shares, lambda value: f"{value:.1%}", "share of the keys seen that have a weight"),
    ]
    blocks: list[Block] = [
        Text(words),
        head_figure("alpha", alphas, ylabel="alpha", ylim=(0.95, 2.05)),
        head_figure("support", sizes, ylabel="keys with a weight, a query"),
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
    path = write_report(output, f"longspan: how sparse {run} is", [Section("Support", blocks)], data)
    for table in tables:
        print_table(table)
    console().print(words, markup=False)
    console().print(f"wrote {path}", markup=False)
