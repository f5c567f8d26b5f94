"""The Compressive Transformer: the paper's algorithm, compression, and the parameters that each loss trains."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import longspan as ls
from longspan.mechanisms.compressive.definition import compressive_layer

COMPRESSIONS = ("mean", "max", "conv", "dilated", "most_used")


def build(name: str = "compressive", noise: float = 0.1, **fields: Any) -> Any:
    torch.manual_seed(0)
    mixer = ls.mixers.build(name, dim=16, num_heads=4, num_kv_heads=2, **fields).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(noise * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return mixer


def drawn(length: int, batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, length, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gradients(mixer: Any, y: Tensor, x: Tensor) -> dict[str, Tensor]:
    weight = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(5))
    named = {"x": x} | dict(mixer.named_parameters())
    values = torch.autograd.grad((y * weight).sum(), list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(named[n]) if g is None else g for n, g in zip(named, values, strict=True)}


def windows(gone: Tensor, before: int, ratio: int) -> Tensor:
    """(batch, groups, before + ratio, dim): every group with the vectors before it, zeros before the document."""
    padded = torch.cat([gone.new_zeros(gone.shape[0], before, gone.shape[2]), gone], 1)
    groups = [padded[:, g * ratio : g * ratio + before + ratio] for g in range(gone.shape[1] // ratio)]
    return torch.stack(groups, 1) if groups else gone.new_zeros(gone.shape[0], 0, before + ratio, gone.shape[2])


def compress(mixer: Any, gone: Tensor) -> Tensor:
    """All vectors that left the memory to slots, from the definitions of the compressions."""
    config, parts = mixer.core.config, mixer.core.compressor
    ratio, dim = config.ratio, gone.shape[2]
    if config.compression in ("mean", "max"):
        grouped = windows(gone, 0, ratio)
        return grouped.mean(2) if config.compression == "mean" else grouped.max(2).values
    if config.compression == "conv":
        kernel = parts.conv.unflatten(1, (ratio, dim)).transpose(1, 2)  # (out, in, taps)
        return torch.nn.functional.conv1d(gone.mT, kernel, stride=ratio).mT if gone.shape[1] else gone
    length = 2 ** len(parts.layers)
    h = torch.cat([gone.new_zeros(gone.shape[0], length, dim), gone], 1)
    for level, layer in enumerate(parts.layers):
        older = h.roll(2**level, 1)  # a convolution of two taps at a dilation of 2 ** level, at every position
        h = (older + h) / 2 + torch.nn.functional.gelu(torch.cat([older, h], 2)) @ layer.T
    return h[:, length + ratio - 1 :: ratio]


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("sizes", [(4, 4, 4, 2), (5, 3, 4, 3), (3, 7, 2, 4), (6, 2, 30, 2), (4, 0, 3, 3), (7, 2, 5, 1)])
@pytest.mark.parametrize("length", [1, 3, 63])
def test_it_is_the_algorithm_of_the_paper(compression: str, sizes: tuple[int, ...], length: int) -> None:
    """Outputs, memory and gradients equal the paper's algorithm, in one pass and token by token."""
    fields: dict[str, Any] = dict(zip(("segment", "mem_len", "compressed_len", "ratio"), sizes, strict=True))
    mixer = build(compression=compression, **fields)
    core, x = mixer.core, drawn(length, 1).requires_grad_()
    chosen = None if compression == "most_used" else lambda gone: compress(mixer, gone)
    r = core.relative(core.reach, ls.mixers.BatchLayout(torch.zeros(1), length))
    expected, memory = compressive_layer(
        x, mixer.projections, chosen, r, core.content_bias, core.position_bias, **fields
    )
    expected = mixer.projections.output(expected)
    y, state = mixer(x)
    torch.testing.assert_close(y, expected, atol=1e-9, rtol=0)
    slots = memory.compressed.shape[1]
    torch.testing.assert_close(state.compressed[:, fields["compressed_len"] - slots :], memory.compressed)
    assert not state.compressed[:, : fields["compressed_len"] - slots].any()
    mine, theirs = gradients(mixer, y, x), gradients(mixer, expected, x)
    for name, gradient in theirs.items():
        torch.testing.assert_close(mine[name], gradient, atol=1e-9, rtol=0, msg=f"gradient of {name}")
    with torch.no_grad():
        state, outs = None, []
        for part in x.split(1, 1):
            out, state = mixer(part, state)
            outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), expected.detach(), atol=1e-9, rtol=0)
    if memory.waiting.shape[1]:
        opened = length % sizes[0]
        first_waiting = core.capacity - opened - memory.recent.shape[1] - memory.waiting.shape[1]
        torch.testing.assert_close(
            state.hidden[:, first_waiting : first_waiting + memory.waiting.shape[1]], memory.waiting.detach()
        )


