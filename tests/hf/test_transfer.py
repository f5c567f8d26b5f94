"""Attention transfer: errors fall, layers are independent, and nothing but what the loss says is changed."""

import copy
import math
import weakref
from typing import Any

import pytest
import torch
from tests.hf.conftest import ids, make
from tests.hf.test_convert import examples
from torch import Tensor

from longspan import hf
from longspan.errors import ConfigError, DataError, LongspanError, UnsupportedError
from longspan.hf import distillation


def batches(count: int, rows: int = 2, length: int = 32, seed: int = 0) -> list[Tensor]:
    """Random token ids, different in every batch."""
    return [ids(rows, length, seed=seed * 1000 + index) for index in range(count)]


HELD_OUT = batches(2, seed=9)
FORMS: list[tuple[str, str, dict[str, Any]]] = [
    ("infini", "heads", {"segment": 8}),
    ("gated_delta", "heads", {}),
    ("performer", "outputs", {"num_features": 8}),
    ("linear", "outputs", {}),
    ("window", "outputs", {"window": 4}),
    ("infini", "outputs", {"segment": 8}),
    ("routing", "outputs", {"num_clusters": 3, "window": 4, "shared_qk": True}),
]


def taught(name: str, loss: Any, fields: dict[str, Any], kind: str = "llama", **options: Any) -> tuple[Any, Any]:
    """A model after a short transfer, and its report."""
    model = make(kind).float()
    hf.convert(model, name, **fields)
    options = {"steps": 12, "held_out": HELD_OUT, **options}
    return model, hf.transfer(model, batches(options["steps"]), loss=loss, **options)


@pytest.mark.parametrize(("name", "loss", "fields"), FORMS)
def test_the_error_on_held_out_pieces_falls(name: str, loss: str, fields: dict[str, Any]) -> None:
    model, report = taught(name, loss, fields, steps=40, lr=5e-3)
    assert set(report.after) == {0, 1}
    for layer, before in report.before.items():
        assert report.after[layer] < before
    worst = report.ranking[0]
    assert report.after[worst] == max(report.after.values())
    assert report.to_dict()["layers"][worst]["error_after"] == report.after[worst]
    assert str(worst) in str(report).rsplit(",", 1)[1]
    # the model works as any converted model
    assert torch.isfinite(model(ids(1, 40)).logits).all()


@pytest.mark.parametrize(("name", "fields"), examples(long=True))
def test_every_mechanism_makes_steps(name: str, fields: dict[str, Any]) -> None:
    model = make("llama").float()
    hf.convert(model, name, **fields)
    has_parameters = bool(list(hf.mechanisms(model)[0].parameters()))
    for loss in ("heads", "outputs") if has_parameters else ("outputs",):
        config = hf.TransferConfig(loss=loss, steps=2)
        with hf.Transfer(model, config) as transfer:
            losses = [transfer.step(batch) for batch in batches(2)]
            assert all(0 <= value < math.inf for value in losses[-1].values())
            learned = {name for layer in transfer.layers.values() for name in layer.optimizer.state}
            assert len(learned) == sum(len(layer.trained) for layer in transfer.layers.values())
    assert torch.isfinite(model(ids(1, 40)).logits).all()


@pytest.mark.parametrize("kind", ["qwen3", "gpt2", "mistral"])
def test_families_are_taught(kind: str) -> None:
    _, report = taught("linear", "outputs", {}, kind, steps=40, lr=5e-3)
    assert sum(report.after.values()) < sum(report.before.values())


@pytest.mark.parametrize("more", [{}, {"sliding_window": 6}])
@torch.no_grad()
def test_the_target_is_the_pretrained_attention(more: dict[str, Any]) -> None:
    """The measured error is that of the original modules' outputs, also with sliding windows and padding."""
    model = make("mistral", **more).float()
    text, mask = ids(2, 32), torch.ones(2, 32, dtype=torch.int64)
    mask[0, :5] = 0
    # the first layer has the same input before and after the conversion
    outputs: list[Tensor] = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *call: outputs.append(call[2][0].double()))
    model(text, attention_mask=mask)
    hf.convert(model, "window", window=3)
    model(text, attention_mask=mask)
    with hf.Transfer(model, hf.TransferConfig(loss="outputs")) as transfer:
        errors = transfer.errors([{"input_ids": text, "attention_mask": mask}])
    target, ours, *_ = (output[mask.bool()] for output in outputs)
    assert errors[0] == pytest.approx(float((ours - target).square().sum() / target.square().sum()), rel=1e-3)


