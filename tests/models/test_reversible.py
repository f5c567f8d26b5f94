"""Reversible blocks: autograd through the same equations is the definition, and memory does not grow with depth."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import longspan as ls
from longspan import mixers
from longspan.contract.replay import Choices
from longspan.mixers import BatchLayout
from longspan.models import Head, StackState, load_model, save_model

DYNAMIC: dict[str, Any] = {"name": "adaptive_span", "max_span": 6, "ramp": 3, "dynamic": True, "penalty": 0.1}
FORMS: list[dict[str, Any]] = [
    *({"name": name, **mixers.examples(name)[0]} for name in mixers.names()),
    DYNAMIC,
    {"name": "lsh", "bucket_size": 2, "num_hashes": 2, "num_buckets": 4, "shared_qk": False},
    {"name": "lsh", "bucket_size": 3, "num_hashes": 2, "num_buckets": 4, "selection": "sorted"},
    {"name": "infini", "segment": 4, "update": "delta", "normalizer": "gamma"},
]


def decoder(*tables: dict[str, Any], **options: Any) -> ls.Decoder:
    torch.manual_seed(0)
    fields = {"vocab_size": 31, "dim": 24, "num_layers": 3, "num_heads": 4, "mixers": tables or ({"name": "full"},)}
    config = ls.DecoderConfig(**{**fields, "reversible": True, "init_std": 0.3, **options})
    return ls.Decoder(config).double()


def tokens(batch: int = 2, length: int = 19, seed: int = 3) -> Tensor:
    return torch.randint(0, 31, (batch, length), generator=torch.Generator().manual_seed(seed))


def by_definition(
    model: ls.Decoder,
    text: Tensor,
    state: StackState | None,
    aux_losses: list[Tensor],
    mask: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, StackState | None]:
    """The two equations, with autograd."""
    rows = BatchLayout(ls.state.live(state, len(text)), text.shape[1], mask, reset)
    x1 = x2 = model.embed(rows.gather(text), rows)
    layer_states = []
    for i, block in enumerate(model.layers):
        before = None if state is None else state.layers[i]
        y, after = block.mixer.mix(block.mixer_norm(x2), before, rows, aux_losses)
        x1 = x1 + y
        x2 = x2 + block.ffn(block.ffn_norm(x1))
        layer_states.append(after)
    both = model.config.streams == "both"
    logits = model.logits(model.norm(torch.cat([x1, x2], -1) if both else (x1 + x2) / 2))
    return rows.scatter(logits), StackState(tuple(layer_states), rows.live) if model.traits.streams else None


def gradients(model: ls.Decoder, run: Any, seed: int = 5) -> tuple[list[Tensor], dict[str, Tensor], list[Tensor]]:
    """Outputs, gradients and penalties of two calls, the second with the state of the first where there is one."""
    model.zero_grad()
    torch.manual_seed(seed)
    aux_losses: list[Tensor] = []
    mask = torch.rand(2, 19, generator=torch.Generator().manual_seed(7)) < 0.7
    reset = torch.rand(2, 19, generator=torch.Generator().manual_seed(8)) < 0.15
    first, state = run(tokens(), None, aux_losses)
    second, _ = run(tokens(seed=4), state, aux_losses, mask=mask, reset=reset)
    weights = torch.rand(2, 19, 31, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    ((first * weights).square().sum() + (second * weights).sum() + 3 * sum(aux_losses)).backward()
    parameter_gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return [first.detach(), second.detach()], parameter_gradients, [torch.as_tensor(p).detach() for p in aux_losses]


@pytest.mark.parametrize("table", FORMS, ids=str)
def test_gradients_are_those_of_the_equations(table: dict[str, Any]) -> None:
    """Every mixer, two calls in a row, padding, resets, dropout, penalties; gradients go through the state."""
    check_gradients(decoder(table, dropout=0.2))


def test_gradients_of_both_streams_side_by_side() -> None:
    table = {"name": "infini", "segment": 4}
    model = decoder(table, streams="both", tie_embeddings=False, output_bias=True, norm="layernorm", bias=True)
    check_gradients(model)
    assert model.logits(torch.zeros(48).double()).shape == (31,)


def check_gradients(model: ls.Decoder) -> None:
    def call(text: Tensor, state: Any, aux_losses: list[Tensor], **rows: Any) -> Any:
        return model(text, state, aux_losses=aux_losses, **rows)

    def defined(text: Tensor, state: Any, aux_losses: list[Tensor], **rows: Any) -> Any:
        return by_definition(model, text, state, aux_losses, **rows)

    outputs, actual, aux_losses = gradients(model, call)
    after = torch.get_rng_state()
    expected_outputs, expected, expected_aux_losses = gradients(model, defined)
    assert torch.equal(torch.get_rng_state(), after), "recomputation moves torch's generator"
    assert len(aux_losses) == len(expected_aux_losses)
    torch.testing.assert_close(
        [*outputs, *aux_losses], [*expected_outputs, *expected_aux_losses], atol=1e-12, rtol=1e-12
    )
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = max(1.0, gradient.abs().max().item())
        assert (actual[name] - gradient).abs().max().item() <= 1e-10 * scale, name


def test_a_dynamic_span_has_a_penalty_per_layer() -> None:
    aux_losses: list[Tensor] = []
    decoder(DYNAMIC)(tokens(), aux_losses=aux_losses)
    assert len(aux_losses) == 3
    assert all(penalty.requires_grad for penalty in aux_losses)


def test_an_encoder_passes_gradients_to_embeddings() -> None:
    torch.manual_seed(0)
    model = ls.Encoder(ls.EncoderConfig(dim=24, num_layers=2, num_heads=4, reversible=True, init_std=0.3)).double()
    embedded = torch.randn(2, 9, 24, dtype=torch.float64, requires_grad=True)
    (actual,) = torch.autograd.grad(model(inputs_embeds=embedded).square().sum(), embedded)
    rows = BatchLayout(torch.zeros(2, dtype=torch.int64), 9)
    x1 = x2 = embedded
    for block in model.layers:
        x1 = x1 + block.mixer.mix(block.mixer_norm(x2), None, rows)[0]
        x2 = x2 + block.ffn(block.ffn_norm(x1))
    (expected,) = torch.autograd.grad(model.norm((x1 + x2) / 2).square().sum(), embedded)
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=1e-10)


def test_some_or_all_parameters_may_be_frozen() -> None:
    model = decoder({"name": "window", "window": 5})
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("up_proj" in name)
    model(tokens())[0].square().sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        f"blocks.{i}.ffn.up_proj.weight" for i in range(3)
    }
    model.requires_grad_(False)
    assert not model(tokens())[0].requires_grad


@pytest.mark.parametrize(
    "table",
    [{"name": "window", "window": 4}, {"name": "infini", "segment": 4}, {"name": "transformer_xl", "segment": 4}],
    ids=str,
)
def test_streaming_padding_and_packing_agree(table: dict[str, Any]) -> None:
    model, text = decoder(table).eval(), tokens()
    logits, state = model(text)
    assert ls.state.nbytes(state) == model.state_nbytes(2, 19, torch.float64)
    parts, carried = [], model.init_state(2)
    for a, b in ((0, 1), (1, 9), (9, 9), (9, 19)):
        part, carried = model(text[:, a:b], carried)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), logits, atol=1e-9, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(model(text)[0], logits, atol=1e-12, rtol=0)
    mask = torch.rand(2, 40, generator=torch.Generator().manual_seed(4)) < 0.5
    mask[1] = False
    mask[1, 5:24] = True
    padded = torch.full((2, 40), -100)
    padded[0, mask[0]] = 3
    padded[1, mask[1]] = text[1]
    spread, _ = model(padded, mask=mask)
    torch.testing.assert_close(spread[1, mask[1]], logits[1], atol=1e-9, rtol=0)
    assert not spread[~mask].any()
    packed = torch.cat([text[0], text[1, :7]])[None]
    reset = torch.zeros(1, 26, dtype=torch.bool)
    reset[0, 19] = True
    together = model(packed, reset=reset)[0][0]
    torch.testing.assert_close(together[19:], logits[1, :7], atol=1e-9, rtol=0)


def test_buckets_are_stored_and_not_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32 reconstructed inputs differ in their last bits: a token near a border must stay in its bucket."""
    calls = []
    buckets_of = ls.ops.lsh_buckets

    def counted(*args: Any) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return buckets_of(*args)

    monkeypatch.setattr(ls.ops, "lsh_buckets", counted)
    model = decoder({"name": "lsh", "bucket_size": 2, "num_hashes": 2, "num_buckets": 4}).float()
    loss = model(tokens())[0].square().sum()
    assert calls == [False] * 3
    loss.backward()
    assert len(calls) == 3