def same_as_transformer_xl(mixer: Any, mem_len: int, length: int, cuts: list[int]) -> None:
    xl = build("transformer_xl", segment=mixer.core.config.segment, mem_len=mem_len)
    xl.load_state_dict({n: t for n, t in mixer.state_dict().items() if "compressor" not in n})
    outputs_and_gradients = []
    for model in (mixer, xl):
        x, state, outs = drawn(length).requires_grad_(), None, []
        mask = torch.rand(2, length, generator=torch.Generator().manual_seed(3)) < (1.0 if len(cuts) < 3 else 0.9)
        for a, b in itertools.pairwise([*cuts, length]):
            y, state = model(x[:, a:b], state, mask=mask[:, a:b])
            outs.append(y)
        y = torch.cat(outs, 1)
        outputs_and_gradients.append((y, gradients(model, y, x)))
    (y, mine), (expected, theirs) = outputs_and_gradients
    torch.testing.assert_close(y, expected, atol=1e-10, rtol=0)
    for name, gradient in theirs.items():
        torch.testing.assert_close(mine[name], gradient, atol=1e-10, rtol=0, msg=f"gradient of {name}")


@pytest.mark.parametrize("cuts", [[0], [0, 8], [0, 3, 4, 21]])
@pytest.mark.parametrize("compression", ["mean", "max", "conv", "most_used"])
def test_at_ratio_one_it_is_transformer_xl_with_the_joined_memory(compression: str, cuts: list[int]) -> None:
    mixer = build(segment=4, mem_len=5, compressed_len=6, ratio=1, compression=compression)
    if compression == "conv":
        with torch.no_grad():
            mixer.core.compressor.conv.copy_(torch.eye(16))
    same_as_transformer_xl(mixer, 11, 39, cuts)


@pytest.mark.parametrize("cuts", [[0], [0, 8], [0, 3, 4, 21]])
@pytest.mark.parametrize("ratio", [1, 3])
def test_without_compressed_memory_it_is_transformer_xl(ratio: int, cuts: list[int]) -> None:
    for compression in COMPRESSIONS:
        mixer = build(segment=4, mem_len=5, compressed_len=0, ratio=ratio, compression=compression)
        same_as_transformer_xl(mixer, 5, 39, cuts)


def losses(mixer: Any, x: Tensor, calls: int = 1) -> tuple[Tensor, Tensor]:
    """The loss of a model, and the auxiliary one."""
    aux_losses: list[Tensor] = []
    state, total = None, x.new_zeros(())
    for part in x.chunk(calls, 1):
        y, state = mixer(part, state, aux_losses=aux_losses)
        total = total + y.square().sum()
    return total, torch.stack(aux_losses).sum()


@pytest.mark.parametrize("calls", [1, 3, 6])
@pytest.mark.parametrize("loss", ["attention", "auto_encoding"])
@pytest.mark.parametrize("compression", ["conv", "dilated"])
def test_each_loss_reaches_its_own_parameters(compression: str, loss: str, calls: int) -> None:
    """The auxiliary loss reaches the whole compressor and nothing else, the model's all other parameters."""
    mixer = build(segment=4, mem_len=3, compressed_len=4, ratio=3, compression=compression, loss=loss)
    x = drawn(24).requires_grad_()
    model, auxiliary = losses(mixer, x, calls)
    named = {"x": x} | dict(mixer.named_parameters())
    for total, inside in ((auxiliary, True), (model, False)):
        reached_gradients = torch.autograd.grad(total, list(named.values()), allow_unused=True, retain_graph=True)
        for (name, _), gradient in zip(named.items(), reached_gradients, strict=True):
            reached = gradient is not None and bool((gradient != 0).any())
            assert reached == (("compressor" in name) == inside), name
    assert all(parameter.requires_grad for parameter in mixer.parameters())


def test_the_loss_is_that_of_the_segments_that_close() -> None:
    """No loss before vectors fill a group; then a mean, so that repeating a batch changes nothing."""
    mixer = build(segment=4, mem_len=4, compressed_len=4, ratio=2)
    aux_losses: list[Tensor] = []
    _, state = mixer(drawn(6), aux_losses=aux_losses)
    assert not aux_losses, "nothing was compressed yet"
    mixer(drawn(1), state, aux_losses=aux_losses)
    assert not aux_losses, "no segment closed"
    mixer(drawn(2), state, aux_losses=aux_losses)
    assert len(aux_losses) == 1
    x = drawn(21)
    (one,) = aux_losses_of(mixer, x)
    (twice,) = aux_losses_of(mixer, x.repeat(2, 1, 1))
    torch.testing.assert_close(one, twice)
    with torch.no_grad():
        assert not aux_losses_of(mixer, x), "nothing learns here"
    for fields in ({"compression": "mean"}, {"loss": "none"}, {"loss_weight": 0.0}, {"compressed_len": 0}):
        without_loss = build(**{"segment": 4, "mem_len": 4, "compressed_len": 4, "ratio": 2} | fields)
        assert not aux_losses_of(without_loss, x)
    heavier = build(segment=4, mem_len=4, compressed_len=4, ratio=2, loss_weight=3.0)
    torch.testing.assert_close(aux_losses_of(heavier, x)[0], 3 * one)


