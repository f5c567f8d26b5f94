"""Recurrent memory: against a plain loop over segments, and the laws of the contract."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import longspan as ls
from longspan.models.recurrent import RecurrentMemory

MIXERS = ({"name": "full"}, {"name": "full"})


def backbone(kind: str, **options: Any) -> Any:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": 23,
        "dim": 16,
        "num_layers": 2,
        "num_heads": 4,
        "mixers": MIXERS,
        **options,
    }
    if kind == "decoder":
        return ls.Decoder(ls.DecoderConfig(**settings))
    return ls.Encoder(ls.EncoderConfig(**settings))


def build(kind: str, **options: Any) -> RecurrentMemory:
    model = RecurrentMemory(backbone(kind), num_memory_tokens=3, segment_length=5, **options).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


def text(batch: int, length: int, seed: int = 2) -> Tensor:
    return torch.randint(0, 23, (batch, length), generator=torch.Generator().manual_seed(seed))


def definition(model: RecurrentMemory, tokens: Tensor, borders: list[int]) -> Tensor:
    """One row, segment by segment, from the equations; the last segment is closed too."""
    backbone: Any = model.backbone
    memory = model.memory.weight[None]
    mass = torch.zeros(1, 3)
    outs = []
    for first, last in zip([0, *borders], [*borders, tokens.shape[1]], strict=True):
        embedded = backbone.embedding(tokens[:, first:last])
        if isinstance(model.backbone, ls.Encoder):
            hidden = backbone(inputs_embeds=torch.cat([memory, embedded], 1))
            new, out = hidden[:, :3], hidden[:, 3:]
        else:
            x = torch.cat([memory, embedded, memory], 1)
            rows = ls.mixers.BatchLayout(torch.zeros(1, dtype=torch.int64), x.shape[1])
            hidden = backbone.run(None, None, None, None, None, x)[0]
            assert rows.plain
            new, out = hidden[:, -3:], backbone.logits(hidden[:, 3:-3])
        outs.append(out)
        memory, mass, _ = model.update(memory, new, mass)
    return torch.cat(outs, 1)


@pytest.mark.parametrize("update", ["gated", "paper"])
@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_equals_the_plain_loop(kind: str, update: str) -> None:
    model, tokens = build(kind, update=update), text(1, 17)
    out, state = model(tokens, flush=True)
    torch.testing.assert_close(out, definition(model, tokens, [5, 10, 15]), atol=1e-9, rtol=0)
    assert state is not None
    assert int(state.written) == 3
    right = build(kind, update=update, alignment="right")
    expected = definition(right, tokens, [2, 7, 12])
    torch.testing.assert_close(right(tokens)[0], expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_rows_of_mixed_lengths_equal_each_alone(kind: str) -> None:
    for alignment in ("left", "right"):
        model = build(kind, alignment=alignment)
        tokens, lengths = text(4, 17), [17, 4, 0, 10]
        mask = torch.arange(17) < torch.tensor(lengths)[:, None]
        mask[3] = mask[3].flip(0)
        out, _ = model(torch.where(mask, tokens, -100), mask=mask, flush=True)
        assert not out[~mask].any()
        for row, length in enumerate(lengths):
            if length:
                alone, _ = model(tokens[row, mask[row]][None], flush=True)
                torch.testing.assert_close(out[row, mask[row]], alone[0], atol=1e-9, rtol=0)


def test_decoder_streams_in_any_cuts_with_resets_and_padding() -> None:
    model, tokens = build("decoder"), text(3, 31)
    generator = torch.Generator().manual_seed(5)
    mask = torch.rand(3, 31, generator=generator) < 0.7
    reset = torch.rand(3, 31, generator=generator) < 0.12
    for m, r in ((None, None), (mask, None), (None, reset), (mask, reset)):
        whole, final = model(tokens, mask=m, reset=r)
        for cuts in ((0, 5, 15, 31), (0, 1, 2, 3, 9, 9, 22, 31), tuple(range(32))):
            state, parts = None, []
            for a, b in itertools.pairwise(cuts):
                part, state = model(
                    tokens[:, a:b], state, mask=None if m is None else m[:, a:b], reset=None if r is None else r[:, a:b]
                )
                parts.append(part)
            torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-9, rtol=0)
            for name in ("memory", "mass", "written", "live"):
                torch.testing.assert_close(getattr(state, name), getattr(final, name), atol=1e-9, rtol=0)


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_cuts_at_segment_borders_are_bit_for_bit(kind: str) -> None:
    model, tokens = build(kind).float(), text(2, 20)
    whole, final = model(tokens)
    state, parts = None, []
    for a, b in ((0, 5), (5, 15), (15, 20)):
        part, state = model(tokens[:, a:b], state)
        parts.append(part)
    assert torch.equal(torch.cat(parts, 1), whole)
    assert state is not None
    assert torch.equal(state.memory, final.memory)


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_documents_in_one_row_equal_documents_alone(kind: str) -> None:
    model, tokens = build(kind), text(1, 24)
    reset = torch.zeros(1, 24, dtype=torch.bool)
    reset[0, [7, 17]] = True
    packed, _ = model(tokens, reset=reset, flush=True)
    for a, b in ((0, 7), (7, 17), (17, 24)):
        torch.testing.assert_close(packed[:, a:b], model(tokens[:, a:b], flush=True)[0], atol=1e-9, rtol=0)


def test_flush_shows_the_open_segment_and_changes_nothing() -> None:
    model, tokens = build("encoder"), text(1, 13)
    hidden, state = model(tokens)
    assert not hidden[:, 10:].any()
    flushed, same = model(tokens, flush=True)
    assert flushed[:, 10:].abs().min() > 0
    assert torch.equal(hidden[:, :10], flushed[:, :10])
    assert torch.equal(state.memory, same.memory)


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
@pytest.mark.parametrize("horizon", [1, 2, 3])
def test_gradients_reach_exactly_bptt_segments(kind: str, horizon: int) -> None:
    model = build(kind, bptt_segments=horizon)
    embedded: list[Tensor] = []

    def record(_: object, __: object, out: Tensor) -> None:
        if out.ndim == 3:  # not the whole table, which tied output layers ask for
            embedded.append(out)

    embedding: Any = model.backbone.embedding
    embedding.register_forward_hook(record)
    out, _ = model(text(1, 25))
    gradients = torch.autograd.grad(out[:, -5:].square().sum(), embedded, allow_unused=True)
    reached = [g is not None and bool(g.abs().max() > 0) for g in gradients]
    assert reached == [False] * (5 - horizon) + [True] * horizon


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_memory_replay_gives_the_same_gradients(kind: str) -> None:
    gradients = []
    for replay in (False, True):
        model = build(kind, replay=replay).train()
        torch.manual_seed(9)
        out, _ = model(text(2, 23), flush=True)
        out.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        if gradient is not None:
            torch.testing.assert_close(gradients[1][name], gradient, atol=1e-10, rtol=0)


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_the_last_summaries_are_read(kind: str) -> None:
    """One segment is a plain model with a soft prompt; of several, only the last `max_summaries` are read."""
    model = build(kind, accumulate=True, max_summaries=2)
    tokens = text(1, 20)
    out, state = model(tokens)
    assert state.memory.shape == (1, 6, 16)
    changed = tokens.clone()
    changed[0, 0] = (changed[0, 0] + 1) % 23
    difference = (model(changed)[0] != out).any(-1)[0].unflatten(0, (4, 5)).any(1)
    assert difference.tolist() == [True, True, True, True], "through summaries of summaries"
    one = build(kind, accumulate=True, max_summaries=1)
    last = one(tokens)[1].memory
    with torch.no_grad():
        _, first = one(tokens[:, :15])
        torch.testing.assert_close(one(tokens[:, 15:], first)[1].memory, last, atol=1e-9, rtol=0)


def test_segment_lengths_vary_in_training_only() -> None:
    model = build("decoder", vary=0.5)
    tokens = text(1, 20)
    assert torch.equal(model(tokens)[0], model(tokens)[0])
    model.train()
    torch.manual_seed(0)
    outs = [model(tokens) for _ in range(8)]
    assert all(state is None for _, state in outs)
    assert len({float(out.detach().sum()) for out, _ in outs}) > 1


def test_the_gate_does_not_forget_and_can_write_nothing() -> None:
    torch.manual_seed(0)
    update = ls.models.memory_update.GatedUpdate(8, 2).eval()
    old, new, mass = torch.randn(1, 2, 8), torch.randn(1, 2, 8), torch.zeros(1, 2)
    with torch.no_grad():
        update.gate.zero_()
        update.bias.fill_(12.0)
        memory, mass, _ = update(old, new, mass)
        assert torch.equal(memory, old + (new - old)), "the first write replaces the initial memory"
        update.bias.fill_(-1.0)
        unchanged, same, _ = update(memory, torch.randn(1, 2, 8), mass)
        assert torch.equal(unchanged, memory)
        assert torch.equal(same, mass)
        update.bias.fill_(1.0)  # a thousand writes of little evidence
        for _ in range(1000):
            memory, mass, _ = update(memory, torch.randn(1, 2, 8), mass)
    assert (memory - new).abs().max() < 0.05


def test_invalid_settings_are_named_in_one_line() -> None:
    with pytest.raises(ls.ConfigError, match="segment_length = 0"):
        RecurrentMemory(backbone("decoder"), segment_length=0)
    with pytest.raises(ls.ConfigError, match="not a backbone for RecurrentMemory"):
        RecurrentMemory(torch.nn.Linear(2, 2))
    model = build("encoder", alignment="right")
    with pytest.raises(ls.UnsupportedError, match="alignment = 'right' needs the whole text in one call"):
        model(text(1, 5), build("encoder")(text(1, 5))[1])
