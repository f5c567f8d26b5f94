"""What transformers requires of every model in its tests of models and of generation, tested for our models.

Tested here: options of outputs, determinism, batching, signatures, embeddings, saving and loading, types,
recomputation, sequences of all kinds from `generate`. Tested elsewhere: problem types (test_classification_losses),
resized embeddings (test_resized_embeddings), the Trainer (test_trainer_life), offloading, adapters, pickles.

Left out, with the reason:
- attention weights, `output_attentions`: mechanisms make no such matrix; it is an error of one line.
- eager against sdpa, flash, flex: there is one implementation of every mechanism. "eager" and "sdpa" are accepted and
  are the same, the others are refused by transformers.
- four-dimensional masks, token types, head masks: no mechanism but `full` could honor them; refused.
- static, quantized and compiled caches, cropping, assisted and prompt-lookup decoding, contrastive search: they take
  keys and values back or store them in a form of their own; a state does not.
- tensor and pipeline plans: models here have none; data parallel training is tested with the trainer.
- `torch.fx`, gguf and kernels of the hub: not offered.
- a 'no split modules' list, encoders and decoders in one model, multimodal inputs: no such models here.
- hidden states of a RecurrentMemory: its layers run once a segment with memory tokens among the rest; refused.
"""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.field.models import CONVERTIBLE, DIM, NAMES, VOCAB, converted, own, tokens
from torch import Tensor

import longspan as ls
from longspan.errors import UnsupportedError

transformers = pytest.importorskip("transformers")
from transformers.modeling_outputs import CausalLMOutputWithPast  # noqa: E402

from longspan import hf  # noqa: E402

LAYERS = 2
# transformers 5.24 has another name for it
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


def causal(name: str = "full", **fields: Any) -> Any:
    return hf.LongspanForCausalLM.wrap(own(name, layers=LAYERS, **fields)).eval()


def encoder_config(**fields: Any) -> ls.EncoderConfig:
    return ls.EncoderConfig(**({"vocab_size": VOCAB, "dim": DIM, "num_layers": LAYERS, "num_heads": 2} | fields))


def make(kind: str) -> Any:
    """One model of each class."""
    torch.manual_seed(0)
    if kind == "masked":
        return hf.LongspanForMaskedLM.wrap(ls.MaskedLM(encoder_config()).eval()).eval()
    if kind == "classifier":
        return hf.LongspanForSequenceClassification.wrap(ls.Encoder(encoder_config()).eval(), num_labels=3).eval()
    if kind == "reversible":
        return causal(reversible=True)
    return causal("infini")


KINDS = ["causal", "masked", "classifier", "reversible"]


def padded(rows: int = 2, length: int = 9) -> tuple[Tensor, Tensor]:
    """Ids and a mask with padding in front of the first row."""
    mask = torch.ones(rows, length, dtype=torch.int64)
    mask[0, :3] = 0
    return tokens(rows, length) * mask, mask


class Recorder:
    """The definition: what each block begins with, seen by hooks, and the last norm's output."""

    def __init__(self, stack: Any) -> None:
        self.seen: list[Tensor] = []
        self.handles = [block.register_forward_pre_hook(self._before) for block in stack.blocks]
        self.handles.append(stack.norm.register_forward_hook(self._after))
        self.rows: Any = None

    def _before(self, module: Any, args: Any) -> None:
        self.rows = args[2]
        self.seen.append(self.rows.scatter(args[0]))

    def _after(self, module: Any, args: Any, output: Tensor) -> None:
        self.seen.append(self.rows.scatter(output))


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_hidden_states_of_every_mechanism(name: str) -> None:
    model = causal(name)
    ids, mask = padded()
    recorder = Recorder(model.model)
    out = model(ids, attention_mask=mask, output_hidden_states=True)
    assert len(out.hidden_states) == LAYERS + 1
    for ours, seen in zip(out.hidden_states, recorder.seen, strict=True):
        assert ours.shape == (2, 9, DIM)
        assert torch.equal(ours, seen)
    assert not out.hidden_states[0][0, :3].any()
    torch.testing.assert_close(out.hidden_states[0][1], model.get_input_embeddings()(ids[1]))
    logits = model.model.logits(out.hidden_states[-1])
    torch.testing.assert_close(logits[mask.bool()], out.logits[mask.bool()])
    plain = model(ids, attention_mask=mask)
    assert plain.hidden_states is None
    torch.testing.assert_close(plain.logits, out.logits)
    model.config.output_hidden_states = True
    assert len(model(ids).hidden_states) == LAYERS + 1


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_keep_their_gradient(kind: str) -> None:
    model = make(kind)
    out = model(tokens(2, 9), output_hidden_states=True)
    assert len(out.hidden_states) == LAYERS + 1
    for hidden in out.hidden_states:
        hidden.retain_grad()
    out.logits.square().sum().backward(retain_graph=True)
    # the means of two streams are not what the next block reads
    through = out.hidden_states[-1:] if kind == "reversible" else out.hidden_states
    assert all(hidden.grad is not None and hidden.grad.any() for hidden in through)
    for hidden in out.hidden_states:
        model.zero_grad()
        hidden.square().sum().backward(retain_graph=True)
        assert model.get_input_embeddings().weight.grad.any()


