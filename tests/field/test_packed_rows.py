"""Documents packed into one row, separated as callers of transformers do: every document computes as if alone."""

from typing import Any

import pytest
import torch
from tests.field.models import CONVERTIBLE, DIM, FIELDS, HEADS, NAMES, VOCAB, converted, llama, own, tokens
from torch import Tensor

from longspan.errors import ConfigError, UnsupportedError

transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("longspan.hf")
CACHE = pytest.importorskip("longspan.hf.cache").CACHE

LENGTHS = (5, 3, 6)
STARTS = (0, 5, 8)
OURS = [pytest.param("own", name) for name in NAMES] + [pytest.param("converted", name) for name in CONVERTIBLE]


def model_of(kind: str, name: str) -> Any:
    return hf.LongspanForCausalLM.wrap(own(name)).eval() if kind == "own" else converted(name)


def positions(*lengths: int) -> Tensor:
    return torch.cat([torch.arange(length) for length in lengths])[None]


def packings() -> list[dict[str, Any]]:
    reset = torch.zeros(1, 14, dtype=torch.bool)
    reset[0, list(STARTS)] = True
    ends = torch.tensor([0, 5, 8, 14])
    flash = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 6, "max_length_k": 6}
    index = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))[None].int()
    return [
        {"position_ids": positions(*LENGTHS)},
        {"reset": reset},
        flash,
        {"seq_idx": index},
        {"position_ids": positions(*LENGTHS), "seq_idx": index, **flash},
        {"position_ids": torch.arange(14)[None], "reset": reset},
    ]


@pytest.mark.parametrize(("kind", "name"), OURS)
@torch.no_grad()
def test_every_document_computes_as_if_alone(kind: str, name: str) -> None:
    model, text = model_of(kind, name), tokens(1, 14)
    alone = torch.cat([model(part, use_cache=False).logits for part in text.split(LENGTHS, 1)], 1)
    leaking = model(text, use_cache=False).logits
    assert float((leaking - alone).abs().max()) > 1e-3
    for packing in packings():
        actual = model(text, use_cache=False, **packing).logits
        torch.testing.assert_close(actual, alone, rtol=1e-4, atol=1e-4)
    # with a cache, cut inside a document, and with padding whose positions mean nothing
    where = positions(*LENGTHS)
    first = model(text[:, :7], position_ids=where[:, :7], use_cache=True)
    second = model(text[:, 7:], position_ids=where[:, 7:], use_cache=True, **{CACHE: first[CACHE]})
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), alone, rtol=1e-4, atol=1e-4)
    padded = torch.cat([text[:, :6], torch.zeros(1, 2, dtype=torch.int64), text[:, 6:]], 1)
    odd = torch.cat([where[:, :6], torch.tensor([[1, 0]]), where[:, 6:]], 1)
    mask = (padded > 0).long()
    actual = model(padded, attention_mask=mask, position_ids=odd).logits
    torch.testing.assert_close(actual[mask.bool()][None], alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_flattened_batches_are_those_of_llama() -> None:
    rows = [{"input_ids": part[0].tolist()} for part in tokens(1, 14).split(LENGTHS, 1)]
    collate = transformers.DataCollatorWithFlattening(return_tensors="pt", return_flash_attn_kwargs=True)
    batch = dict(collate(rows))
    batch.pop("labels")
    expected = llama()(**batch, use_cache=False).logits
    actual = converted("full")(**batch, use_cache=False).logits
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_layers_that_keep_their_keys_keep_documents_apart(use_cache: bool, padded: bool) -> None:
    model, text = llama(layers=2), tokens(1, 14)
    alone = torch.cat([model(part).logits for part in text.split(LENGTHS, 1)], 1)
    hf.convert(model, "full", layers=[1])
    where, mask = positions(*LENGTHS), torch.ones(1, 14, dtype=torch.int64)
    if padded:
        text, where = (torch.cat([t.new_zeros(1, 2), t], 1) for t in (text, where))
        mask = torch.cat([mask.new_zeros(1, 2), mask], 1)
    out = model(text, attention_mask=mask if padded else None, position_ids=where, use_cache=use_cache).logits
    torch.testing.assert_close(out[mask.bool()][None], alone, rtol=1e-4, atol=1e-4)
    cut = 9
    first = model(text[:, :cut], attention_mask=mask[:, :cut], position_ids=where[:, :cut], use_cache=True)
    for column in range(cut, text.shape[1]):
        step = slice(column, column + 1)
        more = model(
            text[:, step], attention_mask=mask[:, : column + 1], position_ids=where[:, step], **{CACHE: first[CACHE]}
        )
        torch.testing.assert_close(more.logits[0, 0], out[0, column], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "name"), OURS)
