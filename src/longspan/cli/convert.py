"""`longspan convert`."""

import functools
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from longspan import renames
from longspan.cli.console import console, print_command, print_table, say
from longspan.cli.options import DeviceOption, DtypeOption, GgufOption, layer_ranges, verb
from longspan.cli.outputs import check_output_folder
from longspan.cli.ranking import print_ranking
from longspan.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class ConvertOptions:
    """Options of `longspan convert`."""

    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A causal model of transformers: a folder, a GGUF file, or a name on the hub.",
            show_default=False,
        ),
    ]
    to: Annotated[
        str, typer.Option("--to", metavar="MIXER", help="The mechanism: see `longspan mixers`.", show_default=False)
    ]
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Folder to write the converted model to.", show_default=False
        ),
    ]
    segment: Annotated[
        int,
        typer.Option(
            "--segment", min=0, help="Tokens per segment, for mixers that work in segments; 0: the mixer's default."
        ),
    ] = 0
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A=B", help="Set a field of the mixer. Repeatable.", show_default=False),
    ] = None
    layers: Annotated[
        str,
        typer.Option(
            "--layers",
            metavar="N,A-B,...",
            help="Layers to convert; negative numbers count from the last one. auto:N: all but the N layers whose "
            "conversion costs most on the file of --check; these keep softmax.",
        ),
    ] = "all"
    check: Annotated[
        Path | None,
        typer.Option(
            "--check", metavar="FILE", help="Measure the loss on a text file before and after.", show_default=False
        ),
    ] = None
    check_tokens: Annotated[
        int, typer.Option("--check-tokens", min=2, help="Tokens of the file to read with --check, its first ones.")
    ] = 4096
    gguf: GgufOption = None
    device: DeviceOption = "cpu"
    dtype: DtypeOption = ""


@verb(ConvertOptions)
def convert(options: ConvertOptions) -> None:
    """Replace the attention of a pretrained model by another mechanism and keep its weights.

    DIR becomes a transformers folder that every command takes: stream, eval and generate read texts longer than the
    model was trained for, with a state of constant size (unless the state of the mixer grows). New parameters, such as
    gates, are initialized so that the model's predictions change little; a short fine-tuning trains them. Weights keep
    the dtype of MODEL.

    Examples:
      longspan convert ./SmolLM2-135M --to infini --segment 2048 -o out/endless
      longspan convert ./SmolLM2-135M --to window --set window=1024 -o out/window --check book.txt
      longspan stream out/endless book.txt
    """
    output = options.output
    check_output_folder(output, "--output")
    from longspan.tasks.sources import read_file

    # check everything else first: loading weights may take minutes
    to = renames.mixer(options.to)
    fields, layers = checked_fields(to, options.segment, options.set_ or []), layer_ranges(options.layers)
    if isinstance(layers, str) and options.check is None:
        raise ConfigError(f"--layers {layers}: ranks the layers on a text; add --check FILE")
    _check_output(options.model, output)
    text = None if options.check is None else bytes(read_file(options.check)).decode(errors="replace")
    from longspan import hf
    from longspan.hf.decoder import open_pretrained
    from longspan.hf.opening import locate_weights
    from longspan.train.distributed import choose_device
    from longspan.train.folders import seal, write_folder
    from longspan.train.opening import parse_dtype

    weights = locate_weights(options.model, options.gguf)
    opened = open_pretrained(weights.source, gguf=weights.gguf, dtype=parse_dtype(options.dtype))
    opened.model.to(choose_device(options.device, what="--device"))
    before = None if text is None else _read(opened, text, options.check_tokens)
    data = None if before is None else [before.ids]
    report = hf.convert(opened.model, to, layers=layers, data=data, **fields)

    write_folder(output, lambda folder: [part.save_pretrained(folder) for part in opened], seal)
    if report.ranking is not None:
        print_ranking(report.ranking.to_dict(), report.softmax_layers)
    console().print(str(report), markup=False)
    if not report.bounded:
        say("note: the state of this model grows with the length of the text")
    if before is None:
        from longspan.hf.advice import expectation

        console().print(expectation(report), markup=False)
    else:
        _show_check(opened, before, str(options.check))
    name = shlex.quote(str(output))
    print_command(
        f"next: longspan stream {name} FILE | longspan generate {name} -p TEXT | "
        f"longspan train pretrained --set model.source={name}",
    )


class _Reading(NamedTuple):
    """The tokens of a text, and their losses in nats."""

    ids: Any
    nats: Any


def _read(opened: Any, text: str, tokens: int) -> _Reading:
    """Read the first tokens of a text with the model before its conversion."""
    from longspan.hf.check import first_tokens, token_nats

    ids = first_tokens(opened.tokenizer, text, tokens)
    return _Reading(ids, token_nats(opened.model.eval(), ids))


def _signed(value: float) -> str:
    """Return a number with its sign and three digits; zero is +0.000."""
    return f"{round(value, 3) + 0.0:+.3f}"


def _show_check(opened: Any, before: _Reading, file: str) -> None:
    """Read the text again, with the converted model, and print the losses by position and what they mean."""
    from longspan.hf.advice import advice
    from longspan.hf.check import compare, token_nats
    from longspan.report import Table

    report = compare(opened.tokenizer, before.ids, before.nats, token_nats(opened.model, before.ids))
    rows = [
        (
            f"{part.first:,} to {part.last:,}",
            f"{part.before:.3f}",
            f"{part.after:.3f}",
            _signed(part.after - part.before),
        )
        for part in report.ranges
    ]
    columns = ("tokens", "original, nats per token", "converted", "difference")
    print_table(Table(columns=columns, rows=rows, right=(1, 2, 3)), console())
    console().print(
        f"{file}, {report.tokens:,} tokens: {report.before:.3f} bits per byte before, {report.after:.3f} after "
        f"({_signed(report.after - report.before)}). {advice(report.more)}",
        markup=False,
    )


def checked_fields(to: str, segment: int, assignments: list[str]) -> dict[str, Any]:
    """Return the fields of the mixer `to` that the options set; raise ConfigError if one does not fit it."""
    from longspan.config import from_dict, override
    from longspan.contract.registry import mechanism_class

    initial: dict[str, Any] = {"segment": segment} if segment else {}
    assigned: dict[str, Any] = functools.reduce(override, assignments, initial)
    fields = renames.fields(to, assigned)
    from_dict(mechanism_class(to, "convert").Config, fields, f"convert to {to}")
    return fields


def _check_output(model: str, output: Path) -> None:
    """Raise CheckpointError if the output folder contains `model` itself or anything but an earlier converted model."""
    from longspan.models.io import is_converted
    from longspan.train.folders import check_outside

    if not output.exists() or not any(output.iterdir()):
        return
    check_outside(model, output)
    if not is_converted(output):
        raise CheckpointError(
            f"{output}: contains files that `longspan convert` did not write; choose another folder with -o"
        )
