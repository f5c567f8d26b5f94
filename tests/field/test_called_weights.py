"""A weight acts as its module applies it: adapters, offloading and quantized maps act wherever a weight does."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import longspan as ls
from longspan.train.loss import chunked_next_token_loss, next_token_loss

from .models import CONVERTIBLE, FIELDS, NAMES, converted, own, tokens

pytestmark = [  # of peft 0.21 beside transformers 5.23, and of torch's dynamic quantization
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning"),
]

# forms in which a part of a weight, or a parameter outside its module's call, was read
FORMS: dict[str, dict[str, Any]] = {
    "untied": {"tie_embeddings": False},
    "biased": {"output_bias": True},
    "adaptive": {"adaptive_cutoffs": (10, 30), "adaptive_div": 2.0, "output_bias": True},
    "adaptive untied": {"adaptive_cutoffs": (10, 30), "tie_embeddings": False, "tie_projections": "none"},
    "shared kv": {
        "mixers": (
            {
                "name": "mixed_heads",
                "mixers": [
                    {"name": "window", "num_heads": 1, "window": 4},
                    {"name": "compressive", "num_heads": 1, **FIELDS["compressive"]},
                ],
            },
        )
    },
    "dilated": {"mixers": ({"name": "compressive", **FIELDS["compressive"], "compression": "dilated"},)},
    "kv": {"mixers": ({"name": "transformer_xl", **FIELDS["transformer_xl"], "cache": "kv"},)},
    "reversible": {"reversible": True},
}


def wrapped(name: str) -> Any:
    """One of our models, by mechanism or form, as one of transformers."""
    hf = pytest.importorskip("longspan.hf")
    fields = {"init_std": 0.3} | FORMS.get(name, {})
    return hf.LongspanForCausalLM.wrap(own("full" if name in FORMS else name, **fields)).eval()


SUBJECTS = [
    *(pytest.param(wrapped, name, id=f"own-{name}") for name in [*NAMES, *FORMS]),
    *(pytest.param(converted, name, id=f"converted-{name}") for name in CONVERTIBLE),
]


@torch.no_grad()
def streamed(model: nn.Module, ids: Tensor, cuts: tuple[int, ...] = (9, 1, 1, 2)) -> Tensor:
    """Logits of a text in calls of so many tokens."""
    outs, cache = [], None
    for part in ids.split(cuts, 1):
        out = model(input_ids=part, past_key_values=cache, use_cache=True)
        outs.append(out.logits)
        cache = out.past_key_values
    return torch.cat(outs, 1)


def adapted(model: nn.Module, targets: str | list[str] = "all-linear") -> Any:
    """A model with adapters that act."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    return model.eval()


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=2e-5 * max(1.0, float(b.detach().abs().max())), rtol=0)


@pytest.mark.parametrize(("make", "name"), SUBJECTS)
def test_adapters_act_everywhere_and_nowhere_once_disabled(make: Callable[[str], Any], name: str) -> None:
    ids = tokens(2, 13)
    base = make(name)
    before = streamed(base, ids)
    model = adapted(base)
    with torch.no_grad():
        whole = model(input_ids=ids).logits
    assert float((whole - before).abs().max()) > 1e-2, "the adapters do nothing"
    close(streamed(model, ids), whole)
    with model.disable_adapter():
        close(streamed(model, ids), before)
    merged = model.merge_and_unload()
    with torch.no_grad():
        close(merged(input_ids=ids).logits, whole)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("chunk", [0, 5])
def test_adapters_beside_the_output_act_in_logits_and_losses(tied: bool, chunk: int) -> None:
    """An untied output layer, and a tied one by its embedding; the loss in chunks has the same value and gradients."""
    model = wrapped("full" if tied else "untied")
    ids, targets = tokens(2, 9), tokens(2, 9, seed=1)
    model = adapted(model, ["embedding"] if tied else ["output"])
    decoder = model.get_base_model().model
    learning = [p for p in model.parameters() if p.requires_grad]
    logits = decoder(ids)[0]
    expected = next_token_loss(logits, targets)
    hidden = decoder.hidden(ids)[0]
    loss = chunked_next_token_loss(hidden, decoder.head(), targets, chunk=chunk)
    close(loss, expected)
    for mine, theirs in zip(torch.autograd.grad(loss, learning), torch.autograd.grad(expected, learning), strict=True):
        close(mine, theirs)
    close(decoder.last(ids)[0], logits[:, -1])
    close(model.merge_and_unload().model(ids)[0], logits)