@torch.no_grad()
def test_a_first_call_may_begin_anywhere(kind: str, name: str) -> None:
    model, text = model_of(kind, name), tokens(2, 9)
    expected = model(text, use_cache=False).logits
    begins = torch.tensor([[3], [0]]) + torch.arange(9)
    first = model(text[:, :4], position_ids=begins[:, :4], use_cache=True)
    second = model(text[:, 4:], position_ids=begins[:, 4:], use_cache=True, **{CACHE: first[CACHE]})
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), expected, rtol=1e-4, atol=1e-4)
    wrong = begins[:, 4:].clone()
    wrong[0, 2] += 1
    with pytest.raises(ConfigError, match="row 0 has 10 in column 2; use 9 to continue"):
        model(
            text[:, 4:],
            position_ids=wrong,
            use_cache=True,
            **{CACHE: model(text[:, :4], position_ids=begins[:, :4], use_cache=True)[CACHE]},
        )


@pytest.mark.parametrize("kind", ["own", "converted"])
@torch.no_grad()
def test_generate_continues_the_last_document(kind: str) -> None:
    model, text = model_of(kind, "linear"), tokens(1, 14)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": None, "eos_token_id": None}
    alone = model.generate(text[:, 8:], **options)[:, 6:]
    assert torch.equal(model.generate(text, position_ids=positions(*LENGTHS), **options)[:, 14:], alone)
    assert torch.equal(
        model.generate(text, position_ids=positions(*LENGTHS), prefill_chunk_size=4, **options)[:, 14:], alone
    )
    if kind == "own":
        reset = torch.zeros(1, 14, dtype=torch.bool)
        reset[0, 8] = True
        assert torch.equal(model.generate(text, reset=reset, **options)[:, 14:], alone)
        assert torch.equal(model.generate(text, reset=reset, num_beams=2, **options)[:, :14], text)
        mask = torch.arange(14)[None] >= 8
        assert torch.equal(model.generate(text, mask=mask, **options)[:, 14:], alone)


@pytest.mark.parametrize("position", [0, 2])
@torch.no_grad()
def test_encoders_keep_documents_apart(position: int) -> None:
    text, where = tokens(1, 14), positions(*LENGTHS)
    sizes = {"vocab_size": VOCAB, "hidden_size": DIM, "num_hidden_layers": 2, "num_attention_heads": HEADS}
    more: dict[str, Any] = {
        "intermediate_size": 32,
        "max_position_embeddings": 40,
        "pad_token_id": 1 if position else 0,
    }
    kind = "Roberta" if position else "Bert"
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**sizes, **more)).eval()
    alone = torch.cat(
        [model(part, position_ids=torch.arange(part.shape[1])[None] + position)[0] for part in text.split(LENGTHS, 1)],
        1,
    )
    for layers in (None, [1]):
        hf.convert(model, "full", layers=layers)
        actual = model(text, position_ids=where + position)[0]
        torch.testing.assert_close(actual, alone, rtol=1e-4, atol=1e-4)
        hf.revert(model)
    import longspan as ls

    mine = hf.LongspanForMaskedLM.wrap(
        ls.models.MaskedLM(
            ls.EncoderConfig(vocab_size=VOCAB, dim=DIM, num_layers=1, num_heads=HEADS, mixers=({"name": "full"},))
        )
    ).eval()
    apart = torch.cat([mine(part).logits for part in text.split(LENGTHS, 1)], 1)
    for packing in packings():
        torch.testing.assert_close(mine(text, **packing).logits, apart, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["own", "converted"])
