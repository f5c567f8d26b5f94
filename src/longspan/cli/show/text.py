"""`longspan show text`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from longspan.cli.console import console, print_table, reading_progress
from longspan.cli.options import DeviceOption, DtypeOption, ErrorsOption, PageOption, RunArgument, SetOption, verb
from longspan.cli.runs import open_run
from longspan.errors import DataError

if TYPE_CHECKING:
    from longspan.tasks.base import Array
    from longspan.tasks.tokenizers import Tokenizer

_LONGEST = 2048
# bytes that are read from a file at once
_READ = 1 << 16


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Options of `longspan show text`."""

    run: RunArgument
    file: Annotated[str, typer.Argument(metavar="FILE", help="A file, or - for standard input.", show_default=False)]
    from_: Annotated[
        int, typer.Option("--from", min=0, metavar="N", help="Tokens to read before the first one that is shown.")
    ] = 0
    length: Annotated[int, typer.Option("--length", "-n", min=1, max=_LONGEST, help="Number of tokens to show.")] = 1024
    layer: Annotated[
        int, typer.Option("--layer", min=0, metavar="L", help="Show what this layer reads, from 1. 0: all layers.")
    ] = 0
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON; the page is written, too.")] = (
        False
    )
    output: PageOption = Path("out/text")
    set_: SetOption = None
    errors: ErrorsOption = "strict"
    device: DeviceOption = "auto"
    dtype: DtypeOption = ""


class ShownText(NamedTuple):
    """A part of a text that is shown.

    Attributes:
        ids: (n,) token ids of the document, the first of which begins it.
        span: positions of the tokens that are shown, in `ids`.
    """

    ids: "Array"
    span: range


@verb(TextOptions)
def text(options: TextOptions) -> None:
    """Show what a run does with a text, token by token, on an HTML page: its loss, what it reads, what it remembers.

    The page shades every token by its loss in bits, or by what the carried state changes: the loss is also measured
    with an empty state at the start of every segment. For a selected token it marks the earlier tokens with the largest
    attention weights, which are measured by the mechanism's own operation, and lists gates, decays, spans, buckets or
    retrieved tokens, as far as the mechanism has them. The text before --from is read first.

    Writes report.html and, with all numbers, report.json.

    Examples:
      longspan show text runs/first book.txt
      longspan show text runs/first book.txt --from 500 --length 200 --layer 2
    """
    from longspan.cli.evaluate import trained_segment
    from longspan.cli.show.text_page import plain, summary, write_page
    from longspan.train.token_layers import LayerWatch
    from longspan.train.token_view import read_span

    model, task = open_run(options.run, options.set_ or [], device=options.device, dtype=options.dtype)
    segment = trained_segment(options.run, model)
    # a model that does not stream reads its last segment as a whole
    shown = _read(task.tokenizer, options, 0 if model.traits.streams else segment)
    with reading_progress("reading the text") as reading, reading_progress("measuring the layers") as measuring:
        watch = LayerWatch(model, shown.span, options.layer, progress=measuring)
        losses = read_span(model, shown.ids, shown.span, segment=segment, watch=watch.see, progress=reading)
    data = plain(options, task.tokenizer, shown, losses, watch.views())
    path = write_page(options, data)
    if options.as_json:
        print(json.dumps(data, indent=2))
        return
    print_table(summary(data))
    console().print(f"wrote {path}", markup=False)


def _read(tokenizer: "Tokenizer", options: TextOptions, more: int) -> ShownText:
    """Read the text as far as it is shown, and `more` tokens.

    Raises:
        DataError: the text cannot be read or decoded, or ends before --from.
    """
    import numpy as np

    from longspan.cli import reading

    name = "standard input" if options.file == "-" else options.file
    first, needed = options.from_, options.from_ + options.length
    encoder = reading.encoder(tokenizer, name, errors=options.errors)
    parts, count, done = [], 0, False
    with reading.open_bytes(options.file) as file:
        while not done and count < needed + more:
            block = reading.read_some(file, _READ)
            done = not block
            parts.append(encoder.flush() if done else encoder.push(block))
            count += len(parts[-1])
    ids = np.concatenate([[tokenizer.begin], *parts])[: needed + more + 1]
    if count <= first:
        raise DataError(f"{name}: has {count:,} tokens, so none is left after --from {first}; give a smaller number")
    # without text before it, the token that begins the document is shown, too
    return ShownText(ids, range(first + 1 if first else 0, min(needed, count) + 1))
