"""Recurrent memory over Hugging Face models, by duck typing."""

from typing import Any

import pytest
import torch
from tests.models.test_recurrent import text
from torch import Tensor

import longspan as ls

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 23, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}


def backbone(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "llama":
        config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, max_position_embeddings=64)
        return transformers.LlamaForCausalLM(config).double().eval()
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=23, n_embd=16, n_layer=2, n_head=4, n_positions=64)
        return transformers.GPT2LMHeadModel(config).double().eval()
    return transformers.BertModel(transformers.BertConfig(**SIZES, max_position_embeddings=64)).double().eval()


def build(kind: str, **options: Any) -> ls.RecurrentMemory:
    return ls.RecurrentMemory(backbone(kind), num_memory_tokens=3, segment_length=5, **options).double().eval()


def definition(model: ls.RecurrentMemory, tokens: Tensor) -> Tensor:
    """One row, segment by segment, by the documented calls of the model."""
    memory, outs, causal = model.memory.weight[None], [], model.adapter.causal
    backbone: Any = model.backbone
    embedding = backbone.get_input_embeddings()
    mass = torch.zeros(1, 3)
    for first in range(0, tokens.shape[1], 5):
        segment = embedding(tokens[:, first : first + 5])
        parts = [memory, segment, memory] if causal else [memory, segment]
        hidden = backbone(inputs_embeds=torch.cat(parts, 1), output_hidden_states=True).hidden_states[-1]
        new = hidden[:, -3:] if causal else hidden[:, :3]
        seen = hidden[:, 3 : 3 + segment.shape[1]]
        outs.append(backbone.get_output_embeddings()(seen) if causal else seen)
        memory, mass, _ = model.update(memory, new, mass)
    return torch.cat(outs, 1)


@pytest.mark.parametrize("update", ["gated", "paper"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_equals_the_plain_loop(kind: str, update: str) -> None:
    model, tokens = build(kind, update=update), text(1, 15)
    torch.testing.assert_close(model(tokens)[0], definition(model, tokens), atol=1e-9, rtol=0)


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_padded_rows_equal_each_alone(kind: str, per_layer: bool) -> None:
    model = build(kind, per_layer=per_layer, memory_dim=4)
    tokens, mask = text(3, 13), torch.ones(3, 13, dtype=torch.bool)
    mask[1, :4] = False
    mask[2, 7:] = False
    together = model(tokens, mask=mask, flush=True)[0]
    for row in range(3):
        alone = model(tokens[row : row + 1, mask[row]], flush=True)[0]
        torch.testing.assert_close(together[row, mask[row]], alone[0], atol=1e-9, rtol=0)
    assert (together[~mask] == 0).all()


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_token_by_token_equals_forward(kind: str, per_layer: bool) -> None:
    """An open segment runs without write tokens, and gives the outputs of the closed one."""
    model, tokens = build(kind, per_layer=per_layer, memory_dim=4), text(2, 12)
    whole, end = model(tokens)
    state, outs = None, []
    for index in range(12):
        out, state = model(tokens[:, index : index + 1], state)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), whole, atol=1e-9, rtol=0)
    assert state is not None
    torch.testing.assert_close(state.memory, end.memory, atol=1e-9, rtol=0)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_layer_memory_reads_and_writes_around_every_layer(kind: str) -> None:
    model, tokens = build(kind, per_layer=True, memory_dim=4), text(1, 10)
    with torch.no_grad():
        cell: Any = model.cell
        for layer in cell.maps:
            layer.value.weight.normal_()
    first, state = model(tokens[:, :5])
    assert state.memory.abs().sum(dim=(2, 3)).gt(0).all(), "every layer has written"
    after, _ = model(tokens[:, 5:], state)
    alone, _ = model(tokens[:, 5:])
    assert not torch.allclose(after, alone)
    plain = model.backbone(tokens[:, :5])
    shown = plain.logits if kind == "llama" else None
    if shown is not None:
        torch.testing.assert_close(first, shown, atol=1e-9, rtol=0)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_it_learns_and_replay_gives_the_same_gradients(kind: str) -> None:
    gradients = []
    for replay in (False, True):
        model = build(kind, replay=replay).train()
        out, _ = model(text(2, 15))
        out.square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 10
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-10, rtol=0)


def test_unsupported_calls_on_a_foreign_model_are_named(tmp_path: Any) -> None:
    model = build("llama")
    with pytest.raises(ls.UnsupportedError, match="only counted for models of longspan"):
        model.flops(10)
    with pytest.raises(ls.UnsupportedError, match="save_pretrained"):
        ls.save_model(model, tmp_path)
    groups = model.parameter_groups(lr=1.0, weight_decay=0.1)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
