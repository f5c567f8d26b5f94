"""BP-Transformer: its tree against sets of tokens and the paper's counts, its operation against its definition."""

from typing import Any

import pytest
import torch
from torch import Tensor

from longspan import ops, reference
from longspan.errors import ConfigError
from longspan.mechanisms.bp import definition as bp
from longspan.mechanisms.bp.nodes import make_table
from longspan.mechanisms.bp.schedule import make_schedule
from longspan.mechanisms.bp.tree import Chunks, Tree, make_layout

# Any, as the calls unpack lists and dicts of arguments
bp_attention: Any = ops.bp_attention

FP64 = torch.float64


def leaves(node: tuple[int, int]) -> set[int]:
    level, number = node
    return set(range(number << level, (number + 1) << level))


def walk(i: int, length: int, k: int, levels: int, causal: bool) -> list[tuple[int, int]]:
    """The nodes as sets of tokens: per level the next k per side, or the free half of a node that overlaps."""
    nodes = [(0, i)]
    for side in (-1,) if causal else (-1, 1):
        covered = {i}
        for level in range(levels + 1):
            for _ in range(k):
                token = (min(covered) if side < 0 else max(covered)) + side
                if not 0 <= token < length:
                    break
                node = (level, token >> level)
                if leaves(node) & covered:
                    node = (level - 1, token >> (level - 1))
                assert not leaves(node) & covered
                covered |= leaves(node)
                nodes.append(node)
    return nodes


def nodes_read(length: int, k: int, levels: int, causal: bool, tile: int) -> list[list[tuple[int, int]]]:
    """The nodes that the operation reads for each position, sorted."""
    tree = Tree(k, levels, causal)
    layout = make_layout(length, tile, lengths=None, start=None, offset=torch.tensor([0]))
    highest = tree.highest_level(length)
    table = make_table(
        tree, levels if causal else highest, tile, layout.chunks.begin.shape[1], False, torch.device("cpu")
    )
    schedule = make_schedule(tree, table, layout, highest, 1)
    in_table = {}
    for chunk in range(layout.chunks.begin.shape[1]):
        number = torch.tensor([chunk])
        seen_from = Chunks(
            number, number * tile, 0 * number, 0 * number + length, 0 * number + layout.chunks.begin.shape[1] - 1
        )
        for level in range(highest + 1):
            for node in range(chunk * tile >> level, ((chunk + 1) * tile - 1 >> level) + 1):
                row = table.find(seen_from, torch.tensor(level), torch.tensor(node))
                in_table[int(row)] = level, node
    visible = schedule.visible(slice(0, layout.chunks.begin.shape[1]))[0].flatten(0, 1)[:length]
    rows = schedule.rows.repeat_interleave(tile, 0)[:length]
    return [sorted(in_table[row] for row in rows[i][visible[i]].tolist()) for i in range(length)]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_every_position_reads_the_nodes_of_the_definition(k: int, causal: bool) -> None:
    for length in (*range(1, 34), 47, 48, 63, 64, 65, 80):
        levels = 7
        read = nodes_read(length, k, levels, causal, tile=8 if length % 2 else 64)
        for i in range(length):
            expected = sorted(walk(i, length, k, levels, causal))
            assert read[i] == expected, (length, i)
            assert sorted(node for node, _ in bp.spans(i, length, k, levels, causal)) == expected


@pytest.mark.parametrize("k", [1, 2, 3, 4, 7])
def test_every_token_lies_in_exactly_one_node(k: int) -> None:
    for length in (1, 5, 17, 64, 80, 100):
        for causal in (True, False):
            for levels in (0, 2, 9):
                for i in range(length):
                    tokens = [t for node, _ in bp.spans(i, length, k, levels, causal) for t in leaves(node)]
                    assert len(set(tokens)) == len(tokens)
                    tokens = [t for t in tokens if t < length]
                    reach = range(min(tokens), max(tokens) + 1)
                    assert sorted(tokens) == list(reach)
                    least, most = (2 * k - 1) * 2**levels - k + 1, k * (2 ** (levels + 1) - 1)
                    assert min(i, least) <= i - min(tokens) <= most
                    if levels == 9:
                        assert reach == range(i + 1 if causal else length)


