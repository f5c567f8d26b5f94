"""Adaptive embeddings and softmax: the definition, torch's own class, tying, cost, and everything that takes logits."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import longspan as ls
from longspan.config import read_toml
from longspan.cost.scaling import non_embedding
from longspan.models import AdaptiveHead, build_model, model_hash
from longspan.models.adaptive import AdaptiveEmbedding, AdaptiveSoftmax
from longspan.train.loss import chunked_next_token_loss, head_nats, next_token_loss, token_nats

VOCABULARY, DIM = 31, 16
OPTIONS: list[dict[str, Any]] = [
    {"adaptive_cutoffs": (5, 12), "adaptive_div": 2.0},
    {"adaptive_cutoffs": (5, 12, 13), "tie_projections": "rare", "embedding_dim": 64, "output_bias": True},
    {"adaptive_cutoffs": (7,), "tie_projections": "none", "output_bias": True},
    {"adaptive_cutoffs": (5, 12), "tie_embeddings": False},
    {"adaptive_cutoffs": (5, 12), "adaptive_div": 1.0, "output_bias": True},
    {"adaptive_cutoffs": (5, 12), "adaptive_div": 1.0, "embedding_dim": 6, "tie_projections": "rare"},
    {"adaptive_cutoffs": (5, 12), "adaptive_div": 1.0, "embedding_dim": 6, "tie_embeddings": False},
    {"embedding_dim": 6, "output_bias": True},
]


def config(**options: Any) -> ls.DecoderConfig:
    fields: dict[str, Any] = {"vocab_size": VOCABULARY, "dim": DIM, "num_layers": 2, "num_heads": 2, "init_std": 0.3}
    return ls.DecoderConfig(**fields, mixers=({"name": "window", "window": 6},), **options)


def decoder(**options: Any) -> ls.Decoder:
    torch.manual_seed(0)
    model = ls.Decoder(config(**options)).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.normal_()
    return model


def tokens(rows: int = 2, length: int = 19, seed: int = 3) -> Tensor:
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def hidden_states(rows: int = 2, length: int = 19) -> Tensor:
    states = torch.randn(rows, length, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    return states.requires_grad_()


def defined(model: ls.Decoder, h: Tensor) -> Tensor:
    """Log-probabilities token by token, computed from the parameters of the module."""
    assert isinstance(model.embedding, AdaptiveEmbedding)
    assert isinstance(model.output, AdaptiveSoftmax)
    options = model.config
    embedding: Any = model.embedding
    output: Any = model.output
    cuts = [0, *options.adaptive_cutoffs, VOCABULARY]
    count = len(cuts) - 1
    one = len(embedding.tables) == 1

    def table(index: int) -> Any:
        if not options.tie_embeddings:
            return output.tables[index].weight
        return embedding.tables[0].weight[cuts[index] : cuts[index + 1]] if one else embedding.tables[index].weight

    def narrow(index: int) -> Any:
        if str(index) in output.projections:
            return h @ output.projections[str(index)].weight.T
        if not len(embedding.projections):
            return h
        return h @ embedding.projections[0 if one else index].weight

    def bias(index: int) -> Any:
        return output.biases[index] if options.output_bias else torch.zeros(cuts[index + 1] - cuts[index])

    first = torch.cat([narrow(0) @ table(0).T + bias(0)], -1)
    if count > 1:
        extra = narrow(0) @ output.cluster.weight.T
        first = torch.cat([first, extra if output.cluster_bias is None else extra + output.cluster_bias], -1)
    weights = first.exp() / first.exp().sum(-1, keepdim=True)
    probabilities = []
    for token in range(VOCABULARY):
        index = max(i for i in range(count) if cuts[i] <= token)
        if index == 0:
            probabilities.append(weights[..., token])
        else:
            own = (narrow(index) @ table(index).T + bias(index)).exp()
            probabilities.append(weights[..., cuts[1] + index - 1] * own[..., token - cuts[index]] / own.sum(-1))
    return torch.stack(probabilities, -1).log()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_logits_are_log_probabilities_as_defined(options: dict[str, Any]) -> None:
    model, h = decoder(**options), hidden_states()
    logits = model.logits(h)
    torch.testing.assert_close(logits, defined(model, h), atol=1e-10, rtol=0)
    torch.testing.assert_close(logits.exp().sum(-1), torch.ones(2, 19, dtype=torch.float64), atol=1e-12, rtol=0)
    parameters = [h, *(p for name, p in model.named_parameters() if name.startswith(("embedding", "output")))]
    upstream = torch.randn(logits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    gradients = torch.autograd.grad(logits, parameters, upstream, allow_unused=True)
    expected_gradients = torch.autograd.grad(defined(model, h), parameters, upstream, allow_unused=True)
    assert sum(gradient is not None for gradient in gradients) > 1
    torch.testing.assert_close(gradients, expected_gradients, atol=1e-9, rtol=0)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("chunk", [0, 1, 7, 1000])
def test_the_loss_is_that_of_the_log_probabilities(options: dict[str, Any], chunk: int) -> None:
    model, h, targets = decoder(**options), hidden_states(), tokens()
    head = model.head()
    graded = torch.rand(targets.shape, generator=torch.Generator().manual_seed(8)) < 0.6
    parameters = [h, *(p for name, p in model.named_parameters() if name.startswith(("embedding", "output")))]
    expected = -model.logits(h).gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(token_nats(model.logits(h), targets), expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(head_nats(h, head, targets, chunk=chunk), expected, atol=1e-10, rtol=0)
    loss = chunked_next_token_loss(h, head, targets, graded, chunk=chunk)
    whole = next_token_loss(model.logits(h), targets, graded)
    torch.testing.assert_close(loss, whole, atol=1e-9, rtol=0)
    gradients = torch.autograd.grad(loss * 0.3, parameters, allow_unused=True)
    expected_gradients = torch.autograd.grad(whole * 0.3, parameters, allow_unused=True)
    for actual, reference in zip(gradients, expected_gradients, strict=True):
        # the parts of the embedding that no output uses have no gradient on either path
        assert (actual is None) == (reference is None)
        if actual is not None:
            torch.testing.assert_close(actual, reference, atol=1e-9, rtol=0)


def test_clusters_without_a_target_still_have_gradients() -> None:
    model, h = decoder(**OPTIONS[0]), hidden_states()
    frequent = tokens() % 5
    head = model.head()
    assert isinstance(head, AdaptiveHead)
    for chunk in (0, 4):
        loss = chunked_next_token_loss(h, model.head(), frequent, chunk=chunk)
        torch.testing.assert_close(loss, next_token_loss(model.logits(h), frequent), atol=1e-9, rtol=0)
        # processes sum their gradients, so every parameter needs one
        for weight in head.weights:
            assert torch.autograd.grad(loss, weight, retain_graph=True)[0].shape == weight.shape
        none = torch.zeros_like(frequent, dtype=torch.bool)
        assert chunked_next_token_loss(h, model.head(), frequent, none, chunk=chunk).item() == 0


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("chunk", [0, 5])
def test_products_are_bf16_and_losses_fp32(autocast: bool, chunk: int) -> None:
    model, h, targets = decoder(**OPTIONS[1]), hidden_states(), tokens()
    expected = next_token_loss(model.logits(h), targets)
    model = model.to(torch.float32 if autocast else torch.bfloat16)
    narrow = h.detach().to(torch.float32 if autocast else torch.bfloat16).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = chunked_next_token_loss(narrow, model.head(), targets, chunk=chunk)
        assert model.logits(narrow).dtype == narrow.dtype
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=0.02, atol=0)
    (gradient,), (expected_gradient,) = torch.autograd.grad(loss, narrow), torch.autograd.grad(expected, h)
    assert gradient.dtype == narrow.dtype
    assert (gradient - expected_gradient).abs().max() <= 0.05 * expected_gradient.abs().max()


def test_the_recipe_of_wikitext_has_the_papers_parameters(request: pytest.FixtureRequest) -> None:
    """151 M parameters (Dai et al. 2019, table 1) for the 267,735 words of WikiText-103."""
    table = read_toml(request.config.rootpath / "recipes" / "wikitext-xl.toml")["model"]
    with torch.device("meta"):
        model = build_model({**table, "vocab_size": 267_735})
    assert round(model.num_parameters() / 1e6) == 151


@pytest.mark.parametrize("div", [2.0, 4.0])
def test_torchs_own_class_gives_the_same_numbers(div: float) -> None:
    cutoffs = [5, 12]
    model = decoder(adaptive_cutoffs=tuple(cutoffs), adaptive_div=div, tie_embeddings=False)
    theirs: Any = torch.nn.AdaptiveLogSoftmaxWithLoss(DIM, VOCABULARY, cutoffs, div_value=div).double()
    assert isinstance(model.output, AdaptiveSoftmax)
    output: Any = model.output
    h, targets = hidden_states(), tokens()
    with torch.no_grad():
        # torch's first cluster has no projection
        output.projections["0"].weight.copy_(torch.eye(DIM))
        theirs.head.weight.copy_(torch.cat([output.tables[0].weight, output.cluster.weight]))
        for index, tail in enumerate(theirs.tail, 1):
            tail[0].weight.copy_(output.projections[str(index)].weight)
            tail[1].weight.copy_(output.tables[index].weight)
    rows = h.flatten(0, 1)
    torch.testing.assert_close(model.logits(rows), theirs.log_prob(rows), atol=1e-12, rtol=0)
    loss = theirs(rows, targets.flatten()).loss * targets.numel()
    ours = chunked_next_token_loss(h, model.head(), targets, chunk=0)
    torch.testing.assert_close(ours, loss, atol=1e-11, rtol=0)
    (gradient,), (expected_gradient,) = torch.autograd.grad(ours, h), torch.autograd.grad(loss, h)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-12, rtol=0)


def test_one_softmax_of_a_factorized_embedding_is_the_plain_one() -> None:
    model, h = decoder(embedding_dim=6), hidden_states()
    embedding: Any = model.embedding
    (table,), (projection,) = embedding.tables, embedding.projections
    dense = table.weight @ projection.weight.T
    torch.testing.assert_close(model.logits(h), (h @ dense.T).log_softmax(-1), atol=1e-12, rtol=0)
    torch.testing.assert_close(model.embedding(tokens()), dense[tokens()], atol=1e-12, rtol=0)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_token_is_embedded_by_its_cluster(options: dict[str, Any]) -> None:
    embedding: Any = decoder(**options).embedding
    cuts, one = [0, *options.get("adaptive_cutoffs", ()), VOCABULARY], len(embedding.tables) == 1
    for token in (0, 4, 5, 11, 12, 30):
        index = 0 if one else max(i for i in range(len(cuts) - 1) if cuts[i] <= token)
        row = embedding.tables[index].weight[token if one else token - cuts[index]]
        expected = embedding.projections[index].weight @ row if len(embedding.projections) else row
        embedded = embedding(torch.tensor([[token, 30, 0]]))[0, 0]
        torch.testing.assert_close(embedded, expected, atol=1e-12, rtol=0)
        (touched,) = torch.autograd.grad(embedded.sum(), embedding.tables[index].weight)
        assert touched.any(1).nonzero()[:, 0].tolist() == [token if one else token - cuts[index]]


def test_later_tokens_of_other_clusters_change_no_bit() -> None:
    model = decoder(**OPTIONS[0]).float()
    text = tokens(1, 40)
    for least in (0, 12):
        changed = text.clone()
        changed[:, 20:] = tokens(1, 20, seed=9) % 5 + least
        assert torch.equal(model(text)[0][:, :20], model(changed)[0][:, :20])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_parameters_are_those_of_the_layout(options: dict[str, Any]) -> None:
    chosen = config(**options)
    cuts, widths = [0, *chosen.adaptive_cutoffs, VOCABULARY], chosen.cluster_widths
    sizes = [last - first for first, last in itertools.pairwise(cuts)]
    tables = sum(size * width for size, width in zip(sizes, widths, strict=True))
    alike, count = len(set(widths)) == 1, len(sizes)
    mapped = chosen.embedding_dim is not None or not alike
    maps = (widths[0] if alike else sum(widths)) * DIM if mapped else 0
    own = {"all": 0, "rare": widths[0], "none": sum(widths)}
    total = tables + maps + widths[0] * (count - 1)
    if not chosen.tie_embeddings:
        total += tables
    if mapped:
        total += DIM * own[chosen.tie_projections if chosen.tie_embeddings else "none"]
    if chosen.output_bias:
        total += VOCABULARY + count - 1
    model = ls.Decoder(chosen)
    layers = sum(p.numel() for name, p in model.named_parameters() if not name.startswith(("embedding", "output")))
    assert model.num_parameters() == layers + total
    assert non_embedding(model) == layers
    storages = [tensor.data_ptr() for tensor in model.state_dict().values()]
    assert len(set(storages)) == len(storages), "a tied weight is saved once"


def test_parameters_are_initialized_and_grouped() -> None:
    torch.manual_seed(0)
    model = ls.Decoder(
        ls.DecoderConfig(
            vocab_size=3000, dim=128, num_layers=1, num_heads=2, init_std=0.05, adaptive_cutoffs=(500, 1500)
        )
    )
    embedding: Any = model.embedding
    for first, last in ((0, 500), (500, 1500), (1500, 3000)):
        embedded = embedding(torch.arange(first, last))
        assert embedded.std().item() == pytest.approx(0.05, rel=0.15)
    head: Any = model.head()
    logits = torch.nn.functional.linear(torch.randn(64, 128), head.maps[2])
    logits = logits @ head.weights[2].T
    assert logits.std().item() == pytest.approx(0.05 * 128**0.5, rel=0.25), "as those of plain embeddings"
    groups = {group["name"]: {id(p) for p in group["params"]} for group in model.parameter_groups(lr=1, weight_decay=1)}
    tables = {id(table.weight) for table in embedding.tables}
    assert tables <= groups["plain"]
    assert {id(projection.weight) for projection in embedding.projections} <= groups["decay"]
    head = ls.Decoder(config(**OPTIONS[3], init="sparse")).head()
    assert not any(weight.any() for weight in head.weights)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_saved_model_loads_as_it_was(options: dict[str, Any], tmp_path: Path) -> None:
    model = decoder(**options)
    ls.save_model(model, tmp_path)
    loaded = ls.load_model(tmp_path)
    assert loaded.config == model.config
    assert torch.equal(loaded(tokens())[0], model(tokens())[0])
    assert model_hash(loaded) == model_hash(model)
    assert model_hash(decoder()) != model_hash(model)


def test_a_stream_scores_and_writes() -> None:
    model = decoder(**OPTIONS[1])
    text = tokens(1, 30)[0]
    logits = model(text[None])[0][0]
    session = ls.StreamSession(model, chunk=7)
    scores = session.score(text)
    expected = -logits[:-1].gather(-1, text[1:, None])[:, 0]
    torch.testing.assert_close(scores.nats[1:].double(), expected, atol=1e-5, rtol=0)
    assert torch.equal(scores.likeliest[1:], logits[:-1].argmax(-1) == text[1:])
    torch.testing.assert_close(session.logits.exp().sum().item(), 1.0)
    assert session.generate(1, temperature=0) == [int(logits[-1].argmax())]
    assert all(0 <= token < VOCABULARY for token in session.generate(20, generator=torch.Generator().manual_seed(0)))


def test_an_adaptive_softmax_works_under_recurrent_memory() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    torch.manual_seed(0)
    options = {**OPTIONS[0], "positions": "none"}
    memory = ls.RecurrentMemory(decoder(**options), num_memory_tokens=2, segment_length=5).double().eval()
    logits, _ = memory(tokens())
    hidden, _ = memory.hidden(tokens())
    assert isinstance(memory.head(), AdaptiveHead)
    torch.testing.assert_close(
        head_nats(hidden, memory.head(), tokens()), token_nats(logits, tokens()), atol=1e-9, rtol=0
    )

    def sdpa(q: Any, k: Any, *_: Any, **__: Any) -> int:
        batch, heads, length, dim = q
        return int(4 * batch * heads * length * k[2] * dim)

    mapping: Any = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: sdpa}
    for length in (50, 8):
        with FlopCounterMode(display=False, custom_mapping=mapping) as counter, torch.no_grad():
            memory(tokens(3, length), flush=True)
        assert counter.get_total_flops() == pytest.approx(memory.flops(length, batch_size=3), rel=0.02)


def test_mistakes_are_named_in_one_line() -> None:
    for cutoffs in ((0, 5), (5, 5), (7, 3)):
        with pytest.raises(ls.ConfigError, match=r"adaptive_cutoffs = \[.*must increase from at least 1"):
            config(adaptive_cutoffs=cutoffs)
    with pytest.raises(ls.ConfigError, match=r"adaptive_div = 0.5: must be at least 1"):
        config(adaptive_cutoffs=(5,), adaptive_div=0.5)
    with pytest.raises(ls.ConfigError, match=r"gives embeddings of widths \[16, 4, 1, 0\]"):
        config(adaptive_cutoffs=(5, 6, 7))
    with pytest.raises(ls.ConfigError, match=r"adaptive_cutoffs = \[31\]: must be below vocab_size = 31"):
        ls.Decoder(config(adaptive_cutoffs=(31,)))