def test_choices_come_back_in_their_order_and_type() -> None:
    choices, many = Choices(), torch.tensor([0, 70_000])
    plain = BatchLayout(torch.zeros(1, dtype=torch.int64), 3)
    assert torch.equal(plain.choose(lambda: many, below=2), many), "no pass records"
    rows = plain.with_choices(choices)

    def choose(positions: Tensor, below: int) -> Tensor:
        return rows.choose(lambda: positions, below=below)

    with torch.no_grad():
        assert (rows.learns, plain.learns) == (True, False)
        for chosen, below in ((torch.tensor([255]), 256), (torch.tensor([256]), 257), (many, 70_001)):
            assert choose(chosen, below) is chosen
        for _ in range(2):
            choices.rewind()
            assert not rows.learns
            replayed = [choose(torch.tensor([-1]), 1) for _ in range(3)]
            assert [t.tolist() for t in replayed] == [[255], [256], [0, 70_000]]
            assert all(t.dtype == torch.int64 for t in replayed)


def test_statistics_count_a_step_once() -> None:
    """The first pass builds no graph and the second one repeats it: clusters and bounds count each token once."""
    kinds: tuple[tuple[dict[str, Any], Callable[[Any], Tensor]], ...] = (
        ({"name": "routing", "num_clusters": 2, "window": 4}, lambda core: core.pending.counts),
        ({"name": "performer", "num_features": 4, "kind": "bounded"}, lambda core: core.pending),
    )
    for mixer, counted in kinds:
        counts = []
        for reversible in (False, True):
            torch.manual_seed(0)
            model = decoder(mixer, num_layers=1, reversible=reversible).train()
            aux_losses: list[Tensor] = []
            loss = model(tokens(), aux_losses=aux_losses)[0].square().sum()
            (loss + sum(aux_losses)).backward()
            block: Any = model.blocks[0]
            counts.append(counted(block.mixer.core).clone())
        assert float(counts[0].abs().sum()) > 0
        torch.testing.assert_close(counts[0], counts[1])


