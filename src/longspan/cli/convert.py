"""`longspan convert`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from longspan.cli.console import console, print_command, say
from longspan.cli.outputs import check_output_folder
from longspan.errors import ConfigError


def convert(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A causal model of transformers: a folder, or a name on the hub.", show_default=False
        ),
    ],
    to: Annotated[str, typer.Option("--to", metavar="MIXER", help="See `longspan mixers`.", show_default=False)],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Where the converted model goes.", show_default=False)
    ],
    segment: Annotated[
        int, typer.Option("--segment", min=0, help="Tokens of a segment, for mixers that have them; 0: the default.")
    ] = 0,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A=B", help="A field of the mixer. Repeatable.", show_default=False),
    ] = None,
    layers: Annotated[
        str, typer.Option("--layers", metavar="N,...", help="Only these; negative ones count from the end.")
    ] = "all",
    gguf: Annotated[
        str | None, typer.Option("--gguf", metavar="FILE", help="A GGUF file in MODEL that holds the weights.")
    ] = None,
) -> None:
    """Put another mechanism into the place of a pretrained model's attention, weights kept.

    DIR is a folder of transformers that every verb takes: stream, eval and generate read texts longer than the model
    was trained for, with a state that does not grow (where the mixer's does not). New parameters, such as gates, begin
    where the model stays nearly the same; a short training teaches them.

    Examples:
      longspan convert ./SmolLM2-135M --to infini --segment 2048 -o out/endless
      longspan convert ./SmolLM2-135M --to window --set window=1024 -o out/window
      longspan stream out/endless book.txt
    """
    check_output_folder(output, "--output")
    from longspan import hf
    from longspan.config import override
    from longspan.hf.decoder import open_pretrained

    fields: dict[str, Any] = {"segment": segment} if segment else {}
    for assignment in set_ or []:
        fields = override(fields, assignment)
    opened = open_pretrained(model, gguf=gguf)
    report = hf.convert(opened.model, to, layers=_numbers(layers), **fields)
    opened.model.save_pretrained(output)
    opened.tokenizer.save_pretrained(output)
    console().print(str(report), markup=False)
    if not report.bounded:
        say("the state of this model grows with the text")
    print_command(f"next: longspan stream {output} FILE | longspan generate {output} -p TEXT")


def _numbers(layers: str) -> list[int] | None:
    if layers == "all":
        return None
    try:
        return [int(part) for part in layers.split(",")]
    except ValueError:
        raise ConfigError(f"--layers {layers!r}: expected whole numbers, for example 0,2,-1") from None
