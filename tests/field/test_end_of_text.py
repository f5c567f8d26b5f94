"""Where a text begins and where it ends are two tokens, and there may be several ends; transformers says which.

The models here say one fixed token after another, so that what they write is known.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.field.models import own

import longspan as ls
from longspan.cli.app import run as command
from longspan.stream import StreamSession
from longspan.tasks.tokenizers import Bytes, Subword, borrow, load_tokenizer

transformers = pytest.importorskip("transformers")
from longspan import hf  # noqa: E402
from longspan.cli.runs import open_run  # noqa: E402

BEGIN, END, STOP, TURN = 0, 1, 2, 3
SPECIALS = ["<s>", "</s>", "<|stop|>", "<|turn|>"]
VOCABULARY = len(SPECIALS) + 256


def byte(letter: str) -> int:
    """The token of a letter; the alphabet is that of byte-level BPE, sorted."""
    from tokenizers.pre_tokenizers import ByteLevel

    return len(SPECIALS) + sorted(ByteLevel.alphabet()).index(letter)


def tokenizer(eos: str | None = "</s>") -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    table = {symbol: index for index, symbol in enumerate([*SPECIALS, *alphabet])}
    engine: Any = Tokenizer(models.BPE(vocab=table, merges=[]))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    fast_tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=engine, bos_token="<s>", eos_token=eos)
    fast_tokenizer.add_special_tokens({"additional_special_tokens": SPECIALS[2:]})
    return fast_tokenizer


def script(embedding: Any, output: Any, chain: list[int]) -> None:
    """Weights with which every token of the chain is followed by the next; the last by itself."""
    torch.manual_seed(0)
    with torch.no_grad():
        vectors = torch.nn.functional.normalize(torch.randn(embedding.shape), dim=-1)
        embedding.copy_(vectors)
        output.zero_()
        for before, after in zip(chain, [*chain[1:], chain[-1]], strict=True):
            output[after] = vectors[before]


def scripted_llama(chain: list[int], **ends: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=BEGIN,
        **({"eos_token_id": END} | ends),
    )
    model = transformers.LlamaForCausalLM(config).eval()
    layer: Any = model.model.layers[0]
    with torch.no_grad():
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    script(model.model.embed_tokens.weight, model.lm_head.weight, chain)
    return model


def save(model: Any, folder: Path, eos: str | None = "</s>") -> Path:
    hf.convert(model, "infini", segment=4)
    model.save_pretrained(folder)
    tokenizer(eos).save_pretrained(folder)
    return folder


A, B, C, D = (byte(letter) for letter in "abcd")
# what the model says after "a"; what of it is a text, with the ends that generation_config has
CASES = {
    "the end is not the beginning": ([A, B, C, END, D], END, b"bc"),
    "a beginning is no end": ([A, B, BEGIN, C, END, D], END, b"bc"),
    "one of several": ([A, B, C, STOP, D], [END, STOP], b"bc"),
    "the last of several": ([A, B, TURN, D], [END, STOP, TURN], b"b"),
    "the tokenizer's own beside others": ([A, B, C, END, D], [STOP], b"bc"),
}


@pytest.mark.parametrize("case", CASES)
def test_every_way_to_write_stops_at_the_end(
    case: str, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    chain, ends, text = CASES[case]
    model = scripted_llama(chain)
    model.generation_config.eos_token_id = ends
    folder = save(model, tmp_path / "model")
    # the control: transformers stops where generation_config says
    written = hf.load(folder).generate(torch.tensor([[BEGIN, A]]), max_new_tokens=9, do_sample=False)[0, 2:].tolist()
    if case != "the tokenizer's own beside others":
        assert written == chain[1 : chain.index(written[-1]) + 1]
    # the command line
    capfdbinary.readouterr()
    assert command(["generate", str(folder), "--prompt", "a", "-n", "9", "--temperature", "0"]) == 0
    assert capfdbinary.readouterr().out == text
    # a session
    decoder, task = open_run(str(folder))
    assert task.tokenizer.begin == BEGIN
    session = StreamSession(decoder)
    session.feed([BEGIN, A])
    tokens = session.generate(9, temperature=0, stop=task.tokenizer.ends)
    assert task.tokenizer.decode(token for token in tokens if token not in task.tokenizer.ends) == text
    assert len(tokens) < 9
    if case != "the tokenizer's own beside others":
        assert tokens == written


@pytest.mark.parametrize("case", CASES)
def test_the_harness_stops_at_the_end(case: str, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance  # type: ignore[import-untyped]

    from longspan.harness import LongspanLM

    chain, ends, text = CASES[case]
    model = scripted_llama(chain)
    model.generation_config.eos_token_id = ends
    harness = LongspanLM(save(model, tmp_path / "model"), max_gen_toks=9)
    assert harness.eot_token_id == END
    assert harness.prefix_token_id == BEGIN
    request = Instance("generate_until", {}, ("a", {"until": ["\n\n"]}), 0)
    assert harness.generate_until([request]) == [text.decode()]
    # an empty context is the beginning of a document, never its end
    (empty,) = harness.loglikelihood([Instance("loglikelihood", {}, ("", "b"), 0)])
    with torch.no_grad():
        logits = hf.load(tmp_path / "model")(torch.tensor([[BEGIN]])).logits[0, -1]
    assert empty[0] == pytest.approx(float(logits.log_softmax(-1)[B]), abs=1e-5)


@pytest.mark.parametrize("where", ["config", "list in config", "tokenizer", "nowhere"])
def test_where_the_ends_come_from(where: str, tmp_path: Path) -> None:
    """Models without generation_config.json have them in their configuration, or only the tokenizer has one."""
    ends = {"config": STOP, "list in config": [STOP, TURN]}.get(where)
    folder = save(scripted_llama([A, B], eos_token_id=ends), tmp_path / "model", None if where == "nowhere" else "</s>")
    (folder / "generation_config.json").unlink()
    known = {"config": {END, STOP}, "list in config": {END, STOP, TURN}, "tokenizer": {END}, "nowhere": {BEGIN}}
    _, task = open_run(str(folder))
    assert set(task.tokenizer.ends) == known[where]


def test_a_run_on_a_pretrained_model_keeps_its_ends(tmp_path: Path) -> None:
    from longspan.train.pretrained import write_tokenizer

    model = scripted_llama([A, B])
    model.generation_config.eos_token_id = [END, TURN]
    folder = save(model, tmp_path / "model")
    (tmp_path / "run").mkdir()
    write_tokenizer({"source": str(folder)}, tmp_path / "run")
    again = load_tokenizer(tmp_path / "run" / "tokenizer.json")
    assert (again.begin, set(again.ends)) == (BEGIN, {END, TURN})


def test_tokenizers_keep_their_ends(tmp_path: Path) -> None:
    borrowed = borrow(tokenizer(), [STOP])
    borrowed.save(tmp_path / "tokenizer.json")
    again = load_tokenizer(tmp_path / "tokenizer.json")
    assert (again.begin, again.ends, again.text()) == (BEGIN, (END, STOP), borrowed.text())
    # those saved before ends were known begin and end with the same token
    table = json.loads((tmp_path / "tokenizer.json").read_text())
    del table["ends"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(table))
    assert load_tokenizer(tmp_path / "tokenizer.json").ends == (BEGIN,)
    assert Bytes().ends == (Bytes.begin,)
    trained = Subword.train([("text", Bytes().encode(b"to be or not to be"))], 260)
    trained.save(tmp_path / "own.json")
    assert trained.ends == load_tokenizer(tmp_path / "own.json").ends == (trained.begin,)


@pytest.mark.parametrize(
    "stop",
    [END, [END], {END, STOP}, (END,), lambda token: token == END],
    ids=["id", "list", "set", "tuple", "function"],
)
def test_a_session_takes_ends_of_any_form(stop: Any) -> None:
    session = StreamSession(scripted_decoder([A, B, C, END, D]))
    session.feed([BEGIN, A])
    assert session.generate(9, temperature=0, stop=stop) == [B, C, END]
    assert StreamSession(session.model).generate(3, temperature=0) != []


def scripted_decoder(chain: list[int]) -> ls.Decoder:
    model = own(vocab_size=VOCABULARY, dim=64, tie_embeddings=False)
    block: Any = model.blocks[0]
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
    assert model.output is not None
    script(model.embedding.weight, model.output.weight, chain)
    return model


def test_wrapped_models_know_the_ends_of_their_tokenizer(tmp_path: Path) -> None:
    borrowed = borrow(tokenizer(), [STOP])
    for chain in ([A, B, END, C], [A, B, STOP, C]):
        model = hf.LongspanForCausalLM.wrap(scripted_decoder(chain), tokenizer=borrowed).eval()
        model.save_pretrained(tmp_path / "model")
        for network in (model, transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")):
            written = network.generate(torch.tensor([[BEGIN, A]]), max_new_tokens=9, do_sample=False, pad_token_id=END)
            assert written[0].tolist() == [BEGIN, *chain[:3]]
    plain = hf.LongspanForCausalLM.wrap(scripted_decoder([A, B]), tokenizer=Bytes())
    assert (plain.config.bos_token_id, plain.config.eos_token_id) == (0, 0)
