"""`longspan show patterns`."""

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longspan import renames
from longspan.cli.console import console, print_table, say
from longspan.cli.options import PageOption
from longspan.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from longspan.mixers import Mixer
    from longspan.report import Block, Section

# size of the drawn layers; the `examples` of the mechanisms are made for four heads
_HEADS, _HEAD_DIM = 4, 16
_LONGEST = 512
_LEAD = (
    "Rows are queries, columns are keys. Patterns are measured: the value of one key at a time is changed, and a cell "
    "is colored if that changes the output of the query. A darker cell has more weight within its row; gray keys are "
    "not read. The number of keys is the mean over the queries."
)


def patterns(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME", help="Mechanisms to draw. None: all of them.", show_default=False),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="FIELD=VALUE",
            help="Draw one mechanism with these fields, all others at their defaults. Repeatable.",
            show_default=False,
        ),
    ] = None,
    length: Annotated[
        int, typer.Option("--length", "-n", min=1, max=_LONGEST, help="Length of the drawn sequence in tokens.")
    ] = 64,
    bidirectional: Annotated[
        bool, typer.Option("--bidirectional", help="Draw the bidirectional form of each mechanism that has one.")
    ] = False,
    both_sides: Annotated[bool, typer.Option("--both-sides", hidden=True)] = False,
    seed: Annotated[
        int, typer.Option("--seed", help="Random seed of weights and inputs, on which some patterns depend.")
    ] = 0,
    output: PageOption = Path("out/patterns"),
) -> None:
    """Draw which keys each query attends to, as in the papers' figures: rows are queries, columns are keys.

    Patterns are measured, not derived from a formula: the mechanism runs while the value of one key at a time is
    changed; the queries whose outputs change have read that key. A darker cell has more weight within its row; gray
    keys are not read. Heads with equal patterns share a panel. Without --set, every form of a mechanism is drawn, with
    small fields.

    Writes report.html, report.json and figures/NAME.png.

    Examples:
      longspan show patterns
      longspan show patterns sparse bp --length 128
      longspan show patterns sparse --set pattern=strided --set stride=16 --length 256
      longspan show patterns window --set window=9 --bidirectional
    """
    from longspan.config import override
    from longspan.mixers import examples
    from longspan.report import write_report

    if both_sides:
        renames.warn("--both-sides", "--bidirectional")
    bidirectional = bidirectional or both_sides
    chosen = _chosen(names)
    if set_ and len(chosen) != 1:
        raise ConfigError(f"--set {set_[0]!r}: applies to one mechanism; give exactly one NAME")
    chosen_fields: dict[str, Any] = functools.reduce(override, set_ or [], {})
    rows, sections = [], []
    for name in chosen:
        forms = [
            (fields, _build(name, fields, bidirectional, seed))
            for fields in ([chosen_fields] if set_ else examples(name))
        ]
        drawn = [(fields, mixer) for fields, mixer in forms if mixer is not None]
        if drawn:
            section, records = _section(name, drawn, length, seed)
            sections.append(section)
            rows += records
        elif names:
            raise ConfigError(f"{name}: has no bidirectional form; leave --bidirectional out")
    if not sections:
        raise ConfigError("--bidirectional: none of these mechanisms has a bidirectional form; leave the option out")
    path = write_report(
        output,
        "longspan: which keys a query reads",
        sections,
        {"length": length, "bidirectional": bidirectional, "seed": seed, "patterns": rows},
        lead=_LEAD,
        footer="made by longspan show patterns",
    )
    _print(rows, length)
    console().print(f"wrote {path}", markup=False)


def _chosen(names: list[str] | None) -> list[str]:
    """Return the names of the mechanisms to draw: those on the command line, or all that can be loaded.

    Raises:
        ConfigError: a name on the command line is unknown or cannot be loaded.
    """
    from longspan.contract.registry import mechanism_class
    from longspan.contract.registry import names as all_names

    chosen = []
    for name in dict.fromkeys(names or all_names()):
        try:
            mechanism_class(name)
        except ConfigError as error:
            if names:
                raise
            say(f"skipped: {error}")
        else:
            chosen.append(name)
    return chosen


