"""RecurrentMemory in every combination of its fields: diagonals, types and devices of states, cost (a review)."""

from typing import Any

import pytest
import torch
from tests.laws.checks.cost import COUNTED
from torch.utils.flop_counter import FlopCounterMode

import longspan as ls

from .models import DIM, FIELDS, HEADS, NAMES, VOCAB, labeled, own, tokens

SIZE, MEMORY = 6, 2


def recurrent(backbone: Any, **fields: Any) -> ls.RecurrentMemory:
    """In evaluation mode, with layer memories that answer something."""
    torch.manual_seed(1)
    options = {"num_memory_tokens": MEMORY, "segment_length": SIZE, "memory_dim": 3} | fields
    model = ls.RecurrentMemory(backbone, **options)
    for name, parameter in model.cell.named_parameters():
        if name.endswith("value.weight"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def encoder(**fields: Any) -> ls.Encoder:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": VOCAB, "dim": DIM, "num_layers": 2, "num_heads": HEADS}
    return ls.Encoder(ls.EncoderConfig(**(sizes | {"mixers": ({"name": "full"},)} | fields))).eval()


# diagonals ---------------------------------------------------------------------------------------------------


def gradients(model: ls.RecurrentMemory, ids: torch.Tensor, aux_losses: list[torch.Tensor] | None) -> dict[str, Any]:
    model.zero_grad()
    out, state = model(ids, aux_losses=aux_losses)
    loss = out.float().logsumexp(-1).sum()
    (loss + torch.stack(aux_losses).sum() if aux_losses else loss).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach(), **grads, **{f"state.{k}": v.detach() for k, v in ls.state.tensors(state).items()}}


@pytest.mark.parametrize("name", NAMES)
def test_diagonals_run_with_every_mechanism(name: str) -> None:
    """Outputs, states, gradients and auxiliary losses of the segment order; three full segments."""
    table = {"name": name, **FIELDS[name]} | ({"penalty": 0.1} if name == "adaptive_span" else {})
    ids = tokens(2, 3 * SIZE)
    runs = []
    for diagonal in (False, True):
        model = recurrent(own(layers=2, mixers=(table,)), per_layer=True, diagonal=diagonal)
        aux_losses: list[torch.Tensor] = []
        runs.append(gradients(model, ids, aux_losses) | {"losses": sum(aux_losses, torch.zeros(()))})
        with torch.no_grad():
            torch.testing.assert_close(model(ids)[0], runs[-1]["out"], atol=1e-5, rtol=1e-5)
    assert runs[0].keys() == runs[1].keys()
    for key, value in runs[0].items():
        torch.testing.assert_close(runs[1][key], value, atol=1e-5, rtol=1e-4, msg=labeled(key))


@pytest.mark.parametrize("name", ["full", "infini", "associative"])
def test_mechanisms_that_run_in_batches_of_layers_do(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from longspan.models.layer_memory import LayerMemory

    calls = []
    diagonals = LayerMemory.diagonals

    def counted(*args: Any) -> Any:
        calls.append(1)
        return diagonals(*args)

    monkeypatch.setattr(LayerMemory, "diagonals", counted)
    model = recurrent(own(name, layers=2), per_layer=True, diagonal=True)
    model(tokens(2, 3 * SIZE))
    assert calls == [1]


def test_training_with_dropout_runs_along_diagonals() -> None:
    model = recurrent(own("full", layers=2, dropout=0.5), per_layer=True, diagonal=True).train()
    one, two = (model(tokens(1, 2 * SIZE))[0] for _ in range(2))
    assert not torch.equal(one, two)


def test_layers_that_differ_by_more_than_weights_go_segment_by_segment() -> None:
    """What hooks do to one layer, a batch of layers would do to all or to none."""
    backbone = own("full", layers=2)
    backbone.blocks[1].register_forward_hook(lambda module, args, output: (2 * output[0], *output[1:]))
    plain, diagonal = (recurrent(backbone, per_layer=True, diagonal=flag) for flag in (False, True))
    ids = tokens(2, 3 * SIZE)
    torch.testing.assert_close(diagonal(ids)[0], plain(ids)[0], atol=1e-5, rtol=1e-5)


# states ------------------------------------------------------------------------------------------------------

FORMS: dict[str, dict[str, Any]] = {
    "tokens": {},
    "paper": {"update": "paper"},
    "accumulate": {"accumulate": True, "max_summaries": 2},
    "per_layer": {"per_layer": True},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_empty_state_has_the_named_type_and_device(form: str, dtype: torch.dtype) -> None:
    for name in ("window", "linear", "bp"):
        model = recurrent(own(name), **FORMS[form])
        empty = model.init_state(3, dtype=dtype)
        assert ls.state.nbytes(empty) == model.state_nbytes(3, 0, dtype), name
        moved = model.init_state(3, device="meta", dtype=dtype)
        assert {tensor.device.type for tensor in ls.state.tensors(moved).values()} == {"meta"}
        control = model.to(dtype).init_state(3)
        for key, tensor in ls.state.tensors(control).items():
            assert ls.state.tensors(empty)[key].dtype == ls.state.tensors(moved)[key].dtype == tensor.dtype, key


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_backbone_of_any_type_is_wrapped(form: str, dtype: torch.dtype) -> None:
    """The memory comes in the type of its backbone."""
    model = recurrent(own("window").to(dtype), **FORMS[form])
    with torch.no_grad():
        out, state = model(tokens(2, 2 * SIZE + 3))
    assert out.dtype == dtype
    assert ls.state.nbytes(state) == model.state_nbytes(2, 2 * SIZE + 3, dtype)


# cost --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alignment", ["left", "right"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["full", "linear", "encoder"])
def test_flops_are_those_of_the_forward(kind: str, form: str, alignment: str) -> None:
    backbone = encoder() if kind == "encoder" else own(kind, layers=2)
    model = recurrent(backbone, alignment=alignment, **FORMS[form])
    for length in (1, 3, SIZE, SIZE + 1, 4 * SIZE + 2):
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
            model(tokens(2, length), flush=True)
        done = counter.get_total_flops()
        assert abs(model.flops(length, batch_size=2) - done) <= 0.02 * done, f"{length} tokens"
