"""Stores of keys and values on disk, for `memorizing`, searched exactly or with faiss.

    store = MemoryStore("notes", kv_heads=8, head_dim=64, capacity=10_000_000)    # or index="faiss"
    core.attach(store)                                                            # see MemorizingMechanism.attach
    with torch.no_grad():
        y, state = mixer(x)                                                       # writes and searches the store
    store.close()                                                                 # later: write=False

Keys and values are memory-mapped numpy files. A pair's number counts from the last `clear`; pair number i lies in slot
i % capacity of both files, so that the oldest pair is the one overwritten. Source: Wu et al. 2022, section 3.2, who
search approximately too.

    exact     reads every key from the files, a block at a time, so the store may be larger than RAM
    faiss     (extra `faiss`) an HNSW graph that holds a copy of every key in RAM, 4 head_dim + about 8 links bytes of
              it, and up to as many evicted ones; of the files it reads values. A search meets few keys: `recall` says
              how many of the nearest it finds

`benchmarks/bench_memory_store.py` measures both.
"""

import functools
import importlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from longspan.errors import CheckpointError, ConfigError, UnsupportedError
from longspan.files import read_json, write_json
from longspan.mechanisms.memorizing.operation import mixed, nearest_of_blocks
from longspan.state import on_failure

SCORES = 1 << 23  # of one block of an exact search
_BLOCK = 1 << 16  # keys that enter a graph at once
_KIND = "longspan memory store"


class Found(NamedTuple):
    """What a search found, nearest first; fewer than asked for where the store holds fewer."""

    scores: Tensor  # (heads, queries, k)
    numbers: Tensor  # (heads, queries, k) of the pairs
    values: Tensor  # (heads, queries, k, head_dim)


