"""Measures one run on a held-out text: losses by block, position and recurrence, and what the model costs.

All sums are by byte, so runs with different tokenizers can be compared.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from longspan import tasks
from longspan.config import from_dict
from longspan.cost import footprint
from longspan.errors import CheckpointError, ConfigError, DataError
from longspan.files import data_digest, read_object, write_json
from longspan.tasks import TextTask
from longspan.tasks.base import Array, Document, Documents, Head, evenly, heads
from longspan.tasks.shards import stamps
from longspan.tasks.sources import source_files
from longspan.tasks.text import TextConfig
from longspan.tasks.tokenizers import Tokenizer
from longspan.tasks.words import Words
from longspan.train import DivergedError, TrainConfig, load_run, read_log, recurrence
from longspan.train.lm_evaluation import Window, place_nats
from longspan.train.opening import stored_recipe
from longspan.train.run_summary import read_summaries
from longspan.version import __version__

FEW_DOCUMENTS = 8
"""with fewer documents, intervals resample parts of them"""
PARTS, LEAST_PART = 32, 64
"""parts of the whole text, about, if there are few documents, and the fewest bytes of one"""
COST_LENGTHS = (2_048, 65_536, 1_048_576)
"""tokens of a text at which the bytes of a state are computed"""
TIMED_TOKENS, TIMES = 2_048, 3
"""tokens of every document that are read for the speed, and how often"""
CHUNK, ROWS = 512, 16
"""tokens per row and rows of a call that reads with a carried state; does not change losses"""


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The text that all runs of a comparison read."""

    source: tuple[str, ...] = ()
    """files or folders; empty: the held-out documents of the run's own task"""
    split: bool = False
    """read only what a training on the source would hold out: some of the runs may have been trained on the rest"""
    pattern: str = "*.txt"
    """glob of the files to read in a folder"""
    documents: int = 24
    """most documents, evenly spaced; 0: all"""
    reach: int = 65_536
    """bytes of every document that are read at most; 0: all"""


class Cut(NamedTuple):
    """A held-out text as one run reads it.

    Attributes:
        documents: token ids, cut so that they cover the bytes that are compared.
        sizes: per document, (tokens,) bytes of every token, the last one cut at the reach.
        shares: per document, the share of the last token's bytes that are compared.
        texts: per document, (bytes,) its text.
    """

    documents: Documents
    sizes: list[Array]
    shares: list[float]
    texts: list[Array]


def measure_run(folder: str | Path, held_out: HeldOut, file: Path) -> dict[str, Any]:
    """Measure a run on a held-out text; what `file` has of the same run and text is read from there.

    Args:
        folder: of a run of the task text.
        held_out: the text.
        file: JSON file of the measurements.

    Returns:
        Plain data: `key`, `folder`, `text` (digest of the bytes), `byte_entropy` (bits per byte of a model that knows
        only how frequent every byte is in this text), `names` and `bytes` of the documents, `blocks` and their `nats`
        and `units`, `positions` and `distances` (see `_places`), `reading` (how the text was read), `bytes_per_second`
        of reading (None: see `add_speed`), `parameters`, `flops` of a further token, `bytes_per_token`, `state` (bytes
        by tokens; None: does not stream), `carries`, `bounded`, `mechanism`, `training` (see `training_of`).

    Raises:
        CheckpointError: the folder is not a run of text, or is damaged.
        ConfigError: the tokenizer of the run does not give back the text that it reads.
        DataError: the text cannot be read, or is empty.
        DivergedError: the loss is not finite.
    """
    folder = Path(folder)
    recipe = stored_recipe(folder)
    source, pattern = held_out.source, held_out.pattern
    if not source:
        source, pattern = recipe["task"].get("source", ""), recipe["task"].get("pattern")
    key = data_digest([weights_of(folder), asdict(held_out), text_stamps(source, pattern), __version__])
    if file.is_file() and (saved := read_object(file)).get("key") == key:
        return saved
    opened = open_for_reading(folder, held_out)
    cut, window = opened.cut, opened.window
    losses = place_nats(opened.model, cut.documents, window, chunk=opened.chunk, batch=opened.batch)
    nats = [_with_share(loss, share) for loss, share in zip(losses, cut.shares, strict=True)]
    if not all(np.isfinite(loss).all() for loss in nats):
        raise DivergedError(f"{folder}: its loss on the held-out text is not a number")
    lengths = [int(size.sum()) for size in cut.sizes]
    record = {
        "key": key,
        "folder": str(folder),
        "text": data_digest([text.tobytes().hex() for text in cut.texts]),
        "byte_entropy": _byte_entropy(cut.texts),
        "names": list(cut.documents.names),
        "bytes": lengths,
        **_blocks(nats, cut.sizes),
        **_places(nats, cut),
        "reading": (
            "its state carried through every document"
            if window is None
            else f"windows of {window.context:,} tokens, of which the last {window.stride:,} are scored"
        ),
        "bytes_per_second": None,
        "carries": window is None,
        **costs_of(opened.model),
        "bytes_per_token": sum(lengths) / max(sum(len(size) for size in cut.sizes), 1),
        "mechanism": read_summaries(folder)[0].mechanism,
        "made_of": made_of(recipe["model"]),
        "training": training_of(folder, recipe),
    }
    write_json(file, record)
    return record


