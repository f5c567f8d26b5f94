"""On a device that is no CPU: same numbers, no mixed devices, no kernels or generators of the CPU, fp64 or not."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.emulated_device import Device, emulated
from tests.field.models import FIELDS, HEADS, NAMES, VOCAB, converted, own, tokens
from torch import Tensor

import longspan as ls
from longspan import ops

TOLERANCE = 1e-4


@pytest.fixture(params=[pytest.param(True, id="fp64", marks=pytest.mark.long), pytest.param(False, id="no-fp64")])
def device(request: pytest.FixtureRequest) -> Any:
    with emulated(float64=request.param) as there:
        yield there


def moved(value: Any, device: Device | None) -> Any:
    return value if device is None else value.to(device.device)


def close(actual: Tensor, expected: Tensor) -> None:
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    assert (actual - expected).abs().max() <= TOLERANCE * max(1.0, float(expected.abs().max()))


def calls(model: Any, device: Device | None) -> list[Tensor]:
    """Logits of a whole text, cut, token by token, with padding, and with documents."""
    text = moved(tokens(2, 11), device)
    mask, reset = torch.ones(2, 11, dtype=torch.bool), torch.zeros(2, 11, dtype=torch.bool)
    mask[0, :3] = mask[1, -2:] = False
    reset[0, 4] = reset[1, 9] = True
    with torch.no_grad():
        outs = [model(text, None)[0], model(text, None, mask=moved(mask, device), reset=moved(reset, device))[0]]
        if model.traits.streams:
            state = None
            for part in (text[:, :6], text[:, 6:7], text[:, 7:8], text[:, 8:]):
                logits, state = model(part, state)
                outs.append(logits)
            outs.append(model(text, state, mask=moved(mask, device), reset=moved(reset, device))[0])
    return [out.cpu() for out in outs]


def gradients(model: Any, device: Device | None) -> list[Tensor | None]:
    """Of a training step's loss, penalties included."""
    aux_losses: list[Tensor] = []
    text = moved(tokens(2, 11), device)
    out, _ = model.train()(text, None, aux_losses=aux_losses)
    (out.square().mean() + sum(penalty.sum() for penalty in aux_losses)).backward()
    return [None if p.grad is None else p.grad.cpu() for p in model.parameters()]


def same(make: Callable[[], Any], device: Device) -> None:
    """A model gives on the device what it gives on the CPU."""
    here, there = make(), make().to(device.device)
    for on_device, on_cpu in zip(calls(there, device), calls(here, None), strict=True):
        close(on_device, on_cpu)
    for grad, expected in zip(gradients(there, device), gradients(here, None), strict=True):
        assert (grad is None) == (expected is None)
        if grad is not None and expected is not None:
            close(grad, expected)


@pytest.mark.parametrize("name", NAMES)
def test_decoders(name: str, device: Device) -> None:
    same(lambda: own(name), device)


@pytest.mark.parametrize("name", ["window", pytest.param("lsh", marks=pytest.mark.long)])
def test_reversible_decoders(name: str, device: Device) -> None:
    same(lambda: own(name, layers=2, reversible=True), device)


LONG = pytest.mark.long


@pytest.mark.parametrize(
    "fields", [pytest.param({}, marks=LONG), {"per_layer": True}, pytest.param({"accumulate": True}, marks=LONG)]
)
def test_recurrent_memory(fields: dict[str, Any], device: Device) -> None:
    def make() -> Any:
        torch.manual_seed(0)
        return ls.RecurrentMemory(own("full"), num_memory_tokens=2, segment_length=4, **fields).eval()

    same(make, device)


@pytest.mark.parametrize(
    "name", ["routing", *(pytest.param(name, marks=LONG) for name in ("full", "window", "linear", "lsh", "bp"))]
)
def test_masked_models(name: str, device: Device) -> None:
    def make() -> Any:
        torch.manual_seed(0)
        fields = {key: value for key, value in FIELDS[name].items() if key != "selection"}
        sizes: dict[str, Any] = {"vocab_size": VOCAB, "dim": 16, "num_layers": 1, "num_heads": HEADS}
        return ls.MaskedLM(ls.EncoderConfig(**sizes, mixers=({"name": name, **fields},))).eval()

    same(make, device)


