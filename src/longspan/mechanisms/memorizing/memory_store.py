"""Stores of keys and values on disk for `memorizing`, searched exactly or with faiss.

    store = MemoryStore("notes", kv_heads=8, head_dim=64, capacity=10_000_000)    # or index="faiss"
    core.attach(store)                                                            # see MemorizingMechanism.attach
    with torch.no_grad():
        y, state = mixer(x)                                                       # writes and searches the store
    store.close()                                                                 # later: write=False

Keys and values are memory-mapped numpy files. Pairs are numbered from the last `clear`; pair i is in slot i % capacity
of both files, so the oldest pair is the one overwritten. Source: Wu et al. 2022, section 3.2, who use approximate
search too.

    exact     reads every key from the files, one block at a time, so the store may be larger than RAM
    faiss     (extra `faiss`) an HNSW graph with a copy of every key in RAM: 4 head_dim + about 8 links bytes per key,
              and up to as many evicted ones; values are read from the files. A search visits only few keys; `recall`
              measures how many of the nearest it finds

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
from longspan.mechanisms.memorizing.operation import mix_retrieved, nearest_of_blocks
from longspan.state import on_failure

SCORES = 1 << 23  # scores per block of an exact search
_BLOCK = 1 << 16  # keys added to a graph at once
_KIND = "longspan memory store"


class SearchResult(NamedTuple):
    """Result of a search, nearest first; k is smaller than requested if the store holds fewer pairs."""

    scores: Tensor  # (heads, queries, k)
    numbers: Tensor  # (heads, queries, k) numbers of the pairs
    values: Tensor  # (heads, queries, k, head_dim)


class MemoryStore:
    """Key-value pairs in a folder on disk.

    Args:
        folder: where the files are; created if missing.
        kv_heads, head_dim, capacity: sizes; None = those of an existing store.
        index: "exact", or "faiss" for an HNSW graph with all keys in RAM, built when the store is opened.
        write: False = only search; several processes may do so at once.
        links: edges per node of the HNSW graph.
        effort: number of candidates kept in a search of the graph; more is slower and finds more.

    Raises:
        ConfigError: unknown index, or a size missing for a new store.
        CheckpointError: there is no store, it has other sizes, or it is being written or was not closed.
        UnsupportedError: index "faiss" without the faiss package.
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
            raise ConfigError(f"MemoryStore: index = {index!r}: must be 'exact' or 'faiss'")
        faiss = _faiss() if index == "faiss" else None
        self.folder, self.write = Path(folder), write
        requested_sizes = {"kv_heads": kv_heads, "head_dim": head_dim, "capacity": capacity}
        exists = self._file.exists()
        sizes = self._read_sizes(requested_sizes) if exists else self._new_sizes(requested_sizes)
        self.kv_heads, self.head_dim, self.capacity = (int(sizes[name]) for name in requested_sizes)
        self.written: int = sizes["written"]
        """Number of pairs added since the store was last empty, evicted ones included."""
        if write:
            self._save(closed=False)
        # for reading use "r", not "c", which reserves RAM for the whole file
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
        """Number of pairs that the store holds per kv head."""
        return min(self.written, self.capacity)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def add(self, keys: Tensor, values: Tensor) -> None:
        """Append key-value pairs; if the store is full, the oldest are overwritten.

        Args:
            keys: (kv_heads, n, head_dim), of unit length (`ops.unit_vectors`).
            values: (kv_heads, n, head_dim).

        Raises:
            ConfigError: other shapes, or a store opened with write=False.
        """
        self._check_writable()
        count = keys.shape[1] if keys.ndim == 3 else -1
        if keys.shape != (self.kv_heads, count, self.head_dim) or values.shape != keys.shape:
            raise ConfigError(
                f"{self.folder}: keys have shape {tuple(keys.shape)}, values {tuple(values.shape)}; "
                f"expected (kv_heads, n, head_dim) = ({self.kv_heads}, n, {self.head_dim}) for both"
            )
        num_stored = min(count, self.capacity)
        slots = np.arange(self.written + count - num_stored, self.written + count) % self.capacity
        numbers = [t[:, count - num_stored :].detach().to("cpu", torch.float32).numpy() for t in (keys, values)]
        on_failure(functools.partial(self._restore, self.written, slots, self._keys[:, slots], self._values[:, slots]))
        self._keys[:, slots], self._values[:, slots] = numbers
        self.written += count
        if num_stored < count or (self._graphs and self._graphs[0].count + count > 2 * self.capacity):
            self._rebuild()
        else:
            for head, graph in enumerate(self._graphs):
                graph.add(numbers[0][head])

    def search(self, queries: Tensor, k: int, *, exact: bool = False) -> SearchResult:
        """Return the `k` pairs whose keys have the largest inner products with each query.

        Args:
            queries: (heads, n, head_dim), kv_heads dividing heads: each head searches the keys of its kv head.
            k: number of pairs per query.
            exact: search every key even if the store has a graph.

        Raises:
            ConfigError: k below 1, or queries of a wrong shape.
        """
        heads, count, dim = queries.shape
        group, top = heads // self.kv_heads, min(k, len(self))
        if dim != self.head_dim or group * self.kv_heads != heads or k < 1:
            raise ConfigError(
                f"{self.folder}: cannot search k = {k}, queries of shape {tuple(queries.shape)}; k must be at least "
                f"1, queries (heads, n, head_dim = {self.head_dim}), heads a multiple of kv_heads = {self.kv_heads}"
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
        nearest = SearchResult(scores.view(shape), numbers.view(shape), values.view(*shape, dim))
        return SearchResult(*(t.to(queries.device) for t in nearest))

    def clear(self) -> None:
        """Remove all pairs; numbering restarts at 0.

        Raises:
            ConfigError: a store opened with write=False.
        """
        self._check_writable()
        on_failure(functools.partial(self._restore, self.written))
        self.written = 0
        self._rebuild()

    def _check_writable(self) -> None:
        """Check that the store was opened for writing.

        Raises:
            ConfigError: it was opened with write=False.
        """
        if not self.write:
            raise ConfigError(f"{self.folder}: the memory store was opened with write=False; open it with write=True")

    def _restore(self, written: int, slots: Any = None, keys: Any = None, values: Any = None) -> None:
        """Undo a failed call: restore the number of pairs written and, if given, the contents of overwritten slots."""
        if slots is not None:
            self._keys[:, slots], self._values[:, slots] = keys, values
        self.written = written
        self._rebuild()

    def close(self) -> None:
        """Flush everything to disk; afterwards the store can be opened again, also by other processes."""
        if self.write:
            self._keys.flush()
            self._values.flush()
            self._save(closed=True)
            self.write = False

    @property
    def _file(self) -> Path:
        """Path of the JSON file with the store's sizes."""
        return self.folder / "store.json"

    def _save(self, *, closed: bool) -> None:
        """Write the store's sizes to the JSON file, and whether the store is closed."""
        sizes = {"kv_heads": self.kv_heads, "head_dim": self.head_dim, "capacity": self.capacity}
        write_json(self._file, {"kind": _KIND, **sizes, "written": self.written, "closed": closed})

    def _new_sizes(self, sizes: dict[str, int | None]) -> dict[str, Any]:
        """Check the sizes of a new store and return the contents of its JSON file.

        Raises:
            CheckpointError: the store is opened for reading, but does not exist.
            ConfigError: a size is missing or below 1.
        """
        if not self.write:
            raise CheckpointError(
                f"{self.folder}: there is no memory store in this folder; check the path, or open with write=True"
            )
        for name, size in sizes.items():
            if size is None or size < 1:
                raise ConfigError(f"{self.folder}: {name} = {size}: must be at least 1 for a new memory store")
        return {**sizes, "written": 0}

    def _read_sizes(self, sizes: dict[str, int | None]) -> dict[str, Any]:
        """Read the JSON file of an existing store and check it against the requested sizes.

        Raises:
            CheckpointError: it is not a memory store, has other sizes, or was not closed.
        """
        stored: dict[str, Any] = read_json(self._file)
        if stored.get("kind") != _KIND:
            raise CheckpointError(f"{self._file}: is not the file of a memory store; use another folder")
        for name, size in sizes.items():
            if size is not None and size != stored[name]:
                raise CheckpointError(
                    f"{self.folder}: the memory store has {name} = {stored[name]}, not {size}; omit {name}, or use "
                    "another folder"
                )
        if not stored["closed"]:
            raise CheckpointError(
                f"{self.folder}: the memory store is being written, or was not closed and may be damaged; close it, or "
                "use another folder"
            )
        return stored

    def _rebuild(self) -> None:
        """Rebuild the graphs from the pairs that the store holds now."""
        oldest = self.written - len(self)
        for head, graph in enumerate(self._graphs):
            graph.clear(oldest)
            for low in range(oldest, self.written, _BLOCK):
                slots = np.arange(low, min(low + _BLOCK, self.written)) % self.capacity
                graph.add(self._keys[head, slots])

    def _exact(self, queries: Tensor, heads: slice, top: int) -> tuple[Tensor, Tensor]:
        """Search all keys of some kv heads; return scores and pair numbers (kv heads, queries, top), nearest first."""
        scores, slots = nearest_of_blocks(self._blocks(queries, heads), top)
        order = scores.argsort(-1, descending=True)
        oldest = self.written - len(self)
        return scores.gather(-1, order), oldest + (slots.gather(-1, order) - oldest) % self.capacity

    def _blocks(self, queries: Tensor, heads: slice) -> Iterator[tuple[int, Tensor]]:
        """Yield (first slot, scores) for blocks of keys of some kv heads."""
        size = max(256, SCORES // (queries.shape[0] * queries.shape[1]))
        for low in range(0, len(self), size):
            yield low, queries @ _mapped(self._keys[heads, low : min(low + size, len(self))]).mT

    def _approximate(self, queries: Tensor, top: int) -> tuple[Tensor, Tensor]:
        """Search with the graphs; return scores and pair numbers (kv heads, queries, top), nearest first.

        Queries for which a graph finds too few pairs are searched exactly.
        """
        oldest = self.written - len(self)
        results = [graph.search(part.numpy(), top, oldest) for graph, part in zip(self._graphs, queries, strict=True)]
        scores, numbers = (torch.from_numpy(np.stack(parts)) for parts in zip(*results, strict=True))
        for head, incomplete in enumerate((numbers < 0).any(-1)):
            if bool(incomplete.any()):
                exact = self._exact(queries[head, incomplete][None], slice(head, head + 1), top)
                scores[head, incomplete], numbers[head, incomplete] = exact[0][0], exact[1][0]
        return scores, numbers


class _Graph:
    """HNSW graph over the keys of one kv head; node i is pair number `first` + i."""

    def __init__(self, faiss: Any, dim: int, links: int, effort: int) -> None:
        self.faiss, self.dim, self.links, self.effort = faiss, dim, links, effort
        self.clear(0)

    @property
    def count(self) -> int:
        """Number of keys in the graph, evicted ones included."""
        return int(self.index.ntotal)

    def clear(self, first: int) -> None:
        """Replace the graph by an empty one whose first node will be pair number `first`."""
        self.first = first
        self.index = self.faiss.IndexHNSWFlat(self.dim, self.links, self.faiss.METRIC_INNER_PRODUCT)

    def add(self, keys: Any) -> None:
        """Add keys (n, head_dim) to the graph."""
        if len(keys):
            self.index.add(np.ascontiguousarray(keys))

    def search(self, queries: Any, top: int, oldest: int) -> tuple[Any, Any]:
        """Return scores and pair numbers, (n, top) each, of the nearest pairs; -1 where there are fewer than `top`.

        Args:
            queries: (n, head_dim).
            top: number of pairs per query.
            oldest: number of the oldest pair that is not evicted; older ones are not returned.

        Evicted pairs stay in the graph until it is rebuilt. They are searched with the others and removed afterwards,
        so enough candidates must be requested for the nearest remaining pairs to be among them. (A search that skips
        evicted pairs would end among them where they are the nearest, with whatever it met on its way.)
        """
        evicted, count = oldest - self.first, self.count
        num_candidates = max(self.effort, 2 * top if evicted else top)
        num_candidates = min(-(-num_candidates * count // (count - evicted)), count)
        scores, nodes = self.index.search(
            np.ascontiguousarray(queries),
            num_candidates,
            params=self.faiss.SearchParametersHNSW(efSearch=num_candidates),
        )
        # pairs still in the store first, in their order; `nodes` is -1 where the graph returns no more
        order = np.argsort(nodes < evicted, axis=-1, kind="stable")[:, :top]
        scores, nodes = np.take_along_axis(scores, order, -1), np.take_along_axis(nodes, order, -1)
        return scores, np.where(nodes < evicted, -1, nodes + self.first)


def recall(store: MemoryStore, queries: Tensor, k: int) -> float:
    """Return the fraction of the true `k` nearest pairs that the store's search finds; 1 if exact or empty.

    Args:
        store: the store to measure.
        queries: (heads, n, head_dim).
        k: number of pairs per query.
    """
    retrieved, true = store.search(queries, k).numbers, store.search(queries, k, exact=True).numbers
    if not true.numel():
        return 1.0
    hits = (true[..., :, None] == retrieved[..., None, :]).any(-1)
    return float(hits.cpu().double().mean())


def read_store(store: MemoryStore, q: Tensor, local: Tensor, gate: Tensor, top: int) -> Tensor:
    """Retrieve the `top` nearest pairs from a store and mix them into local attention; see `memorizing_attention`.

    q and `local` are (heads, n, head_dim), q scaled unit vectors; `gate` is (heads,).
    """
    nearest = store.search(q, top)
    weights = nearest.scores.softmax(-1).to(q.dtype)
    values = (weights[..., None, :] @ nearest.values.to(q.dtype))[..., 0, :]
    return mix_retrieved(values, local, gate, torch.ones((), dtype=torch.bool, device=q.device))


def _mapped(array: Any) -> Tensor:
    """Return a tensor that shares an array's memory, without torch's warning about read-only arrays."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array)


def _faiss() -> Any:
    """Import and return the faiss package.

    Raises:
        UnsupportedError: it is not installed.
    """
    try:
        return importlib.import_module("faiss")
    except ImportError:
        raise UnsupportedError(
            "MemoryStore: index = 'faiss': the faiss package is not installed; run pip install 'longspan[faiss]', or "
            "use index = 'exact'"
        ) from None