class OpenedForReading(NamedTuple):
    """A run and a held-out text, ready for `place_nats`.

    Attributes:
        model: in evaluation mode.
        cut: the text as the run reads it.
        window: None: with the state carried.
        chunk: tokens per row of a call.
        batch: rows of a call.
    """

    model: Any
    cut: Cut
    window: Window | None
    chunk: int
    batch: int


def open_for_reading(folder: Path, held_out: HeldOut) -> OpenedForReading:
    """Open a run and the text; raises as `measure_run`."""
    train = stored_recipe(folder)["train"]
    model, task = load_run(folder)
    if not isinstance(task, TextTask) or not hasattr(model, "vocab_size") or not model.traits.causal:
        raise CheckpointError(f"{folder}: not a language model of text; `longspan compare` reads such runs only")
    # the last stage is what the model was trained for
    stage = from_dict(TrainConfig, train, "train").stage_configs[-1]
    # a state of constant size costs nothing to carry, however the model was trained
    carries = model.traits.streams and (model.traits.bounded or stage.carries)
    length = stage.segment_length
    window = None if carries else Window(length, max(length // 2, 1))
    chunk = CHUNK if window is None else length
    batch = max(ROWS * CHUNK // chunk, 1)
    return OpenedForReading(model, cut_text(task, held_out, str(folder)), window, chunk, batch)


def add_speed(record: dict[str, Any], held_out: HeldOut, file: Path) -> dict[str, Any]:
    """Return the record of a run with the bytes that its model reads per second, and save it, unless it has them.

    To compare runs, call this for one after another while nothing else runs. Of a few readings of the beginnings of
    documents, side by side, the fastest counts, which other processes disturb least.
    """
    if record["bytes_per_second"] is not None:
        return record
    model, cut, window, chunk, batch = open_for_reading(Path(record["folder"]), held_out)
    # windows overlap from the second one on
    count = TIMED_TOKENS if window is None else max(TIMED_TOKENS, 2 * window.context)
    documents = heads(cut.documents, count, batch)
    read = sum(int(size[:count].sum()) for size in cut.sizes[:batch])
    seconds = fastest(lambda: place_nats(model, documents, window, chunk=chunk, batch=batch))
    record = {**record, "bytes_per_second": read / seconds}
    write_json(file, record)
    return record


def fastest(read: Callable[[], object]) -> float:
    """Return the seconds of the fastest of a few readings, which other processes disturb least."""
    seconds = []
    for _ in range(TIMES):
        started = time.perf_counter()
        read()
        seconds.append(time.perf_counter() - started)
    return max(min(seconds), 1e-9)


def _byte_entropy(texts: Sequence[Array]) -> float:
    """Return the bits per byte of a text for a model that knows only how frequent every byte is in it."""
    counts = np.bincount(np.concatenate(texts), minlength=256)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


def cut_text(task: TextTask, held_out: HeldOut, run: str) -> Cut:
    """Return a held-out text as the task of a run reads it.

    Raises:
        ConfigError: the tokenizer does not give back the text that it reads.
        DataError: the text cannot be read, or is empty.
    """
    if not held_out.source:
        documents = task.documents("validation")
    elif held_out.split:
        own = TextTask(TextConfig(source=held_out.source, pattern=held_out.pattern), tokenizer=task.tokenizer)
        documents = own.documents("validation")
    else:
        documents = task.read(held_out.source, pattern=held_out.pattern, errors="replace")
    documents = evenly(documents, held_out.documents)
    if held_out.reach:
        # a token has at least one byte, but for the ends of lines that some tokenizers add
        documents = heads(documents, 2 * held_out.reach)
    items: list[Document] = []
    sizes, shares = [], []
    for item in documents.items:
        size = item.cut(0, len(item)).sizes.astype(np.int64)
        ends = np.cumsum(size)
        if held_out.reach and len(ends) and ends[-1] > held_out.reach:
            count = int(np.searchsorted(ends, held_out.reach)) + 1
            whole = int(size[count - 1])
            size = size[:count].copy()
            size[-1] -= int(ends[count - 1]) - held_out.reach
            item = Head(item, count)
            shares.append(float(size[-1] / whole))
        else:
            shares.append(1.0)
        items.append(item)
        sizes.append(size)
    if not sum(int(size.sum()) for size in sizes):
        raise DataError("the held-out text is empty; give another one")
    return Cut(Documents(items, documents.names), sizes, shares, _texts(items, sizes, task.tokenizer, run))


def _texts(items: Sequence[Document], sizes: Sequence[Array], tokenizer: Tokenizer, run: str) -> list[Array]:
    """Return the bytes of documents; raises ConfigError if the tokenizer does not give back what it has read."""
    spelled = [tokenizer.decode([index]) for index in range(tokenizer.vocab_size)]
    texts = []
    for item, size in zip(items, sizes, strict=True):
        ids = item.cut(0, len(item)).targets.tolist()
        whole = zip(ids[:-1], size[:-1].tolist(), strict=True)
        if isinstance(tokenizer, Words) or any(len(spelled[index]) != count for index, count in whole):
            raise ConfigError(
                f"{run}: its tokenizer does not give back the text that it reads (unknown words, ends of lines), so "
                "its loss per byte cannot be compared; compare runs that read bytes or subwords"
            )
        # the last token may reach beyond the text that is compared
        text = b"".join(spelled[index] for index in ids)[: int(size.sum())]
        texts.append(np.frombuffer(text, dtype=np.uint8))
    return texts


def weights_of(folder: Path) -> Any:
    """Return what tells the weights of a run from those of another: digests of its model, or its checkpoints."""
    digests = folder / "model" / "digests.json"
    if digests.is_file():
        return read_object(digests)
    saved = (folder / "checkpoints").glob("step-*")
    return [str(folder.resolve()), sorted((path.name, path.stat().st_mtime_ns) for path in saved)]


def text_stamps(source: str | Sequence[str], pattern: str | None = None) -> Any:
    """Return sizes and times of the files of a text, to notice that they have changed; None if they cannot be listed.

    Args:
        source: as in `TextConfig`.
        pattern: glob of the files to read in a folder; None: the default.
    """
    try:
        return stamps(source_files(source, pattern=pattern or TextConfig.pattern) or [])
    except (DataError, OSError):
        # reading the text gives the reason
        return None


def _with_share(loss: Array, share: float) -> Array:
    """Return the losses of tokens in fp64, with that of the last one reduced to the share of it that is compared."""
    nats: Array = loss.astype(np.float64)
    nats[-1:] *= share
    return nats


def _blocks(nats: Sequence[Array], sizes: Sequence[Array]) -> dict[str, Any]:
    """Sum losses by the blocks that intervals resample: whole documents, or parts of few documents.

    Returns:
        `blocks` ("documents" or "parts"), and `nats` and `units` (bytes) of every block.
    """
    if len(nats) >= FEW_DOCUMENTS:
        totals = [float(loss.sum()) for loss in nats]
        return {"blocks": "documents", "nats": totals, "units": [int(size.sum()) for size in sizes]}
    whole = sum(int(size.sum()) for size in sizes)
    sums, units = [], []
    for loss, size in zip(nats, sizes, strict=True):
        length = int(size.sum())
        if not length:
            continue
        parts = max(min(round(PARTS * length / whole), length // LEAST_PART), 1)
        edges = [part * length // parts for part in range(parts + 1)]
        sums += by_offset(loss, size, edges).tolist()
        units += np.diff(edges).tolist()
    return {"blocks": "parts", "nats": sums, "units": units}


def by_offset(nats: Array, sizes: Array, edges: Sequence[int]) -> Array:
    """Sum the losses of tokens by ranges of bytes, (ranges,) fp64; that of a token over an edge is divided by bytes.

    A token without bytes belongs to the one before.

    Args:
        nats: (tokens,) losses.
        sizes: (tokens,) bytes.
        edges: ends of the ranges, from 0.
    """
    ends = np.concatenate([[0], np.cumsum(sizes)])
    totals = np.concatenate([[0.0], np.cumsum(nats)])
    # tokens without bytes make offsets repeat; the loss at an offset is that after all of them
    keep = np.concatenate([ends[1:] > ends[:-1], [True]])
    ends, totals = ends[keep], totals[keep]
    totals[0] = 0.0
    result: Array = np.diff(np.interp(edges, ends, totals))
    return result


def _places(nats: Sequence[Array], cut: Cut) -> dict[str, Any]:
    """Return losses by position and by distance to the last occurrence of the same context, as plain data.

    `positions`: `edges` in bytes, and `nats` (documents, ranges) of the documents that have all positions; the edges
    end where a third of the documents still reach. `distances`: lower ends, `nats` and `units` (documents, ranges).
    """
    lengths = [int(size.sum()) for size in cut.sizes]
    end = sorted(lengths)[-max(-(-len(lengths) // 3), 1)]
    edges = recurrence.position_edges(end)
    rows = [
        by_offset(loss, size, edges).tolist()
        for loss, size, length in zip(nats, cut.sizes, lengths, strict=True)
        if length >= end
    ]
    pairs = [
        recurrence.by_distance(_per_byte(loss, size), recurrence.distances(text))
        for loss, size, text in zip(nats, cut.sizes, cut.texts, strict=True)
    ]
    return {
        "positions": {"edges": edges, "nats": rows},
        "distances": {
            "edges": list(recurrence.DISTANCES),
            "nats": [sums.tolist() for sums, _ in pairs],
            "units": [counts.tolist() for _, counts in pairs],
        },
    }


def _per_byte(nats: Array, sizes: Array) -> Array:
    """Divide the losses of tokens evenly among their bytes, (bytes,)."""
    shares: Array = np.repeat(nats / np.maximum(sizes, 1), sizes)
    return shares


def costs_of(model: Any) -> dict[str, Any]:
    """Return parameters, FLOPs of a further token after the shortest of `COST_LENGTHS`, and bytes of the state."""
    state = {str(length): model.state_nbytes(1, length) for length in COST_LENGTHS} if model.traits.streams else None
    return {
        "parameters": model.num_parameters(),
        "flops": footprint(model, COST_LENGTHS[0]).further_flops,
        "state": state,
        "bounded": bool(model.traits.streams and model.traits.bounded),
    }


def made_of(model: Mapping[str, Any]) -> str:
    """Return the mixers of a `[model]` table, and its memory, with the fields that were given: `window(window=256)`."""
    mixers = dict.fromkeys(_call(mixer) for mixer in model.get("mixers", ()))
    memory = model.get("memory")
    parts = [" + ".join(mixers), *([f"recurrent {_call({'name': 'memory', **memory})}"] if memory else [])]
    return " under ".join(filter(None, parts))


def _call(table: Mapping[str, Any]) -> str:
    """Return a table with a name as a call: `mixed_heads(window(window=128), routing(num_clusters=16))`."""
    fields = [f"{key}={value}" for key, value in table.items() if key not in ("name", "mixers") and value is not None]
    inner = [_call(mixer) for mixer in table.get("mixers", ())]
    return f"{table['name']}({', '.join([*inner, *fields])})" if inner or fields else str(table["name"])


def training_of(folder: Path, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the log of a run says: `steps`, `tokens`, `seconds`, `memory` (largest resident bytes), `curve`.

    The curve has (step, tokens, seconds, bits per byte, or what else the task counts) of every evaluation on held-out
    documents. Further `planned` steps (None: only the clock ends the run), `text` (its source, or the name of a task
    that is no text), `init` and `seed`.
    """
    lines = read_log(folder / "log.jsonl")
    train, task = recipe["train"], recipe["task"]
    last = lines[-1] if lines else {}
    bits = f"bits_per_{tasks.build(task).unit}"
    return {
        "steps": last.get("step", 0),
        "planned": train.get("steps"),
        "tokens": last.get("tokens", 0),
        "seconds": last.get("seconds", 0.0),
        "memory": max((line["memory"] for line in lines if "memory" in line), default=0),
        "text": task.get("source", "" if task.get("name", "text") == "text" else task["name"]),
        "init": train.get("init", ""),
        "seed": train.get("seed", 0),
        "curve": [
            [line["step"], line["tokens"], line["seconds"], line["validation"][bits]]
            for line in lines
            if bits in line.get("validation", {})
        ],
    }