def test_layers_learn_the_same_alone_and_together() -> None:
    together, _ = taught("gated_delta", "heads", {})
    for layer in (0, 1):
        alone, report = taught("gated_delta", "heads", {}, layers=[layer - 2])
        assert set(report.after) == {layer}
        ours, theirs = alone.model.layers[layer].state_dict(), together.model.layers[layer].state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("loss", ["heads", "outputs"])
def test_only_what_the_loss_says_is_changed(loss: Any) -> None:
    model = make("llama").float().train()
    model.model.embed_tokens.requires_grad_(False)
    hf.convert(model, "infini", segment=8)
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    random_state = torch.get_rng_state()
    hf.transfer(model, batches(4), loss=loss, steps=4, held_out=HELD_OUT)
    assert torch.equal(torch.get_rng_state(), random_state)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    inside = {name for name in before if (".longspan." if loss == "heads" else ".self_attn.") in name}
    assert changed == inside
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any("longspan_substitute" in module.__dict__ for module in model.modules())


def test_padding_is_left_out() -> None:
    """Rows with padding, and documents in one row, give the gradients of the rows alone."""
    results = []
    row = ids(1, 24)
    padded = torch.cat([torch.full((1, 8), 5), row], 1)
    mask = torch.tensor([[0] * 8 + [1] * 24])
    other = torch.cat([padded, torch.full((1, 32), 7)])
    mask = torch.cat([mask, torch.zeros(1, 32, dtype=torch.int64)])
    for batch in (row, {"input_ids": other, "attention_mask": mask}):
        model = make("llama")
        hf.convert(model, "infini", segment=8)
        model.double()
        hf.transfer(model, [batch] * 3, steps=3, held_out=[batch])
        results.append(model.state_dict())
    for name, tensor in results[0].items():
        torch.testing.assert_close(tensor, results[1][name], rtol=1e-9, atol=1e-9)


def test_the_graph_of_one_layer_exists_at_a_time() -> None:
    """The most tensors saved for a backward pass at any time do not depend on the number of layers."""
    peaks = []
    for num_layers in (2, 8):
        model = make("llama").float()
        config = copy.deepcopy(model.config)
        config.num_hidden_layers = num_layers
        model = type(model)(config).eval()
        hf.convert(model, "gated_delta")
        alive = peak = total = 0

        class Saved:
            """Counts itself among the saved tensors as long as it exists."""

            def __init__(self, tensor: Tensor) -> None:
                nonlocal alive, peak, total
                self.tensor = tensor
                alive, total = alive + 1, total + 1
                peak = max(peak, alive)
                weakref.finalize(self, released)

        def released() -> None:
            nonlocal alive
            alive -= 1

        with (
            hf.Transfer(model, hf.TransferConfig(loss="outputs")) as transfer,
            torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor),
        ):
            transfer.step(ids(2, 32))
        assert alive == 0
        peaks.append(peak)
        assert total >= num_layers * 10
    assert peaks[0] == peaks[1]


def test_layers_after_the_last_taught_one_are_not_run() -> None:
    model = make("llama").float()
    hf.convert(model, "infini", segment=8)
    calls: list[int] = []
    model.model.layers[1].register_forward_hook(lambda *_: calls.append(1))
    hf.transfer(model, batches(2), steps=2, layers=[0], held_out=HELD_OUT)
    assert not calls


@pytest.mark.parametrize("loss", ["heads", "outputs"])
def test_half_precision_learns_in_single_precision(loss: Any) -> None:
    model = make("llama").bfloat16()
    hf.convert(model, "gated_delta")
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    learned: set[torch.dtype] = set()

    def note(step: int, losses: dict[int, float]) -> None:
        learned.update(parameter.dtype for parameter in model.parameters() if parameter.requires_grad)

    report = hf.transfer(model, batches(30), loss=loss, steps=30, lr=5e-3, held_out=HELD_OUT, on_step=note)
    assert learned == {torch.float32}
    assert sum(report.after.values()) < sum(report.before.values())
    assert {name: parameter.dtype for name, parameter in model.named_parameters()} == dtypes
    assert torch.isfinite(model(ids(1, 20)).logits).all()


