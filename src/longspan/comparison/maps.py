"""What the models of a comparison read and remember on a piece of the held-out text: weights and learned quantities."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from longspan.comparison.answers import Samples, test_samples
from longspan.comparison.measure import open_for_reading, text_stamps, weights_of
from longspan.comparison.reading import Reading
from longspan.errors import LongspanError
from longspan.files import data_digest, read_object, write_json
from longspan.report import Block, Section, Table, Text
from longspan.tasks.base import Array
from longspan.train import load_run
from longspan.train.token_layers import LayerView, LayerWatch
from longspan.train.token_view import read_span
from longspan.version import __version__

BEFORE, SPAN = 512, 512
"""tokens that are read before the piece, and those of the piece"""
MAP = 64
"""last tokens of the piece whose weights are drawn"""


class Piece(NamedTuple):
    """A piece of a held-out document, ready for a model.

    Attributes:
        model: in evaluation mode.
        tokens: ids from the beginning of the document to the end of the piece.
        span: positions of the piece.
        segment: tokens that a model without a carried state reads at once.
    """

    model: Any
    tokens: Array
    span: range
    segment: int


def measure_maps(folder: str | Path, reading: Reading, file: Path) -> dict[str, Any]:
    """Measure what a run reads in a piece of the held-out text; what `file` has of the same run is read from there.

    Args:
        folder: of the run.
        reading: held-out text or samples.
        file: JSON file of the measurements.

    Returns:
        Plain data: `distances`, the mean weight of tokens by their distance (`edges`, lower ends, and `weights`), and
        `map`, the weights of the last tokens of the piece, both the mean over heads and layers, or None where outputs
        are no weighted values; `quantities`, of every quantity that a mechanism tells, such as a gate: `name`,
        `caption`, `mean`, `low` and `high` over layers, heads and tokens; `problem`, why nothing could be measured.
    """
    folder = Path(folder)
    text = None if isinstance(reading, Samples) else text_stamps(reading.source, reading.pattern)
    key = data_digest([weights_of(folder), asdict(reading), text, BEFORE, SPAN, MAP, __version__])
    if file.is_file() and (saved := read_object(file)).get("key") == key:
        return saved
    record: dict[str, Any] = {"key": key, "distances": None, "map": None, "quantities": [], "problem": ""}
    try:
        piece = _piece(folder, reading)
        watch = LayerWatch(piece.model, piece.span)
        read_span(piece.model, piece.tokens, piece.span, segment=piece.segment, watch=watch.see)
    except (LongspanError, RuntimeError, KeyError, ValueError) as error:
        # the report is worth more than this section; the next call tries again
        return {**record, "problem": str(error)}
    else:
        weights = watch.mean_weights()
        if weights is not None:
            record["distances"] = by_distance(weights)
            record["map"] = np.round(weights[-MAP:, -MAP:], 4).tolist()
        record["quantities"] = quantities(watch.views())
    write_json(file, record)
    return record


def _piece(folder: Path, reading: Reading) -> Piece:
    """Return the piece of the longest held-out document that a run reads; raises as `measure`."""
    if isinstance(reading, Samples):
        model, task = load_run(folder)
        document = test_samples(task, folder, 1, 1)[0]
        segment = len(document)
    else:
        opened = open_for_reading(folder, reading)
        model, items = opened.model, opened.cut.documents.items
        document = max(items, key=len)
        segment = opened.chunk
    tokens = document.cut(0, min(len(document), BEFORE + SPAN)).tokens
    first = max(len(tokens) - SPAN, 0)
    if not model.traits.streams:
        # from the beginning of a segment, so that all of the piece has the same past
        first -= first % segment
    return Piece(model, tokens, range(first, len(tokens)), segment)


def by_distance(weights: Array) -> dict[str, list[float]]:
    """Return the mean weight of tokens at a distance, summed over ranges of distances: 0, 1, 2 to 3, 4 to 7, ...

    Only the second half of the queries counts, which have all distances up to half of the piece; the last range is that
    of all that is farther.

    Args:
        weights: (tokens, tokens) of queries and keys.
    """
    tokens = len(weights)
    queries = np.arange(tokens // 2, tokens)
    distances = queries[:, None] - np.arange(tokens)
    powers = [1 << power for power in range(max(tokens // 2, 1).bit_length())]
    edges = [0, *powers]
    index = np.searchsorted(edges, distances, side="right") - 1
    sums = [float(weights[queries][index == number].sum() / len(queries)) for number in range(len(edges))]
    return {"edges": [float(edge) for edge in edges], "weights": sums}


def quantities(views: Sequence[LayerView]) -> list[dict[str, Any]]:
    """Return what the layers tell, over all layers, heads and tokens: mean, lowest and highest."""
    values: dict[str, list[Array]] = {}
    captions: dict[str, str] = {}
    for view in views:
        for diagnostic in view.diagnostics:
            name, finite = diagnostic.name, diagnostic.values[np.isfinite(diagnostic.values)]
            if not len(finite):
                continue
            if diagnostic.discrete:
                # names, such as those of clusters, have no mean: how many of them a head uses
                by_head = np.atleast_2d(diagnostic.values)
                name, finite = f"{name}, different ones", np.array([_different(row) for row in by_head])
            values.setdefault(name, []).append(finite)
            captions[name] = diagnostic.caption
    joined = {name: np.concatenate(parts) for name, parts in values.items()}
    return [
        {
            "name": name,
            "caption": captions[name],
            "mean": float(all_values.mean()),
            "low": float(all_values.min()),
            "high": float(all_values.max()),
        }
        for name, all_values in joined.items()
    ]


def _different(names: Array) -> float:
    """Return how many different numbers there are, NaN aside."""
    return float(len(np.unique(names[np.isfinite(names)])))


def map_section(maps: Mapping[str, Mapping[str, Any]]) -> list[Section]:
    """Return the section of the report on what the models read, in their order; none without measurements."""
    if not maps:
        return []
    blocks: list[Block] = [
        Text(
            f"Measured on up to {SPAN} tokens of one held-out document, the mean over heads and layers. longspan show "
            "text, above, has every token and layer."
        )
    ]
    blocks += _distance_pictures(maps)
    blocks += _quantity_tables(maps)
    blocks += _map_pictures({name: one["map"] for name, one in maps.items() if one["map"]})
    blocks += [Text(f"{name}: {one['problem']}") for name, one in maps.items() if one["problem"]]
    silent = [name for name, one in maps.items() if not (one["distances"] or one["quantities"] or one["problem"])]
    if silent:
        blocks.append(Text(f"Outputs that are no weighted values, and no quantities to show: {', '.join(silent)}."))
    return [Section("What the models read", blocks)]


def _distance_pictures(maps: Mapping[str, Mapping[str, Any]]) -> list[Block]:
    """Draw the weight by distance, a line per model, in the colors of all other figures."""
    from longspan.report.figures import Series, line_figure, picture_of

    lines, edges = list[Series](), list[float]()
    for index, (name, one) in enumerate(maps.items()):
        if one["distances"]:
            weights = one["distances"]["weights"]
            lines.append(Series(x=range(len(weights)), y=weights, label=name, kind="marked", color=index))
            edges = max(edges, one["distances"]["edges"], key=len)
    if not lines:
        return []
    ranges = enumerate(zip(edges, [*edges[1:], None], strict=True))
    labels = {index: f"{edge:.0f}" if end == edge + 1 else f"{edge:.0f}+" for index, (edge, end) in ranges}
    return [
        picture_of(
            line_figure,
            "weights",
            lines,
            xlabel="distance of the token that is read, in tokens",
            ylabel="weight",
            xticks=labels,
            alt="Weight of earlier tokens by their distance.",
            caption="How much of an output comes from tokens at a distance: 0 is the token itself, 8+ is 8 to 15. What "
            "is missing to a sum of 1 comes from the state before the piece, from memory or from learned vectors.",
        )
    ]


def _quantity_tables(maps: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """Return the table of learned quantities: gates, spans, alphas and the like."""
    rows = [
        (name, quantity["name"], *(f"{quantity[key]:.3g}" for key in ("mean", "low", "high")), quantity["caption"])
        for name, one in maps.items()
        for quantity in one["quantities"]
    ]
    if not rows:
        return []
    columns = ("model", "quantity", "mean", "lowest", "highest", "what it is")
    caption = "Quantities of the mechanisms, over layers, heads and tokens."
    return [Table(columns=columns, rows=rows, right=(2, 3, 4), caption=caption)]


def _map_pictures(maps: Mapping[str, Sequence[Sequence[float]]]) -> list[Block]:
    """Draw the weights of the last tokens of the piece, a panel per model."""
    from longspan.report.figures import Panel, pattern_figure, picture_of

    if not maps:
        return []
    panels = [Panel(name, np.maximum(np.array(weights), 0.0).tolist()) for name, weights in maps.items()]
    return [
        picture_of(
            pattern_figure,
            "maps",
            panels,
            alt="Weights of keys for every query, a panel per model.",
            caption=f"The last {len(panels[0].values)} tokens: each row is a query, the darker a key, the larger its "
            "weight in that row. Negative weights, which memories may have, are drawn as none.",
        )
    ]


def look_at(folders: Mapping[str, str], reading: Reading, out: Path) -> dict[str, dict[str, Any]]:
    """Return `measure_maps` of runs by name; results are kept in `OUT/measured`."""
    return {
        name: measure_maps(folder, reading, out / "measured" / f"{name.replace('/', '-')}.maps.json")
        for name, folder in folders.items()
    }
