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
            help="Save where the stream ends, or is stopped, as by Ctrl-C.",
            callback=check_state,
        ),
    ] = None
    load_state: Annotated[
        Path | None, typer.Option("--load-state", metavar="STATE", help="Go on from a saved state with FILE.")
    ] = None
    save_at: Annotated[
        int,
        typer.Option("--save-at", min=0, metavar="BYTES", help="Save after so many bytes of FILE instead, and go on."),
    ] = 0
    skip: Annotated[int, typer.Option("--skip", min=0, metavar="BYTES", help="Leave out the start of FILE.")] = 0
    limit: Annotated[
        int, typer.Option("--limit", min=0, metavar="BYTES", help="Stop after so many; 0: at the end.")
    ] = 0
    log: Annotated[
        Path | None, typer.Option("--log", metavar="FILE", help="Write the figures of every block as JSON lines.")
    ] = None
    losses: Annotated[
        Path | None, typer.Option("--losses", metavar="FILE", help="Write the nats of every token as raw float32.")
    ] = None
    block: Annotated[int, typer.Option("--block", min=1, metavar="BYTES", help="Bytes of a line of figures.")] = 1 << 16
    chunk: Annotated[
        int, typer.Option("--chunk", min=0, help="Tokens the model computes at once; 0: as suits the model.")
    ] = 0
    set_: SetOption = None
    errors: ErrorsOption = "strict"
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False
    device: DeviceOption = "auto"
    dtype: DtypeOption = ""


@verb(StreamOptions)
def stream(options: StreamOptions) -> int:
    """Read one text of any length with a run's model, in constant memory, and say how well it is predicted.

    The file is read in blocks and never held whole. Where it stops, a saved state goes on as if nothing had happened:
    in another process, on another day, with the next part of the text. A run that reads bytes takes them as they come;
    one that reads subwords waits for a line's end after 64 K characters, so that cutting changes no token.

    Examples:
      longspan stream runs/first book.txt
      longspan stream runs/first part1.txt --save-state book.state
      longspan stream runs/first part2.txt --load-state book.state
      tail -f server.log | longspan stream runs/first -
    """
    save_at, limit = options.save_at, options.limit
    if save_at and options.save_state is None:
        raise ConfigError("--save-at says when to save; --save-state FILE says where")
    if save_at and limit and save_at > limit:
        raise ConfigError(f"--save-at {save_at} lies beyond --limit {limit}")
    if options.chunk and options.load_state:
        raise ConfigError("--chunk: a saved state goes on with the chunks it began with; leave it out")
    for path, option in ((options.log, "--log"), (options.losses, "--losses")):
        if path is not None:
            check_output_folder(path.parent, option)  # made where it is missing
    from longspan.cli import streaming

    model, task = open_run(options.run, options.set_ or [], device=options.device, dtype=options.dtype)
    session = open_session(model, options.load_state, options.chunk)
    if not model.traits.bounded:
        say("this model's state grows with the text; memory will not stay constant")
    records = streaming.Records(options.log, options.losses)
    try:
        return _Stream(options, session).read(task.tokenizer, records)
    finally:
        records.close()


def open_session(model: "Decoder", load_state: Path | None, chunk: int = 0) -> "StreamSession":
    """A session at the start, or where a saved state stands.

    Raises:
        CheckpointError: the state is missing, damaged, or another model's.
        UnsupportedError: the model does not stream.
    """
    from longspan.stream import StreamSession

    if load_state is None:
        return StreamSession(model, chunk=chunk or None)
    # a fork, as its tensors lie where torch puts them: on the alignment in memory the last bit may depend
    return StreamSession.load(model, load_state).fork()


class _Stream:
    """A file on its way through a session, which is saved once where the options ask for it."""

    def __init__(self, options: StreamOptions, session: "StreamSession") -> None:
        self.options, self.session = options, session
        self.last: Block | None = None
        self.saved = False

    def read(self, tokenizer: "Tokenizer", records: "Records") -> int:
        """Read, show, record and save; the exit code."""
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
                # text that cannot be read on, a full disk, a reader of the output that has left
                raise self._error(error) from None
            if stop.stopping or not options.save_at:
                # before anything is printed, as the terminal may be gone
                self._save()
        status.end()
        self._print_end()
        return 130 if stop.stopping else 0

    def _save(self) -> bool:
        """Save, unless that is done or not wanted; whether it was."""
        if self.options.save_state is None or self.saved:
            return False
        self.session.save(self.options.save_state)
        self.saved = True
        return True

    def _error(self, error: LongspanError | OSError) -> Exception:
        """The error that ended the stream, after what was read is saved."""
        if not self._save():
            return error
        hint = f"what was read before is saved: {self._resume_hint()}"
        if isinstance(error, BrokenPipeError):
            say(hint)
            return error
        if isinstance(error, OSError):
            text = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)
            return DataError(f"{text}; {hint}")
        return type(error)(f"{error}; {hint}")

    def _resume_hint(self) -> str:
        state, end = shlex.quote(str(self.options.save_state)), self.last.end if self.last else 0
        return f"go on with --load-state {state} (in the same file: --skip {self.options.skip + end})"

    def _print_end(self) -> None:
        from longspan.report import si_bytes

        options, last = self.options, self.last
        if options.save_at and not self.saved:
            say(f"the text ended before --save-at {options.save_at}; nothing was saved")
        if options.quiet:
            return
        if last is None:
            say("nothing to read")
        else:
            speed = last.bytes / max(last.seconds, 1e-9)
            print(
                f"{last.bytes:,} bytes, {last.tokens:,} tokens: {last.mean_bits_per_byte:.4f} bits per byte, "
                f"{speed:,.0f} bytes/s, state {si_bytes(self.session.nbytes)}",
                flush=True,
            )
        if self.saved and (not options.save_at or last is None or last.read < options.save_at):
            say(f"saved {shlex.quote(str(options.save_state))}; {self._resume_hint()}")
