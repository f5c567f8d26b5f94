"""A recurrent memory around a converted model: its mixers' auxiliary losses, steps and groups are not lost."""

from typing import Any

import pytest
import torch
from tests.field.models import converted, llama, tokens

import longspan as ls

hf = pytest.importorskip("longspan.hf")


def memory(name: str, **options: Any) -> Any:
    return ls.RecurrentMemory(converted(name, layers=2), num_memory_tokens=2, segment_length=5, **options).train()


@pytest.mark.parametrize("options", [{}, {"replay": True}, {"per_layer": True, "memory_dim": 4}], ids=str)
def test_auxiliary_losses_reach_the_caller_with_their_graph(options: dict[str, Any]) -> None:
    model = memory("adaptive_span", **options)
    aux_losses: list[torch.Tensor] = []
    model(tokens(2, 15), aux_losses=aux_losses)
    cores = hf.mechanisms(model.backbone).values()
    # three segments of two layers; the loss is the mean span of a layer
    spans = [core.config.penalty * core.config.max_span * core.span.clamp(0, 1).mean() for core in cores]
    assert len(aux_losses) == 6
    assert torch.stack(aux_losses).sum().item() == pytest.approx(3 * float(torch.stack(spans).sum().detach()), rel=1e-5)
    torch.stack(aux_losses).sum().backward()
    for core in cores:
        expected = 3 * core.config.penalty * core.config.max_span / core.span.numel()
        assert torch.allclose(core.span.grad, torch.full_like(core.span, expected))


def test_no_list_no_losses_and_a_plain_model_has_none() -> None:
    aux_losses: list[torch.Tensor] = []
    model = ls.RecurrentMemory(llama(), num_memory_tokens=2, segment_length=5).train()
    model(tokens(1, 5), aux_losses=aux_losses)
    model.after_step(1)
    assert aux_losses == []
    assert model.redraw_count == 0


def test_spans_are_clamped_after_a_step() -> None:
    model = memory("adaptive_span")
    for core in hf.mechanisms(model.backbone).values():
        core.span.data.fill_(7.0)
    model.after_step(1)
    assert all(float(core.span.detach().max()) == 1 for core in hf.mechanisms(model.backbone).values())


def test_centroids_move_after_a_step() -> None:
    model = memory("routing")
    before = {name: value.clone() for name, value in hf.mechanisms(model.backbone)[0].state_dict().items()}
    model(tokens(2, 10))
    model.after_step(1, torch.Generator().manual_seed(0))
    after = hf.mechanisms(model.backbone)[0].state_dict()
    assert any(not torch.equal(value, after[name]) for name, value in before.items())


def test_a_redraw_is_counted() -> None:
    inner = llama(layers=2)
    hf.convert(inner, "performer", num_features=8, redraw_every=1)
    model = ls.RecurrentMemory(inner, num_memory_tokens=2, segment_length=5)
    before = model.redraw_count
    model.after_step(1, torch.Generator().manual_seed(0))
    assert model.redraw_count == before + 2


def test_groups_of_the_mixers_are_their_own() -> None:
    model = memory("adaptive_span")
    groups = {group["name"]: group for group in model.parameter_groups(lr=0.1, weight_decay=0.01)}
    expected = {group["name"] for group in hf.parameter_groups(model.backbone, lr=0.1, weight_decay=0.01)} | {"memory"}
    assert set(groups) == expected
    trained = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(trained) == sorted(id(p) for p in model.parameters() if p.requires_grad)