def _build(name: str, fields: dict[str, Any], bidirectional: bool, seed: int) -> "Mixer | None":
    """Build a layer of a mechanism to draw; None if the bidirectional form is requested and does not exist."""
    import torch

    from longspan import mixers as registry

    if (
        bidirectional
        and not registry.build(name, dim=_HEADS * _HEAD_DIM, num_heads=_HEADS, **fields).traits.bidirectional
    ):
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mixer = registry.build(name, dim=_HEADS * _HEAD_DIM, num_heads=_HEADS, causal=not bidirectional, **fields)
        with torch.no_grad():
            # some memories start with zero weights; random ones make visible which keys they read
            for parameter in mixer.core.parameters():
                if parameter.ndim > 1 and not parameter.any():
                    parameter.normal_(0, 0.1)
    return mixer


def _section(
    name: str, forms: "list[tuple[dict[str, Any], Mixer]]", length: int, seed: int
) -> "tuple[Section, list[dict[str, Any]]]":
    """Return the report section of one mechanism with a panel per form, and a record per form for the JSON.

    Args:
        name: of the mechanism.
        forms: fields and layer of each form.
        length: tokens of the drawn sequence.
        seed: of the random inputs.
    """
    from longspan.mixers.probe import influence
    from longspan.report import Section, Text
    from longspan.report.figures import Panel, pattern_figure, picture

    panels, rows = [], []
    for fields, mixer in forms:
        weights = influence(mixer, length, seed=seed)
        keys, alike = (weights > 0).sum(-1).double().mean(-1).tolist(), _alike(weights)
        for heads in alike:
            plural = "s" if len(heads) > 1 else ""
            numbers = "" if len(heads) == _HEADS else f"head{plural} {', '.join(map(str, heads))}: "
            title = f"{_words(fields) or 'defaults'}\n{numbers}{keys[heads[0] - 1]:.1f} keys"
            panels.append(Panel(title, weights[heads[0] - 1].tolist()))
        rows.append({"name": name, "fields": fields, "keys_per_query": keys, "heads_alike": alike})
    mixers = [mixer for _, mixer in forms]
    bidirectional = not mixers[0].causal
    figure = picture(
        name,
        lambda theme: pattern_figure(panels, bidirectional=bidirectional, theme=theme),
        alt=f"Attention patterns of {name}: {'; '.join(panel.title.replace(chr(10), ', ') for panel in panels)}",
    )
    about = mixers[0].core.about().partition("\n\n")[0]
    blocks: list[Block] = [Text(about), figure]
    if any(mixer.traits.selects or mixer.traits.sparse for mixer in mixers):
        blocks.append(Text("The pattern depends on the data; here: untrained weights and random inputs."))
    return Section(name, blocks), rows


def _alike(weights: "Tensor") -> list[list[int]]:
    """Group heads that read the same keys; weights: (heads, queries, keys). Returns head numbers from 1, per group."""
    groups: dict[bytes, list[int]] = {}
    for number, read in enumerate((weights > 0).cpu().numpy(), 1):
        groups.setdefault(read.tobytes(), []).append(number)
    return list(groups.values())


def _words(fields: dict[str, Any]) -> str:
    """Format fields as on the command line, `a=1, b=x`; those of `mixed_heads` are separated by `|`."""
    if "mixers" in fields:
        parts = [dict(part) for part in fields["mixers"]]
        return " | ".join(
            f"{part.pop('num_heads')} {part.pop('name')}({_words(part)})".replace("()", "") for part in parts
        )
    written = {key: value if isinstance(value, str) else json.dumps(value) for key, value in fields.items()}
    return ", ".join(f"{key}={value.replace(' ', '')}" for key, value in written.items())


def _print(rows: list[dict[str, Any]], length: int) -> None:
    """Print a table of the mean number of keys per query, a row per form."""
    from longspan.report import Table

    def key_range(keys: list[float]) -> str:
        """Format the smallest and the largest of several mean key counts, `3.0 to 8.5`, or one number if they agree."""
        low, high = (f"{value:.1f}" for value in (min(keys), max(keys)))
        return low if low == high else f"{low} to {high}"

    cells = [(row["name"], _words(row["fields"]) or "defaults", key_range(row["keys_per_query"])) for row in rows]
    print_table(Table(columns=("mechanism", "fields", f"keys per query, of {length}"), rows=cells, right=(2,)))
