"""Memory stores on disk: an exact search against faiss, by how many pairs they hold, in one process.

    python benchmarks/bench_memory_store.py [--pairs 20000 100000] [--k 32] [--effort 64] [--threads 1] [--cpu-time]

Keys of norm 1, "random" ones and "clustered" ones (around 1,000 centres; a query lies near one). Per row: milliseconds
a query (batches of --queries, exact and faiss in turn), recall@k, and what the process holds more than before the
store was opened: anonymous memory, which must fit into RAM, and pages of the store's files, which the system may drop
at any time (Linux). The exact search is first held against all products; no figures are shown where they differ.
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

CENTRES, SPREAD = 1000, 0.08  # of a coordinate; an eighth of the centres' own at 64 dimensions


def drawn(kind: str, count: int, dim: int, seed: int) -> Tensor:
    """Vectors (1, count, dim) of norm 1."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, count, dim, generator=generator)
    if kind == "clustered":
        centres = ops.unit_vectors(torch.randn(CENTRES, dim, generator=torch.Generator().manual_seed(0)))
        x = centres[torch.randint(CENTRES, (count,), generator=generator)] + SPREAD * x
    return ops.unit_vectors(x)


def filled(folder: Path, kind: str, count: int, dim: int) -> None:
    """A closed store; a part at a time, so that this process never holds it."""
    with MemoryStore(folder, kv_heads=1, head_dim=dim, capacity=count) as store:
        for seed, low in enumerate(range(0, count, 10_000)):
            size = min(10_000, count - low)
            store.add(drawn(kind, size, dim, seed), drawn("random", size, dim, -1 - seed))


def check(folder: Path, queries: Tensor, k: int) -> None:
    """Hold an exact search against all products with the store's file."""
    store = MemoryStore(folder, write=False)
    keys = torch.from_numpy(store._keys[:, : len(store)].copy())
    true = (queries @ keys.mT).topk(min(k, len(store)), -1).values
    scores = store.search(queries, k).scores
    difference = float((scores - true).abs().max())
    if difference > 1e-5:
        raise SystemExit(f"the exact search is off by {difference:.1e} (bar 1e-5); no figures are shown")


def memory_in_use() -> tuple[int, int]:
    """Bytes of this process: anonymous ones, and all others."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)  # what was freed before would be used again, and not count
    anonymous, resident = anonymous_bytes(), resident_bytes()
    if anonymous is None or resident is None:
        raise SystemExit("this system does not say how much memory is anonymous; Linux does")
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
    parser.add_argument("--rounds", type=int, default=5, help="how often each is timed")
    parser.add_argument("--threads", type=int, default=1, help="of the exact search; of faiss: OMP_NUM_THREADS")
    parser.add_argument("--cpu-time", action="store_true", help="with one thread where the machine is busy")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{options.queries} queries, k = {options.k}, head_dim {options.head_dim}, one kv head")
    print("keys           pairs index  ms/query  recall@k  anonymous MB  mapped MB  opened s")
    for kind in ("random", "clustered"):
        for count in options.pairs:
            measure(kind, count, options)


if __name__ == "__main__":
    main()
