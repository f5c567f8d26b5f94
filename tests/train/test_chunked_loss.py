"""The loss in chunks equals the loss of whole logits in value, gradients and training, and never stores them."""

from typing import Any

import pytest
import torch
from tests.tensor_sizes import LargestTensor
from torch import Tensor

from longspan.errors import ConfigError, UnsupportedError
from longspan.models import Decoder, DecoderConfig, Encoder, EncoderConfig, Head, MaskedLM, RecurrentMemory
from longspan.tasks import Documents
from longspan.train import TrainConfig, chunked_next_token_loss, next_token_loss, read_log, run
from longspan.train.distributed import Group
from longspan.train.document_source import DocumentSource


def inputs(dtype: torch.dtype = torch.float64, bias: bool = False) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(2, 19, 8), (31, 8), *([(31,)] if bias else [])]
    return [(2 * torch.randn(shape, dtype=dtype)).requires_grad_() for shape in shapes]


def answers() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randint(31, (2, 19)), torch.rand(2, 19) < 0.6


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize("chunk", [1, 5, 38, 1000])
def test_loss_and_gradients_are_those_of_whole_logits(chunk: int, some: bool, bias: bool) -> None:
    targets, graded = answers()
    leaves = inputs(bias=bias)
    counted = graded if some else None
    loss = chunked_next_token_loss(leaves[0], Head(*leaves[1:]), targets, counted, chunk=chunk)
    expected = next_token_loss(torch.nn.functional.linear(*leaves), targets, counted)
    torch.testing.assert_close(loss, expected, atol=1e-10, rtol=0)
    gradients = torch.autograd.grad(loss * 0.37, leaves)
    expected_gradients = torch.autograd.grad(expected * 0.37, leaves)
    torch.testing.assert_close(gradients, expected_gradients, atol=1e-10, rtol=0)


def test_a_loss_over_no_graded_tokens_is_zero() -> None:
    leaves, targets = inputs(), answers()[0]
    loss = chunked_next_token_loss(leaves[0], Head(leaves[1]), targets, torch.zeros(2, 19, dtype=torch.bool), chunk=4)
    assert loss.item() == 0
    for gradient in torch.autograd.grad(loss, leaves):
        assert not gradient.any()


def test_the_head_or_the_hidden_states_may_be_frozen() -> None:
    targets = answers()[0]
    for frozen in (0, 1):
        leaves = inputs()
        leaves[frozen].requires_grad_(False)
        learned = leaves[1 - frozen]
        loss = chunked_next_token_loss(leaves[0], Head(leaves[1]), targets, chunk=7)
        expected = next_token_loss(leaves[0] @ leaves[1].T, targets)
        (gradient,) = torch.autograd.grad(loss, learned)
        torch.testing.assert_close(gradient, torch.autograd.grad(expected, learned)[0], atol=1e-10, rtol=0)


@pytest.mark.parametrize("autocast", [False, True])
def test_products_are_bf16_and_losses_fp32(autocast: bool) -> None:
    """As for whole logits: products in bf16, losses in fp32, and each gradient in the type of its tensor."""
    targets = answers()[0]
    leaves = inputs(torch.float32 if autocast else torch.bfloat16)
    losses_and_gradients = []
    for chunk in (0, 5):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if chunk:
                loss = chunked_next_token_loss(leaves[0], Head(leaves[1]), targets, chunk=chunk)
            else:
                loss = next_token_loss(torch.nn.functional.linear(*leaves), targets)
        assert loss.dtype == torch.float32
        losses_and_gradients.append([loss, *torch.autograd.grad(loss, leaves)])
    torch.testing.assert_close(losses_and_gradients[1][0], losses_and_gradients[0][0])
    for gradient, expected, like in zip(losses_and_gradients[1][1:], losses_and_gradients[0][1:], leaves, strict=True):
        assert gradient.dtype == like.dtype
        assert (gradient - expected).abs().max() <= 0.02 * expected.abs().max()


def largest_tensor(make: Any) -> int:
    """Elements of the largest tensor that a forward and backward pass makes."""
    with LargestTensor() as mode:
        make().backward()
    return int(mode.largest)


