"""The numbers and the HTML page of `longspan show text`."""

import codecs
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longspan.report import (
    Block,
    Section,
    Table,
    Text,
    TokenSeries,
    TokenText,
    change_series,
    loss_series,
    number,
    write_report,
)

if TYPE_CHECKING:
    from longspan.cli.show.text import ShownText, TextOptions
    from longspan.tasks.base import Array
    from longspan.tasks.tokenizers import Tokenizer
    from longspan.train.token_layers import LayerView, Strongest
    from longspan.train.token_view import SpanLosses

BEGIN = "start of the document"
_NAMES = {" ": "space", "\n": "line break", "\t": "tab", "\r": "carriage return"}
# characters before and after a token that show where it is
_AROUND = 16
_WEIGHTS = (
    "Weights are measured: each layer runs again with unit vectors in place of values, so they are what its operation "
    "uses, also for linear attention and for memories, where no softmax is computed. The weights of a token sum to 1 "
    "over all that it reads, unless its mechanism says otherwise below. What the tokens shown here do not get is on "
    "the text before them, on memory tokens, on compressed slots or on learned vectors."
)
_NO_WEIGHTS = "no weights: the outputs of this mechanism are not a weighted sum of values"


def plain(
    options: "TextOptions",
    tokenizer: "Tokenizer",
    shown: "ShownText",
    losses: "SpanLosses",
    views: "Sequence[LayerView]",
) -> dict[str, Any]:
    """Return all numbers as plain data for JSON; lists have one entry per token, None where there is no number.

    Positions count the tokens of the document; 0 is the token that begins it.
    """
    span, ids = shown.span, shown.ids[shown.span.start : shown.span.stop].tolist()
    texts = token_texts(tokenizer, ids)
    if span.start == 0:
        texts[0] = ""
    return {
        "run": options.run,
        "file": options.file,
        "first_position": span.start,
        "tokens": texts,
        "names": _names(tokenizer, ids, texts, span),
        "ids": ids,
        "bytes": [int(size) for size in tokenizer.sizes[ids]],
        "bits": _numbers(losses.nats / math.log(2)),
        "bits_without_memory": _numbers(losses.without / math.log(2)),
        "segment": losses.segment,
        "carries_state": losses.carried,
        "layers": [_layer(view, shown, tokenizer) for view in views],
    }


