"""`longspan show support`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longspan.cli.console import console, print_table
from longspan.cli.runs import open_any_run

if TYPE_CHECKING:
    from torch import Tensor

    from longspan.mixers.entmax import EntmaxCore
    from longspan.report import Block

# keys whose weights are read off at once
_WIDTH = 256


def support(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The folder of a run.", show_default=False)],
    tokens: Annotated[
        int, typer.Option("--tokens", min=1, help="Read so many held-back tokens, of documents drawn at random.")
    ] = 8192,
    head: Annotated[
        int, typer.Option("--head", min=0, help="Read only the first so many tokens of each document. 0: all.")
    ] = 1024,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Where the page and the figures go.")
    ] = Path("out/support"),
) -> None:
    """Show how sparse each head of a trained model has become: its alpha, and how many keys get a weight at all.

    Of a run with layers of entmax: alpha = 1 is the softmax, where every key has a weight, 2 the sparsemax. The model
    reads held-back documents, and the weights that are not zero are counted, of the keys that a token could see.
    Writes report.html, report.json and figures.

    Examples:
      longspan show support runs/first
      longspan show support runs/first --tokens 20000 --head 2048
    """
    import torch

    from longspan.cli.show.heads import find, head_figure, head_table
    from longspan.cli.show.reading import real_tokens, watched
    from longspan.mixers.entmax import EntmaxCore
    from longspan.report import Section, Text, number, write_report

    model, task = open_any_run(run)
    found = find(model, EntmaxCore, run, "entmax")
    # by core: summed keys with a weight and keys that could be seen, a head; and queries
    zeros = {id(each.core): torch.zeros(each.core.shape.num_heads, dtype=torch.float64) for each in found}
    kept, seen = zeros, {key: each.clone() for key, each in zeros.items()}
    queries = dict.fromkeys(kept, 0)

    def watch(core: EntmaxCore, given: tuple[Any, ...], _keywords: dict[str, Any], _out: Any) -> None:
        real = real_tokens(given[4], given[0])
        for totals, q in ((kept, given[0]), (seen, torch.zeros_like(given[0]))):
            # with a query of zeros all scores are equal, and every key that is seen has a weight
            counts = support_sizes(core, q, *given[1:5])
            totals[id(core)] += (counts * real[:, None]).sum((0, 2)).cpu()
        queries[id(core)] += int(real.sum())

    read = watched(model, task, run, [each.core for each in found], watch, tokens=tokens, head=head)
    alphas = [(each, each.core.alpha.tolist()) for each in found]
    sizes = [(each, (kept[id(each.core)] / max(queries[id(each.core)], 1)).tolist()) for each in found]
    shares = [(each, (kept[id(each.core)] / seen[id(each.core)].clamp(min=1)).tolist()) for each in found]
    everything = sum(float(each.sum()) for each in kept.values()) / sum(float(each.sum()) for each in seen.values())
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
            {"layer": each.layer, "first_head": each.first, "alpha": alpha, "support": size, "share": share}
            for (each, alpha), (_, size), (_, share) in zip(alphas, sizes, shares, strict=True)
        ],
    }
    path = write_report(output, f"longspan: how sparse {run} is", [Section("Support", blocks)], data)
    for table in tables:
        print_table(table)
    console().print(words, markup=False)
    console().print(f"wrote {path}", markup=False)


def support_sizes(core: "EntmaxCore", q: "Tensor", k: "Tensor", v: "Tensor", state: Any, rows: Any) -> "Tensor":
    """(batch, heads, length) how many keys get a weight that is not zero, in one call of a layer.

    The layer runs with unit vectors in the place of values, so that its outputs are its weights; arguments are those of
    a call.
    """
    import torch

    memory = 0 if state is None else state.v.shape[2]
    columns = memory + v.shape[2]
    counts = q.new_zeros(q.shape[:3])
    for first in range(0, columns, _WIDTH):
        width = min(_WIDTH, columns - first)
        unit = v.new_zeros(*v.shape[:2], columns, width)
        unit[:, :, torch.arange(first, first + width), torch.arange(width)] = 1
        before = None if state is None else state._replace(v=unit[:, :, :memory])
        # not the module's call, which is watched
        weights, _ = core.forward(q, k, unit[:, :, memory:], before, rows)
        counts += (weights != 0).sum(-1)
    return counts
