"""ARMT, a memory in every layer: against a plain loop over the equations; diagonals; cost."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.laws.checks.cost import COUNTED
from tests.models.test_recurrent import backbone, text
from torch.utils.flop_counter import FlopCounterMode

import longspan as ls
from longspan import ops, reference
from longspan.models.layer_memory import LayerMemory


def build(kind: str, **options: Any) -> ls.RecurrentMemory:
    settings = {"num_memory_tokens": 3, "segment_length": 5, "per_layer": True, "memory_dim": 4, **options}
    model = ls.RecurrentMemory(backbone(kind), **settings).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


@pytest.mark.parametrize("damped", [False, True])
def test_ops_equal_their_definitions_in_values_and_gradients(damped: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()

    x, values, strength, memory = draw(2, 3, 7, 4), draw(2, 3, 7, 6), draw(2, 3, 7), draw(2, 3, 24, 6)
    normalizer = draw(2, 3, 24)
    runs = []
    for kind in (ops, reference):
        phi = kind.dpfp(x, 3)
        small = normalizer.square() / 50  # so that pairs overshoot
        after = kind.associative_write(phi, values, strength.sigmoid(), memory, small, damped=damped)
        read = kind.associative_read(kind.dpfp(x.flip(-2), 3), *after)
        total = read.square().sum() + after[1].sum()
        runs.append([read, *after, *torch.autograd.grad(total, [x, values, strength, memory, normalizer])])
    for actual, expected in zip(*runs, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-9, rtol=1e-9)


def test_a_key_written_again_replaces_its_value() -> None:
    key = reference.dpfp(torch.tensor([[[0.9, -0.3, 0.4, 0.2]]], dtype=torch.float64))
    memory, normalizer = torch.zeros(1, 24, 2, dtype=torch.float64), torch.zeros(1, 24, dtype=torch.float64)
    one = torch.ones(1, 1, dtype=torch.float64)
    for value in ([1.0, 2.0], [-3.0, 5.0]):
        written = torch.tensor([[value]], dtype=torch.float64)
        memory, normalizer = ops.associative_write(key, written, one, memory, normalizer)
        torch.testing.assert_close(ops.associative_read(key, memory, normalizer), written, atol=1e-3, rtol=1e-3)


def test_pairs_that_are_written_together_do_not_overshoot() -> None:
    # seen in training: eight like keys, longer than those the normalizer has seen, made the memory grow to 1e23
    generator = torch.Generator().manual_seed(0)
    key = reference.dpfp(torch.randn(1, 1, 4, generator=generator, dtype=torch.float64))
    largest = {}
    for damped in (False, True):
        memory, normalizer = torch.zeros(1, 24, 2, dtype=torch.float64), torch.zeros(1, 24, dtype=torch.float64)
        half = torch.full((1, 8), 0.5, dtype=torch.float64)
        for step in range(200):
            phi = (0.2 if step == 0 else 1.0) * key.expand(1, 8, 24)
            value = torch.randn(1, 1, 2, generator=generator, dtype=torch.float64).clamp(-2, 2).expand(1, 8, 2)
            memory, normalizer = ops.associative_write(phi, value, half, memory, normalizer, damped=damped)
        largest[damped] = float(ops.associative_read(key, memory, normalizer).abs().max())
    assert largest[True] <= 2
    assert largest[False] > 1e6


def test_a_pair_alone_is_not_damped() -> None:
    generator = torch.Generator().manual_seed(0)
    phi, memory = torch.rand(2, 1, 8, generator=generator), torch.rand(2, 8, 3, generator=generator)
    normalizer = torch.rand(2, 8, generator=generator)
    values, strength = torch.rand(2, 1, 3, generator=generator), torch.rand(2, 1, generator=generator)
    writes = [
        ops.associative_write(phi, values, strength, memory, normalizer, damped=damped) for damped in (True, False)
    ]
    for actual, expected in zip(*writes, strict=True):
        torch.testing.assert_close(actual, expected)


def test_zero_features_have_finite_gradients() -> None:
    # seen in training too: such a key wrote nothing, but its gradient was NaN
    phi = torch.zeros(1, 2, 8, requires_grad=True)
    normalizer = torch.ones(1, 8, requires_grad=True)
    after = ops.associative_write(
        phi, torch.ones(1, 2, 3), torch.ones(1, 2), torch.zeros(1, 8, 3), normalizer, constant_gamma=False, damped=True
    )
    (after[0].sum() + after[1].square().sum()).backward()
    assert phi.grad is not None
    assert phi.grad.isfinite().all()
    assert phi.grad.abs().max() < 1e6


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_equals_the_plain_loop(kind: str) -> None:
    model, tokens = build(kind), text(2, 15)
    out, state = model(tokens)
    stack: Any = model.backbone
    cell = model.cell
    assert isinstance(cell, LayerMemory)
    assert state is not None
    memories = [torch.zeros(2, cell.features, 16, dtype=torch.float64) for _ in stack.blocks]
    normalizers = [torch.zeros(2, cell.features, dtype=torch.float64) for _ in stack.blocks]
    rows = ls.mixers.BatchLayout(torch.zeros(2, dtype=torch.int64), 8)
    for first in (0, 5, 10):
        embedded = stack.embedding(tokens[:, first : first + 5])
        h = torch.cat([embedded, cell.tokens.weight.expand(2, -1, -1)], 1)
        for index, block in enumerate(stack.blocks):
            maps = cell.layer(index)
            phi = reference.dpfp(maps.query(h), 3)
            h = h + reference.associative_read(phi, memories[index], normalizers[index])
            h = block(h, None, rows, False)[0]
            m = h[:, 5:]
            strength = maps.strength(m).sigmoid()[..., 0]
            memories[index], normalizers[index] = reference.associative_write(
                reference.dpfp(maps.key(m), 3), maps.value(m), strength, memories[index], normalizers[index]
            )
        hidden = stack.norm(h[:, :5])
        expected = stack.logits(hidden) if kind == "decoder" else hidden
        torch.testing.assert_close(out[:, first : first + 5], expected, atol=1e-9, rtol=0)
    torch.testing.assert_close(state.memory, torch.stack(memories, 1), atol=1e-9, rtol=0)


@pytest.mark.parametrize("bptt", [None, 1, 2])
@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_diagonals_equal_segments_one_after_another(kind: str, bptt: int | None) -> None:
    plain, diagonal = build(kind, bptt_segments=bptt), build(kind, bptt_segments=bptt, diagonal=True)
    diagonal.load_state_dict(plain.state_dict())
    tokens, runs = text(2, 30), []
    for model in (plain, diagonal):
        _, state = model(tokens[:, :10])
        traces: list[Any] = []
        out, state = model(tokens[:, 10:], state, traces=traces)
        (out.square().sum() + traces[-1].offered.sum()).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        runs.append([out, state.memory, state.mass, *gradients])
    assert len(runs[0]) == len(runs[1])
    for actual, expected in zip(*runs, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_any_cuts_agree_and_rows_are_independent(kind: str) -> None:
    model, tokens = build(kind), text(2, 17)
    whole, end = model(tokens)
    for cuts in ((5, 10), (3, 4, 11)) if kind == "decoder" else ((5, 10),):
        state, outs = None, []
        for first, last in zip((0, *cuts), (*cuts, 17), strict=True):
            out, state = model(tokens[:, first:last], state)
            outs.append(out)
        torch.testing.assert_close(torch.cat(outs, 1), whole, atol=1e-9, rtol=0)
        assert state is not None
        torch.testing.assert_close(state.memory, end.memory, atol=1e-9, rtol=0)
    mask = torch.ones(2, 17, dtype=torch.bool)
    mask[1, :6] = False
    padded = model(tokens, mask=mask, flush=True)[0]
    torch.testing.assert_close(padded[1:, 6:], model(tokens[1:, 6:], flush=True)[0], atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    "options", [{}, {"accumulate": True, "max_summaries": 2}, {"per_layer": True, "memory_dim": 4}]
)
@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_the_predicted_cost_is_the_counted_cost(kind: str, options: dict[str, Any]) -> None:
    model = ls.RecurrentMemory(backbone(kind), num_memory_tokens=3, segment_length=50, **options).eval()
    for length in (100, 170):
        _, state = model(text(2, length))
        assert ls.state.nbytes(state) == model.state_nbytes(2, length)
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
            model(text(2, length), flush=True)
        assert abs(counter.get_total_flops() - model.flops(length, batch_size=2)) <= 0.02 * counter.get_total_flops()


@pytest.mark.parametrize("options", [{}, {"per_layer": True, "memory_dim": 4}, {"accumulate": True}])
def test_a_loaded_model_streams_as_the_saved_one(tmp_path: Path, options: dict[str, Any]) -> None:
    model = ls.RecurrentMemory(backbone("decoder"), num_memory_tokens=3, segment_length=5, **options).eval()
    ls.save_model(model, tmp_path / "model")
    again = ls.load_model(tmp_path / "model")
    tokens = text(1, 43)
    with torch.no_grad():
        torch.testing.assert_close(again(tokens)[0], model(tokens)[0], atol=0, rtol=0)
        expected = torch.cat([torch.zeros(1, 1, 23), model(tokens)[0][:, :-1]], 1)
        nats = torch.nn.functional.cross_entropy(expected[0], tokens[0], reduction="none")
    session = ls.StreamSession(again)
    first = session.feed(tokens[0, :17], losses=True)
    session.save(tmp_path / "state")
    resumed = ls.StreamSession.load(again, tmp_path / "state")
    torch.testing.assert_close(torch.cat([first, resumed.feed(tokens[0, 17:], losses=True)]), nats, atol=1e-5, rtol=0)
    assert session.nbytes == model.state_nbytes(1, 17)


def test_a_classifier_answers_from_the_last_closed_segment(tmp_path: Path) -> None:
    recurrent = ls.RecurrentMemory(backbone("encoder"), num_memory_tokens=3, segment_length=5)
    model = ls.models.RecurrentClassifier(recurrent, 4).eval()
    tokens = text(2, 12)
    traces: list[Any] = []
    answer, state = model(tokens, traces=traces)
    hidden = recurrent(tokens)[0]
    expected = model.head(torch.cat([traces[1].offered.mean(1), hidden[:, 9]], -1))
    torch.testing.assert_close(answer, expected, atol=0, rtol=0)
    flushed, _ = model(tokens, flush=True)
    assert not torch.allclose(flushed, answer)
    later, _ = model(torch.cat([tokens, tokens], 1)[:, 12:20], state)
    whole, _ = model(torch.cat([tokens, tokens], 1)[:, :20])
    torch.testing.assert_close(later, whole, atol=1e-5, rtol=0)
    ls.save_model(model, tmp_path)
    torch.testing.assert_close(ls.load_model(tmp_path)(tokens)[0], answer, atol=0, rtol=0)
    with pytest.raises(ls.UnsupportedError, match="needs a causal model"):
        ls.StreamSession(recurrent)


def test_replay_keeps_the_penalties_of_the_backbone() -> None:
    outcomes = []
    for replay in (False, True):
        model = ls.RecurrentMemory(
            WithAuxLosses(backbone("encoder").config), num_memory_tokens=3, segment_length=5, replay=replay
        )
        torch.manual_seed(0)
        aux_losses: list[torch.Tensor] = []
        model.train()(text(2, 15), aux_losses=aux_losses)
        torch.stack(aux_losses).sum().backward()
        outcomes.append((len(aux_losses), model.memory.weight.grad is not None))
    assert outcomes[0] == outcomes[1] == (3, True)


class WithAuxLosses(ls.Encoder):
    """An encoder that asks for small hidden states."""

    def run(self, *args: Any) -> Any:
        hidden, state, rows = super().run(*args)
        if args[4] is not None:
            args[4].append(hidden.square().mean())
        return hidden, state, rows
