"""`longspan mixers`."""

from typing import TYPE_CHECKING, Annotated

import typer

from longspan.cli.console import console, print_table
from longspan.cli.fields import field_table

if TYPE_CHECKING:
    from longspan.mixers import Mixer

# size of the layer in the table
_DIM, _HEADS = 512, 8
_SHORT, _LONG = 1_000, 1_000_000


def mixers(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="Explain this mechanism: its equations and fields.", show_default=False),
    ] = None,
) -> None:
    """List the available mechanisms: causal or bidirectional, size of the state, fields and defaults.

    With NAME: its equations, their source, and the meaning of each field. Set fields in model.mixers of a recipe, or
    with `longspan train --set model.mixers.0.FIELD=VALUE`.

    Examples:
      longspan mixers
      longspan mixers transformer_xl
    """
    from longspan import mixers as registry

    if name is None:
        _list(registry.names())
    else:
        _explain(name)


def _build(name: str) -> "Mixer":
    """Build a layer of a mechanism with default fields and the sizes of the table (`_DIM`, `_HEADS`)."""
    from longspan import mixers as registry

    return registry.build(name, dim=_DIM, num_heads=_HEADS)


def _list(names: list[str]) -> None:
    """Print the table of all mechanisms."""
    from longspan.config import to_dict
    from longspan.errors import ConfigError
    from longspan.report import Table, si_bytes

    rows: list[tuple[str, ...]] = []
    for name in names:
        try:
            mixer = _build(name)
        except ConfigError as error:  # a mechanism of another package that cannot be loaded
            rows.append((name, "-", "-", "-", "-", str(error)))
            continue
        traits = mixer.traits
        cost = [si_bytes(mixer.state_nbytes(1, length)) for length in (_SHORT, _LONG)] if traits.streams else ["-", "-"]
        sides = " and ".join(
            side for side, has in (("causal", traits.causal), ("bidirectional", traits.bidirectional)) if has
        )
        state = "none" if not traits.streams else "constant" if traits.bounded else "grows"
        fields = ", ".join(f"{key}={value!r}" for key, value in to_dict(mixer.core.config).items())
        rows.append((name, sides, state, *cost, fields or "-"))
    columns = ("name", "direction", "state", "at 1,000", "at 1,000,000", "fields and defaults")
    out = console()
    print_table(Table(columns=columns, rows=rows, right=(3, 4)), out)
    out.print(
        f"State: size after 1,000 and 1,000,000 tokens, for one layer of dim {_DIM} with {_HEADS} heads, float32, "
        "default fields."
    )
    out.print("Details of one: longspan mixers NAME")


def _explain(name: str) -> None:
    """Print the description, the fields and the state size of one mechanism."""
    from longspan.contract.registry import mechanism_class
    from longspan.report import si_bytes

    core = mechanism_class(name)
    mixer = _build(name)
    traits = mixer.traits
    out = console()
    out.print(f"{name}\n", style="bold", markup=False)
    out.print(core.about(), markup=False)
    table = field_table(core.Config)
    if table.rows:
        print_table(table, out)
    else:
        out.print("\nNo fields.")
    if traits.streams:
        cost = " and ".join(f"{si_bytes(mixer.state_nbytes(1, n))} after {n:,} tokens" for n in (_SHORT, _LONG))
        out.print(f"State of a layer of dim {_DIM}, {_HEADS} heads, float32: {cost}.")
    if traits.selects:
        out.print("Which keys a token attends to is a discrete choice that depends on the data.")
    if traits.sparse:
        out.print("Visible keys may get attention weight exactly zero, depending on the data.")
    if traits.horizon is not None:
        out.print(f"Gradients reach back over {traits.horizon} segment(s) of {traits.segment} positions.")