def test_a_restart_gives_the_same_weights() -> None:
    fields: dict[str, Any] = {"num_features": 8, "redraw_every": 3}
    data = batches(8)
    whole, _ = taught("performer", "outputs", fields, steps=8)
    config = hf.TransferConfig(loss="outputs", steps=8)
    first = make("llama").float()
    hf.convert(first, "performer", **fields)
    with hf.Transfer(first, config) as transfer:
        for batch in data[:4]:
            transfer.step(batch)
        tensors = {name: tensor.clone() for name, tensor in transfer.tensors().items()}
    second = make("llama").float()
    hf.convert(second, "performer", **fields)
    with hf.Transfer(second, config) as transfer:
        transfer.load_tensors(tensors, 4)
        for batch in data[4:]:
            transfer.step(batch)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor), name


@pytest.mark.parametrize(("kind", "kept"), [("llama", "full"), ("mistral", "window")])
def test_the_worst_layers_get_their_softmax_back(kind: str, kept: str) -> None:
    more = {"sliding_window": 12} if kind == "mistral" else {}
    model = make(kind, **more).float()
    before = copy.deepcopy(model.state_dict())
    hf.convert(model, "linear")
    report = hf.transfer(model, batches(4), loss="outputs", steps=4, held_out=HELD_OUT, keep_softmax=1)
    (layer,) = report.softmax_layers
    assert layer == report.ranking[0]
    assert type(hf.mechanisms(model)[layer]).__name__ == f"{kept.capitalize()}Mechanism"
    assert [record["mixer"] for record in model.config.longspan] == ["linear", kept]
    assert model.config.longspan[0]["layers"] == [1 - layer]
    for name, tensor in model.state_dict().items():
        if f"layers.{layer}." in name:
            assert torch.equal(tensor, before[name])
    hf.revert(model)
    assert not hasattr(model.config, "longspan")


@pytest.mark.parametrize("loss", ["heads", "outputs"])
def test_distillation_brings_predictions_closer_to_those_of_the_pretrained_model(loss: Any) -> None:
    original, text = make("llama").float(), ids(2, 32, seed=9000)
    model = copy.deepcopy(original)
    hf.convert(model, "gated_delta")
    fresh = copy.deepcopy(model)
    report = hf.transfer(model, batches(40), loss=loss, steps=20, lr=5e-3, distill=20, held_out=HELD_OUT)
    assert report.divergence is not None
    assert report.divergence[1] < report.divergence[0]
    # the divergence is that of the logits of the two models
    with torch.no_grad():
        target = original(text).logits.log_softmax(-1)
        ours = [converted(text).logits.log_softmax(-1) for converted in (fresh, model)]
    before, after = ((target.exp() * (target - logits)).sum(-1).mean() for logits in ours)
    assert after < before
    with hf.Transfer(fresh, hf.TransferConfig()) as transfer:
        whole = {"input_ids": text, "attention_mask": torch.ones_like(text)}
        assert transfer.divergence([whole]) == pytest.approx(float(before), rel=1e-4)


def test_distillation_reaches_layers_before_those_that_are_not_taught() -> None:
    model = make("llama").float()
    hf.convert(model, "gated_delta")
    before = copy.deepcopy(model.state_dict())
    hf.transfer(model, batches(3), steps=1, distill=2, layers=[0], held_out=HELD_OUT)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all(".layers.0.self_attn.longspan." in name for name in changed)


def test_logits_exist_in_chunks() -> None:
    """Chunks give the divergence and gradients of whole logits, and none is larger than a chunk."""
    model, student, teacher = make("llama"), torch.randn(11, 16).double().requires_grad_(), torch.randn(11, 16).double()
    sizes: list[int] = []
    model.lm_head.register_forward_hook(lambda _module, _inputs, output: sizes.append(len(output)))
    results = []
    for chunk in (11, 4):
        sizes.clear()
        divergence = distillation.next_token_divergence(model, teacher, student, chunk)
        results.append([divergence, *torch.autograd.grad(divergence, student)])
        assert max(sizes) == chunk
    torch.testing.assert_close(*results)
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(UnsupportedError, match="logits are changed by final_logit_softcapping"):
        distillation.next_token_divergence(model, teacher, student)


