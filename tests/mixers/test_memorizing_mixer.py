"""Memorizing Transformer's attention as a layer: when pairs are stored and evicted, and attached stores on disk."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import longspan as ls
from longspan.errors import ConfigError, UnsupportedError
from longspan.mechanisms.memorizing.memory_store import MemoryStore

FIELDS: dict[str, Any] = {"window": 4, "max_memories": 10, "k": 3}


def build(**fields: Any) -> Any:
    torch.manual_seed(0)
    mixer: Any = ls.mixers.build("memorizing", dim=16, num_heads=4, num_kv_heads=2, **{**FIELDS, **fields}).double()
    with torch.no_grad():
        mixer.core.gate.copy_(torch.tensor([-1.0, 0.0, 1.0, 2.0]))
    return mixer


def drawn(seed: int, batch: int, length: int) -> Tensor:
    return torch.randn(batch, length, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_hand(mixer: Any, x: Tensor) -> Tensor:
    """One document, token by token and head by head, from the equations."""
    core, config = mixer.core, mixer.core.config
    q, k, v = mixer.projections(x)
    out = torch.zeros_like(q)
    for head in range(4):
        gate, scale = core.gate[head].sigmoid(), core.log_scale[head].double().exp()
        for i in range(x.shape[1]):
            query, keys, values = q[0, head, i], k[0, head // 2], v[0, head // 2]
            near = slice(max(0, i - config.window + 1), i + 1)
            local = torch.softmax(keys[near] @ query / 2, 0) @ values[near]
            border = i // config.window * config.window
            stored = slice(max(0, border - config.max_memories), border)
            if border == 0:
                out[0, head, i] = local
                continue
            cosines = torch.stack([torch.cosine_similarity(query, key, 0, 0.0) for key in keys[stored]])
            best = cosines.topk(min(config.k, len(cosines)))
            retrieved = torch.softmax(scale * best.values, 0) @ values[stored][best.indices]
            out[0, head, i] = gate * retrieved + (1 - gate) * local
    outputs: Tensor = mixer.projections.output(out)
    return outputs


@pytest.mark.parametrize("fields", [{}, {"max_memories": 2}, {"window": 7, "k": 1}, {"max_memories": 99, "k": 99}])
@torch.no_grad()
def test_equals_the_equations(fields: dict[str, Any]) -> None:
    mixer, x = build(**fields), drawn(1, 1, 31)
    # the paper's code and this one add 1e-6 to the squared norm, the equations do not
    torch.testing.assert_close(mixer(x)[0], by_hand(mixer, x), atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_store_holds_the_last_pairs_of_closed_segments_oldest_evicted_first() -> None:
    mixer, x = build(), drawn(1, 2, 30)
    _, k, v = mixer.projections(x)
    keys, state, stores = ls.ops.unit_vectors(k), None, []
    for token in range(30):
        _, state = mixer(x[:, token : token + 1], state)
        closed = (token + 1) // 4 * 4
        num_stored = min(closed, 10)
        for stored, pairs in ((state.store_k, keys), (state.store_v, v)):
            torch.testing.assert_close(
                stored[:, :, 10 - num_stored :], pairs[:, :, closed - num_stored : closed], atol=1e-12, rtol=0
            )
            assert not stored[:, :, : 10 - num_stored].any()
        stores.append(state.store_k)
    assert stores[4] is stores[6], "while no segment closes, the store is handed on as it is"


def test_the_store_is_not_trained_and_gates_and_scales_are() -> None:
    mixer, x = build(), drawn(1, 1, 32).requires_grad_()
    y = mixer(x)[0]
    (gradient,) = torch.autograd.grad(y[:, 28:].square().sum(), x, retain_graph=True)
    assert not gradient[:, :25].any()
    assert gradient[:, 25:].abs().amax(-1).all()
    for gradient in torch.autograd.grad(y.square().sum(), (mixer.core.gate, mixer.core.log_scale)):
        assert gradient.abs().min() > 0
    tokens = ls.Decoder(
        ls.DecoderConfig(vocab_size=9, dim=16, num_layers=2, num_heads=2, mixers=({"name": "memorizing", **FIELDS},))
    )
    groups = {group["name"]: group for group in tokens.parameter_groups(lr=3e-4, weight_decay=0.1)}
    assert groups["gates"]["lr"] == 0.01
    assert groups["gates"]["weight_decay"] == 0
    assert len(groups["gates"]["params"]) == 4


@torch.no_grad()
def test_a_closed_gate_is_window_attention() -> None:
    mixer, x = build(gate_init=-1e9), drawn(1, 2, 40)
    mixer.core.gate.fill_(-1e9)
    window = ls.mixers.build("window", dim=16, num_heads=4, num_kv_heads=2, window=4).double()
    window.projections.load_state_dict(mixer.projections.state_dict())
    torch.testing.assert_close(mixer(x)[0], window(x)[0], atol=1e-12, rtol=0)


@torch.no_grad()
def test_a_document_reads_nothing_of_the_one_before() -> None:
    mixer, x = build(), drawn(1, 1, 33)
    reset = torch.zeros(1, 33, dtype=torch.bool)
    reset[0, 14] = True
    whole, end = mixer(x, reset=reset)
    alone, last = mixer(x[:, 14:])
    torch.testing.assert_close(whole[:, 14:], alone, atol=1e-12, rtol=0)
    torch.testing.assert_close(end.store_k, last.store_k, atol=1e-12, rtol=0)


@pytest.mark.parametrize("length", [0, 1, 4, 5, 23])
@pytest.mark.parametrize("carried", [False, True])
def test_a_batch_of_no_rows(length: int, carried: bool) -> None:
    mixer = build()
    x = drawn(1, 0, length).requires_grad_()
    y, state = mixer(x, mixer.init_state(0) if carried else None)
    assert y.shape == (0, length, 16)
    for actual, expected in zip(state, mixer.init_state(0), strict=True):
        assert actual.shape == expected.shape
    y.sum().backward()
    y, _ = mixer(drawn(2, 0, 9), state, reset=torch.zeros(0, 9, dtype=torch.bool))
    assert y.shape == (0, 9, 16)


@torch.no_grad()
def test_a_session_equals_one_pass() -> None:
    mixers = ({"name": "window", "window": 3}, {"name": "memorizing", **FIELDS})
    torch.manual_seed(0)
    model = (
        ls.Decoder(ls.DecoderConfig(vocab_size=11, dim=16, num_layers=2, num_heads=4, mixers=mixers)).double().eval()
    )
    tokens = torch.randint(11, (1, 60))
    session = ls.StreamSession(model)
    session.feed(tokens[0, :21].tolist())
    last = None
    for token in tokens[0, 21:].tolist():
        last = session.feed([token])
    torch.testing.assert_close(last, model(tokens)[0][0, -1], atol=1e-9, rtol=0)


@pytest.mark.parametrize("field", ["window", "max_memories", "k", "scale_init"])
def test_fields_below_their_least_are_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=f"memorizing.{field} = 0"):
        build(**{field: 0})


def store_at(folder: Path, **fields: Any) -> MemoryStore:
    return MemoryStore(folder, **{"kv_heads": 2, "head_dim": 4, "capacity": 100, **fields})


@torch.no_grad()
def test_an_attached_store_gives_what_a_larger_store_in_the_state_gives(tmp_path: Path) -> None:
    """Also over several calls, padding, a reset, and separate rows, and the state is carried along."""
    large, small, x = build(max_memories=100), build(max_memories=2), drawn(1, 2, 60)
    stores = [store_at(tmp_path / str(row)) for row in range(2)]
    small.core.attach(stores)
    mask, reset = torch.ones(2, 60, dtype=torch.bool), torch.zeros(2, 60, dtype=torch.bool)
    mask[0, 5:8] = reset[1, 31] = False
    reset[1, 31] = True
    expected, _ = large(x, mask=mask, reset=reset)
    outs, state = [], None
    for part in (slice(0, 23), slice(23, 24), slice(24, 60)):
        y, state = small(x[:, part], state, mask=mask[:, part], reset=reset[:, part])
        outs.append(y)
    # the files store fp32
    torch.testing.assert_close(torch.cat(outs, 1), expected, atol=1e-5, rtol=0)
    assert [len(store) for store in stores] == [56, 28]
    small.core.detach()
    states, own = small(drawn(2, 2, 9), state), small(x, mask=mask, reset=reset)[1]
    torch.testing.assert_close(states[0], small(drawn(2, 2, 9), own)[0], atol=1e-12, rtol=0)


@torch.no_grad()
def test_a_store_that_does_not_fit_the_state_is_refused(tmp_path: Path) -> None:
    mixer, x = build(), drawn(1, 1, 12)
    _, before = mixer(x[:, :8])
    mixer.core.attach(store_at(tmp_path / "a"))
    with pytest.raises(ConfigError, match="0 pairs written, but the state has read 8"):
        mixer(x[:, 8:], before)
    _, state = mixer(x[:, :8])
    mixer(x[:, 8:], state)
    with pytest.raises(ConfigError, match="12 pairs written, but the state has read 8"):
        mixer(x[:, 8:], state)
    with pytest.raises(ConfigError, match="1 stores attached, the call has 2 rows; attach one per row"):
        mixer(drawn(1, 2, 5))
    with torch.enable_grad(), pytest.raises(UnsupportedError, match="inference"):
        mixer(x)
    with pytest.raises(ConfigError, match="the store has kv_heads = 1 and head_dim = 4, the layer 2 and 4"):
        mixer.core.attach(store_at(tmp_path / "b", kv_heads=1))


@torch.no_grad()
def test_a_store_opened_for_reading_is_searched_by_every_document(tmp_path: Path) -> None:
    mixer, x = build(k=1), drawn(1, 1, 12)
    mixer.core.gate.fill_(1e9)
    store = store_at(tmp_path)
    mixer.core.attach(store)
    mixer(x)
    store.close()
    known = MemoryStore(tmp_path, write=False)
    mixer.core.attach(known)
    q, _, v = mixer.projections(x)
    y, _ = mixer(x)
    number = known.search(ls.ops.unit_vectors(q)[0], 1).numbers[..., 0]
    values = torch.stack([v[0, head // 2][number[head]] for head in range(4)])
    torch.testing.assert_close(y, mixer.projections.output(values[None]), atol=1e-5, rtol=0)
    assert len(known) == 12