def aux_losses_of(mixer: Any, x: Tensor, **keywords: Tensor) -> list[Tensor]:
    aux_losses: list[Tensor] = []
    mixer(x, aux_losses=aux_losses, **keywords)
    return aux_losses


def test_the_loss_of_padded_rows_is_that_of_the_rows_alone() -> None:
    """Rows weigh as many queries as they have in segments that closed and were compressed."""
    for loss in ("attention", "auto_encoding"):
        mixer, x = build(segment=4, mem_len=3, compressed_len=4, ratio=3, loss=loss), drawn(24, 3)
        lengths = (24, 13, 9)
        mask = torch.arange(24) < torch.tensor(lengths)[:, None]
        (together,) = aux_losses_of(mixer, x, mask=mask)
        alone = [aux_losses_of(mixer, x[row : row + 1, :n]) for row, n in enumerate(lengths)]
        # segments that compress: from the second on (8 tokens, of which 5 have left the memory)
        closed = [n // 4 - 1 for n in lengths]
        slots = [(n // 4 * 4 - 3) // 3 for n in lengths]
        weights = closed if loss == "attention" else slots
        expected = sum(w * part[0] for w, part in zip(weights, alone, strict=True)) / sum(weights)
        torch.testing.assert_close(together, expected)


def test_nothing_is_lost_at_ratio_one() -> None:
    for loss in ("attention", "auto_encoding"):
        mixer = build(noise=0.0, segment=4, mem_len=4, compressed_len=4, ratio=1, loss=loss)
        assert aux_losses_of(mixer, drawn(20))[0].item() == pytest.approx(0.0, abs=1e-25)


def test_first_in_first_out() -> None:
    """Slots are the means of groups in the order of time, whatever segment and ratio; the oldest go first."""
    for segment, mem_len, ratio in ((4, 4, 2), (5, 3, 4), (3, 0, 2), (2, 5, 7)):
        mixer = build(segment=segment, mem_len=mem_len, compressed_len=3, ratio=ratio, compression="mean")
        x = drawn(61)
        with torch.no_grad():
            state = mixer(x)[1]
        left = 61 // segment * segment - mem_len
        groups = x[:, : left // ratio * ratio].unflatten(1, (-1, ratio)).mean(2)
        torch.testing.assert_close(state.compressed, groups[:, -3:])


def test_reach_over_positions_is_exact() -> None:
    """A token sees mem_len + ratio * compressed_len positions before its segment, and nothing older."""
    mixer = build(segment=4, mem_len=4, compressed_len=3, ratio=2, compression="mean")
    x = drawn(41, 1)
    with torch.no_grad():
        last = mixer(x)[0][0, -1]
        for position in range(41):
            changed = x.clone()
            changed[0, position] += 1
            seen = bool((mixer(changed)[0][0, -1] != last).any())
            assert seen == (position >= 40 - 4 - 3 * 2), position


def test_a_constant_memory_is_compressed_to_itself() -> None:
    for compression in COMPRESSIONS:
        mixer = build(noise=0.0, segment=4, mem_len=4, compressed_len=3, ratio=3, compression=compression)
        x = drawn(1).expand(-1, 50, -1)
        with torch.no_grad():
            state = mixer(x)[1]
        torch.testing.assert_close(state.compressed, x[:, :3])


def test_the_compressor_is_a_group_of_its_own() -> None:
    tables = (
        {"name": "compressive", "segment": 4, "mem_len": 4, "compressed_len": 4, "ratio": 2, "compressor_lr": 0.5},
    )
    model = ls.Decoder(ls.DecoderConfig(vocab_size=7, dim=16, num_layers=3, mixers=tables, positions="none"))
    (group,) = [g for g in model.parameter_groups(lr=0.1, weight_decay=0.01) if g["name"] == "compressor"]
    assert group["lr"] == 0.5
    assert group["weight_decay"] == 0.01
    assert len(group["params"]) == 3
    for core in model.cores():  # a model draws its weights, and leaves the mean with which a compressor begins
        assert torch.equal(core.get_parameter("compressor.conv"), torch.eye(16).repeat(1, 2) / 2)
    pooled = build(compression="mean")
    assert pooled.core.parameter_groups() == []


def test_the_compressor_learns() -> None:
    """Vectors of which only the first of a group says anything: the reconstruction learns to keep it."""
    torch.manual_seed(0)
    mixer = build(noise=0.3, segment=16, mem_len=16, compressed_len=8, ratio=2)
    optimizer = torch.optim.Adam(mixer.core.compressor.parameters(), lr=0.01)
    generator, history = torch.Generator().manual_seed(2), []
    for _ in range(60):
        x = torch.randn(4, 64, 16, dtype=torch.float64, generator=generator)
        x[:, 1::2] *= 0.05
        (loss,) = aux_losses_of(mixer, x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert sum(history[-5:]) < 0.5 * sum(history[:5]), (history[:5], history[-5:])
