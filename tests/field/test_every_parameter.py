"""Every parameter that exists gets a gradient in every forward; what a form does not use does not exist."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

import longspan as ls
from longspan.contract.gradients import with_gradients
from longspan.errors import CheckpointError
from longspan.files import write_tensors

from .models import CONVERTIBLE, DIM, FIELDS, HEADS, NAMES, converted, own, tokens

SHARED = {"lsh": {}, "routing": {"shared_qk": True}}
LENGTHS = (1, 3, 13)  # no segment closes in the first two


def without_gradient(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def forms() -> list[Any]:
    """Every form of every mechanism that the law matrix knows, in two layers of four heads."""
    return [
        pytest.param({"name": name, **fields}, id=f"{name}-{number}")
        for name in NAMES
        for number, fields in enumerate(ls.mixers.examples(name))
        if fields.get("cache") != "kv"  # for inference alone
    ]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("mixer", forms())
def test_every_parameter_of_our_models_gets_a_gradient(mixer: dict[str, Any], length: int) -> None:
    model = own(num_heads=4, mixers=(mixer,)).train()
    aux_losses: list[torch.Tensor] = []
    logits = model(tokens(2, length), aux_losses=aux_losses)[0]
    ls.mixers.with_aux_losses(logits.square().mean(), aux_losses).backward()
    assert not without_gradient(model)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_gets_a_gradient_in_a_call_with_a_state(name: str) -> None:
    model = own(name).train()
    state = ls.state.detach(model(tokens(1, 6))[1])
    for length in (1, 2):
        model.zero_grad()
        model(tokens(1, length), state)[0].square().mean().backward()
        assert not without_gradient(model)


@pytest.mark.parametrize(
    "fields", [{"reversible": True}, {"checkpoint": True}, {"adaptive_cutoffs": (10, 30)}], ids=str
)
@pytest.mark.parametrize("name", ["infini", "memorizing", "compressive"])
def test_every_parameter_of_other_kinds_of_models_gets_a_gradient(name: str, fields: dict[str, Any]) -> None:
    model = own(name, **fields).train()
    model(tokens(2, 3))[0].square().mean().backward()
    assert not without_gradient(model)


MEMORIES: list[dict[str, Any]] = [
    {},
    {"update": "gated"},
    {"accumulate": True},
    {"per_layer": True},
    {"per_layer": True, "diagonal": True},
]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("fields", MEMORIES, ids=str)
def test_every_parameter_of_a_recurrent_memory_gets_a_gradient(fields: dict[str, Any], length: int) -> None:
    model = ls.RecurrentMemory(own(layers=2), num_memory_tokens=2, segment_length=4, **fields).train()
    model(tokens(2, length))[0].square().mean().backward()
    assert not without_gradient(model)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", [*CONVERTIBLE, *(f"shared {name}" for name in SHARED)])
def test_every_parameter_of_a_converted_model_gets_a_gradient(name: str, length: int) -> None:
    shared = name.startswith("shared ")
    model = (shared_llama(name.removeprefix("shared ")) if shared else converted(name)).train()
    model(tokens(2, length)).logits.square().mean().backward()
    assert not without_gradient(model)


def shared_llama(name: str) -> Any:
    hf = pytest.importorskip("longspan.hf")
    from .models import llama

    model = llama()
    hf.convert(model, name, **(FIELDS[name] | {"shared_qk": True}))
    return model


@pytest.mark.parametrize("kind", ["decoder", "memory", "masked"])
def test_every_parameter_of_heads_around_models_gets_a_gradient(kind: str) -> None:
    hf = pytest.importorskip("longspan.hf")
    ids, labels = tokens(2, 6), torch.tensor([0, 1])
    if kind == "memory":
        memory = ls.RecurrentMemory(own(tie_embeddings=False), num_memory_tokens=2, segment_length=4)
        model: Any = ls.models.RecurrentClassifier(memory, 2).train()
        model(ids)[0].square().mean().backward()
    elif kind == "decoder":
        decoder = own(tie_embeddings=False, output_bias=True)
        model = hf.LongspanForSequenceClassification.wrap(decoder, num_labels=2).train()
        model(input_ids=ids, labels=labels).loss.backward()
    else:
        masked = ls.models.MaskedLM(ls.EncoderConfig(vocab_size=50, dim=DIM, num_layers=1, num_heads=HEADS))
        model = hf.LongspanForMaskedLM.wrap(masked).train()
        model(input_ids=ids, labels=ids).loss.backward()
    assert not without_gradient(model)


# -- what a form does not use ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHARED)
def test_shared_keys_have_no_projection(name: str, tmp_path: Path) -> None:
    model: Any = own(name)
    rest = own(name, mixers=({"name": name, **FIELDS[name], "shared_qk": False},))
    named = {key for key, _ in model.named_parameters()}
    assert not any("k_proj" in key for key in named)
    assert rest.num_parameters() - model.num_parameters() == DIM * DIM
    core = model.blocks[0].mixer
    assert core.projections.flops(7) == 3 * 2 * 7 * DIM * DIM
    # files of earlier versions have the weight
    ls.models.save_model(model, tmp_path)
    saved = {**model.state_dict(), "blocks.0.mixer.projections.k_proj.weight": torch.zeros(DIM, DIM)}
    loaded = own(name)
    with torch.no_grad():
        for p in loaded.parameters():
            p.zero_()
    ls.models.load_weights(loaded, saved, "saved")
    ids = tokens(1, 9)
    torch.testing.assert_close(loaded(ids)[0], model(ids)[0], atol=0, rtol=0)
    loaded.load_state_dict(saved)


@pytest.mark.parametrize("name", SHARED)
def test_sessions_of_earlier_versions_continue(name: str, tmp_path: Path) -> None:
    model: Any = own(name)
    ls.models.save_model(model, tmp_path)
    unused = "blocks.0.mixer.projections.k_proj.weight"
    weights = {**model.state_dict(), unused: torch.ones(DIM, DIM)}
    session = ls.StreamSession(model)
    session.feed(tokens(1, 9))
    # as an earlier version named the model, which counted the weight
    model.blocks[0].mixer.projections.k_proj = torch.nn.Linear(DIM, DIM, bias=False)
    torch.nn.init.ones_(model.blocks[0].mixer.projections.k_proj.weight)
    session.save(tmp_path / "session.state")
    with pytest.raises(CheckpointError, match="weights or configuration"):
        ls.StreamSession.load(ls.models.load_model(tmp_path), tmp_path / "session.state")
    write_tensors(tmp_path / "model.safetensors", weights, {})
    loaded = ls.models.load_model(tmp_path)
    again = ls.StreamSession.load(loaded, tmp_path / "session.state")
    torch.testing.assert_close(again.logits, session.logits, atol=0, rtol=0)
    with torch.no_grad():
        loaded.blocks[0].mixer.projections.q_proj.weight.mul_(2)
    with pytest.raises(CheckpointError, match="weights or configuration"):
        ls.StreamSession.load(loaded, tmp_path / "session.state")


def test_a_compression_to_no_slots_has_no_parameters() -> None:
    for how in ("conv", "dilated"):
        mixer = {"name": "compressive", **FIELDS["compressive"], "compressed_len": 0, "compression": how}
        model = own(mixers=(mixer,))
        assert not any("compressor" in key for key, _ in model.named_parameters())
        saved = dict(model.state_dict()) | {"blocks.0.mixer.core.compressor.conv": torch.zeros(DIM, 2 * DIM)}
        model.load_state_dict(saved)
        ls.models.load_weights(model, saved, "saved")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", SHARED)
def test_a_converted_model_keeps_its_keys_for_revert(name: str, tmp_path: Path) -> None:
    hf, peft = pytest.importorskip("longspan.hf"), pytest.importorskip("peft")
    from .models import llama

    plain, model = llama(), shared_llama(name)
    key = "model.layers.0.self_attn.k_proj.weight"
    resting = model.model.layers[0].self_attn.k_proj
    assert not resting.weight.requires_grad
    assert key not in dict(model.named_parameters())
    torch.testing.assert_close(model.state_dict()[key], plain.state_dict()[key], atol=0, rtol=0)
    model.double()
    assert resting.weight.dtype == torch.float64
    model.float()
    model.save_pretrained(tmp_path)
    loaded = hf.load(tmp_path)
    ids = tokens(1, 9)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    values = {name: 2 * value for name, value in model.state_dict().items()}
    model.load_state_dict(values)
    torch.testing.assert_close(resting.weight, values[key], atol=0, rtol=0)
    for network in (model, loaded):
        hf.revert(network)
        assert dict(network.named_parameters())[key].requires_grad
        assert [n for n, _ in network.named_parameters()] == [n for n, _ in plain.named_parameters()]
    for parameter_name, value in plain.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[parameter_name], value, atol=0, rtol=0)
    adapters = peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj"])
    named = [n for n, _ in peft.get_peft_model(shared_llama(name), adapters).named_parameters() if "lora" in n]
    assert named
    assert not any("k_proj" in n for n in named)


# -- two processes ---------------------------------------------------------------------------------------------------


def reduced(rank: int, port: int, subjects: list[tuple[str, str]], failed: Any) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    for kind, name in subjects:
        try:
            if kind == "own":
                model = ls_causal(own(name))
            else:
                model = shared_llama(name) if kind == "shared" else converted(name)
            parallel = DistributedDataParallel(model.train())
            for length in (13, 3, 1):  # each forward waits for what the one before did not reduce
                ids = tokens(2, length, seed=rank)
                out = parallel(input_ids=ids, labels=ids if length > 1 else None)
                (out.logits.square().mean() if out.loss is None else out.loss).backward()
            assert not without_gradient(model)
        except (RuntimeError, AssertionError) as error:
            failed.append(f"{kind} {name}: {error}"[:300])
    dist.destroy_process_group()


def ls_causal(model: nn.Module) -> Any:
    import longspan.hf as hf

    return hf.LongspanForCausalLM.wrap(model)


def train_in_two(subjects: list[tuple[str, str]]) -> list[str]:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with mp.Manager() as manager:
        failed = manager.list()
        spawn(reduced, args=(port, subjects, failed), nprocs=2)
        return list(failed)


@pytest.mark.long
def test_every_mechanism_trains_in_two_processes() -> None:
    pytest.importorskip("longspan.hf")
    subjects = [("own", name) for name in NAMES] + [("converted", name) for name in CONVERTIBLE]
    assert not train_in_two(subjects + [("shared", name) for name in SHARED])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_unused_parameters_are_zero_whatever_they_hold(dtype: torch.dtype) -> None:
    out, unused = torch.tensor([1.5, -0.0, 7e30], dtype=dtype), torch.full((2, 3), torch.nan, requires_grad=True)
    scalar = torch.tensor(torch.inf, dtype=torch.float64, requires_grad=True)
    tied = with_gradients(out, [unused, scalar])
    assert tied.dtype == dtype
    assert torch.equal(tied, out)
    tied.sum().backward()
    for parameter in (unused, scalar):
        assert parameter.grad is not None
        assert not parameter.grad.any()
    assert with_gradients(out, [torch.ones(2)]) is out
