"""Models pickle, copy and keep no graph from step to step, before and after training, as a Llama does."""

import copy
import gc
import io
import pickle
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.field.models import CONVERTIBLE, NAMES, converted, llama, own, tokens

import longspan as ls

hf = pytest.importorskip("longspan.hf")

KINDS = [*(("own", name) for name in NAMES), *(("converted", name) for name in CONVERTIBLE)]


def make(kind: str, name: str) -> Any:
    """A small model as one of transformers."""
    return converted(name) if kind == "converted" else hf.LongspanForCausalLM.wrap(own(name))


def through_file(model: Any) -> Any:
    """`torch.save` and `torch.load` of the whole model."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_cloudpickle(model: Any) -> Any:
    """What clusters send to their workers."""
    return pickle.loads(pytest.importorskip("cloudpickle").dumps(model))


COPIES: list[Any] = [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), through_file, through_cloudpickle]


def train(model: Any, text: torch.Tensor) -> torch.Tensor:
    """One training step with auxiliary losses; the model is then in evaluation mode. Returns the loss."""
    model.train()
    loss: torch.Tensor = model(text, labels=text).loss
    extra = hf.aux_losses(model) if hasattr(model.config, "longspan") else []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (loss + sum(extra)).backward()
    optimizer.step()
    model.eval()
    return loss


@pytest.mark.parametrize(("kind", "name"), KINDS)
def test_copies_compute_what_the_model_does_and_change_independently(kind: str, name: str) -> None:
    model, text = make(kind, name), tokens(2, 11)
    loss = train(model, text)
    with torch.no_grad():
        before = model(text).logits
        twins = [duplicate(model) for duplicate in COPIES]
        # the graph of the step is still there, as it is in the middle of any training loop
        assert loss.grad_fn is not None
        for parameter in model.parameters():
            parameter.mul_(1.5)
        changed = model(text).logits
        assert not torch.equal(changed, before)
        for twin in twins:
            assert torch.equal(twin(text).logits, before)
            assert type(twin) is type(model)
            for mine, theirs in zip(twin.modules(), model.modules(), strict=True):
                assert type(mine) is type(theirs)
        if kind == "converted":
            # the copy's hooks are its own: without them it is the original model again
            layers = twins[1].model.layers
            hf.revert(twins[1])
            assert type(layers[0].self_attn) is type(llama().model.layers[0].self_attn)
            assert not hasattr(twins[1].config, "longspan")
            assert torch.equal(model(text).logits, changed)
            assert hf.mechanisms(model)


@pytest.mark.parametrize(("kind", "name"), KINDS)
def test_copies_train_as_the_model_does(kind: str, name: str) -> None:
    model, text = make(kind, name), tokens(2, 11)
    twin = copy.deepcopy(model)
    for network in (model, twin):
        torch.manual_seed(0)
        train(network, text)
    for mine, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(("kind", "name"), KINDS)
def test_no_graph_is_left_after_a_step(kind: str, name: str) -> None:
    class Mark:
        """Lives as long as a node of the graph."""

    marks: list[weakref.ref[Mark]] = []

    def leave_mark(module: Any, args: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and output.grad_fn is not None:
            mark = Mark()
            metadata: Any = output.grad_fn.metadata
            metadata["mark"] = mark
            marks.append(weakref.ref(mark))

    model, text = make(kind, name).train(), tokens(2, 11)
    for module in model.modules():
        module.register_forward_hook(leave_mark)
    gc.freeze()  # skip the objects that exist already: searching them takes half a second
    try:
        loss = model(text, labels=text).loss
        assert any(mark() is not None for mark in marks)
        del loss
        assert not any(mark() is not None for mark in marks)
        assert not any(type(live) is torch.Tensor and live.grad_fn is not None for live in gc.get_objects())
    finally:
        gc.unfreeze()
    assert all(buffer.grad_fn is None for buffer in model.buffers())


@pytest.mark.parametrize("name", ["adaptive_span", "routing"])
def test_auxiliary_losses_train_while_the_loss_exists_and_are_read_afterwards(name: str) -> None:
    model, text = converted(name, layers=2).train(), tokens(2, 11)
    loss = model(text, labels=text).loss
    extra = hf.aux_losses(model)
    assert len(extra) == 2
    values = [float(penalty.detach()) for penalty in extra]
    assert all(penalty.requires_grad for penalty in extra)
    del extra
    (loss * 0 + sum(hf.aux_losses(model))).backward()
    assert any(bool(p.grad.abs().sum() > 0) for p in model.parameters() if p.grad is not None)
    del loss
    assert [float(penalty) for penalty in hf.aux_losses(model)] == values
    assert not any(penalty.requires_grad for penalty in hf.aux_losses(model))
    with torch.no_grad():
        model(text)
    assert not any(penalty.requires_grad for penalty in hf.aux_losses(model))


@pytest.mark.parametrize("name", NAMES)
def test_states_sessions_and_memories_copy(name: str) -> None:
    model, text = own(name), tokens(1, 11)
    recurrent = ls.RecurrentMemory(own(name), num_memory_tokens=2, segment_length=4).eval()
    for whole in (model, recurrent):
        if not whole.traits.streams:
            continue
        session = ls.StreamSession(whole)
        session.feed(text[0])
        for duplicate in (copy.deepcopy, COPIES[1]):
            twin = duplicate(session)
            assert torch.equal(twin.logits, session.logits)
            assert twin.generate(3, temperature=0) == session.fork().generate(3, temperature=0)
    if model.traits.streams:
        wrapped = hf.LongspanForCausalLM.wrap(model)
        with torch.no_grad():
            cache = wrapped(text, use_cache=True).past_key_values
            twin = pickle.loads(pickle.dumps(cache))
            ours, theirs = (wrapped(text[:, :2], past_key_values=past).logits for past in (cache, twin))
        assert torch.equal(ours, theirs)


def test_a_bert_pickles() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.BertModel(transformers.BertConfig(**sizes, intermediate_size=32)).eval()
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2)).eval()
    for network in (model, gpt2):
        hf.convert(network, "window", window=4)
        twin = COPIES[1](network)
        assert torch.equal(twin(tokens(1, 9))[0], network(tokens(1, 9))[0])


def test_classes_of_a_user_pickle() -> None:
    model = llama()
    attention = model.model.layers[0].self_attn
    attention.__class__ = Louder
    hf.convert(model, "full")
    twin = COPIES[1](model)
    hf.revert(twin)
    assert type(twin.model.layers[0].self_attn) is Louder


modeling = pytest.importorskip("transformers.models.llama.modeling_llama")


class Louder(modeling.LlamaAttention):  # type: ignore[misc, name-defined]
    """An attention module that no library knows."""


@pytest.mark.long
def test_another_process_reads_them(tmp_path: Path) -> None:
    models, text = [converted(name) for name in CONVERTIBLE], tokens(2, 9)
    for model in models:
        train(model, text)
    with torch.no_grad():
        expected = [model(text).logits for model in models]
    (tmp_path / "models.pickle").write_bytes(pickle.dumps((models, text, expected)))
    code = (
        "import pickle, sys, torch\n"
        "models, text, expected = pickle.load(open(sys.argv[1], 'rb'))\n"
        "for model, logits in zip(models, expected, strict=True):\n"
        "    torch.testing.assert_close(model(text).logits, logits)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "models.pickle")], check=True, timeout=300)
