"""Options that verbs share: the device and the precision a model runs in."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from longspan.errors import ConfigError

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16", "float64")

DeviceOption = Annotated[
    str,
    typer.Option("--device", metavar="NAME", help="auto (CUDA where there is one), cpu, cuda, cuda:1 or another."),
]
DtypeOption = Annotated[
    str,
    typer.Option(
        "--dtype",
        metavar="TYPE",
        help=f"Of the weights: {', '.join(DTYPES)}.",
        show_default="as they are stored",
    ),
]


def parse_dtype(name: str) -> "torch.dtype | None":
    """The type of a name; None where it is empty.

    Raises:
        ConfigError: it is none of `DTYPES`.
    """
    import torch

    if not name:
        return None
    if name not in DTYPES:
        raise ConfigError(f"--dtype {name!r}: one of {', '.join(DTYPES)}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def place(model: Any, device: str, dtype: str) -> Any:
    """The model on a device and in a floating-point type, as the options name them.

    Raises:
        ConfigError: an unknown type, or a device that torch cannot reach.
    """
    from longspan.train.distributed import choose_device

    return model.to(choose_device(device, what="--device"), parse_dtype(dtype))