def test_some_layers_are_reverted() -> None:
    model, text = make("llama"), ids(1, 20)
    before = model(text).logits
    hf.convert(model, "linear")
    whole = model(text).logits
    hf.revert(model, layers=[-1])
    assert list(hf.mechanisms(model)) == [0]
    assert model.config.longspan[0]["layers"] == [0]
    half = model(text).logits
    assert not torch.allclose(half, whole)
    with pytest.raises(ConfigError, match="layer 1 is not converted"):
        hf.revert(model, layers=[1])
    hf.revert(model, layers=[0])
    assert torch.equal(model(text).logits, before)
    assert not hasattr(model.config, "longspan")


@pytest.mark.parametrize(
    ("name", "fields", "options", "error", "message"),
    [
        ("window", {"window": 4}, {}, ConfigError, "has no parameters to learn; use loss 'outputs'"),
        ("full", {}, {}, ConfigError, "has no parameters to learn; use loss 'outputs'"),
        ("full", {}, {"loss": "outputs"}, DataError, "already computes what attention does"),
        ("infini", {"segment": 32}, {}, DataError, "use pieces longer than its segment or window"),
        ("infini", {"segment": 8}, {"loss": "weights"}, ConfigError, "must be 'heads' or 'outputs'"),
        ("infini", {"segment": 8}, {"layers": [2]}, ConfigError, r"layers = \[2\]: must be among the converted layers"),
        ("infini", {"segment": 8}, {"layers": []}, ConfigError, r"layers = \[\]: must be among"),
        ("infini", {"segment": 8}, {"steps": 9}, DataError, "the data ended after 3 of 9 steps"),
        ("infini", {"segment": 8}, {"steps": 0}, ConfigError, "transfer.steps = 0: must be at least 1"),
        ("infini", {"segment": 8}, {"lr": 0.0}, ConfigError, "transfer.lr = 0.0"),
        ("infini", {"segment": 8}, {"keep_softmax": 2}, ConfigError, "keep_softmax = 2: must be from 0 to 1"),
        ("infini", {"segment": 8}, {"held_out": []}, DataError, "no held-out tokens"),
        ("infini", {"segment": 8}, {"data": [torch.zeros(3)]}, DataError, r"token ids \(rows, length\)"),
    ],
)
def test_mistakes_are_named_in_one_line(
    name: str, fields: dict[str, Any], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = make("llama").float()
    hf.convert(model, name, **fields)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(error, match=message) as raised:
        hf.transfer(model, **{"data": batches(3), "steps": 3, "held_out": HELD_OUT, **options})
    assert "\n" not in str(raised.value)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags


def test_models_that_cannot_be_taught_are_named() -> None:
    with pytest.raises(ConfigError, match=r"not converted; call longspan.hf.convert"):
        hf.transfer(make("llama"), batches(1))
    encoder = make("bert")
    hf.convert(encoder, "window", window=4)
    with pytest.raises(UnsupportedError, match="bidirectional"):
        hf.transfer(encoder, batches(1), loss="outputs")
    model = make("llama").float()
    hf.convert(model, "infini", segment=8)
    with torch.no_grad():
        hf.mechanisms(model)[1].get_parameter("gate").fill_(torch.nan)
    before = copy.deepcopy(model.state_dict())
    with (
        hf.Transfer(model, hf.TransferConfig()) as transfer,
        pytest.raises(LongspanError, match="gradient of layer 1 is not finite at step 1; lower lr"),
    ):
        transfer.step(ids(1, 32))
    ours = model.state_dict()
    assert torch.equal(ours["model.layers.1.self_attn.q_proj.weight"], before["model.layers.1.self_attn.q_proj.weight"])


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_adapters_come_after_the_transfer() -> None:
    peft = pytest.importorskip("peft")
    model = make("llama").float()
    hf.convert(model, "infini", segment=8)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["longspan"])
    with pytest.raises(UnsupportedError, match="add adapters afterwards"):
        hf.transfer(peft.get_peft_model(model, settings), batches(1))
