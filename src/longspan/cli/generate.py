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
        str | None, typer.Option("--prompt", "-p", metavar="TEXT", help="The text to continue.", show_default=False)
    ] = None
    prompt_file: Annotated[
        str | None,
        typer.Option(
            "--prompt-file", metavar="FILE", help="File with the text to continue, of any length; - reads stdin."
        ),
    ] = None
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=1, help="Maximum number of tokens to generate.")] = 200
    temperature: Annotated[
        float,
        typer.Option("--temperature", min=0.0, help="Sampling temperature; 0: always take the most likely token."),
    ] = 0.8
    top_k: Annotated[int, typer.Option("--top-k", min=0, help="Sample from the k most likely tokens; 0: from all.")] = 0
    top_p: Annotated[
        float,
        typer.Option(
            "--top-p", min=0.0, max=1.0, help="Sample from the most likely tokens that reach this total probability."
        ),
    ] = 0.95
    seed: Annotated[int, typer.Option("--seed", help="Random seed; the same seed generates the same text.")] = 0
    load_state: Annotated[
        Path | None, typer.Option("--load-state", metavar="STATE", help="Continue from a state that `stream` saved.")
    ] = None
    save_state: Annotated[
        Path | None,
        typer.Option(
            "--save-state", metavar="STATE", help="Save the state after the generated text.", callback=check_state
        ),
    ] = None
    errors: ErrorsOption = "strict"
    echo: Annotated[bool, typer.Option("--echo", help="Print the prompt (of --prompt) before the new text.")] = False
    set_: SetOption = None
    device: DeviceOption = "auto"
    dtype: DtypeOption = ""


@verb(GenerateOptions)
def generate(options: GenerateOptions) -> int:
    """Generate text that continues a prompt, a file of any length, or a saved state.

    Standard output receives only the new text, as it is generated. Ctrl-C stops; with --save-state the state of
    everything read and generated so far is saved then too.

    Examples:
      longspan generate runs/first --prompt "My fellow citizens, "
      longspan generate runs/first --prompt-file book.txt --tokens 500 --temperature 0.7
      longspan generate runs/first --load-state book.state --seed 3
    """
    if options.prompt is not None and options.prompt_file is not None:
        raise ConfigError("give --prompt or --prompt-file, not both")
    if options.prompt is None and options.prompt_file is None and options.load_state is None:
        raise ConfigError("no prompt: give --prompt TEXT, --prompt-file FILE or --load-state STATE")
    if options.top_p == 0:
        raise ConfigError("--top-p 0 excludes every token; use --temperature 0 for the most likely token")
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
            # the process that reads the output has exited, or the disk is full
            if options.save_state is not None:
                session.save(options.save_state)
            raise
        if options.save_state is not None:
            session.save(options.save_state)
            say(f"saved {options.save_state}")
    return 130 if stop.stopping else 0


def _write(drawn: "Iterator[int]", tokenizer: "Tokenizer", prompt: str | None, stop: "Stop") -> None:
    """Write the prompt, if any, and then tokens as they are sampled, until the last one or Ctrl-C."""
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
    """Encode a command-line argument as UTF-8; bytes that the shell could not decode are restored unchanged."""
    return text.encode("utf-8", errors="surrogateescape")


def _read_prompt(session: "StreamSession", tokenizer: "Tokenizer", options: GenerateOptions, stop: "Stop") -> None:
    """Feed the prompt to the session, to its end or until Ctrl-C.

    Raises:
        DataError: the prompt cannot be read or decoded; the session has read everything before that point, and with
            --save-state its state is saved.
    """
    from longspan.cli import reading, streaming

    streaming.begin(session, tokenizer)
    size, path = 0, options.prompt_file
    if path is None:
        text = cast(BinaryIO, io.BytesIO(_bytes(options.prompt or "")))
        opened: contextlib.AbstractContextManager[BinaryIO] = contextlib.nullcontext(text)
    else:
        # the size of a pipe is unknown
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
            f"; the state after the first {end:,} bytes is saved: longspan stream RUN FILE --load-state {state} "
            f"--skip {end}"
        )
    if problem is not None:
        raise DataError(f"{problem}{hint}") from None
    say(f"stopped while reading the prompt{hint}")


class Writer:
    """Writes bytes to standard output: unchanged to a file or a pipe, without control characters to a terminal."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace") if sys.stdout.isatty() else None

    def write(self, data: bytes) -> None:
        """Write and flush bytes; an incomplete UTF-8 character waits for its rest when writing to a terminal."""
        if self._decoder is None:
            sys.stdout.buffer.write(data)
        else:
            sys.stdout.write(harmless(self._decoder.decode(data)))
        sys.stdout.flush()

    def end(self) -> None:
        """End the output with a newline if it goes to a terminal."""

        if self._decoder is not None:
            sys.stdout.write("\n")
            sys.stdout.flush()