def token_texts(tokenizer: "Tokenizer", ids: Sequence[int]) -> list[str]:
    """Return the text of each token; a character whose bytes are in several tokens belongs to the last of them."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    return [decoder.decode(tokenizer.decode([index])) for index in ids]


def _names(tokenizer: "Tokenizer", ids: Sequence[int], texts: Sequence[str], span: range) -> list[str]:
    """Return how to call each token, where its text cannot be seen; "" for the others."""
    return [
        BEGIN if position == 0 else _name(text, tokenizer, index)
        for position, index, text in zip(span, ids, texts, strict=True)
    ]


def _name(text: str, tokenizer: "Tokenizer", index: int) -> str:
    """Return how to call a token without visible text; "" for other tokens."""
    if text:
        return _NAMES.get(text, "" if text.strip() else f"white space {text!r}")
    data = tokenizer.decode([index])
    return f"part of a character, {data.hex(' ')}" if data else f"token {index} without text"


def _numbers(values: "Array", digits: int = 6) -> list[Any]:
    """Return an array as lists of rounded numbers, with None instead of NaN."""
    if values.ndim > 1:
        return [_numbers(row, digits) for row in values]
    return [None if math.isnan(value) else round(value, digits) for value in values.tolist()]


def _layer(view: "LayerView", shown: "ShownText", tokenizer: "Tokenizer") -> dict[str, Any]:
    """Return the numbers of one layer as plain data."""
    layer: dict[str, Any] = {
        "layer": view.number,
        "mechanism": view.name,
        "label": f"Layer {view.number} ({view.name})" if view.number else "Mean of all layers with weights",
        "positions": None,
        "weights": None,
        "sum": None,
        "note": _NO_WEIGHTS if view.strongest is None else "",
        "diagnostics": [
            {
                "name": diagnostic.name,
                "caption": diagnostic.caption,
                "per": diagnostic.per,
                "discrete": diagnostic.discrete,
                "values": _numbers(diagnostic.values),
            }
            for diagnostic in view.diagnostics
        ],
        "retrievals": [
            {
                "name": retrieval.name,
                "caption": retrieval.caption,
                **_lists(retrieval.strongest),
                "snippets": _snippets(retrieval.strongest, shown, tokenizer),
            }
            for retrieval in view.retrievals
        ],
    }
    if view.strongest is not None and view.read is not None and view.sums is not None:
        lists = _lists(view.strongest)
        for key, values in {**lists, "sum": _numbers(view.sums)}.items():
            layer[key] = [value if read else None for value, read in zip(values, view.read, strict=True)]
    return layer


def _lists(strongest: "Strongest") -> dict[str, list[list[Any]]]:
    """Return positions and weights as lists of different lengths."""
    rows: list[list[int]] = strongest.positions.tolist()
    positions = [[position for position in row if position >= 0] for row in rows]
    weights = [row[: len(known)] for row, known in zip(_numbers(strongest.weights), positions, strict=True)]
    return {"positions": positions, "weights": weights}


def _snippets(strongest: "Strongest", shown: "ShownText", tokenizer: "Tokenizer") -> dict[int, list[str]]:
    """Return the text before, of and after each retrieved token that is not shown, by position."""
    snippets = {}
    for position in sorted(set(strongest.positions.ravel().tolist())):
        if position < 0 or position in shown.span:
            continue
        before, after = (
            tokenizer.decode(part[part != tokenizer.begin].tolist()).decode(errors="replace")
            for part in (shown.ids[max(position - _AROUND, 1) : position], shown.ids[position + 1 :][:_AROUND])
        )
        own = tokenizer.decode([int(shown.ids[position])]).decode(errors="replace") if position else BEGIN
        snippets[position] = [before[-_AROUND:], own, after[:_AROUND]]
    return snippets


def summary(data: dict[str, Any]) -> Table:
    """Return a table of the mean losses, with the state and without where both are measured."""
    rows = [("all tokens shown", *_means(data, data["bits"]))]
    changed = [value is not None for value in data["bits_without_memory"]]
    if any(changed):
        with_state = [value if known else None for value, known in zip(data["bits"], changed, strict=True)]
        if not all(changed):
            rows.append(("after the first segment", *_means(data, with_state)))
        name = f"the same without memory, segments of {data['segment']:,}"
        rows.append((name, *_means(data, data["bits_without_memory"])))
    return Table(columns=("", "tokens", "bits per token", "bits per byte"), rows=rows, right=(1, 2, 3))


def _means(data: dict[str, Any], bits: Sequence[float | None]) -> tuple[str, str, str]:
    """Return the number of tokens with a loss, and their mean loss per token and per byte."""
    known = [(value, size) for value, size in zip(bits, data["bytes"], strict=True) if value is not None]
    total, size = sum(value for value, _ in known), sum(size for _, size in known)
    return f"{len(known):,}", number(total / max(len(known), 1), 4), number(total / max(size, 1), 4)


def write_page(options: "TextOptions", data: dict[str, Any]) -> Path:
    """Write the page and its numbers; return the path of the HTML file.

    Raises:
        CheckpointError: a file could not be written.
    """
    text = TokenText(
        tokens=data["tokens"],
        names=data["names"],
        series=_series(data),
        layers=data["layers"],
        first=data["first_position"],
    )
    last = data["first_position"] + len(data["tokens"]) - 1
    sections = [
        Section("Text", [text, summary(data), *map(Text, _notes(data))]),
        Section("Layers", _about_layers(data)),
    ]
    title = f"Tokens {max(data['first_position'], 1):,} to {last:,} of {options.file}, read by {options.run}"
    return write_report(options.output, title, sections, data, footer="made by longspan show text")


def _series(data: dict[str, Any]) -> list[TokenSeries]:
    """Return the numbers that may shade the text, besides those of the layers."""
    series = [loss_series(data["bits"])]
    if any(value is not None for value in data["bits_without_memory"]):
        saved = [
            None if without is None else round(without - bits, 6)
            for bits, without in zip(data["bits"], data["bits_without_memory"], strict=True)
        ]
        caption = (
            f"bits that the carried state saves: the loss without memory, in segments of {data['segment']:,} tokens "
            "that each begin with an empty state, minus the loss; above zero the memory helps"
        )
        series.append(change_series("saved by the memory", caption, saved))
    return series


def _notes(data: dict[str, Any]) -> list[str]:
    """Return sentences about what the losses are."""
    notes = [
        "Losses are those of longspan eval and longspan stream: each token is predicted from all tokens before it."
    ]
    if not data["carries_state"]:
        return [
            f"The model does not stream. As in longspan eval, the text is read in segments of {data['segment']:,} "
            "tokens, each from an empty state, so there is no memory to leave out; what a token reads may depend on "
            "later tokens of its segment."
        ]
    if not any(value is not None for value in data["bits_without_memory"]):
        notes.append(
            f"All of it lies in the first segment of {data['segment']:,} tokens, where there is no memory yet; choose "
            "a larger --from or --length to see what the memory saves."
        )
    return notes


def _about_layers(data: dict[str, Any]) -> list[Block]:
    """Return what the numbers of the layers are, and those that do not depend on the token."""
    told = {item["name"]: item["caption"] for layer in data["layers"] for item in _told(layer)}
    rows = [
        (layer["label"], layer["note"] or "attention weights", ", ".join(item["name"] for item in _told(layer)))
        for layer in data["layers"]
    ]
    columns = ("layer", "reads", "tells")[: 3 if told else 2]
    cells = [row[: len(columns)] for row in rows]
    blocks: list[Block] = [Text(_WEIGHTS), Table(columns=columns, rows=cells)]
    if told:
        blocks.append(Table(columns=("number", "what it is"), rows=list(told.items())))
    constants = [
        (layer["label"], item["name"], ", ".join(number(value) for value in item["values"]))
        for layer in data["layers"]
        for item in layer["diagnostics"]
        if not isinstance(item["values"][0], list)
    ]
    if constants:
        blocks.append(Table(columns=("layer", "number", "by head"), rows=constants))
    return blocks


def _told(layer: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what the mechanism of a layer tells."""
    return [*layer["diagnostics"], *layer["retrievals"]]