@pytest.mark.parametrize("name", ["infini", *(pytest.param(name, marks=LONG) for name in ("window", "routing"))])
def test_converted_models(name: str, device: Device) -> None:
    here = converted(name)
    there = copy.deepcopy(here).to(device.device)
    text = tokens(2, 9)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :2] = 0
    with torch.no_grad():
        for keywords in ({}, {"attention_mask": mask}):
            expected = here(text, **keywords).logits
            moved = {key: value.to(device.device) for key, value in keywords.items()}
            real = keywords.get("attention_mask", torch.ones_like(text)).bool()
            close(there(text.to(device.device), **moved).logits.cpu()[real], expected[real])
        close(there.generate(text.to(device.device), max_new_tokens=3).float(), here.generate(text, max_new_tokens=3))


@pytest.mark.parametrize("name", NAMES)
def test_a_state_moves_to_the_device_and_back(name: str, device: Device) -> None:
    here, there = own(name), own(name).to(device.device)
    text = tokens(2, 12)
    with torch.no_grad():
        _, before = here(text[:, :7], None)
        _, state = there(text[:, 7:9].to(device.device), ls.state.to(before, device=device.device))
        _, before = here(text[:, 7:9], before)
        close(here(text[:, 9:], ls.state.to(state, device="cpu"))[0], here(text[:, 9:], before)[0])


@pytest.mark.parametrize("name", NAMES)
def test_models_are_built_trained_and_read_under_a_default_device(name: str, device: Device) -> None:
    torch.set_default_device(device.device)
    try:
        model = own(name).train()
        for parameter in (*model.parameters(), *model.buffers()):
            assert parameter.device == device.device
        optimizer = torch.optim.AdamW(model.parameter_groups(lr=1e-3, weight_decay=0.1))
        generators = torch.Generator(), device.generator()
        for step, generator in enumerate(generators, 1):
            aux_losses: list[Tensor] = []
            text = tokens_there(device)
            logits, _ = model(text, None, aux_losses=aux_losses)
            (logits.square().mean() + sum(penalty.sum() for penalty in aux_losses)).backward()
            optimizer.step()
            model.after_step(step, generator)
        session = ls.StreamSession(model)
        scores = session.score(tokens_there(device)[0])
        assert scores.nats.device == scores.likeliest.device == device.device
        assert len(session.generate(2, generator=generators[0])) == len(session.generate(2, generator=generators[1]))
    finally:
        torch.set_default_device(None)


def tokens_there(device: Device) -> Tensor:
    return torch.arange(18, device=device.device).view(2, 9)


@pytest.mark.parametrize("name", ["performer", "lsh"])
def test_a_generator_of_the_cpu_draws_the_same_for_every_device(name: str, device: Device) -> None:
    mixers = ({"name": name, **FIELDS[name], "redraw_every": 1},)
    here, there = own(mixers=mixers), own(mixers=mixers).to(device.device)
    for model in (here, there):
        model.cores()[0].after_step(1, torch.Generator().manual_seed(3))
        assert model.cores()[0].redraw_count == 1
    buffer = "projection" if name == "performer" else "rotations"
    close(getattr(there.cores()[0], buffer), getattr(here.cores()[0], buffer))


@pytest.mark.parametrize("base", [10000.0, (1.0, 0.3, 7.5, 1e-4)])
def test_rotary_angles_without_fp64_are_those_of_fp64(base: Any) -> None:
    positions = torch.tensor([[0, 1, 17, 10**6 + 3, 10**8 + 7, 3 * 10**8 + 1]])
    steps = base if isinstance(base, tuple) else [base ** (-2 * i / 8) for i in range(4)]
    angles = positions.double()[:, None, :, None] * torch.tensor(steps, dtype=torch.float64)
    with emulated(float64=False) as device:
        cos, sin = (t.cpu() for t in ops.rotary_table(positions.to(device.device), 8, base=base))
    assert (cos - angles.cos()).abs().max() < 1e-6
    assert (sin - angles.sin()).abs().max() < 1e-6


def test_the_device_is_strict() -> None:
    with emulated(float64=False) as device:
        there = torch.zeros(3, device=device.device)
        with pytest.raises(RuntimeError, match="one device"):
            there + torch.arange(3)
        with pytest.raises(RuntimeError, match="generator"):
            torch.randn(3, device=device.device, generator=torch.Generator())
        with pytest.raises(TypeError, match="float64"):
            there.double()
        q = torch.zeros(1, 1, 2, 4, device=device.device)
        with pytest.raises(NotImplementedError, match="CPU alone"):
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q)
        assert not device.reads
        there.tolist()
        assert len(device.reads) == 1
