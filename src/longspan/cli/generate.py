"""`longspan generate`."""

import codecs
import contextlib
import io
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO, cast

import typer

from longspan.cli.console import harmless, reading_progress, say
from longspan.cli.options import DeviceOption, DtypeOption, ErrorsOption, RunArgument, SetOption, check_state, verb
from longspan.cli.runs import open_run
from longspan.cli.stream import open_session
from longspan.errors import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from longspan.cli.streaming import Stop
    from longspan.stream import StreamSession
    from longspan.tasks.tokenizers import Tokenizer


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Options of `longspan generate`."""

    run: RunArgument
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", metavar="TEXT", help="What to go on from.", show_default=False)
    ] = None
    prompt_file: Annotated[
        str | None,
        typer.Option("--prompt-file", metavar="FILE", help="A file of any length, or - for standard input."),
    ] = None
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=1, help="How many tokens to write at most.")] = 200
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="Below 1 bolder in what is likely; 0: always the likeliest.")
    ] = 0.8
    top_k: Annotated[int, typer.Option("--top-k", min=0, help="Draw among the k likeliest; 0: among all.")] = 0
    top_p: Annotated[
        float, typer.Option("--top-p", min=0.0, max=1.0, help="Draw among the likeliest that reach this probability.")
    ] = 0.95
    seed: Annotated[int, typer.Option("--seed", help="The same seed writes the same text.")] = 0
    load_state: Annotated[
        Path | None, typer.Option("--load-state", metavar="STATE", help="Go on from a state that `stream` saved.")
    ] = None
    save_state: Annotated[
        Path | None,
        typer.Option("--save-state", metavar="STATE", help="Save where the text ends.", callback=check_state),
    ] = None
    errors: ErrorsOption = "strict"
    echo: Annotated[bool, typer.Option("--echo", help="Write the prompt (of --prompt) too.")] = False
    set_: SetOption = None
    device: DeviceOption = "auto"
    dtype: DtypeOption = ""


@verb(GenerateOptions)
def generate(options: GenerateOptions) -> int:
    """Go on writing from a prompt, a file of any length, or a state that was saved.

    Standard output gets the new text alone, as it comes. Ctrl-C ends it; with --save-state what was read and written
    is saved then too.

    Examples:
      longspan generate runs/first --prompt "My fellow citizens, "
      longspan generate runs/first --prompt-file book.txt --tokens 500 --temperature 0.7
      longspan generate runs/first --load-state book.state --seed 3
    """
    if options.prompt is not None and options.prompt_file is not None:
        raise ConfigError("give --prompt or --prompt-file, not both")
    if options.prompt is None and options.prompt_file is None and options.load_state is None:
        raise ConfigError("nothing to go on from: give --prompt TEXT, --prompt-file FILE or --load-state STATE")
    if options.top_p == 0:
        raise ConfigError("--top-p 0 leaves nothing to draw from; --temperature 0 takes the likeliest token")
    import torch

    from longspan.cli import streaming

    model, task = open_run(options.run, options.set_ or [], device=options.device, dtype=options.dtype)
    session = open_session(model, options.load_state)
    stop = streaming.Stop()
    with stop.listening():
        _read_prompt(session, task.tokenizer, options, stop)
        drawn = session.stream(
            options.tokens,
            temperature=options.temperature,
            top_k=min(options.top_k, model.vocab_size) or None,
            top_p=options.top_p if options.top_p < 1 else None,
            generator=torch.Generator().manual_seed(options.seed),
            stop=task.tokenizer.ends,
        )
        try:
            if not stop.stopping:
                _write(drawn, task.tokenizer, options.prompt if options.echo else None, stop)
        except OSError:
            # the reader of the output has left, or the disk is full
            if options.save_state is not None:
                session.save(options.save_state)
            raise
        if options.save_state is not None:
            session.save(options.save_state)
            say(f"saved {options.save_state}")
    return 130 if stop.stopping else 0


def _write(drawn: "Iterator[int]", tokenizer: "Tokenizer", prompt: str | None, stop: "Stop") -> None:
    """Write the prompt, where there is one, and tokens as they come, until Ctrl-C."""
    out = Writer()
    if prompt:
        out.write(_bytes(prompt))
    for token in drawn:
        if token not in tokenizer.ends:
            out.write(tokenizer.decode([token]))
        if stop.stopping:
            break
    out.end()


def _bytes(text: str) -> bytes:
    """What the shell could not decode goes back to the bytes it was."""
    return text.encode("utf-8", errors="surrogateescape")


def _read_prompt(session: "StreamSession", tokenizer: "Tokenizer", options: GenerateOptions, stop: "Stop") -> None:
    """Read it to its end, or to Ctrl-C.

    Raises:
        DataError: what cannot be read; all before it has been, and is saved where that is wanted.
    """
    from longspan.cli import reading, streaming

    streaming.begin(session, tokenizer)
    size, path = 0, options.prompt_file
    if path is None:
        text = cast(BinaryIO, io.BytesIO(_bytes(options.prompt or "")))
        opened: contextlib.AbstractContextManager[BinaryIO] = contextlib.nullcontext(text)
    else:
        # a pipe does not say how much there is
        size, opened = Path(path).stat().st_size if Path(path).is_file() else 0, reading.open_bytes(path)
    name = "standard input" if path == "-" else path or "--prompt"
    encoder = reading.encoder(tokenizer, name, errors=options.errors)
    problem, end = None, 0
    with opened as file, reading_progress("reading the prompt") as show:
        try:
            for block, _ in streaming.feed(session, file, tokenizer, encoder, stop=stop, losses=False):
                end = block.end
                if size:
                    show(block.read, size)
        except (DataError, OSError) as error:
            problem = error
    if problem is None and not stop.stopping:
        return
    hint = ""
    if options.save_state is not None and path is not None:
        session.save(options.save_state)
        state = shlex.quote(str(options.save_state))
        hint = (
            f"; the first {end:,} bytes are read and saved: longspan stream RUN FILE --load-state {state} --skip {end}"
        )
    if problem is not None:
        raise DataError(f"{problem}{hint}") from None
    say(f"stopped while the prompt was read{hint}")


class Writer:
    """Bytes to standard output as they come: raw into a file or a pipe, harmless text on a terminal."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace") if sys.stdout.isatty() else None

    def write(self, data: bytes) -> None:
        """Write some bytes."""
        if self._decoder is None:
            sys.stdout.buffer.write(data)
        else:
            sys.stdout.write(harmless(self._decoder.decode(data)))
        sys.stdout.flush()

    def end(self) -> None:
        """Leave a terminal at the start of a line."""
        if self._decoder is not None:
            sys.stdout.write("\n")
            sys.stdout.flush()