def test_hidden_states_of_reversible_blocks_are_means_of_their_streams() -> None:
    model, ids = causal(reversible=True), tokens(2, 9)
    y1 = y2 = model.get_input_embeddings()(ids)
    rows = ls.mixers.BatchLayout(torch.zeros(2, dtype=torch.int64), 9)
    expected = [y1]
    for block in model.model.blocks:
        y1 = y1 + block.attend(y2, None, rows)[0]
        y2 = y2 + block.feed(y1)
        expected.append((y1 + y2) / 2)
    expected[-1] = model.model.norm(expected[-1])
    output = model(ids, output_hidden_states=True)
    torch.testing.assert_close(output.hidden_states, tuple(expected))
    torch.testing.assert_close(output.logits, model(ids).logits)
    gradients = []
    for with_hidden_states in (True, False):
        model.zero_grad()
        model(ids, labels=ids, output_hidden_states=with_hidden_states).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("name", CONVERTIBLE)
@torch.no_grad()
def test_converted_models_have_the_outputs_of_theirs(name: str) -> None:
    model = converted(name, layers=LAYERS)
    ids = tokens(2, 9)
    out = model(ids, output_hidden_states=True, use_cache=False)
    assert [hidden.shape for hidden in out.hidden_states] == [(2, 9, DIM)] * (LAYERS + 1)
    torch.testing.assert_close(model.lm_head(out.hidden_states[-1]), out.logits)
    as_tuple = model(ids, output_hidden_states=True, use_cache=False, return_dict=False)
    torch.testing.assert_close(as_tuple, out.to_tuple())
    columns = torch.tensor([0, 4, 8])
    assert torch.allclose(model(ids, logits_to_keep=columns).logits, out.logits[:, columns], atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_tuple_has_what_a_named_output_has(kind: str) -> None:
    model = make(kind)
    ids = tokens(2, 9)
    labels = torch.tensor([0, 2]) if kind == "classifier" else ids
    for options in ({}, {"labels": labels}, {"output_hidden_states": True}):
        named, plain = model(ids, **options), model(ids, return_dict=False, **options)
        assert type(plain) is tuple
        assert len(plain) == len(named.to_tuple())
        for ours, theirs in zip(plain, named.to_tuple(), strict=True):
            if isinstance(theirs, (Tensor, tuple)):
                torch.testing.assert_close(ours, theirs)
            else:
                assert type(ours) is type(theirs)
    model.config.return_dict = False
    assert torch.equal(model(ids)[0], named.logits)
    assert not isinstance(model(ids, return_dict=True), tuple)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_logits_of_some_columns(name: str) -> None:
    model = causal(name, output_bias=True, tie_embeddings=False)
    model.model.output_bias.data.normal_()
    ids, mask = padded()
    whole = model(ids, attention_mask=mask).logits
    assert whole.shape == (2, 9, VOCAB)
    columns: list[Any] = [0, 1, 4, torch.tensor([0, 3, 8]), torch.arange(9) > 5, torch.tensor([-1])]
    for selection in columns:
        expected = whole[:, selection] if isinstance(selection, Tensor) else whole[:, -selection:]
        for labels in (None, ids):
            output = model(ids, attention_mask=mask, logits_to_keep=selection, labels=labels)
            torch.testing.assert_close(output.logits, expected)
            if labels is not None:
                torch.testing.assert_close(output.loss, model(ids, attention_mask=mask, labels=ids).loss)


@torch.no_grad()
def test_logits_of_some_columns_of_other_models() -> None:
    memory = hf.LongspanForCausalLM.wrap(
        ls.RecurrentMemory(own("full"), segment_length=4, num_memory_tokens=2).eval()
    ).eval()
    adaptive = hf.LongspanForCausalLM.wrap(own(adaptive_cutoffs=(20,))).eval()
    ids = tokens(2, 9)
    for model in (memory, adaptive):
        whole = model(ids).logits
        torch.testing.assert_close(whole, model.model(ids)[0])
        for selection in (1, torch.tensor([2, 8])):
            expected = whole[:, selection] if isinstance(selection, Tensor) else whole[:, -selection:]
            torch.testing.assert_close(model(ids, logits_to_keep=selection).logits, expected)
    with pytest.raises(UnsupportedError, match="output_hidden_states: a recurrent memory"):
        memory(ids, output_hidden_states=True)
    with pytest.raises(UnsupportedError, match="pass input_ids"):
        memory(inputs_embeds=torch.zeros(2, 9, DIM))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_attention_weights_are_refused_in_one_line(kind: str) -> None:
    with pytest.raises(UnsupportedError, match="attention_map"):
        make(kind)(tokens(2, 9), output_attentions=True)


@pytest.mark.parametrize("where", ["call", "config"])
@torch.no_grad()
def test_attention_weights_of_converted_models_are_refused_too(where: str) -> None:
    model = converted("infini")
    model.set_attn_implementation("eager")
    if where == "config":
        model.config.output_attentions = True
    with pytest.raises(UnsupportedError, match="output_attentions"):
        model(tokens(2, 9), **({"output_attentions": True} if where == "call" else {}))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_the_implementations_of_attention_that_have_a_meaning(implementation: str, tmp_path: Path) -> None:
    for number, kind in enumerate(KINDS):
        model = make(kind)
        folder = tmp_path / str(number)
        model.save_pretrained(folder)
        again = type(model).from_pretrained(folder, attn_implementation=implementation).eval()
        assert again.config._attn_implementation == implementation
        torch.testing.assert_close(again(tokens(2, 9)).logits, model(tokens(2, 9)).logits)
        model.set_attn_implementation(implementation)
        built = type(model)._from_config(model.config, attn_implementation=implementation)
        assert built.config._attn_implementation == implementation


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_calls(kind: str) -> None:
    """Determinism, batching, signature, main input, embeddings given in place of ids."""
    model = make(kind)
    ids = tokens(3, 9)
    logits = model(ids).logits
    assert torch.equal(model(ids).logits, logits)
    for row in range(3):
        torch.testing.assert_close(model(ids[row : row + 1]).logits, logits[row : row + 1], rtol=1e-5, atol=1e-5)
    names = list(inspect.signature(model.forward).parameters)
    assert names[:2] == ["input_ids", "attention_mask"]
    assert model.main_input_name == "input_ids"
    embedding = model.get_input_embeddings()
    torch.testing.assert_close(model(inputs_embeds=embedding(ids)).logits, logits)
    model.set_input_embeddings(torch.nn.Embedding.from_pretrained(embedding.weight.clone()))
    torch.testing.assert_close(model(ids).logits, logits)
    output = model.get_output_embeddings()
    assert output is None or isinstance(output, torch.nn.Linear)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_saving_and_loading(kind: str, tmp_path: Path) -> None:
    model = make(kind)
    ids = tokens(2, 9)
    model.save_pretrained(tmp_path / "once")
    again, info = type(model).from_pretrained(tmp_path / "once", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(again.eval()(ids).logits, model(ids).logits)
    again.save_pretrained(tmp_path / "twice")
    assert (tmp_path / "once" / "config.json").read_text() == (tmp_path / "twice" / "config.json").read_text()
    config = transformers.AutoConfig.from_pretrained(tmp_path / "once")
    assert config.to_dict() == hf.LongspanConfig.from_dict(config.to_dict()).to_dict()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fresh = type(model)(config).eval()
    assert any(not torch.equal(fresh.state_dict()[name], tensor) for name, tensor in state.items())
    fresh.load_state_dict(state)
    torch.testing.assert_close(fresh(ids).logits, model(ids).logits)
    half = type(model).from_pretrained(tmp_path / "once", dtype=torch.bfloat16).eval()
    assert half.dtype == torch.bfloat16
    assert half(ids).logits.dtype == torch.bfloat16
    half.save_pretrained(tmp_path / "half")
    assert type(model).from_pretrained(tmp_path / "half").dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_training_and_recomputation(kind: str) -> None:
    ids = tokens(2, 9)
    labels = torch.tensor([0, 2]) if kind == "classifier" else ids
    gradients = []
    for recompute in (False, True):
        model = make(kind).train()
        if recompute:
            model.gradient_checkpointing_enable()
            assert model.is_activation_checkpointing
            assert model.is_gradient_checkpointing
        model(ids, labels=labels).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        assert all(gradient is not None for gradient in gradients[-1].values())
    torch.testing.assert_close(gradients[0], gradients[1])
    model.gradient_checkpointing_disable()
    # reversible blocks are always recomputed
    assert model.is_activation_checkpointing == (kind == "reversible")


QUICK = ["infini", "linear", "memory"]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.long) for name in [*NAMES, "memory"]]
)
@torch.no_grad()
def test_sequences_of_all_kinds(name: str) -> None:
    """Greedy, sampled, beams, several of them, with and without cache, from embeddings, with all that is recorded."""
    if name == "memory":
        memory = ls.RecurrentMemory(own("full"), segment_length=4, num_memory_tokens=2).eval()
        model = hf.LongspanForCausalLM.wrap(memory).eval()
    else:
        model = causal(name)
        model.model.embedding.weight.mul_(20)
    assert model.can_generate()
    ids, mask = padded()
    options = {"attention_mask": mask, "max_new_tokens": 4, "pad_token_id": 0}
    greedy = model.generate(ids, do_sample=False, **options)
    assert greedy.shape == (2, 13)
    assert torch.equal(model.generate(ids, do_sample=False, use_cache=False, **options), greedy)
    # as rows alone, without padding
    alone = model.generate(ids[:1, 3:], do_sample=False, max_new_tokens=4, pad_token_id=0)
    assert torch.equal(alone[0], greedy[0, 3:])
    beams = model.generate(ids, num_beams=2, num_return_sequences=2, do_sample=False, **options)
    assert torch.equal(
        model.generate(ids, num_beams=2, num_return_sequences=2, do_sample=False, use_cache=False, **options), beams
    )
    sampled = model.generate(ids, do_sample=True, top_k=5, num_return_sequences=2, **options)
    assert sampled.shape == (4, 13)
    recorded = model.generate(
        ids, do_sample=False, return_dict_in_generate=True, output_scores=True, output_logits=True, **options
    )
    assert torch.equal(recorded.sequences, greedy)
    assert len(recorded.logits) == 4
    whole = model(greedy, attention_mask=torch.cat([mask, torch.ones(2, 4, dtype=torch.int64)], 1)).logits
    for step, logits in enumerate(recorded.logits):
        torch.testing.assert_close(logits, whole[:, 8 + step].float(), rtol=1e-3, atol=1e-3)
    state = {CACHE: model(greedy[1:, :9])[CACHE]}
    resumed = model.generate(greedy[1:], max_new_tokens=2, do_sample=False, **state)
    longer = model.generate(ids[1:], do_sample=False, max_new_tokens=6, pad_token_id=0)
    assert torch.equal(resumed[:, :15], longer)


@pytest.mark.parametrize("name", ["full", "infini", "linear"])
@torch.no_grad()
def test_generated_sequences_with_hidden_states_and_from_embeddings(name: str) -> None:
    model = causal(name)
    model.model.embedding.weight.mul_(20)
    ids = tokens(2, 9)
    recorded = model.generate(
        ids, do_sample=False, max_new_tokens=3, return_dict_in_generate=True, output_hidden_states=True
    )
    assert [len(step) for step in recorded.hidden_states] == [LAYERS + 1] * 3
    assert [step[0].shape for step in recorded.hidden_states] == [(2, 9, DIM), (2, 1, DIM), (2, 1, DIM)]
    embedded = model.generate(inputs_embeds=model.get_input_embeddings()(ids), do_sample=False, max_new_tokens=3)
    assert torch.equal(embedded, recorded.sequences[:, 9:])
    for options in ({}, {"logits_to_keep": 0}):
        assert torch.equal(model.generate(ids, do_sample=False, max_new_tokens=3, **options), recorded.sequences)
