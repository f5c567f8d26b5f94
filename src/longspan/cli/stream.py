"""`longspan stream`."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longspan.cli.console import StatusLine, say
from longspan.cli.options import DeviceOption, DtypeOption, ErrorsOption, RunArgument, SetOption, check_state, verb
from longspan.cli.outputs import check_output_folder
from longspan.cli.runs import open_run
from longspan.errors import ConfigError, DataError, LongspanError

if TYPE_CHECKING:
    from longspan.cli.streaming import Block, Records
    from longspan.models import Decoder
    from longspan.stream import StreamSession
    from longspan.tasks.tokenizers import Tokenizer


@dataclass(frozen=True, kw_only=True)
class StreamOptions:
    """Options of `longspan stream`."""

    run: RunArgument
    file: Annotated[str, typer.Argument(metavar="FILE", help="A file, or - for standard input.", show_default=False)]
    save_state: Annotated[
        Path | None,
        typer.Option(
            "--save-state",
            metavar="STATE",
            help="Save the state at the end, or when stopped (Ctrl-C).",
            callback=check_state,
        ),
    ] = None
    load_state: Annotated[
        Path | None, typer.Option("--load-state", metavar="STATE", help="Continue from a saved state with FILE.")
    ] = None
    save_at: Annotated[
        int,
        typer.Option(
            "--save-at", min=0, metavar="BYTES", help="Save after this many bytes of FILE instead, then keep reading."
        ),
    ] = 0
    skip: Annotated[
        int, typer.Option("--skip", min=0, metavar="BYTES", help="Skip this many bytes at the start of FILE.")
    ] = 0
    limit: Annotated[
        int, typer.Option("--limit", min=0, metavar="BYTES", help="Stop after this many bytes; 0: at the end.")
    ] = 0
    log: Annotated[
        Path | None, typer.Option("--log", metavar="FILE", help="Write the figures of every block as JSON lines.")
    ] = None
    losses: Annotated[
        Path | None,
        typer.Option("--losses", metavar="FILE", help="Write the loss of every token (nats) as raw float32."),
    ] = None
    block: Annotated[
        int, typer.Option("--block", min=1, metavar="BYTES", help="Bytes per block; one line is printed per block.")
    ] = 1 << 16
    chunk: Annotated[
        int, typer.Option("--chunk", min=0, help="Tokens per call of the model; 0: chosen to suit the model.")
    ] = 0
    set_: SetOption = None
    errors: ErrorsOption = "strict"
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors and warnings.")] = False
    device: DeviceOption = "auto"
    dtype: DtypeOption = ""


@verb(StreamOptions)
def stream(options: StreamOptions) -> int:
    """Read one text of any length in constant memory and report how well the model predicts it, in bits per byte.

    The file is read in blocks, never as a whole. A saved state continues the stream with identical results: in another
    process, at any time, with the next part of the text. A model of bytes reads them at once; a model of subwords or
    words tokenizes pieces that end at the first newline after 64 K characters, so that blocks do not change the tokens.


    Examples:
      longspan stream runs/first book.txt
      longspan stream runs/first part1.txt --save-state book.state
      longspan stream runs/first part2.txt --load-state book.state
      tail -f server.log | longspan stream runs/first -
    """
    save_at, limit = options.save_at, options.limit
    if save_at and options.save_state is None:
        raise ConfigError("--save-at: needs a file to save to; add --save-state FILE")
    if save_at and limit and save_at > limit:
        raise ConfigError(f"--save-at {save_at}: must not be larger than --limit {limit}")
    if options.chunk and options.load_state:
        raise ConfigError("--chunk: cannot be changed for a saved state, which stores its chunk size; leave it out")
    for path, option in ((options.log, "--log"), (options.losses, "--losses")):
        if path is not None:
            check_output_folder(path.parent, option)  # created later if it does not exist
    from longspan.cli import streaming

    model, task = open_run(options.run, options.set_ or [], device=options.device, dtype=options.dtype)
    session = open_session(model, options.load_state, options.chunk)
    if not model.traits.bounded:
        say("note: the state of this model grows with the text, so memory use is not constant")
    records = streaming.Records(options.log, options.losses)
    try:
        return _Stream(options, session).read(task.tokenizer, records)
    finally:
        records.close()


def open_session(model: "Decoder", load_state: Path | None, chunk: int = 0) -> "StreamSession":
    """Return a new streaming session, or one that continues from a saved state.

    Args:
        model: to stream with.
        load_state: file of the saved state; None: start with an empty state.
        chunk: tokens per call of the model, for a new session; 0: chosen to suit the model.

    Raises:
        CheckpointError: the state file is missing, damaged, or of another model.
        UnsupportedError: the model does not stream.
    """
    from longspan.stream import StreamSession

    if load_state is None:
        return StreamSession(model, chunk=chunk or None)
    # a fork copies the tensors into memory that torch allocates: the last bit of results may depend on their alignment
    return StreamSession.load(model, load_state).fork()


class _Stream:
    """Feeds one file to a session, prints and records the figures, and saves the state once if the options say so."""

    def __init__(self, options: StreamOptions, session: "StreamSession") -> None:
        self.options, self.session = options, session
        self.last: Block | None = None
        self.saved = False

    def read(self, tokenizer: "Tokenizer", records: "Records") -> int:
        """Read the file to its end, its limit or Ctrl-C, and return the exit code of the command.

        Raises:
            LongspanError: the text cannot be read further or a file cannot be written; the state before the error is
                saved, and the message says how to resume.
        """
        from longspan.cli import reading, streaming

        options, status, stop = self.options, StatusLine(quiet=self.options.quiet), streaming.Stop()
        name = "standard input" if options.file == "-" else options.file
        encoder = reading.encoder(tokenizer, name, errors=options.errors, start=options.skip)
        with reading.open_bytes(options.file, options.skip) as file, stop.listening():
            streaming.begin(self.session, tokenizer)
            sizes: dict[str, Any] = {"block": options.block, "cuts": [options.save_at], "limit": options.limit}
            try:
                for block, nats in streaming.feed(self.session, file, tokenizer, encoder, stop=stop, **sizes):
                    self.last = block
                    if options.save_at == block.read:
                        self._save()
                    records.write(block, nats)
                    status.show(*block.lines())
            except (LongspanError, OSError) as error:
                # invalid text, a full disk, or the process that reads our output has exited
                raise self._error(error) from None
            if stop.stopping or not options.save_at:
                # save before anything is printed: the terminal may be gone
                self._save()
        status.end()
        self._print_end()
        return 130 if stop.stopping else 0

    def _save(self) -> bool:
        """Save the state unless it was saved before or no file was given; return whether it was saved now."""
        if self.options.save_state is None or self.saved:
            return False
        self.session.save(self.options.save_state)
        self.saved = True
        return True

    def _error(self, error: LongspanError | OSError) -> Exception:
        """Save the state and return the error to raise, with a hint how to resume."""
        if not self._save():
            return error
        hint = f"the state before the error is saved: {self._resume_hint()}"
        if isinstance(error, BrokenPipeError):
            say(hint)
            return error
        if isinstance(error, OSError):
            text = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)
            return DataError(f"{text}; {hint}")
        return type(error)(f"{error}; {hint}")

    def _resume_hint(self) -> str:
        """Tell how to continue from the saved state, and how many bytes to skip in the same file."""
        state, end = shlex.quote(str(self.options.save_state)), self.last.end if self.last else 0
        return f"continue with --load-state {state} (in the same file add --skip {self.options.skip + end})"

    def _print_end(self) -> None:
        """Print the totals of the stream, and where its state was saved."""
        from longspan.report import si_bytes

        options, last = self.options, self.last
        if options.save_at and not self.saved:
            say(f"the text ended before --save-at {options.save_at}, so no state was saved")
        if options.quiet:
            return
        if last is None:
            say("the input is empty")
        else:
            speed = last.bytes / max(last.seconds, 1e-9)
            print(
                f"{last.bytes:,} bytes, {last.tokens:,} tokens: {last.mean_bits_per_byte:.4f} bits per byte, "
                f"{speed:,.0f} bytes/s, state {si_bytes(self.session.nbytes)}",
                flush=True,
            )
        if self.saved and (not options.save_at or last is None or last.read < options.save_at):
            say(f"saved {shlex.quote(str(options.save_state))}; {self._resume_hint()}")