class MemoryStore:
    """Pairs of keys and values in a folder.

    Args:
        folder: made if it is not there.
        kv_heads, head_dim, capacity: sizes; None = those of the folder, which must be there.
        index: "exact", or "faiss" for an HNSW graph with all keys in RAM, built when the store is opened.
        write: False = only search; several processes may.
        links: edges of a node of the graph.
        effort: candidates that a search of the graph keeps; more is slower and finds more.

    Raises:
        CheckpointError: no store there, one of other sizes, or one that is being written or was not closed.
        UnsupportedError: index "faiss" without faiss.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        capacity: int | None = None,
        index: Literal["exact", "faiss"] = "exact",
        write: bool = True,
        links: int = 32,
        effort: int = 64,
    ) -> None:
        if index not in ("exact", "faiss"):
            raise ConfigError(f"memory store: index = {index!r}: 'exact' or 'faiss'")
        faiss = _faiss() if index == "faiss" else None
        self.folder, self.write = Path(folder), write
        wished = {"kv_heads": kv_heads, "head_dim": head_dim, "capacity": capacity}
        exists = self._file.exists()
        sizes = self._read(wished) if exists else self._new(wished)
        self.kv_heads, self.head_dim, self.capacity = (int(sizes[name]) for name in wished)
        self.written: int = sizes["written"]
        """Pairs added since the store was last empty, evicted ones included."""
        if write:
            self._save(closed=False)
        # for reading alone never "c", which claims RAM for the whole file
        mode: Any = ("r+" if exists else "w+") if write else "r"
        shape = (self.kv_heads, self.capacity, self.head_dim)
        self._keys, self._values = (
            np.lib.format.open_memmap(self.folder / f"{name}.npy", mode=mode, dtype=np.float32, shape=shape)
            for name in ("keys", "values")
        )
        self._graphs = (
            [] if faiss is None else [_Graph(faiss, self.head_dim, links, effort) for _ in range(self.kv_heads)]
        )
        self._rebuild()

    def __len__(self) -> int:
        """Pairs that the store holds, in each kv head."""
        return min(self.written, self.capacity)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def add(self, keys: Tensor, values: Tensor) -> None:
        """Append pairs; where the store is full the oldest are overwritten.

        Args:
            keys: (kv_heads, n, head_dim), of norm 1 (`ops.unit_vectors`).
            values: like keys.

        Raises:
            ConfigError: other shapes, or a store opened with write=False.
        """
        self._check_writable()
        count = keys.shape[1] if keys.ndim == 3 else -1
        if keys.shape != (self.kv_heads, count, self.head_dim) or values.shape != keys.shape:
            raise ConfigError(
                f"{self.folder}: keys and values must be ({self.kv_heads}, n, {self.head_dim}), "
                f"got {tuple(keys.shape)} and {tuple(values.shape)}"
            )
        most = min(count, self.capacity)
        slots = np.arange(self.written + count - most, self.written + count) % self.capacity
        numbers = [t[:, count - most :].detach().to("cpu", torch.float32).numpy() for t in (keys, values)]
        on_failure(functools.partial(self._put_back, self.written, slots, self._keys[:, slots], self._values[:, slots]))
        self._keys[:, slots], self._values[:, slots] = numbers
        self.written += count
        if most < count or (self._graphs and self._graphs[0].count + count > 2 * self.capacity):
            self._rebuild()
        else:
            for head, graph in enumerate(self._graphs):
                graph.add(numbers[0][head])

    def search(self, queries: Tensor, k: int, *, exact: bool = False) -> Found:
        """The `k` pairs whose keys have the largest inner products with each query.

        Args:
            queries: (heads, n, head_dim), kv_heads dividing heads: each head searches the keys of its kv head.
            k: pairs for each query.
            exact: search every key though the store has a graph.
        """
        heads, count, dim = queries.shape
        group, top = heads // self.kv_heads, min(k, len(self))
        if dim != self.head_dim or group * self.kv_heads != heads or k < 1:
            raise ConfigError(
                f"{self.folder}: k = {k}, queries {tuple(queries.shape)}: k at least 1, queries of {self.head_dim} "
                f"numbers, heads a multiple of {self.kv_heads}"
            )
        folded = queries.detach().to("cpu", torch.float32).reshape(self.kv_heads, group * count, dim)
        if not top or not count:
            scores = folded.new_zeros(self.kv_heads, group * count, top)
            numbers = scores.long()
        elif self._graphs and not exact:
            scores, numbers = self._approximate(folded, top)
        else:
            scores, numbers = self._exact(folded, slice(None), top)
        head = np.arange(self.kv_heads)[:, None, None]
        values = torch.from_numpy(np.asarray(self._values[head, numbers.numpy() % self.capacity]))
        shape = heads, count, top
        nearest = Found(scores.view(shape), numbers.view(shape), values.view(*shape, dim))
        return Found(*(t.to(queries.device) for t in nearest))

    def clear(self) -> None:
        """Forget every pair; numbers start at 0 again.

        Raises:
            ConfigError: a store opened with write=False.
        """
        self._check_writable()
        on_failure(functools.partial(self._put_back, self.written))
        self.written = 0
        self._rebuild()

    def _check_writable(self) -> None:
        if not self.write:
            raise ConfigError(f"{self.folder}: opened with write=False")

    def _put_back(self, written: int, slots: Any = None, keys: Any = None, values: Any = None) -> None:
        """As it was before a call that failed: so many pairs written, and what its slots held."""
        if slots is not None:
            self._keys[:, slots], self._values[:, slots] = keys, values
        self.written = written
        self._rebuild()

    def close(self) -> None:
        """Write everything to disk; the store may then be opened again, also by other processes."""
        if self.write:
            self._keys.flush()
            self._values.flush()
            self._save(closed=True)
            self.write = False

    @property
    def _file(self) -> Path:
        return self.folder / "store.json"

    def _save(self, *, closed: bool) -> None:
        sizes = {"kv_heads": self.kv_heads, "head_dim": self.head_dim, "capacity": self.capacity}
        write_json(self._file, {"kind": _KIND, **sizes, "written": self.written, "closed": closed})

    def _new(self, sizes: dict[str, int | None]) -> dict[str, Any]:
        if not self.write:
            raise CheckpointError(f"{self.folder}: no memory store there")
        for name, size in sizes.items():
            if size is None or size < 1:
                raise ConfigError(f"{self.folder}: a new memory store needs {name} of at least 1, got {size}")
        return {**sizes, "written": 0}

    def _read(self, sizes: dict[str, int | None]) -> dict[str, Any]:
        stored: dict[str, Any] = read_json(self._file)
        if stored.get("kind") != _KIND:
            raise CheckpointError(f"{self._file}: not of a memory store")
        for name, size in sizes.items():
            if size is not None and size != stored[name]:
                raise CheckpointError(f"{self.folder}: a memory store with {name} = {stored[name]}, not {size}")
        if not stored["closed"]:
            raise CheckpointError(
                f"{self.folder}: is being written, or was not closed and cannot be trusted; use another folder"
            )
        return stored

    def _rebuild(self) -> None:
        """Graphs of the pairs that are held, and of no other."""
        oldest = self.written - len(self)
        for head, graph in enumerate(self._graphs):
            graph.clear(oldest)
            for low in range(oldest, self.written, _BLOCK):
                slots = np.arange(low, min(low + _BLOCK, self.written)) % self.capacity
                graph.add(self._keys[head, slots])

    def _exact(self, queries: Tensor, heads: slice, top: int) -> tuple[Tensor, Tensor]:
        """Scores and numbers (kv heads, queries, top), nearest first, of queries to the keys of these kv heads."""
        scores, slots = nearest_of_blocks(self._blocks(queries, heads), top)
        order = scores.argsort(-1, descending=True)
        oldest = self.written - len(self)
        return scores.gather(-1, order), oldest + (slots.gather(-1, order) - oldest) % self.capacity

    def _blocks(self, queries: Tensor, heads: slice) -> Iterator[tuple[int, Tensor]]:
        size = max(256, SCORES // (queries.shape[0] * queries.shape[1]))
        for low in range(0, len(self), size):
            yield low, queries @ _mapped(self._keys[heads, low : min(low + size, len(self))]).mT

    def _approximate(self, queries: Tensor, top: int) -> tuple[Tensor, Tensor]:
        """As `_exact`, by the graphs, and exactly for the queries of which a graph does not know the answer."""
        oldest = self.written - len(self)
        answers = [graph.search(part.numpy(), top, oldest) for graph, part in zip(self._graphs, queries, strict=True)]
        scores, numbers = (torch.from_numpy(np.stack(parts)) for parts in zip(*answers, strict=True))
        for head, lacking in enumerate((numbers < 0).any(-1)):
            if bool(lacking.any()):
                exact = self._exact(queries[head, lacking][None], slice(head, head + 1), top)
                scores[head, lacking], numbers[head, lacking] = exact[0][0], exact[1][0]
        return scores, numbers


class _Graph:
    """An HNSW graph over the keys of one kv head; node i is pair number `first` + i."""

    def __init__(self, faiss: Any, dim: int, links: int, effort: int) -> None:
        self.faiss, self.dim, self.links, self.effort = faiss, dim, links, effort
        self.clear(0)

    @property
    def count(self) -> int:
        return int(self.index.ntotal)

    def clear(self, first: int) -> None:
        self.first = first
        self.index = self.faiss.IndexHNSWFlat(self.dim, self.links, self.faiss.METRIC_INNER_PRODUCT)

    def add(self, keys: Any) -> None:
        if len(keys):
            self.index.add(np.ascontiguousarray(keys))

    def search(self, queries: Any, top: int, oldest: int) -> tuple[Any, Any]:
        """Scores and numbers (queries, top) of pairs from number `oldest` on, nearest first, -1 where it finds too few.

        Evicted pairs stay in the graph until it is built anew. They are searched for with the others and left out
        afterwards: only where enough of the nearest of all pairs are held are these the nearest of those held. (A
        search that skips the evicted ones ends among them where they are the nearest, with what it met on its way.)
        """
        evicted, count = oldest - self.first, self.count
        wide = max(self.effort, 2 * top if evicted else top)
        wide = min(-(-wide * count // (count - evicted)), count)
        scores, nodes = self.index.search(
            np.ascontiguousarray(queries), wide, params=self.faiss.SearchParametersHNSW(efSearch=wide)
        )
        # those that are held come first, in their order; `nodes` is -1 where the graph gives no more
        order = np.argsort(nodes < evicted, axis=-1, kind="stable")[:, :top]
        scores, nodes = np.take_along_axis(scores, order, -1), np.take_along_axis(nodes, order, -1)
        return scores, np.where(nodes < evicted, -1, nodes + self.first)


def recall(store: MemoryStore, queries: Tensor, k: int) -> float:
    """The share of the true `k` nearest pairs that the store's own search finds; 1 for an exact or an empty store.

    Args:
        store: to be measured.
        queries: (heads, n, head_dim).
        k: pairs for each query.
    """
    own, true = store.search(queries, k).numbers, store.search(queries, k, exact=True).numbers
    if not true.numel():
        return 1.0
    hits = (true[..., :, None] == own[..., None, :]).any(-1)
    return float(hits.cpu().double().mean())


def read_store(store: MemoryStore, q: Tensor, local: Tensor, gate: Tensor, top: int) -> Tensor:
    """`memorizing_attention` of scaled unit queries (heads, n, head_dim) to what a store has nearest."""
    nearest = store.search(q, top)
    weights = nearest.scores.softmax(-1).to(q.dtype)
    values = (weights[..., None, :] @ nearest.values.to(q.dtype))[..., 0, :]
    return mixed(values, local, gate, torch.ones((), dtype=torch.bool, device=q.device))


def _mapped(array: Any) -> Tensor:
    """A tensor over the memory of an array; torch warns where that cannot be written, which nobody does here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array)


def _faiss() -> Any:
    try:
        return importlib.import_module("faiss")
    except ImportError:
        raise UnsupportedError(
            "a memory store with index = 'faiss' needs faiss: pip install 'longspan[faiss]', or index = 'exact'"
        ) from None
