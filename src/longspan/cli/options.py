"""Options that verbs share: the device and the precision a model runs in."""

from typing import Annotated

import typer

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