def test_autocast_and_narrow_weights_are_near_fp64() -> None:
    """Streams are fp32 at least, so that what is subtracted is what was added."""
    table = {"name": "window", "window": 5}

    def flat_gradients(model: ls.Decoder, autocast: bool) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(tokens())[0]
            # inside autocast: casts that the forward pass has cached have no graph
            logits.double().square().mean().backward()
        return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])

    def relative(a: Tensor, b: Tensor) -> float:
        return float((a - b).norm() / b.norm())

    exact = flat_gradients(decoder(table, num_layers=12, init_std=0.1), False)
    mixed = flat_gradients(decoder(table, num_layers=12, init_std=0.1).float(), True)
    narrow = flat_gradients(decoder(table, num_layers=12, init_std=0.1).bfloat16(), False)
    assert len(mixed) == len(narrow) == len(exact)
    assert relative(mixed, exact) < 0.05
    assert relative(narrow, exact) < 0.05


@contextmanager
def saved_bytes(model: torch.nn.Module) -> Iterator[list[int]]:
    """Bytes of the distinct storages that autograd saves, parameters not counted."""
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    seen: dict[int, int] = {}
    total: list[int] = []

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield total
    total.append(sum(seen.values()))


@pytest.mark.parametrize("reversible", [True, False])
def test_saved_activations_do_not_grow_with_depth(reversible: bool) -> None:
    sizes = []
    for layers in (2, 8, 32):
        model = decoder({"name": "window", "window": 5}, num_layers=layers, reversible=reversible)
        with saved_bytes(model) as total:
            loss = model(tokens(2, 64))[0].square().sum()
        loss.backward()
        sizes += total
    if reversible:
        assert sizes[0] == sizes[1] == sizes[2]
    else:
        assert sizes[2] > 10 * sizes[0], "the measurement sees activations"


def test_gradients_reach_memory_tokens_through_reversible_blocks() -> None:
    """Gradients reach the memory tokens, through segments."""
    model = decoder({"name": "full"})
    memory = ls.RecurrentMemory(model, num_memory_tokens=2, segment_length=5).double()
    logits, _ = memory(tokens())
    logits[:, -1].square().sum().backward()
    gradient = memory.cell.tokens.weight.grad
    assert gradient is not None
    assert gradient.abs().max() > 0
    with pytest.raises(ls.UnsupportedError, match="per_layer"):
        ls.RecurrentMemory(model, num_memory_tokens=2, segment_length=5, per_layer=True)


