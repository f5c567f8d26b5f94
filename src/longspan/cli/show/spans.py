"""`longspan show spans`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longspan.cli.console import console, print_table, reading_progress
from longspan.cli.options import DeviceOption, DtypeOption, PageOption, RunArgument
from longspan.cli.runs import open_any_run

if TYPE_CHECKING:
    from longspan.cli.show.heads import MechanismHeads
    from longspan.mechanisms.adaptive_span.layer import AdaptiveSpanMechanism
    from longspan.report import Block


def spans(
    run: RunArgument,
    tokens: Annotated[
        int,
        typer.Option("--tokens", min=1, help="Number of held-out tokens over which dynamic spans are averaged."),
    ] = 8192,
    output: PageOption = Path("out/spans"),
    device: DeviceOption = "auto",
    dtype: DtypeOption = "",
) -> None:
    """Report the learned attention span of each head of a trained model, in tokens.

    For runs with layers of adaptive_span. Writes report.html, report.json and figures/spans.png.

    Examples:
      longspan train lm/adaptive_span -o runs/spans
      longspan show spans runs/spans
    """
    from longspan.cli.show.heads import find_mechanisms
    from longspan.mechanisms.adaptive_span.layer import AdaptiveSpanMechanism
    from longspan.report import Section, Text, number, write_report
    from longspan.report.heads import head_figure, head_table

    model, task = open_any_run(run, device=device, dtype=dtype)
    mechanisms = find_mechanisms(model, AdaptiveSpanMechanism, run, "adaptive_span")
    dynamic = [mechanism for mechanism in mechanisms if mechanism.core.config.dynamic]
    read = _dynamic_spans(model, task, run, dynamic, tokens) if dynamic else {}
    rows = [(mechanism, read.get(id(mechanism.core), mechanism.core.spans)) for mechanism in mechanisms]
    values = [value for _, line in rows for value in line]
    longest, ramps = (
        sorted({getattr(mechanism.core.config, name) for mechanism in mechanisms}) for name in ("max_span", "ramp")
    )
    words = (
        f"The spans of {len(values)} heads are {number(sum(values) / len(values), 1)} tokens on average, "
        f"{number(min(values), 1)} to {number(max(values), 1)}, "
        f"of at most {' or '.join(f'{size:,}' for size in longest)}. "
        f"Beyond its span, the weights of a head fall to zero over {' or '.join(str(ramp) for ramp in ramps)} tokens."
    )
    table = head_table(rows, lambda value: number(value, 1))
    blocks: list[Block] = [Text(words), head_figure("spans", rows, ylabel="span in tokens"), table]
    if dynamic:
        blocks.append(Text("Dynamic spans depend on the token; these are means over held-out documents."))
    data = {
        "run": run,
        "spans": [
            {
                "layer": mechanism.layer,
                "first_head": mechanism.first,
                "dynamic": mechanism.core.config.dynamic,
                "spans": line,
            }
            for mechanism, line in rows
        ],
    }
    path = write_report(output, f"longspan: attention spans of {run}", [Section("Spans", blocks)], data)
    print_table(table)
    console().print(words, markup=False)
    console().print(f"wrote {path}", markup=False)


def _dynamic_spans(
    model: Any, task: Any, run: str, mechanisms: "list[MechanismHeads[AdaptiveSpanMechanism]]", tokens: int
) -> dict[int, list[float]]:
    """Measure the mean dynamic span of each head over held-out documents, in tokens; keys are `id(core)`.

    Args:
        model, task: of the run.
        run: its folder.
        mechanisms: the adaptive_span layers with dynamic spans.
        tokens: total number of tokens to read.
    """
    import torch

    from longspan.cli.show.reading import chosen
    from longspan.train.layer_hooks import watch_layers

    totals = {
        id(mechanism.core): torch.zeros(mechanism.core.shape.num_heads, dtype=torch.float64) for mechanism in mechanisms
    }
    counts = dict.fromkeys(totals, 0)

    def watch(core: "AdaptiveSpanMechanism", arguments: tuple[Any, ...], keywords: dict[str, Any], _out: Any) -> None:
        """Add the spans of a layer's real tokens to `totals`, by head, and their number to `counts`.

        Called after each forward pass of an adaptive_span layer, with its positional and keyword arguments.
        """
        real = arguments[4].real_columns()
        totals[id(core)] += (core.token_spans(keywords["hidden"]) * real[:, None]).sum((0, 2)).cpu().double()
        counts[id(core)] += int(real.sum())

    documents, chunk = chosen(model, task, run, tokens=tokens, head=0)
    cores = [mechanism.core for mechanism in mechanisms]
    with reading_progress("measuring spans") as show:
        watch_layers(model, documents, cores, watch, chunk=chunk, unit=task.unit, progress=show)
    return {key: (total / max(counts[key], 1)).tolist() for key, total in totals.items()}