def test_logits_of_a_whole_call_never_exist() -> None:
    leaves, targets = inputs(), answers()[0]
    whole = largest_tensor(lambda: next_token_loss(leaves[0] @ leaves[1].T, targets))
    chunked = largest_tensor(lambda: chunked_next_token_loss(leaves[0], Head(leaves[1]), targets, chunk=3))
    assert whole == 2 * 19 * 31
    assert chunked == max(2 * 19 * 8, 31 * 8, 3 * 31)


def models() -> list[Any]:
    window = ({"name": "window", "window": 6},)
    fields: dict[str, Any] = {"vocab_size": 31, "dim": 16, "num_layers": 2, "num_heads": 2, "init_std": 0.3}
    torch.manual_seed(0)
    return [
        Decoder(DecoderConfig(**fields, mixers=window)),
        Decoder(DecoderConfig(**fields, mixers=window, tie_embeddings=False, reversible=True, ffn_chunk=5)),
        MaskedLM(EncoderConfig(**fields)),
        RecurrentMemory(Decoder(DecoderConfig(**fields)), num_memory_tokens=2, segment_length=5),
    ]


@pytest.mark.parametrize("index", range(4))
def test_hidden_states_and_head_make_the_logits(index: int) -> None:
    model = models()[index].double().eval()
    text, keep = answers()
    reset = torch.zeros_like(keep)
    reset[0, 7] = True
    logits, state = model(text, mask=keep, reset=reset)
    hidden, state_of_hidden = model.hidden(text, mask=keep, reset=reset)
    recomputed = torch.nn.functional.linear(hidden, *model.head())
    torch.testing.assert_close(recomputed[keep], logits[keep], atol=1e-12, rtol=0)
    if state is not None:
        later_hidden, _ = model.hidden(text, state_of_hidden)
        recomputed = torch.nn.functional.linear(later_hidden, *model.head())
        torch.testing.assert_close(recomputed, model(text, state)[0], atol=1e-12, rtol=0)
    else:
        with pytest.raises(UnsupportedError, match="does not stream"):
            model.hidden(text, model)


@pytest.mark.parametrize("index", range(4))
def test_training_in_chunks_takes_the_same_steps(index: int, recipe: dict[str, Any], tmp_path: Any) -> None:
    kinds: list[dict[str, Any]] = [
        {},
        {"tie_embeddings": False, "reversible": True, "ffn_chunk": 9},
        {"mixers": [{"name": "adaptive_span", "max_span": 8, "ramp": 4, "penalty": 0.1}]},
        {"memory": {"num_memory_tokens": 2, "segment_length": 8}, "mixers": [{"name": "full"}]},
    ]
    recipe["model"] |= kinds[index]
    recipe["train"] |= {"steps": 4, "dtype": "float64", "bptt_segments": 2, "eval_every": 0, "checkpoint_every": 0}
    logs = []
    for chunk in (0, 10):
        recipe["train"]["loss_chunk"] = chunk
        run(recipe, tmp_path / str(chunk))
        logs.append([line for line in read_log(tmp_path / str(chunk) / "log.jsonl") if "loss" in line])
    assert len(logs[0]) == len(logs[1]) >= 4
    for first, second in zip(*logs, strict=True):
        for name in ("loss", "grad_norm"):
            assert second[name] == pytest.approx(first[name], rel=1e-8), name


def test_models_without_a_linear_head_are_refused(documents: Documents) -> None:
    encoder = Encoder(EncoderConfig(vocab_size=31, dim=16, num_layers=1, num_heads=2))
    memory = RecurrentMemory(encoder, num_memory_tokens=2, segment_length=5)
    with pytest.raises(UnsupportedError, match="linear output layer; this model has no output layer"):
        DocumentSource(memory, documents, TrainConfig(loss_chunk=8), Group(device=torch.device("cpu")))
    with pytest.raises(ConfigError, match=r"train.loss_chunk = -1"):
        TrainConfig(loss_chunk=-1)
