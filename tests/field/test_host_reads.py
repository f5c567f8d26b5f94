"""The host reads what lays a call out once; without values (meta, fake, exported) calls run for their shapes."""

from typing import Any

import pytest
import torch
from tests.emulated_device import emulated
from tests.field.models import CONVERTIBLE, DIM, FIELDS, HEADS, NAMES, VOCAB, converted, own, tokens
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import longspan as ls
from longspan.errors import UnsupportedError

CACHE = pytest.importorskip("longspan.hf.cache").CACHE
ConvertedDecoder = pytest.importorskip("longspan.hf").ConvertedDecoder
BOUNDED = [name for name in NAMES if own(name).traits.bounded]
WAITS = {"_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero"}


class Reads(TorchDispatchMode):
    """Counts the operations for which a host waits."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function._schema.name.split("::")[1] in WAITS
        return function(*args, **(kwargs or {}))


def call(kind: str, model: Any, device: Any = None) -> tuple[Tensor, Any, dict[str, Tensor]]:
    """Tokens, state and keywords of a call."""
    mask, reset = torch.ones(2, 9, dtype=torch.bool), torch.zeros(2, 9, dtype=torch.bool)
    mask[0, :3] = mask[1, -1] = False
    reset[0, 5] = True
    text, keywords = tokens(2, 9), {}
    if "mask" in kind:
        keywords["mask"] = mask.to(device)
    if "reset" in kind:
        keywords["reset"] = reset.to(device)
    state = None
    if not kind.startswith("first"):
        with torch.no_grad():
            _, state = model(tokens(2, 6).to(device), None)
    return text[:, :1].to(device) if kind == "decode" else text.to(device), state, keywords


KINDS = ["first", "first mask", "cut", "decode", "cut mask reset"]
LONG = pytest.mark.long
EXPORTED = ("window", "infini")  # where tests are quick, as an export takes seconds


@pytest.mark.parametrize("kind", [*(pytest.param(kind, marks=LONG) for kind in KINDS[:-2]), *KINDS[-2:]])
@pytest.mark.parametrize("name", NAMES)
def test_no_layer_reads_on_the_cpu(name: str, kind: str) -> None:
    model = own(name, layers=2)
    text, state, keywords = call(kind, model)
    with torch.no_grad(), Reads() as reads:
        model(text, state, **keywords)
    assert reads.count == 0


@pytest.mark.parametrize("kind", ["decode", "cut mask reset"])
@pytest.mark.parametrize("name", NAMES)
def test_a_call_reads_a_device_once_at_most(name: str, kind: str) -> None:
    model = own(name, layers=2)
    with emulated() as device:
        model.to(device.device)
        text, state, keywords = call(kind, model, device.device)
        device.reads.clear()
        with torch.no_grad():
            model(text, state, **keywords)
        assert len(device.reads) <= 1, device.reads


@pytest.mark.parametrize("kind", [pytest.param("mask", marks=LONG), "decode"])
@pytest.mark.parametrize("name", CONVERTIBLE)
def test_a_call_of_a_converted_model_reads_a_device_once_at_most(name: str, kind: str) -> None:
    model = converted(name, layers=2)
    with emulated() as device, torch.no_grad():
        model.to(device.device)
        text, keywords = tokens(2, 9).to(device.device), {}
        if kind == "mask":
            keywords["attention_mask"] = (torch.arange(9) > torch.tensor([[2], [0]])).to(device.device)
        else:
            cache = model(text, use_cache=True)[CACHE]
            keywords[CACHE], text = cache, text[:, :1]
        device.reads.clear()
        model(text, **keywords)
        assert len(device.reads) <= 1, device.reads


@pytest.mark.parametrize("layers", [1, 3])
def test_a_session_over_a_converted_model_reads_as_often_for_any_depth(layers: int) -> None:
    model = converted("infini", layers=layers)
    with emulated() as device, torch.no_grad():
        decoder = ConvertedDecoder(model.to(device.device))
        _, state = decoder.last(tokens(1, 9).to(device.device), None)
        device.reads.clear()
        decoder.last(tokens(1, 1).to(device.device), state)
        assert len(device.reads) <= 2, device.reads  # how many tokens were read, and the layout


@LONG
@pytest.mark.parametrize("name", NAMES)
def test_a_training_step_reads_no_more_than_that(name: str) -> None:
    model = own(name, layers=2).train()
    with emulated() as device:
        model.to(device.device)
        model(tokens(2, 9).to(device.device), None, aux_losses=[])[0].sum().backward()
        assert len(device.reads) <= 1, device.reads


@pytest.mark.filterwarnings("ignore:.*get_attr:UserWarning")  # of constants, in torch 2.7
@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in EXPORTED else LONG) for name in BOUNDED])
def test_decoders_export_for_a_fixed_length(name: str) -> None:
    model = own(name)
    program = torch.export.export(model, (tokens(2, 9),), strict=False)
    fresh_ids = tokens(2, 9, seed=5)
    with torch.no_grad():
        assert torch.allclose(program.module()(fresh_ids)[0], model(fresh_ids)[0], atol=1e-5)


def test_an_export_with_a_state_says_what_it_lacks() -> None:
    model = own("window")
    with torch.no_grad():
        _, state = model(tokens(2, 9), None)
    with pytest.raises(UnsupportedError, match="fixed length"):
        torch.export.export(model, (tokens(2, 9), state), strict=False)


def shapes(state: Any) -> dict[str, tuple[int, ...]]:
    return {} if state is None else {name: tuple(t.shape) for name, t in ls.state.tensors(state).items()}


@pytest.mark.parametrize("kind", ["meta", pytest.param("fake", marks=LONG)])
@pytest.mark.parametrize("name", NAMES)
def test_tensors_without_values_go_through(name: str, kind: str) -> None:
    model = own(name)
    with torch.device("meta") if kind == "meta" else FakeTensorMode(), torch.no_grad():
        empty = own(name)
        text = torch.zeros(2, 9, dtype=torch.int64)
        mask = torch.ones(2, 9, dtype=torch.bool)
        outputs = [empty(text, None, mask=mask)]
        for width in (9, 1):
            outputs.append(empty(text[:, :width], outputs[-1][1]))
    with torch.no_grad():
        expected = [model(tokens(2, 9), None)]
        for width in (9, 1):
            expected.append(model(tokens(2, width), expected[-1][1]))
    for (out, state), (logits, after) in zip(outputs, expected, strict=True):
        assert out.shape == logits.shape
        if name != "adaptive_span":  # the length of its state depends on the spans, which have no values here
            assert shapes(state) == shapes(after)


def test_tables_made_of_fake_tensors_stay_with_their_call() -> None:
    model, text = own("bp"), tokens(2, 7)
    expected = own("bp")(text)[0]
    with FakeTensorMode():
        own("bp")(torch.zeros(2, 7, dtype=torch.int64))
    with torch.inference_mode():
        model(text)
    logits, _ = model(text)
    assert torch.equal(logits, expected)
    logits.sum().backward()


@pytest.mark.parametrize("kind", ["first", pytest.param("cut", marks=LONG), "decode", "cut mask reset"])
@pytest.mark.parametrize(
    "fields",
    [{}, *(pytest.param({name: True}, marks=LONG) for name in ("per_layer", "accumulate"))],
)
def test_recurrent_memory_reads_once_however_many_segments(fields: dict[str, Any], kind: str) -> None:
    torch.manual_seed(0)
    model = ls.RecurrentMemory(own("window"), num_memory_tokens=2, segment_length=2, **fields).eval()
    with emulated() as device:
        model.to(device.device)
        text, state, keywords = call(kind, model, device.device)
        device.reads.clear()
        with torch.no_grad():
            model(text, state, **keywords)
        assert len(device.reads) <= 1, device.reads


@pytest.mark.parametrize(
    "name", ["linear", *(pytest.param(name, marks=LONG) for name in ("window", "performer", "bp"))]
)
def test_masked_models_read_once_at_most(name: str) -> None:
    sizes: dict[str, Any] = {"vocab_size": VOCAB, "dim": DIM, "num_layers": 2, "num_heads": HEADS}
    model = ls.MaskedLM(ls.EncoderConfig(**sizes, mixers=({"name": name, **FIELDS[name]},))).eval()
    with emulated() as device:
        model.to(device.device)
        mask, reset = torch.ones(2, 9, dtype=torch.bool), torch.zeros(2, 9, dtype=torch.bool)
        mask[0, :3], reset[0, 5] = False, True
        keywords = {"mask": mask.to(device.device), "reset": reset.to(device.device)}
        text = tokens(2, 9).to(device.device)
        device.reads.clear()
        with torch.no_grad():
            model(text, **keywords)
        assert len(device.reads) <= 1, device.reads
