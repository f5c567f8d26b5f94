"""`longspan stream`."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longspan.cli.console import StatusLine, say
from longspan.cli.options import DeviceOption, DtypeOption, ErrorsOption, RunArgument, SetOption
from longspan.cli.outputs import check_output_file, check_output_folder
from longspan.cli.reading import check_errors
from longspan.cli.runs import open_run
from longspan.errors import ConfigError, DataError, LongspanError

if TYPE_CHECKING:
    from longspan.cli.streaming import Block, Records
    from longspan.models import Decoder
    from longspan.stream import StreamSession
    from longspan.tasks.tokenizers import Tokenizer


def stream(
    run: RunArgument,
    file: Annotated[str, typer.Argument(metavar="FILE", help="A file, or - for standard input.", show_default=False)],
    save_state: Annotated[
        Path | None,
        typer.Option("--save-state", metavar="STATE", help="Save where the stream ends, or is stopped, as by Ctrl-C."),
    ] = None,
    load_state: Annotated[
        Path | None, typer.Option("--load-state", metavar="STATE", help="Go on from a saved state with FILE.")
    ] = None,
    save_at: Annotated[
        int,
        typer.Option("--save-at", min=0, metavar="BYTES", help="Save after so many bytes of FILE instead, and go on."),
    ] = 0,
    skip: Annotated[int, typer.Option("--skip", min=0, metavar="BYTES", help="Leave out the start of FILE.")] = 0,
    limit: Annotated[
        int, typer.Option("--limit", min=0, metavar="BYTES", help="Stop after so many; 0: at the end.")
    ] = 0,
    log: Annotated[
        Path | None, typer.Option("--log", metavar="FILE", help="Write the figures of every block as JSON lines.")
    ] = None,
    losses: Annotated[
        Path | None, typer.Option("--losses", metavar="FILE", help="Write the nats of every token as raw float32.")
    ] = None,
    block: Annotated[int, typer.Option("--block", min=1, metavar="BYTES", help="Bytes of a line of figures.")] = 1
    << 16,
    chunk: Annotated[
        int, typer.Option("--chunk", min=0, help="Tokens the model computes at once; 0: as suits the model.")
    ] = 0,
    set_: SetOption = None,
    errors: ErrorsOption = "strict",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "",
) -> int:
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
    if save_at and save_state is None:
        raise ConfigError("--save-at says when to save; --save-state FILE says where")
    if save_at and limit and save_at > limit:
        raise ConfigError(f"--save-at {save_at} lies beyond --limit {limit}")
    if chunk and load_state:
        raise ConfigError("--chunk: a saved state goes on with the chunks it began with; leave it out")
    check_errors(errors)
    if save_state is not None:
        check_output_file(save_state, "--save-state")
    for path, option in ((log, "--log"), (losses, "--losses")):
        if path is not None:
            check_output_folder(path.parent, option)  # made where it is missing
    from longspan.cli import streaming

    model, task = open_run(run, set_ or [], device=device, dtype=dtype)
    session = open_session(model, load_state, chunk)
    if not model.traits.bounded:
        say("this model's state grows with the text; memory will not stay constant")
    plan = Plan(
        file=file,
        skip=skip,
        limit=limit,
        block=block,
        save_state=save_state,
        save_at=save_at,
        errors=errors,
        quiet=quiet,
    )
    records = streaming.Records(log, losses)
    try:
        return _read(session, task.tokenizer, plan, records)
    finally:
        records.close()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is read and what is kept; fields as the options of the verb."""

    file: str
    skip: int
    limit: int
    block: int
    save_state: Path | None
    save_at: int
    errors: str
    quiet: bool


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


def _read(session: "StreamSession", tokenizer: "Tokenizer", plan: Plan, records: "Records") -> int:
    """Read, show, record and save; the exit code."""
    from longspan.cli import reading, streaming

    status, last, saved = StatusLine(quiet=plan.quiet), None, False
    name = "standard input" if plan.file == "-" else plan.file
    stop = streaming.Stop()
    with reading.open_bytes(plan.file, plan.skip) as opened, stop.listening():
        streaming.begin(session, tokenizer)
        blocks = streaming.feed(
            session,
            opened,
            tokenizer,
            reading.encoder(tokenizer, name, errors=plan.errors, start=plan.skip),
            block=plan.block,
            cuts=[plan.save_at],
            limit=plan.limit,
            stop=stop,
        )
        try:
            for last, nats in blocks:
                if plan.save_state is not None and plan.save_at == last.read and not saved:
                    session.save(plan.save_state)
                    saved = True
                records.write(last, nats)
                status.show(*last.lines())
        except (LongspanError, OSError) as error:
            # text that cannot be read on, a full disk, a reader of the output that has left
            raise _kept(error, last, session, plan, saved) from None
        if plan.save_state is not None and not saved and (stop.asked or not plan.save_at):
            # before anything is printed, as the terminal may be gone
            session.save(plan.save_state)
            saved = True
    status.end()
    _say_end(last, session, plan, saved)
    return 130 if stop.asked else 0


def _kept(
    error: LongspanError | OSError, last: "Block | None", session: "StreamSession", plan: Plan, saved: bool
) -> Exception:
    """The error that ended a stream, after what was read is saved."""
    if plan.save_state is None or saved:
        return error
    session.save(plan.save_state)
    hint = f"what was read before is saved: {_further(last, plan)}"
    if isinstance(error, BrokenPipeError):
        say(hint)
        return error
    if isinstance(error, OSError):
        text = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)
        return DataError(f"{text}; {hint}")
    return type(error)(f"{error}; {hint}")


def _further(last: "Block | None", plan: Plan) -> str:
    """How to go on from the state that was saved."""
    state = shlex.quote(str(plan.save_state))
    return f"go on with --load-state {state} (in the same file: --skip {plan.skip + (last.end if last else 0)})"


def _say_end(last: "Block | None", session: "StreamSession", plan: Plan, saved: bool) -> None:
    from longspan.report import si_bytes

    if plan.save_at and not saved:
        say(f"the text ended before --save-at {plan.save_at}; nothing was saved")
    if plan.quiet:
        return
    if last is None:
        say("nothing to read")
    else:
        speed = last.bytes / max(last.seconds, 1e-9)
        print(
            f"{last.bytes:,} bytes, {last.tokens:,} tokens: {last.mean_bits_per_byte:.4f} bits per byte, "
            f"{speed:,.0f} bytes/s, state {si_bytes(session.nbytes)}",
            flush=True,
        )
    if saved and (not plan.save_at or last is None or last.read < plan.save_at):
        say(f"saved {shlex.quote(str(plan.save_state))}; {_further(last, plan)}")
