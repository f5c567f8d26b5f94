"""Options that verbs share."""

from pathlib import Path
from typing import Annotated

import typer

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="The folder of a run.", show_default=False)]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="A.B=C",
        help="Change a field of the model that holds no weights, such as model.mixers.0.mem_len=1024. Repeatable.",
        show_default=False,
    ),
]
ErrorsOption = Annotated[
    str,
    typer.Option(
        "--errors",
        metavar="strict|replace",
        help="Of bytes that are not UTF-8, where a run reads subwords or words: stop there, or read U+FFFD in their "
        "place.",
    ),
]
PageOption = Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where the page and the figures go.")]
DeviceOption = Annotated[
    str,
    typer.Option("--device", metavar="NAME", help="auto (CUDA where there is one), cpu, cuda, cuda:1 or another."),
]
DtypeOption = Annotated[
    str,
    typer.Option(
        "--dtype",
        metavar="TYPE",
        help="Of the weights: float32, bfloat16, float16, float64.",
        show_default="as they are stored",
    ),
]
