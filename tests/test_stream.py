import itertools
from pathlib import Path

import pytest
import torch

import longspan as ls
from longspan.stream import sample

MIXERS = (
    {"name": "transformer_xl", "segment": 8, "mem_len": 8},
    {"name": "full"},
    {"name": "window", "window": 6, "blocks": True},
)


@pytest.fixture(scope="module")
def model() -> ls.Decoder:
    torch.manual_seed(0)
    config = ls.DecoderConfig(vocab_size=40, dim=32, num_layers=3, num_heads=4, num_kv_heads=2, mixers=MIXERS)
    return ls.Decoder(config).eval()


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, 40, (700,), generator=torch.Generator().manual_seed(1))


def test_losses_and_logits_equal_one_pass(model: ls.Decoder, tokens: torch.Tensor) -> None:
    with torch.no_grad():
        logits = model(tokens[None])[0][0]
    nats = torch.nn.functional.cross_entropy(logits[:-1], tokens[1:], reduction="none")
    session = ls.StreamSession(model)
    cuts = [0, 1, 2, 130, 130, 700]
    losses = torch.cat([session.feed(tokens[a:b], losses=True) for a, b in itertools.pairwise(cuts)])
    torch.testing.assert_close(losses[1:], nats, atol=1e-4, rtol=1e-4)
    assert losses[0].item() == pytest.approx(torch.tensor(40.0).log().item())
    torch.testing.assert_close(session.logits, logits[-1], atol=1e-4, rtol=1e-4)
    assert session.position == 700
    assert session.nbytes == model.state_nbytes(1, 700)


def test_saved_loaded_and_forked_sessions_continue_bit_for_bit(
    model: ls.Decoder, tokens: torch.Tensor, tmp_path: Path
) -> None:
    session = ls.StreamSession(model, chunk=64)
    session.feed(tokens[:333])
    fork = session.fork()
    session.save(tmp_path / "s")
    loaded = ls.StreamSession.load(model, tmp_path / "s")
    rest = [s.feed(tokens[333:], losses=True) for s in (session, fork, loaded)]
    assert torch.equal(rest[0], rest[1])
    assert torch.equal(rest[0], rest[2])
    assert loaded.position == session.position


def test_a_fork_is_independent(model: ls.Decoder, tokens: torch.Tensor) -> None:
    session = ls.StreamSession(model)
    session.feed(tokens[:100])
    fork = session.fork()
    before = fork.logits.clone()
    session.feed(tokens[100:400])
    assert torch.equal(fork.logits, before)
    again = ls.StreamSession(model)
    again.feed(tokens[:100])
    assert torch.equal(fork.feed(tokens[100:200]), again.feed(tokens[100:200]))


def test_another_models_state_is_refused(model: ls.Decoder, tokens: torch.Tensor, tmp_path: Path) -> None:
    session = ls.StreamSession(model)
    session.feed(tokens[:10])
    session.save(tmp_path / "s")
    reinitialized = ls.Decoder(model.config)
    with pytest.raises(ls.CheckpointError, match="another model: weights or configuration"):
        ls.StreamSession.load(reinitialized, tmp_path / "s")
    small = ls.Decoder(ls.DecoderConfig(vocab_size=40, dim=32, mixers=({"name": "full"},)))
    with pytest.raises(ls.CheckpointError, match="another model"):
        ls.StreamSession.load(small, tmp_path / "s")


def test_generation_equals_rereading_and_stops(model: ls.Decoder, tokens: torch.Tensor) -> None:
    session = ls.StreamSession(model)
    session.feed(tokens[:50])
    written = session.generate(20, temperature=0)
    text = tokens[:50].tolist()
    for token in written:
        with torch.no_grad():
            assert int(model(torch.tensor([text]))[0][0, -1].argmax()) == token
        text.append(token)
    first = written[0]
    session = ls.StreamSession(model)
    session.feed(tokens[:50])
    assert session.generate(20, temperature=0, stop=lambda token: token == first) == [first]


def test_generation_is_repeatable_with_a_generator(model: ls.Decoder, tokens: torch.Tensor) -> None:
    runs = []
    for _ in range(2):
        session = ls.StreamSession(model)
        session.feed(tokens[:50])
        runs.append(session.generate(15, top_k=10, top_p=0.9, generator=torch.Generator().manual_seed(5)))
    assert runs[0] == runs[1]


def test_sampling() -> None:
    logits = torch.tensor([0.0, 3.0, 2.0, -1.0])
    assert sample(logits, temperature=0) == 1
    assert {sample(logits, top_k=1) for _ in range(20)} == {1}
    assert {sample(logits, top_p=0.1) for _ in range(20)} == {1}
    generator = torch.Generator().manual_seed(0)
    counts = torch.bincount(torch.tensor([sample(logits, generator=generator) for _ in range(2000)]), minlength=4)
    torch.testing.assert_close(counts / 2000, logits.softmax(0), atol=0.04, rtol=0)


def test_wrong_input_is_refused(model: ls.Decoder) -> None:
    session = ls.StreamSession(model)
    with pytest.raises(ls.DataError, match="token id 40 is outside the model's vocabulary of 40"):
        session.feed([1, 40])
    with pytest.raises(ls.ConfigError, match="reads one sequence"):
        session.feed(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ls.ConfigError, match="temperature"):
        session.generate(1, temperature=-1)
    assert session.feed([]).shape == (40,)
    assert session.feed([], losses=True).shape == (0,)


def test_a_reset_starts_from_the_beginning(model: ls.Decoder, tokens: torch.Tensor) -> None:
    session = ls.StreamSession(model)
    first = session.feed(tokens[:30]).clone()
    session.reset()
    assert session.position == 0
    assert torch.equal(session.feed(tokens[:30]), first)
