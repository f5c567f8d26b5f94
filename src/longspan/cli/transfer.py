"""`longspan transfer`."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from longspan import renames
from longspan.cli.console import console, print_command, print_table, say
from longspan.cli.convert import checked_fields
from longspan.cli.options import DeviceOption, DtypeOption, GgufOption, TrackOption, layer_ranges, verb
from longspan.cli.outputs import check_output_folder
from longspan.cli.ranking import print_ranking
from longspan.errors import ConfigError


@dataclass(frozen=True)
class TransferOptions:
    """Options of `longspan transfer`."""

    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A causal model of transformers: a folder, a GGUF file, or a name on the hub; or a folder that "
            "`longspan convert` wrote.",
            show_default=False,
        ),
    ]
    text: Annotated[
        list[str],
        typer.Option(
            "--text",
            metavar="FILE|DIR",
            help="Text to learn from: a file, a folder, a glob, sotu, kjv or stdlib. Repeatable.",
            show_default=False,
        ),
    ]
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="DIR", help="Folder to write the model to.", show_default=False),
    ]
    to: Annotated[
        str,
        typer.Option(
            "--to", metavar="MIXER", help="Convert MODEL to this mechanism first: see `longspan mixers`.",
            show_default=False,
        ),
    ] = ""  # fmt: skip
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A=B", help="Set a field of the mixer. Repeatable.", show_default=False),
    ] = None
    layers: Annotated[
        str,
        typer.Option(
            "--layers",
            metavar="N,A-B,...",
            help="Layers to convert and teach; negative numbers count from the last one. Processes with different "
            "layers may share one output folder. auto:N: all but the N layers whose conversion costs most, before "
            "training, on held-out text; these keep softmax.",
        ),
    ] = "all"
    loss: Annotated[
        str,
        typer.Option(
            "--loss",
            metavar="heads|outputs",
            help="heads: only new parameters learn, from the outputs of heads; outputs: the projections learn too, "
            "from the outputs of layers.",
        ),
    ] = "heads"
    steps: Annotated[int, typer.Option("--steps", min=1, help="Optimizer steps.")] = 1000
    lr: Annotated[
        float | None,
        typer.Option("--lr", metavar="RATE", help="Learning rate.", show_default="0.01 for heads, 0.001 for outputs"),
    ] = None
    length: Annotated[int, typer.Option("--length", min=2, help="Tokens per piece of text.")] = 1024
    batch: Annotated[int, typer.Option("--batch", min=1, help="Pieces per step.")] = 8
    held_out: Annotated[int, typer.Option("--held-out", min=1, help="Held-out pieces to measure errors on.")] = 16
    keep_softmax: Annotated[
        int,
        typer.Option(
            "--keep-softmax", min=0, metavar="N", help="Give softmax back to the N layers with the largest errors."
        ),
    ] = 0
    distill: Annotated[
        int,
        typer.Option(
            "--distill",
            min=0,
            metavar="STEPS",
            help="Steps afterwards on the divergence of the model's predictions from those of the pretrained model.",
        ),
    ] = 0
    pattern: Annotated[str, typer.Option("--pattern", metavar="GLOB", help="Files to read in a folder.")] = "*.txt"
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the order of the text.")] = 0
    checkpoint_every: Annotated[
        int, typer.Option("--checkpoint-every", min=1, help="Steps between two checkpoints.")
    ] = 100
    eval_every: Annotated[
        int, typer.Option("--eval-every", min=1, help="Steps between two measurements of errors.")
    ] = 100
    gguf: GgufOption = None
    device: DeviceOption = "auto"
    dtype: DtypeOption = ""
    track: TrackOption = ""


@verb(TransferOptions)
def transfer(options: TransferOptions) -> int:
    """Convert a pretrained model, and teach each new layer what the attention that it replaces computes.

    Each layer learns from the pretrained model's own activations, so layers do not depend on each other, the memory
    needed for training is that of one layer. Papers train on tens of millions of tokens this way. DIR becomes a
    folder as `longspan convert` writes it. The same command continues after an interruption, with identical results.

    Examples:
      longspan transfer ./SmolLM2-135M --to gated_delta --text letters -o out/delta
      longspan transfer ./SmolLM2-135M --to linear --loss outputs --keep-softmax 1 --text letters -o out/linear
      longspan transfer ./SmolLM2-135M --to gated_delta --layers 0-1 --text letters -o out/parts
    """
    check_output_folder(options.output, "--output")
    to = renames.mixer(options.to)
    if options.set_ and not to:
        raise ConfigError("--set: the fields of a converted model are fixed; give --to, and the original model")
    if options.loss not in ("heads", "outputs"):
        raise ConfigError(f"--loss {options.loss!r}: must be heads or outputs")
    fields: dict[str, Any] = checked_fields(to, 0, options.set_ or []) if to else {}
    layers = layer_ranges(options.layers)
    from longspan.hf.transfer_layer import TransferConfig
    from longspan.train.transfer import TransferSettings, run_transfer

    loss: Any = options.loss
    settings = TransferSettings(
        model=options.model,
        text=tuple(options.text),
        to=to,
        fields=fields,
        layers=layers,
        pattern=options.pattern,
        length=options.length,
        batch=options.batch,
        held_out=options.held_out,
        keep_softmax=options.keep_softmax,
        distill=options.distill,
        dtype=options.dtype,
        gguf=options.gguf,
        config=TransferConfig(loss=loss, steps=options.steps, lr=options.lr, seed=options.seed),
    )
    outcome = run_transfer(
        settings,
        options.output,
        device=options.device,
        checkpoint_every=options.checkpoint_every,
        eval_every=options.eval_every,
        track=options.track,
    )
    return print_outcome(outcome, options.output, "the same command continues")


def print_outcome(outcome: Any, output: Path, remedy: str) -> int:
    """Print how a transfer ended, and return the exit status.

    Args:
        outcome: a `TransferOutcome`.
        output: folder of the model.
        remedy: how an interrupted transfer continues.
    """
    if outcome.interrupted:
        say(f"stopped after step {outcome.step}, saved in {output}; {remedy}")
        return 130
    _print_report(outcome.report or {}, output)
    return 0


def _print_report(report: dict[str, Any], output: Path) -> None:
    """Print the errors of all layers and the next commands, and write the page."""
    from longspan.cli.transfer_page import error_table, write_page

    if "costs" in report:
        print_ranking(report["costs"], report["softmax_layers"])
    print_table(error_table(report))
    if report["divergence"] is not None:
        before, after = report["divergence"]
        console().print(
            f"divergence of predictions: {before:.3g} nats per token before distillation, {after:.3g} after"
        )
    console().print(f"report: {write_page(report, output)}", markup=False, highlight=False)
    name = shlex.quote(str(output))
    print_command(f"next: longspan eval {name} FILE | longspan stream {name} FILE | longspan generate {name} -p TEXT")
    print_command(f"train further: longspan train pretrained --set model.source={name}")