@pytest.mark.parametrize("where", ["cpu", pytest.param("disk", marks=pytest.mark.long)])
@pytest.mark.parametrize(("make", "name"), SUBJECTS)
def test_offloaded_models_are_the_same(make: Callable[[str], Any], name: str, where: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    ids = tokens(2, 13)
    model = make(name)
    expected = streamed(model, ids)
    offloaded, device = copy.deepcopy(model), torch.device("cpu")
    if where == "cpu":
        accelerate.cpu_offload(offloaded, device)
    else:
        accelerate.disk_offload(offloaded, str(tmp_path), device)
    assert any(p.is_meta for p in offloaded.parameters())
    close(streamed(offloaded, ids), expected)


@pytest.mark.parametrize(("make", "name"), SUBJECTS)
def test_dynamically_quantized_models_run(make: Callable[[str], Any], name: str) -> None:
    ids = tokens(2, 13)
    model = make(name)
    quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    out = streamed(quantized, ids)
    assert torch.isfinite(out).all()
    assert float((out - streamed(model, ids)).abs().max()) > 0


@pytest.mark.parametrize("kind", ["own", "converted"])
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_a_saved_model_is_loaded_with_a_device_map(kind: str, tmp_path: Path) -> None:
    """More than fits: layers stay on disk; the hooks of accelerate work on converted layers, and revert on theirs."""
    hf = pytest.importorskip("longspan.hf")
    transformers, _ = pytest.importorskip("transformers"), pytest.importorskip("accelerate")
    ids, options = tokens(2, 13), {"device_map": "auto", "max_memory": {"cpu": 9000}}
    model = wrapped("transformer_xl") if kind == "own" else converted("infini", layers=2)
    expected = streamed(model, ids)
    model.save_pretrained(tmp_path / "model")
    load = transformers.AutoModelForCausalLM.from_pretrained if kind == "own" else hf.load
    loaded = load(tmp_path / "model", offload_folder=tmp_path / "rest", **options)
    assert any(p.is_meta for p in loaded.parameters())
    if not hasattr(loaded, "hf_device_map"):
        pytest.skip(f"transformers {transformers.__version__} runs no model all of which is on disk")
    close(streamed(loaded, ids), expected)
    if kind == "converted":
        for network in (model, loaded):
            hf.revert(network)
        with torch.no_grad():
            close(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("fields", [{}, {"per_layer": True, "diagonal": True}, {"accumulate": True}], ids=str)
@torch.no_grad()
def test_recurrent_memories_are_the_same_offloaded(fields: dict[str, Any]) -> None:
    accelerate = pytest.importorskip("accelerate")
    backbone = own("full", layers=2, init_std=0.3)
    memory = ls.RecurrentMemory(backbone, num_memory_tokens=2, segment_length=4, **fields).eval()
    ids = tokens(2, 13)
    expected = memory(ids)[0]
    accelerate.cpu_offload(memory, torch.device("cpu"))
    close(memory(ids)[0], expected)
    close(memory.last(ids)[0], expected[:, -1])


@pytest.mark.parametrize("name", NAMES)
def test_sessions_of_offloaded_models_are_the_same(name: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = own(name, output_bias=True)
    session = ls.StreamSession(model)
    session.feed(tokens(1, 11)[0])
    expected = session.logits
    offloaded = own(name, output_bias=True)
    accelerate.cpu_offload(offloaded, torch.device("cpu"))
    session = ls.StreamSession(offloaded)
    session.feed(tokens(1, 11)[0])
    close(session.logits, expected)