@pytest.mark.parametrize(("k", "edges"), [(1, 321), (2, 496), (4, 745)])
def test_edges_of_the_papers_code(k: int, edges: int) -> None:
    assert sum(len(bp.spans(i, 64, k, 10)) - 1 for i in range(64)) == edges


def test_entries_are_the_same_in_every_aligned_block() -> None:
    for i in range(100, 116):
        here = {(level, (i >> level) - m, entry) for (level, m), entry in bp.spans(i, 10**6, 2, 3)}
        there = {(level, (i + 160 >> level) - m, entry) for (level, m), entry in bp.spans(i + 160, 10**6, 2, 3)}
        assert here == there


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=FP64, generator=torch.Generator().manual_seed(seed))


def case(length: int, k: int, levels: int, causal: bool, *, positioned: bool = True, batch: int = 2) -> dict[str, Any]:
    """Arguments of a call by name."""
    tensors: dict[str, Any] = {
        "q": draw(0, batch, 4, length, 6),
        "k": draw(1, batch, 2, length, 6),
        "v": draw(2, batch, 2, length, 6),
        "queries": draw(3, levels, 2, 6),
        "relative": draw(4, ops.bp_entries(k, levels, causal), 6),
    }
    if positioned:
        tensors |= {"rotated_q": draw(5, batch, 4, length, 6), "rotated_k": draw(6, batch, 2, length, 6)}
    return {name: t.requires_grad_() for name, t in tensors.items()}


def run(where: Any, tensors: dict[str, Tensor], k: int, causal: bool, more: dict[str, Any]) -> list[Tensor]:
    """Output, state, and gradients of a random weighted sum of them."""
    positioned = (tensors["rotated_q"], tensors["rotated_k"]) if "rotated_q" in tensors else None
    out, state = where.bp_attention(
        *(tensors[name] for name in ("q", "k", "v", "queries", "relative")),
        nearest=k,
        causal=causal,
        positioned=positioned,
        **more,
    )
    if "lengths" in more:
        out = out * (torch.arange(out.shape[2]) < more["lengths"][:, None])[:, None, :, None]
    ends = list(state[:5]) if state is not None else []
    loss = (out * draw(7, *out.shape)).sum() + sum(t.sin().sum() for t in ends)
    gradients = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
    zeros = [torch.zeros_like(t) if g is None else g for t, g in zip(tensors.values(), gradients, strict=True)]
    return [out, *([] if state is None else state), *zeros]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("k", "levels"), [(1, 4), (2, 7), (3, 2), (5, 0)])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 130])
