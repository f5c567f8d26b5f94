"""A text through a session, block by block: what it cost, how fast it went, how much memory was held.

Imported by the verbs when they run, as it needs torch.
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

# bytes fed at once, about: more would gain nothing and take memory
READ = 4096
# bytes that are reported on at once
BLOCK = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Block:
    """What is known after a block.

    Attributes:
        bytes: read by this process, this block included.
        tokens: the same in tokens.
        position: tokens of the whole stream, those before a saved state included.
        bits_per_byte: of this block; NaN where it completed no token.
        mean_bits_per_byte: of all that this process has read.
        bytes_per_second: while this block was read.
        seconds: since this process began to read.
        resident: bytes of memory that the process holds; None where the system does not say.
        peak: the most it has ever held.
        state_bytes: of the model's state.
        read: bytes taken from the file.
        held_back: of them, bytes that no token stands for yet: the start of a character.
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
        """Bytes of the file that the state knows; what goes on begins there."""
        return self.read - self.held_back

    def lines(self) -> tuple[str, ...]:
        """In words, of even width, for 80 columns; then shorter, for fewer."""
        from longspan.report import si_bytes

        begin = f"{self.bytes:>11,} bytes  {self.bits_per_byte:6.4f} bits/byte"
        whole = f"{begin} (all {self.mean_bits_per_byte:6.4f})  {self.bytes_per_second:>7,.0f} bytes/s"
        memory = () if self.resident is None else (f"{whole}  {si_bytes(self.resident):>9}",)
        return (*memory, whole, f"{begin}  {self.bytes_per_second:>7,.0f}/s", begin, f"{self.bytes:,} bytes")

    def record(self) -> dict[str, Any]:
        """As plain data for a log."""
        record = asdict(self)
        return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in record.items()}


class Counter:
    """Sums over the blocks of a stream."""

    def __init__(self, session: "StreamSession", tokenizer: "Tokenizer") -> None:
        self.session, self.tokenizer = session, tokenizer
        self.bytes = self.tokens = 0
        self.nats = 0.0
        self.started = self.last = time.perf_counter()

    def block(self, ids: "Array", losses: "Array", read: int, held_back: int) -> Block:
        """Count a block that was fed; the rest as in `Block`."""
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
    """Ctrl-C interrupts the waiting for input and is otherwise only noted, so that state and records stay whole.

    So do SIGTERM and SIGHUP. The second one ends it all.
    """

    def __init__(self) -> None:
        self.stopping = False
        self.waiting = False

    def listening(self) -> contextlib.AbstractContextManager[None]:
        """Listen to SIGINT, SIGTERM and SIGHUP, where this is the main thread."""
        return handling(stop_signals(), self._ask)

    def _ask(self, *_: object) -> None:
        again, self.stopping = self.stopping, True
        if again or self.waiting:
            raise KeyboardInterrupt


def begin(session: "StreamSession", tokenizer: "Tokenizer") -> None:
    """Let a new session read the token that every document begins with, so that the first byte is predicted too."""
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
    """Read a file to its end, or to a limit.

    Args:
        session: reads; `begin` it first.
        file: what is read.
        tokenizer: of the session's model.
        encoder: fresh, of the tokenizer.
        block: bytes read at once.
        cuts: counts of bytes at which a block is to end, so that the caller may save there.
        limit: stop after so many bytes; 0: at the end.
        stop: listens to Ctrl-C, which ends the reading as the end of the file does.
        losses: what each token cost is of interest; else it is NaN, which takes less time.

    Yields:
        After each block what is known, and (tokens,) float32 nats of its tokens.

    Raises:
        DataError: bytes that the encoder refuses; all before them have been read, and yielded.
        OSError: the file cannot be read on; as above.
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
            # what stands before it is read all the same
            problem, done = error, True
            ids = encoder.flush(end=False)
        if len(ids):
            out = session.feed(torch.from_numpy(ids.astype("int64")), losses=losses)
            nats = out.numpy() if losses else np.full(len(ids), np.nan, np.float32)
            parts.append((ids, nats))
        # a short read is an input that pauses: what is known is shown
        if parts and (read == border or len(data) < count or problem is not None):
            ids, nats = (_join(list(part)) for part in zip(*parts, strict=True))
            yield counter.block(ids, nats, read, encoder.held_back), nats
            parts, begun = [], read
        elif read == border:
            begun = read
    if problem is not None:
        raise problem


def _read(file: BinaryIO, count: int, stop: Stop) -> bytes:
    """The next bytes; none at the end, and after Ctrl-C."""
    try:
        # set before the question, so that a Ctrl-C between the two is not waited out
        stop.waiting = True
        return b"" if stop.stopping else read_some(file, count)
    except KeyboardInterrupt:
        # nothing was being computed, so the state is whole
        return b""
    finally:
        stop.waiting = False


def _until_chunk(session: "StreamSession") -> int:
    """Tokens to the end of a chunk some way ahead: read so, no chunk is computed in two calls."""
    ahead = session.chunk * max(READ // session.chunk, 1)
    return ahead - session.position % session.chunk


def _join(parts: "list[Array]") -> "Array":
    return np.concatenate(parts) if len(parts) > 1 else parts[0]


class Records:
    """What a stream leaves behind: a log of JSON lines, and the loss of every token as raw float32; both optional.

    Raises:
        DataError: a file that cannot be written.
    """

    def __init__(self, log: Path | None, losses: Path | None) -> None:
        self._files: dict[str, Any] = {}
        for name, path in (("log", log), ("losses", losses)):
            if path is not None:
                try:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    self._files[name] = open(path, "wb")  # noqa: SIM115 - closed by close
                except OSError as error:
                    raise DataError(f"{path}: cannot be written: {error.strerror or error}") from None

    def write(self, block: Block, losses: "Array") -> None:
        """Append a block."""
        self._append("log", (json.dumps(block.record()) + "\n").encode())
        self._append("losses", losses.astype("<f4").tobytes())

    def _append(self, name: str, data: bytes) -> None:
        if file := self._files.get(name):
            try:
                file.write(data)
                file.flush()
            except OSError as error:
                raise DataError(f"{file.name}: cannot be written: {error.strerror or error}") from None

    def close(self) -> None:
        """Close the files; what a full disk did not take is lost, as `write` has said."""
        for file in self._files.values():
            with contextlib.suppress(OSError):
                file.close()