def test_weights_changed_before_the_backward_pass_are_noticed() -> None:
    """Recomputation would no longer give what the forward pass computed."""
    model = decoder({"name": "window", "window": 5})
    loss = model(tokens())[0].square().sum()
    with torch.no_grad():
        model.layers[1].ffn.up_proj.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_loss_on_the_state_of_one_layer_has_gradients() -> None:
    """With unused outputs, gradients still flow from the state of the first layer."""
    model = decoder({"name": "infini", "segment": 4})
    _, state = model(tokens())
    assert state is not None
    state.layers[0].values.square().sum().backward()
    names = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert "blocks.0.mixer.projections.k_proj.weight" in names
    assert not any(name.startswith(("blocks.1", "blocks.2")) for name in names)


def test_second_derivatives_and_wrong_fields_are_refused() -> None:
    model = decoder()
    loss = model(tokens())[0].square().sum()
    first = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    with pytest.raises(ls.errors.UnsupportedError, match="no second derivatives"):
        torch.stack([g.square().sum() for g in first]).sum().backward()
    with pytest.raises(ls.ConfigError, match="pre-norm"):
        decoder(norm_position="post")
    with pytest.raises(ls.ConfigError, match="checkpoint = false"):
        decoder(checkpoint=True)
    with pytest.raises(ls.ConfigError, match="needs reversible blocks"):
        decoder(streams="both", reversible=False, tie_embeddings=False)
    with pytest.raises(ls.ConfigError, match="tie_embeddings = false"):
        decoder(streams="both")
    with pytest.raises(ls.UnsupportedError, match="twice as wide"):
        ls.RecurrentMemory(decoder(streams="both", tie_embeddings=False), num_memory_tokens=2, segment_length=5)


def test_both_streams_widen_hidden_states_and_the_head() -> None:
    """Hidden states are twice as wide, whatever reads them; FLOPs count the wider output layer, hashes the fields."""
    fields: dict[str, Any] = {"dim": 24, "num_layers": 2, "num_heads": 4, "vocab_size": 31, "reversible": True}
    config = ls.EncoderConfig(**fields, streams="both")
    assert ls.Encoder(config)(tokens()).shape == (2, 19, 48)
    assert ls.MaskedLM(config)(tokens())[0].shape == (2, 19, 31)
    model = decoder(streams="both", tie_embeddings=False)
    hidden, _ = model.hidden(tokens())
    head = model.head()
    assert isinstance(head, Head)
    torch.testing.assert_close(torch.nn.functional.linear(hidden, *head), model(tokens())[0])
    plain = decoder(tie_embeddings=False)
    assert model.flops(10) - plain.flops(10) == 2 * 10 * 24 * 31
    hashes = {ls.models.model_hash(decoder(tie_embeddings=False, output_bias=bias)) for bias in (False, True)}
    assert len(hashes) == 2


def test_fields_are_saved_and_older_files_have_defaults(tmp_path: Any) -> None:
    model = decoder(ffn_chunk=7).eval()
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert again.config == model.config
    torch.testing.assert_close(again(tokens())[0], model(tokens())[0], atol=0, rtol=0)
    plain = decoder(reversible=False)
    described = ls.models.describe_model(plain)
    assert described.pop("reversible") is False
    assert described.pop("ffn_chunk") == 0
    assert ls.models.build_model(described).config == plain.config


@pytest.mark.parametrize("options", [{}, {"activation": "gelu", "bias": True}, {"reversible": False}], ids=str)
def test_feed_forward_in_chunks_equals_the_whole(options: dict[str, Any]) -> None:
    runs = []
    for chunk in (0, 1, 5, 1000):
        model = decoder(ffn_chunk=chunk, dropout=0.2, **options)
        torch.manual_seed(1)
        logits, _ = model(tokens())
        logits.square().sum().backward()
        runs.append([logits.detach(), *(p.grad for p in model.parameters())])
        model.eval()
        with torch.no_grad():
            runs[-1].append(model(tokens())[0])
            runs[-1].append(model(tokens(length=0))[0])
    for run in runs[1:]:
        for actual, expected in zip(run, runs[0], strict=True):
            scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
            torch.testing.assert_close(actual, expected, atol=1e-12 * scale, rtol=0)


def test_chunks_of_the_feed_forward_save_less() -> None:
    sizes = []
    for chunk in (0, 16):
        model = decoder(ffn_chunk=chunk, num_layers=1, ffn_dim=2000, reversible=False)
        with saved_bytes(model) as total:
            loss = model(tokens(2, 64))[0].square().sum()
        loss.backward()
        sizes += total
    inner = 2 * 64 * 2000 * 8
    assert sizes[0] - sizes[1] >= 2 * inner