def test_equals_its_definition(length: int, k: int, levels: int, causal: bool) -> None:
    tensors = case(length, k, levels, causal, positioned=length % 2 == 0)
    for actual, expected in zip(*(run(where, tensors, k, causal, {}) for where in (ops, reference)), strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("causal", [True, False])
def test_equals_its_definition_over_many_tiles(causal: bool) -> None:
    tensors = case(600, 4, 8, causal, batch=1)
    for actual, expected in zip(*(run(where, tensors, 4, causal, {}) for where in (ops, reference)), strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("seed", range(12))
def test_documents_padding_and_a_carried_state(seed: int, causal: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    length, k, levels = int(torch.randint(1, 150, (), generator=generator)), 1 + seed % 3, 1 + seed % 5
    more: dict[str, Any] = {"lengths": torch.randint(0, length + 1, (2,), generator=generator)}
    start = torch.full((2, length), -1000)
    if causal:
        before = case(90, k, levels, True)
        state = bp_attention(
            *(before[name].detach() for name in ("q", "k", "v", "queries", "relative")),
            nearest=k,
            lengths=torch.tensor([90, 37 * (seed % 2)]),
        )[1]
        more["state"] = state
        start = (-state.live)[:, None].repeat(1, length)
    else:
        start[:] = 0
    for row in range(2):
        for begin in sorted(torch.randint(0, length, (seed % 4,), generator=generator).tolist()):
            start[row, begin:] = begin
    more["start"] = start
    tensors = case(length, k, levels, causal)
    for actual, expected in zip(*(run(where, tensors, k, causal, more) for where in (ops, reference)), strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-9, rtol=1e-9)


def test_calls_in_any_cuts_carry_the_tree() -> None:
    tensors = {name: t.detach() for name, t in case(300, 2, 6, True, positioned=False).items()}
    q, k, v, queries, relative = tensors.values()
    whole, end = bp_attention(q, k, v, queries, relative, nearest=2)
    state: Any = None
    outs = []
    for first, last in ((0, 1), (1, 2), (2, 70), (70, 134), (134, 134), (134, 299), (299, 300)):
        part = (t[:, :, first:last] for t in (q, k, v))
        out, state = bp_attention(*part, queries, relative, nearest=2, state=state)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 2), whole, atol=1e-12, rtol=0)
    for actual, expected in zip(state, end, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("causal", [True, False])
def test_as_many_nodes_as_tokens_are_full_attention(causal: bool) -> None:
    q, k, v = (draw(seed, 2, heads, 50, 8) for seed, heads in enumerate((4, 2, 2)))
    out, _ = bp_attention(q, k, v, draw(3, 3, 2, 8), nearest=50, causal=causal)
    torch.testing.assert_close(out, ops.full_attention(q, k, v, causal=causal), atol=1e-12, rtol=0)


def test_later_tokens_change_no_bit_and_far_ones_are_reached() -> None:
    tensors = case(500, 2, 8, True, positioned=False)
    q, k, v, queries, relative = tensors.values()
    out, _ = bp_attention(q, k, v, queries, relative, nearest=2)
    altered_qkv = [torch.cat([t[:, :, :333], 30 * draw(9, *t[:, :, 333:].shape)], 2) for t in (q, k, v)]
    changed, _ = bp_attention(*altered_qkv, queries, relative, nearest=2)
    assert torch.equal(changed[:, :, :333], out[:, :, :333])
    (grad,) = torch.autograd.grad(out[:, :, 499].sum(), v)
    assert bool((grad != 0).all())  # through spans of up to 128 tokens


def test_a_far_longer_past_costs_no_more() -> None:
    """A context ten thousand times as long needs as many score entries per token, except for its additional levels."""
    near, far = (ops.bp_cost(n, nearest=8, levels=20)[0] / n for n in (2**10, 2**23))
    assert far < 2 * near


def test_gradients_of_all_inputs_equal_finite_differences() -> None:
    tensors = case(9, 1, 2, True)

    def call(q: Tensor, k: Tensor, v: Tensor, u: Tensor, e: Tensor, tq: Tensor, tk: Tensor) -> tuple[Tensor, ...]:
        out, state = bp_attention(q, k, v, u, e, nearest=1, positioned=(tq, tk))
        return out, state.open_k, state.open_mass

    assert torch.autograd.gradcheck(call, tuple(tensors.values()), fast_mode=True)


def test_refusals() -> None:
    q, k, u = draw(0, 1, 4, 5, 6), draw(1, 1, 2, 5, 6), draw(2, 3, 2, 6)
    state = bp_attention(q, k, k, u, nearest=2)[1]
    with pytest.raises(ConfigError, match="pass earlier tokens as `state`"):
        bp_attention(q[:, :, 1:], k, k, u, nearest=2)
    with pytest.raises(ConfigError, match="the bidirectional form takes no state"):
        bp_attention(q, k, k, u, nearest=2, causal=False, state=state)
    with pytest.raises(ConfigError, match=r"relative has shape \(3, 6\); expected"):
        bp_attention(q, k, k, u, draw(3, 3, 6), nearest=2)
    with pytest.raises(ConfigError, match="queries"):
        bp_attention(q, k, k, u[:, :1], nearest=2)
    with pytest.raises(ConfigError, match="nearest = 0: must be at least 1"):
        bp_attention(q, k, k, u, nearest=0)
