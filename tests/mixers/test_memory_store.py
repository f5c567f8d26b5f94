"""Stores on disk: exact search and faiss, reopening, eviction, errors."""

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longspan import ops
from longspan.errors import CheckpointError, ConfigError, UnsupportedError
from longspan.mechanisms.memorizing import memory_store
from longspan.mechanisms.memorizing.memory_store import MemoryStore, recall

SIZES: dict[str, Any] = {"kv_heads": 2, "head_dim": 16, "capacity": 300}
KINDS = [
    "exact",
    pytest.param(
        "faiss", marks=pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="faiss is not installed")
    ),
]


def pairs(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(2, count, 16, generator=generator) for _ in range(2))
    return ops.unit_vectors(keys), values


def queries_of(count: int, heads: int = 4) -> Tensor:
    return torch.randn(heads, count, 16, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("added", [(5,), (300,), (150, 150, 1), (299, 400), (70,) * 13])
@pytest.mark.parametrize("index", KINDS)
def test_search_against_all_products(added: tuple[int, ...], index: Any, tmp_path: Path) -> None:
    """No evicted pair and no value of another pair; the exact search has full recall, a graph nearly."""
    keys, values = pairs(sum(added))
    store = MemoryStore(tmp_path, index=index, effort=200, **SIZES)
    for new, value in zip(keys.split(added, 1), values.split(added, 1), strict=True):
        store.add(new, value)
    size = min(sum(added), 300)
    assert len(store) == size
    oldest, queries = sum(added) - size, queries_of(7)
    matches = store.search(queries, 8)
    scores = queries.view(2, 14, 16) @ keys[:, oldest:].mT
    best = scores.topk(min(8, size), -1)
    numbers = (best.indices + oldest).view(4, 7, -1)
    if index == "exact":
        assert torch.equal(matches.numbers, numbers)
        torch.testing.assert_close(matches.scores, best.values.view(4, 7, -1), atol=1e-5, rtol=0)
        assert recall(store, queries, 8) == 1
    else:
        assert recall(store, queries, 8) > 0.95
        hits = (matches.numbers[..., None] == numbers[..., None, :]).any(-1).double().mean()
        assert recall(store, queries, 8) == pytest.approx(float(hits))
    for head in range(4):
        real = matches.numbers[head] >= 0
        assert bool((matches.numbers[head][real] >= oldest).all())
        own = matches.numbers[head].clamp(min=0)
        assert torch.equal(matches.values[head][real], values[head // 2][own][real])
        score = (queries[head][:, None] * keys[head // 2][own]).sum(-1)
        torch.testing.assert_close(matches.scores[head][real], score[real], atol=1e-5, rtol=0)


@pytest.mark.parametrize("index", KINDS)
@pytest.mark.parametrize("later", [400, 700, 1000, 1999], ids="after {}".format)
def test_queries_near_evicted_pairs(later: int, index: Any, tmp_path: Path) -> None:
    """Keys lie in two heaps, and most or all of the queried heap is evicted but still in the graph."""
    generator = torch.Generator().manual_seed(5)

    def heap(axis: int, count: int) -> Tensor:
        noise = 0.05 * torch.randn(2, count, 16, generator=generator)
        return ops.unit_vectors(noise + torch.eye(16)[axis])

    sizes = {**SIZES, "capacity": 1000}
    values = torch.randn(2, 1000 + later, 16, generator=generator)
    with MemoryStore(tmp_path, index=index, **sizes) as store:
        store.add(heap(0, 1000), values[:, :1000])
        store.add(heap(1, later), values[:, 1000:])
        # two heads query near evicted pairs, one near live pairs, one between them
        near = [heap(0, 50)[0], heap(1, 50)[0], heap(0, 50)[1], ops.unit_vectors(heap(0, 50)[0] + heap(1, 50)[0])]
        queries = torch.stack(near)
        assert recall(store, queries, 32) > 0.98
        matches = store.search(queries, 32)
        assert int(matches.numbers.min()) >= later
        assert bool((matches.scores.diff(dim=-1) <= 0).all())
        for head in range(4):
            assert torch.equal(matches.values[head], values[head // 2][matches.numbers[head]])
        read = memory_store.read_store(store, 5 * queries, torch.zeros_like(queries), torch.zeros(4), 32)
        exact = store.search(5 * queries, 32, exact=True)
        expected = (exact.scores.softmax(-1)[..., None] * exact.values).sum(-2) / 2
        assert not bool(read.isnan().any())
        assert float((read - expected).abs().mean()) < 0.01


@pytest.mark.parametrize("index", KINDS)
def test_a_closed_store_is_opened_again(index: Any, tmp_path: Path) -> None:
    keys, values = pairs(400)
    with MemoryStore(tmp_path, index=index, **SIZES) as store:
        store.add(keys, values)
        before = store.search(queries_of(5), 4, exact=True)
    with pytest.raises(ConfigError, match="write=False"):
        store.add(keys, values)
    readers = [MemoryStore(tmp_path, index=index, write=False) for _ in range(2)]
    for reader in readers:
        assert len(reader) == 300
        for a, b in zip(reader.search(queries_of(5), 4, exact=True), before, strict=True):
            assert torch.equal(a, b)
        assert recall(reader, queries_of(20), 4) > 0.95
        with pytest.raises(ConfigError, match="write=False"):
            reader.clear()
    with MemoryStore(tmp_path, index=index) as store:
        store.clear()
        assert len(store) == 0
        assert store.search(queries_of(5), 4).numbers.shape == (4, 5, 0)
        assert recall(store, queries_of(5), 4) == 1
        store.add(keys[:, :3], values[:, :3])
        assert sorted(store.search(queries_of(1), 9).numbers[0, 0].tolist()) == [0, 1, 2]


LIMITED = """
import resource, sys, torch
from pathlib import Path
from longspan import ops
from longspan.mechanisms.memorizing.memory_store import MemoryStore

torch.set_num_threads(1)
folder, count, room = sys.argv[1], 400_000, 56 << 20
torch.manual_seed(0)
keys = ops.unit_vectors(torch.randn(1, 1000, 64))
store = MemoryStore(folder, kv_heads=1, head_dim=64, capacity=count)
store.add(keys, keys)
store.search(keys[:, :4], 4)  # a first call loads libraries
store.clear()
held = next(line for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (int(held.split()[1]) * 1024 + room, resource.RLIM_INFINITY))
try:
    torch.ones(count * 64)
    sys.exit("the limit does not hold")
except RuntimeError:
    pass
sign = [1 - 2 * torch.randint(2, (64,)) for _ in range(count // 1000)]
for part in sign:
    store.add(keys * part, keys)
for again in range(2):
    asked = keys[:, :8] * sign[123]
    found = store.search(asked, 16)
    assert found.numbers[0, :, 0].tolist() == list(range(123_000, 123_008)), found.numbers[0, :, 0]
    assert torch.equal(found.values[0, :, 0], keys[0, :8])
    store.close()
    store = MemoryStore(folder, write=False)
print(sum(path.stat().st_size for path in Path(folder).glob("*.npy")) / room)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_a_store_larger_than_the_memory_that_is_allowed(tmp_path: Path) -> None:
    """Writing, exact search and reopening need private memory of less than a third of the files."""
    ran = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert float(ran.stdout) > 3


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no memory store"):
        MemoryStore(tmp_path / "none", write=False)
    with pytest.raises(ConfigError, match="head_dim = None: must be at least 1"):
        MemoryStore(tmp_path / "new", kv_heads=2, capacity=5)
    with pytest.raises(ConfigError, match="'exact' or 'faiss'"):
        MemoryStore(tmp_path, index="flat", **SIZES)  # type: ignore[arg-type]
    store = MemoryStore(tmp_path, **SIZES)
    with pytest.raises(CheckpointError, match="being written"):
        MemoryStore(tmp_path, write=False)
    with pytest.raises(ConfigError, match=r"= \(2, n, 16\) for both"):
        store.add(torch.zeros(1, 3, 16), torch.zeros(1, 3, 16))
    with pytest.raises(ConfigError, match="a multiple of kv_heads = 2"):
        store.search(torch.zeros(3, 1, 16), 4)
    store.close()
    with pytest.raises(CheckpointError, match="capacity = 300, not 5"):
        MemoryStore(tmp_path, capacity=5)


def test_without_faiss_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def missing(name: str, *rest: Any) -> Any:
        if name == "faiss":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(UnsupportedError, match=r"longspan\[faiss\]"):
        MemoryStore(tmp_path, index="faiss", **SIZES)
    assert not any(tmp_path.iterdir())
    assert len(MemoryStore(tmp_path, **SIZES)) == 0
