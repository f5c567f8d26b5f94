"""Memory stores on disk: exact search against faiss, by number of pairs, in one process.

    python benchmarks/bench_memory_store.py [--pairs 20000 100000] [--k 32] [--effort 64] [--threads 1] [--cpu-time]

Keys of norm 1, "random" or "clustered" (around 1,000 centers; a query is near one). Per row: milliseconds per query
(batches of --queries, exact and faiss alternating), recall@k, and memory of the process above that before the store
was opened: anonymous memory, which must fit into RAM, and pages of the store's files, which the system may drop at any
time (Linux). The exact search is first compared with all products; if they differ, no figures are printed.
"""

import argparse
import ctypes
import gc
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from longspan import ops
from longspan.mechanisms.memorizing.memory_store import MemoryStore, recall
from longspan.process import anonymous_bytes, resident_bytes
from timing import compare

CENTERS, SPREAD = 1000, 0.08  # standard deviation per coordinate; an eighth of that of the centers at 64 dimensions


def drawn(kind: str, count: int, dim: int, seed: int) -> Tensor:
    """Vectors (1, count, dim) of norm 1."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, count, dim, generator=generator)
    if kind == "clustered":
        centers = ops.unit_vectors(torch.randn(CENTERS, dim, generator=torch.Generator().manual_seed(0)))
        x = centers[torch.randint(CENTERS, (count,), generator=generator)] + SPREAD * x
    return ops.unit_vectors(x)


def filled(folder: Path, kind: str, count: int, dim: int) -> None:
    """Write a store in parts, so that this process never holds all of it."""
    with MemoryStore(folder, kv_heads=1, head_dim=dim, capacity=count) as store:
        for seed, low in enumerate(range(0, count, 10_000)):
            size = min(10_000, count - low)
            store.add(drawn(kind, size, dim, seed), drawn("random", size, dim, -1 - seed))


def check(folder: Path, queries: Tensor, k: int) -> None:
    """Compare an exact search with all products of the keys in the store's file."""
    store = MemoryStore(folder, write=False)
    keys = torch.from_numpy(store._keys[:, : len(store)].copy())
    true = (queries @ keys.mT).topk(min(k, len(store)), -1).values
    scores = store.search(queries, k).scores
    difference = float((scores - true).abs().max())
    if difference > 1e-5:
        raise SystemExit(f"the exact search is off by {difference:.1e} (bar 1e-5); no figures are printed")


def memory_in_use() -> tuple[int, int]:
    """Resident bytes of this process: anonymous, and all others."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)  # freed memory would be reused and not count
    anonymous, resident = anonymous_bytes(), resident_bytes()
    if anonymous is None or resident is None:
        raise SystemExit("anonymous memory is unknown on this system; use Linux")
    return anonymous, resident - anonymous


def measure(kind: str, count: int, options: argparse.Namespace) -> None:
    """Print a row for each index."""
    queries = drawn(kind, options.queries, options.head_dim, 1 << 20)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        filled(folder, kind, count, options.head_dim)
        check(folder, queries, options.k)
        stores, memory, opened = {}, {}, {}
        for index in ("exact", "faiss"):
            before, begin = memory_in_use(), time.perf_counter()
            stores[index] = MemoryStore(folder, index=index, write=False, links=options.links, effort=options.effort)
            opened[index] = time.perf_counter() - begin
            stores[index].search(queries, options.k)
            memory[index] = [now - then for now, then in zip(memory_in_use(), before, strict=True)]
        clock = time.process_time if options.cpu_time else time.perf_counter
        times = compare(
            lambda: stores["exact"].search(queries, options.k),
            lambda: stores["faiss"].search(queries, options.k),
            pairs=options.rounds,
            clock=clock,
        )
        for index, seconds in (("exact", times.base), ("faiss", times.candidate)):
            recalled = recall(stores[index], queries, options.k)
            anonymous, mapped = (nbytes / 1e6 for nbytes in memory[index])
            print(
                f"{kind:10} {count:9,} {index:6} {1e3 * seconds / options.queries:9.3f} {recalled:9.3f} "
                f"{anonymous:13.1f} {mapped:10.1f} {opened[index]:8.1f}",
                flush=True,
            )


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description="Exact and approximate search of stores on disk")
    parser.add_argument("--pairs", type=int, nargs="+", default=[20_000, 100_000])
    for name, value in (("queries", 64), ("k", 32), ("head-dim", 64), ("links", 32), ("effort", 64)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rounds", type=int, default=5, help="rounds of timing")
    parser.add_argument("--threads", type=int, default=1, help="for the exact search; for faiss set OMP_NUM_THREADS")
    parser.add_argument("--cpu-time", action="store_true", help="on a busy machine; with one thread")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{options.queries} queries, k = {options.k}, head_dim {options.head_dim}, one kv head")
    print("keys           pairs index  ms/query  recall@k  anonymous MB  mapped MB  opened s")
    for kind in ("random", "clustered"):
        for count in options.pairs:
            measure(kind, count, options)


if __name__ == "__main__":
    main()