def test_inconsistent_layouts_raise_errors_of_one_line(kind: str) -> None:
    model, text = model_of(kind, "full"), tokens(2, 6)
    line = torch.arange(6)[None]
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ConfigError, "use 2 to continue", {"position_ids": torch.tensor([[0, 1, 3, 4, 5, 6]])}),
        (ConfigError, "use 0 to", {"position_ids": line - 1}),
        (ConfigError, "expected shape", {"position_ids": line[:, :4]}),
        (ConfigError, "expected integers", {"position_ids": line.float()}),
        (UnsupportedError, "several dimensions", {"position_ids": line.expand(3, 2, -1)}),
        (UnsupportedError, "which keys are visible", {"attention_mask": torch.ones(2, 1, 6, 6)}),
        (ConfigError, "attention_mask: expected shape", {"attention_mask": torch.ones(2, 9)}),
        (ConfigError, "reset: expected", {"reset": torch.ones(2, 5, dtype=torch.bool)}),
        (ConfigError, "have the same meaning", {"mask": line.expand(2, -1) >= 0, "attention_mask": torch.ones(2, 6)}),
        (ConfigError, "cu_seq_lens_q: expected", {"cu_seq_lens_q": torch.tensor([0, 9, 4])}),
        (ConfigError, "need cu_seq_lens_q", {"max_length_q": 4}),
        (UnsupportedError, "differs", {"cu_seq_lens_q": torch.tensor([0, 4]), "cu_seq_lens_k": torch.tensor([0, 5])}),
        (ConfigError, "seq_idx: expected", {"seq_idx": torch.zeros(2, 3)}),
    ]
    for error, says, arguments in cases:
        with pytest.raises(error, match=says) as raised:
            model(text, use_cache=False, **arguments)
        assert "\n" not in str(raised.value)


@torch.no_grad()
def test_learned_positions_are_those_of_the_document() -> None:
    sizes = {"vocab_size": VOCAB, "n_embd": DIM, "n_head": HEADS, "n_layer": 1, "n_positions": 20}
    torch.manual_seed(0)
    model, text = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval(), tokens(1, 14)
    expected = model(text, position_ids=positions(*LENGTHS), use_cache=False).logits
    later = model(text, position_ids=torch.arange(4, 18)[None]).logits
    hf.convert(model, "full")
    for packing in packings()[:5]:
        torch.testing.assert_close(model(text, **packing).logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(text, position_ids=torch.arange(4, 18)[None]).logits, later, rtol=1e-4, atol=1e-4)
    learned = hf.LongspanForCausalLM.wrap(own("full", positions="learned", max_positions=20)).eval()
    alone = torch.cat([learned(part).logits for part in text.split(LENGTHS, 1)], 1)
    torch.testing.assert_close(learned(text, position_ids=positions(*LENGTHS)).logits, alone, rtol=1e-4, atol=1e-4)
    with pytest.raises(UnsupportedError, match="learned positions"):
        learned(text, position_ids=torch.arange(4, 18)[None])


def test_no_matrix_of_the_length_squared_is_made() -> None:
    """transformers would make one of packed positions, which no converted layer reads."""
    shapes: list[tuple[int, ...]] = []
    model = converted("window")

    def look(module: Any, args: Any, kwargs: Any) -> None:
        shapes.extend(tuple(value.shape) for value in kwargs.values() if isinstance(value, Tensor))

    model.model.layers[0].register_forward_pre_hook(look, with_kwargs=True)
    model(tokens(1, 14), position_ids=positions(*LENGTHS), use_cache=False)
    assert shapes
    assert all(shape[-2:] != (14, 14) for shape in shapes)
    assert FIELDS["window"]["window"] < 14
