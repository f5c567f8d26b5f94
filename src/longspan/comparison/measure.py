"""Measures one run on a held-out text: losses by block, position and recurrence, and what the model costs.

All sums are by byte, so runs with different tokenizers can be compared.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from longspan.cost import footprint
from longspan.errors import CheckpointError, DataError
from longspan.files import data_digest, read_object, write_json
from longspan.tasks import TextTask
from longspan.tasks.base import Array, Document, Documents, evenly, heads
from longspan.tasks.tokenizers import Tokenizer
from longspan.train import load_run, read_log, recurrence
from longspan.train.lm_evaluation import Window, place_nats
from longspan.train.opening import stored_recipe
from longspan.train.run_summary import read_summaries
from longspan.version import __version__

FEW = 8
"""with fewer documents, intervals resample parts of them"""
PARTS = 32
"""parts of the whole text, about, if there are few documents"""
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
        texts: per document, its bytes; None: the tokenizer does not keep them.
    """

    documents: Documents
    sizes: list[Array]
    shares: list[float]
    texts: list[Array] | None


def measure_run(folder: str | Path, held_out: HeldOut, file: Path) -> dict[str, Any]:
    """Measure a run on a held-out text; what `file` has of the same run and text is read from there.

    Args:
        folder: of a run of the task text.
        held_out: the text.
        file: JSON file of the measurements.

    Returns:
        Plain data: `key`, `folder`, `text` (digest of the bytes; None: not known), `names` and `bytes` of the
        documents, `blocks` and their `nats` and `units`, `positions` and `distances` (see `_places`), `reading` (how
        the text was read), `bytes_per_second` of reading, `parameters`, `flops` of a further token, `bytes_per_token`,
        `state` (bytes by tokens; None: does not stream), `carries`, `bounded`, `mechanism`, `training` (see
        `_training`).

    Raises:
        CheckpointError: the folder is not a run of text, or is damaged.
        DataError: the text cannot be read, or is empty.
    """
    folder = Path(folder)
    recipe = stored_recipe(folder)
    key = data_digest([_weights(folder), asdict(held_out), __version__])
    if file.is_file() and (saved := read_object(file)).get("key") == key:
        return saved
    model, task = load_run(folder)
    if not isinstance(task, TextTask) or not hasattr(model, "vocab_size") or not model.traits.causal:
        raise CheckpointError(f"{folder}: not a language model of text; `longspan compare` reads such runs only")
    cut = cut_text(task, held_out)
    carries = reads_with_state(model, recipe["train"])
    window = None if carries else _window(recipe["train"])
    # one row per document, or windows that together have as many tokens as a call with a state
    chunk = CHUNK if window is None else window.context
    batch = max(ROWS * CHUNK // chunk, 1)
    losses = place_nats(model, cut.documents, window, chunk=chunk, batch=batch)
    nats = [_with_share(loss, share) for loss, share in zip(losses, cut.shares, strict=True)]
    lengths = [int(size.sum()) for size in cut.sizes]
    record = {
        "key": key,
        "folder": str(folder),
        "text": None if cut.texts is None else data_digest([text.tobytes().hex() for text in cut.texts]),
        "names": list(cut.documents.names),
        "bytes": lengths,
        **_blocks(nats, cut.sizes),
        **_places(nats, cut),
        "reading": (
            "its state carried through every document"
            if window is None
            else f"windows of {window.context:,} tokens, of which the last {window.stride:,} are scored"
        ),
        "bytes_per_second": _speed(model, cut, window, chunk, batch),
        "carries": carries,
        **_costs(model),
        "bytes_per_token": sum(lengths) / max(sum(len(size) for size in cut.sizes), 1),
        "mechanism": read_summaries(folder)[0].mechanism,
        "training": _training(folder, recipe),
    }
    write_json(file, record)
    return record


def _speed(model: Any, cut: Cut, window: Window | None, chunk: int, batch: int) -> float:
    """Return bytes read per second, with rows for as many documents as there are, up to those of a call.

    Of a few readings of the beginnings the fastest counts, which other processes disturb least.
    """
    documents = heads(cut.documents, TIMED_TOKENS, batch)
    read = sum(int(size[:TIMED_TOKENS].sum()) for size in cut.sizes[:batch])
    seconds = []
    for _ in range(TIMES):
        started = time.perf_counter()
        place_nats(model, documents, window, chunk=chunk, batch=batch)
        seconds.append(time.perf_counter() - started)
    return read / max(min(seconds), 1e-9)


def reads_with_state(model: Any, train: Mapping[str, Any]) -> bool:
    """Return whether a run is evaluated with a carried state: its model keeps one of constant size, or trained so."""
    carried = train.get("carry", True) and train.get("sampling", "lanes") == "lanes"
    return bool(model.traits.streams and (model.traits.bounded or carried))


def cut_text(task: TextTask, held_out: HeldOut) -> Cut:
    """Return a held-out text as the task of a run reads it.

    Raises:
        DataError: the text cannot be read, or is empty.
    """
    documents = (
        task.read(held_out.source, pattern=held_out.pattern, errors="replace")
        if held_out.source
        else task.documents("validation")
    )
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
            item = heads(Documents([item], [""], ""), count)[0]
            shares.append(float(size[-1] / whole))
        else:
            shares.append(1.0)
        items.append(item)
        sizes.append(size)
    if not sum(int(size.sum()) for size in sizes):
        raise DataError("the held-out text is empty; give another one")
    fingerprint = f"{documents.fingerprint}:{held_out.documents}:{held_out.reach}"
    return Cut(Documents(items, documents.names, fingerprint), sizes, shares, _texts(items, sizes, task.tokenizer))


def _texts(items: Sequence[Document], sizes: Sequence[Array], tokenizer: Tokenizer) -> list[Array] | None:
    """Return the bytes of documents; None if the tokenizer does not give back what it has read."""
    spelled = [tokenizer.decode([index]) for index in range(tokenizer.vocab_size)]
    texts = []
    for item, size in zip(items, sizes, strict=True):
        text = b"".join(spelled[index] for index in item.cut(0, len(item)).targets.tolist())
        # the last token may reach beyond the text that is compared
        text = text[: int(size.sum())]
        if len(text) != int(size.sum()):
            return None
        texts.append(np.frombuffer(text, dtype=np.uint8))
    return texts


def _weights(folder: Path) -> Any:
    """Return what tells the weights of a run from those of another: digests of its model, or its checkpoints."""
    digests = folder / "model" / "digests.json"
    if digests.is_file():
        return read_object(digests)
    return sorted(path.name for path in (folder / "checkpoints").glob("step-*")) or str(folder)


def _window(train: Mapping[str, Any]) -> Window:
    """Return windows as long as the rows that a run was trained on, each scored in its last half."""
    length = int(train["segment_length"])
    return Window(length, max(length // 2, 1))


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
    if len(nats) >= FEW:
        totals = [float(loss.sum()) for loss in nats]
        return {"blocks": "documents", "nats": totals, "units": [int(size.sum()) for size in sizes]}
    whole = sum(int(size.sum()) for size in sizes)
    sums, units = [], []
    for loss, size in zip(nats, sizes, strict=True):
        length = int(size.sum())
        if not length:
            continue
        parts = max(round(PARTS * length / whole), 1)
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
    end where a third of the documents still reach. `distances`: lower ends, `nats` and `units` (documents, ranges);
    None if the bytes of the text are not known.
    """
    lengths = [int(size.sum()) for size in cut.sizes]
    end = sorted(lengths)[-max(-(-len(lengths) // 3), 1)]
    edges = recurrence.position_edges(end)
    rows = [
        by_offset(loss, size, edges).tolist()
        for loss, size, length in zip(nats, cut.sizes, lengths, strict=True)
        if length >= end
    ]
    places: dict[str, Any] = {"positions": {"edges": edges, "nats": rows}, "distances": None}
    if cut.texts is None:
        return places
    pairs = [
        recurrence.by_distance(_per_byte(loss, size), recurrence.distances(text))
        for loss, size, text in zip(nats, cut.sizes, cut.texts, strict=True)
    ]
    places["distances"] = {
        "edges": list(recurrence.DISTANCES),
        "nats": [sums.tolist() for sums, _ in pairs],
        "units": [counts.tolist() for _, counts in pairs],
    }
    return places


def _per_byte(nats: Array, sizes: Array) -> Array:
    """Divide the losses of tokens evenly among their bytes, (bytes,)."""
    shares: Array = np.repeat(nats / np.maximum(sizes, 1), sizes)
    return shares


def _costs(model: Any) -> dict[str, Any]:
    """Return parameters, FLOPs of a further token after the shortest of `COST_LENGTHS`, and bytes of the state."""
    state = {str(length): model.state_nbytes(1, length) for length in COST_LENGTHS} if model.traits.streams else None
    return {
        "parameters": model.num_parameters(),
        "flops": footprint(model, COST_LENGTHS[0]).further_flops,
        "state": state,
        "bounded": bool(model.traits.streams and model.traits.bounded),
    }


def _training(folder: Path, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the log of a run says: `steps`, `tokens`, `seconds`, `memory` (largest resident bytes), `curve`.

    The curve has (step, tokens, seconds, bits per byte) of every evaluation on held-out documents. Further `planned`
    steps (None: only the clock ends the run), and `init`.
    """
    lines = read_log(folder / "log.jsonl")
    train = recipe["train"]
    last = lines[-1] if lines else {}
    return {
        "steps": last.get("step", 0),
        "planned": train.get("steps"),
        "tokens": last.get("tokens", 0),
        "seconds": last.get("seconds", 0.0),
        "memory": max((line["memory"] for line in lines if "memory" in line), default=0),
        "init": train.get("init", ""),
        "seed": train.get("seed", 0),
        "curve": [
            [line["step"], line["tokens"], line["seconds"], line["validation"]["bits_per_byte"]]
            for line in lines
            if "bits_per_byte" in line.get("validation", {})
        ],
    }
