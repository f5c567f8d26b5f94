"""Converted models as sessions and on the command line."""

import json
from pathlib import Path

import pytest
import torch
from tests.hf.conftest import ids, make, save_llama
from tests.laws.checks.cost import COUNTED
from torch.utils.flop_counter import FlopCounterMode

import longspan as ls
from longspan import hf
from longspan.cli.app import run
from longspan.errors import ConfigError, DataError, UnsupportedError
from longspan.hf.decoder import ConvertedDecoder
from longspan.train import chunked_next_token_loss, next_token_loss

transformers = pytest.importorskip("transformers")
TEXT = "The state of the union is what we make of it. " * 40


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with a byte-level tokenizer, as a folder."""
    return save_llama(tmp_path_factory.mktemp("pretrained") / "llama")


def test_a_session_streams_a_converted_model() -> None:
    model = make("llama")
    hf.convert(model, "infini", segment=8, gate_init=0.0)
    decoder = ConvertedDecoder(model.double())
    text = ids(1, 50)
    session = ls.StreamSession(decoder, chunk=16)
    session.feed(text[0, :23])
    size = session.nbytes
    logits = session.feed(text[0, 23:])
    assert session.nbytes == size == decoder.state_nbytes(1, 50, torch.float64)
    torch.testing.assert_close(logits, model(text).logits[0, -1], rtol=1e-9, atol=1e-9)
    expected = model.generate(text, max_new_tokens=6, do_sample=False)[0, -6:].tolist()
    assert session.fork().generate(6, temperature=0) == expected
    nats = ls.StreamSession(decoder).feed(text[0], losses=True)
    losses = torch.nn.functional.cross_entropy(model(text).logits[0, :-1], text[0, 1:], reduction="none")
    torch.testing.assert_close(nats[1:].double(), losses, rtol=1e-5, atol=1e-5)
    with pytest.raises(DataError, match="must be from 0 to 28"):
        decoder(torch.tensor([[30]]))


@pytest.mark.parametrize("mixer", ["window", "lsh", "routing", "adaptive_span", "memorizing", "window_linear"])
def test_a_first_call_computes_what_is_announced(mixer: str) -> None:
    """No scores of unused columns of a state, of which these mechanisms have many."""
    model = make("llama")
    hf.convert(model, mixer)
    decoder, text = ConvertedDecoder(model), ids(1, 100)
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        _, state = decoder(text)
    assert decoder.flops(100) == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert ls.state.nbytes(state) == decoder.state_nbytes(1, 100, torch.float64)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_packed_documents_equal_documents_alone(kind: str) -> None:
    model = make(kind)
    hf.convert(model, "infini", segment=8, gate_init=0.0)
    decoder, text = ConvertedDecoder(model.double()), ids(2, 40)
    reset = torch.zeros(2, 40, dtype=torch.bool)
    reset[0, 13] = reset[1, 30] = True
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[1, 5:9] = False
    whole, _ = decoder(text, reset=reset, mask=mask)
    first, state = decoder(text[:, :17], reset=reset[:, :17], mask=mask[:, :17])
    second, _ = decoder(text[:, 17:], state, reset=reset[:, 17:], mask=mask[:, 17:])
    torch.testing.assert_close(torch.cat([first, second], 1)[mask], whole[mask], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(whole[0, 13:], decoder(text[:1, 13:])[0][0], rtol=1e-9, atol=1e-9)
    alone = text[1:, :30][mask[1:, :30]][None]
    torch.testing.assert_close(whole[1, :30][mask[1, :30]], decoder(alone)[0][0], rtol=1e-9, atol=1e-9)


def test_models_that_do_not_stream_are_refused() -> None:
    model = make("llama")
    hf.convert(model, "infini", layers=[0])
    with pytest.raises(UnsupportedError, match="1 layers of this model are not converted"):
        ConvertedDecoder(model)
    gpt2 = make("gpt2")
    hf.convert(gpt2, "window", window=16)
    with pytest.raises(UnsupportedError, match="exceeds the 512 learned positions"):
        gpt2(ids(1, 513))


def test_a_converted_folder_streams_on_the_command_line(
    pretrained: Path, tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    def said() -> str:
        return capsysbinary.readouterr().out.decode(errors="replace")

    folder, book = str(tmp_path / "endless"), tmp_path / "book.txt"
    book.write_text(TEXT)
    assert run(["convert", str(pretrained), "--to", "infini", "--segment", "32", "-o", folder]) == 0
    assert "2 layers: infini(segment=32" in said().replace("\n", " ")
    assert json.loads((tmp_path / "endless" / "config.json").read_text())["longspan"][0]["mixer"] == "infini"
    state = str(tmp_path / "state")
    assert run(["stream", folder, str(book), "--limit", "700", "--save-state", state]) == 0
    assert "700 bytes, 700 tokens" in said()
    assert run(["stream", folder, str(book), "--skip", "700", "--load-state", state]) == 0
    assert "1,140 bytes" in said()
    assert run(["generate", folder, "--prompt-file", str(book), "--tokens", "5", "--temperature", "0"]) == 0
    said()
    assert run(["eval", folder, str(book), "--json"]) == 0
    figures = json.loads(said())
    assert 4 < figures["with_memory"]["bits_per_byte"] < 12


def test_errors_are_one_line(pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    for arguments, message in (
        (["convert", str(tmp_path / "nothing"), "--to", "infini", "-o", out], "nothing"),
        (["convert", str(pretrained), "--to", "infinity", "-o", out], "did you mean 'infini'"),
        (["convert", str(pretrained), "--to", "infini", "--layers", "a", "-o", out], "--layers 'a'"),
        (["convert", str(pretrained), "--to", "infini", "--set", "sgment=3", "-o", out], "did you mean 'segment'"),
    ):
        assert run(arguments) == 2
        error = capsys.readouterr().err.strip()
        assert message in error.splitlines()[-1]
    with pytest.raises(ConfigError):
        hf.revert(make("llama"))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_loss_in_chunks_is_that_of_the_logits(kind: str) -> None:
    """Also with a state and several documents, in the loss, its gradients and the next state."""
    model = make(kind)
    hf.convert(model, "infini", segment=8, gate_init=0.0)
    decoder, text = ConvertedDecoder(model.double()), ids(2, 40)
    reset = torch.zeros(2, 23, dtype=torch.bool)
    reset[0, 13] = True
    _, state = decoder(text[:, :17])
    runs = []
    for chunk in (0, 7):
        decoder.zero_grad()
        if chunk:
            hidden, after = decoder.hidden(text[:, 17:], state, reset=reset)
            loss = chunked_next_token_loss(hidden, decoder.head(), text[:, 17:].roll(-1, 1), chunk=chunk)
        else:
            logits, after = decoder(text[:, 17:], state, reset=reset)
            loss = next_token_loss(logits, text[:, 17:].roll(-1, 1))
        loss.backward(retain_graph=True)
        gradients = {name: p.grad for name, p in decoder.named_parameters() if p.grad is not None}
        runs.append((loss.detach(), after.live, gradients))
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-9, atol=1e-9)


def test_a_head_that_is_not_linear_is_refused() -> None:
    model = make("llama")
    hf.convert(model, "window", window=8)
    model.set_output_embeddings(torch.nn.Sequential(model.get_output_embeddings()))
    with pytest.raises(UnsupportedError, match="output layer of type Sequential"):
        ConvertedDecoder(model).head()
