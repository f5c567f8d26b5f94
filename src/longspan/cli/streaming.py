"""Feeds a text to a streaming session block by block, and measures loss, speed and memory.

Imported only when a command runs, because it needs torch.
"""

import contextlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch

from longspan.cli.reading import Encoder, read_some
from longspan.errors import DataError
from longspan.process import handling, peak_bytes, resident_bytes, stop_signals

if TYPE_CHECKING:
    from longspan.stream import StreamSession
    from longspan.tasks.base import Array
    from longspan.tasks.tokenizers import Tokenizer

# approximate number of bytes fed to the session at once: more would not be faster and takes more memory
READ = 4096
# default number of bytes per reported block
BLOCK = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Block:
    """Figures of a stream after one block of it.

    Attributes:
        bytes: number of bytes read by this process, including this block.
        tokens: number of tokens read by this process, including this block.
        position: tokens of the whole stream, including those before a loaded state.
        bits_per_byte: loss of this block; NaN if it completed no token.
        mean_bits_per_byte: loss of everything that this process has read.
        bytes_per_second: speed of this block.
        seconds: time since this process began to read.
        resident: memory of the process in bytes; None if the system does not report it.
        peak: largest memory that the process has used so far, in bytes; None if unknown.
        state_bytes: size of the model's state.
        read: bytes read from the file.
        held_back: those of the read bytes that are not yet encoded as tokens, such as half a character.
    """

    bytes: int
    tokens: int
    position: int
    bits_per_byte: float
    mean_bits_per_byte: float
    bytes_per_second: float
    seconds: float
    resident: int | None
    peak: int | None
    state_bytes: int
    read: int
    held_back: int

    @property
    def end(self) -> int:
        """Number of bytes of the file that the state has read; a resumed stream begins there."""
        return self.read - self.held_back

    def lines(self) -> tuple[str, ...]:
        """Return status lines of constant width, the longest (for 80 columns) first, then shorter ones."""
        from longspan.report import si_bytes

        begin = f"{self.bytes:>11,} bytes  {self.bits_per_byte:6.4f} bits/byte"
        whole = f"{begin} (all {self.mean_bits_per_byte:6.4f})  {self.bytes_per_second:>7,.0f} bytes/s"
        memory = () if self.resident is None else (f"{whole}  {si_bytes(self.resident):>9}",)
        return (*memory, whole, f"{begin}  {self.bytes_per_second:>7,.0f}/s", begin, f"{self.bytes:,} bytes")

    def record(self) -> dict[str, Any]:
        """Return the figures as a dict for the JSON log, with None instead of NaN."""
        record = asdict(self)
        return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in record.items()}


class Counter:
    """Accumulates bytes, tokens and losses over the blocks of a stream."""

    def __init__(self, session: "StreamSession", tokenizer: "Tokenizer") -> None:
        self.session, self.tokenizer = session, tokenizer
        self.bytes = self.tokens = 0
        self.nats = 0.0
        self.started = self.last = time.perf_counter()

    def block(self, ids: "Array", losses: "Array", read: int, held_back: int) -> Block:
        """Add one block and return the figures so far.

        Args:
            ids: (tokens,) token ids of the block.
            losses: (tokens,) their losses in nats.
            read: bytes read from the file so far.
            held_back: bytes read but not yet encoded as tokens.
        """
        count, nats = int(self.tokenizer.sizes[ids].sum()), float(losses.sum(dtype="float64"))
        now = time.perf_counter()
        took, self.last = now - self.last, now
        self.bytes += count
        self.tokens += len(ids)
        self.nats += nats
        return Block(
            bytes=self.bytes,
            tokens=self.tokens,
            position=self.session.position,
            bits_per_byte=nats / count / math.log(2) if count else math.nan,
            mean_bits_per_byte=self.nats / self.bytes / math.log(2) if self.bytes else math.nan,
            bytes_per_second=count / max(took, 1e-9),
            seconds=now - self.started,
            resident=resident_bytes(),
            peak=peak_bytes(),
            state_bytes=self.session.nbytes,
            read=read,
            held_back=held_back,
        )


class Stop:
    """Stops a stream on Ctrl-C, SIGTERM or SIGHUP without leaving the state or the log half updated.

    The first signal interrupts waiting for input; during computation it only sets `stopping`, which the caller checks
    after each block. The second signal raises KeyboardInterrupt at once.
    """

    def __init__(self) -> None:
        self.stopping = False
        self.waiting = False

    def listening(self) -> contextlib.AbstractContextManager[None]:
        """Return a context that handles SIGINT, SIGTERM and SIGHUP; without effect outside the main thread."""
        return handling(stop_signals(), self._ask)

    def _ask(self, *_: object) -> None:
        """Handle a signal: set `stopping`; raise KeyboardInterrupt on the second one or while input is awaited."""
        again, self.stopping = self.stopping, True
        if again or self.waiting:
            raise KeyboardInterrupt


def begin(session: "StreamSession", tokenizer: "Tokenizer") -> None:
    """Feed a new session the token that begins every document, so that the first byte is predicted, too."""
    if session.position == 0:
        session.feed([tokenizer.begin])


def feed(
    session: "StreamSession",
    file: BinaryIO,
    tokenizer: "Tokenizer",
    encoder: Encoder,
    *,
    block: int = BLOCK,
    cuts: Sequence[int] = (),
    limit: int = 0,
    stop: Stop,
    losses: bool = True,
) -> "Iterator[tuple[Block, Array]]":
    """Feed a file to a session, block by block, to its end or to a limit.

    Args:
        session: to feed; call `begin` with it first.
        file: to read.
        tokenizer: of the session's model.
        encoder: a new encoder of the tokenizer.
        block: bytes per block.
        cuts: byte counts at which a block must end, so that the caller can save the state there.
        limit: stop after this many bytes; 0: at the end.
        stop: handles Ctrl-C, which ends reading as the end of the file does.
        losses: compute the loss of each token; False is faster and yields NaN.

    Yields:
        After each block its figures, and the losses of its tokens in nats, (tokens,) float32.

    Raises:
        DataError: bytes that the encoder cannot decode; everything before them has been fed and yielded.
        OSError: the file cannot be read further; everything before the error has been fed and yielded.
    """
    counter = Counter(session, tokenizer)
    cut_points = sorted({cut for cut in (*cuts, limit) if cut > 0})
    read = begun = 0
    done = False
    problem: Exception | None = None
    parts: list[tuple[Array, Array]] = []
    while not done:
        border = min([begun + block, *(cut for cut in cut_points if cut > read)])
        count = min(border - read, _until_chunk(session))
        data = b""
        try:
            data = _read(file, count, stop)
            read += len(data)
            done = not data or read == limit
            ids = encoder.push(data)
            if done or read in cut_points:
                ids = _join([ids, encoder.flush(end=not data and not stop.stopping)])
        except (DataError, OSError) as error:
            # the text before the error is still fed to the session
            problem, done = error, True
            ids = encoder.flush(end=False)
        if len(ids):
            out = session.feed(torch.from_numpy(ids.astype("int64")), losses=losses)
            nats = out.numpy() if losses else np.full(len(ids), np.nan, np.float32)
            parts.append((ids, nats))
        # a short read means that the input pauses, so the figures so far are shown
        if parts and (read == border or len(data) < count or problem is not None):
            ids, nats = (_join(list(part)) for part in zip(*parts, strict=True))
            yield counter.block(ids, nats, read, encoder.held_back), nats
            parts, begun = [], read
        elif read == border:
            begun = read
    if problem is not None:
        raise problem


def _read(file: BinaryIO, count: int, stop: Stop) -> bytes:
    """Read up to `count` bytes; empty at the end of the file and after Ctrl-C."""
    try:
        # set before `stopping` is checked, so that a Ctrl-C between the two interrupts the read
        stop.waiting = True
        return b"" if stop.stopping else read_some(file, count)
    except KeyboardInterrupt:
        # the model was not computing, so the state is consistent
        return b""
    finally:
        stop.waiting = False


def _until_chunk(session: "StreamSession") -> int:
    """Return the number of tokens to a chunk boundary about `READ` tokens ahead.

    Reading up to a boundary means that no chunk of the model is computed in two calls.
    """
    ahead = session.chunk * max(READ // session.chunk, 1)
    return ahead - session.position % session.chunk


def _join(parts: "list[Array]") -> "Array":
    """Concatenate arrays; a single one is returned without a copy."""
    return np.concatenate(parts) if len(parts) > 1 else parts[0]


class Records:
    """Writes the log of a stream as JSON lines and the loss of every token as raw float32; both files are optional.

    Args:
        log: file of the log; None: do not write it.
        losses: file of the losses; None: do not write it.

    Raises:
        DataError: a file cannot be written.
    """

    def __init__(self, log: Path | None, losses: Path | None) -> None:
        self._files: dict[str, Any] = {}
        for name, path in (("log", log), ("losses", losses)):
            if path is not None:
                try:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    self._files[name] = open(path, "wb")  # noqa: SIM115 - closed by close
                except OSError as error:
                    raise DataError(
                        f"{path}: cannot be written: {error.strerror or error}; choose another path"
                    ) from None

    def write(self, block: Block, losses: "Array") -> None:
        """Append the figures of a block to the log, and its losses, (tokens,) in nats, to the other file."""
        self._append("log", (json.dumps(block.record()) + "\n").encode())
        self._append("losses", losses.astype("<f4").tobytes())

    def _append(self, name: str, data: bytes) -> None:
        """Append bytes to the file `"log"` or `"losses"`, if it was requested."""
        if file := self._files.get(name):
            try:
                file.write(data)
                file.flush()
            except OSError as error:
                raise DataError(
                    f"{file.name}: cannot be written: {error.strerror or error}; free disk space or choose another path"
                ) from None

    def close(self) -> None:
        """Close the files; errors are ignored, because `write` has flushed and reported them."""
        for file in self._files.values():
            with contextlib.suppress(OSError):
                file.close()
