"""Training and evaluation with adaptive embeddings and softmax on words, whose ids are ranks of frequency."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import longspan as ls
from longspan.tasks import TextConfig, TextTask
from longspan.tasks.words import SPECIALS, Words
from longspan.train import chunked_next_token_loss, evaluate_text, next_token_loss, read_log, run
from longspan.train.lm_evaluation import Window, place_nats
from longspan.train.loss import adaptive_head

VOCABULARY = 120


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of documents over 117 words, some far more frequent than others, each followed by its next word."""
    folder, rng = tmp_path_factory.mktemp("words"), np.random.default_rng(0)
    shares = 1 / np.arange(1, 61)
    for index in range(10):
        drawn = rng.choice(60, 300, p=shares / shares.sum())
        # every word has its own next word
        text = " ".join(f"word{rank} next{rank}" for rank in drawn)
        (folder / f"{index}.txt").write_text(text + "\n")
    return folder


@pytest.fixture
def worded(recipe: dict[str, Any], words: Path) -> dict[str, Any]:
    recipe["task"] = {"name": "text", "source": str(words), "tokenizer": "word", "vocab_size": VOCABULARY}
    xl = {"name": "transformer_xl", "segment": 16, "mem_len": 16}
    recipe["model"] |= {"adaptive_cutoffs": [12, 50], "adaptive_div": 2.0, "positions": "none", "mixers": [xl]}
    recipe["train"] |= {"steps": 60, "lr": 1e-2, "dtype": "float64", "eval_every": 0, "checkpoint_every": 0}
    return recipe


def test_a_vocabulary_of_words_is_in_order_of_frequency(words: Path) -> None:
    texts = [(path.name, np.frombuffer(path.read_bytes(), dtype=np.uint8)) for path in sorted(words.iterdir())]
    vocabulary = Words.train(texts, VOCABULARY)
    counts = Counter(int(token) for _, data in texts for token in vocabulary.encode(data))
    ranked = [counts[token] for token in range(len(SPECIALS), vocabulary.vocab_size)]
    assert ranked == sorted(ranked, reverse=True)
    assert ranked[0] > 10 * ranked[-1]


def test_training_on_words_learns_and_chunks_change_nothing(worded: dict[str, Any], tmp_path: Path) -> None:
    logs = []
    for chunk in (0, 7):
        worded["train"]["loss_chunk"] = chunk
        run(worded, tmp_path / str(chunk))
        logs.append([line for line in read_log(tmp_path / str(chunk) / "log.jsonl") if "loss" in line])
    for first, second in zip(*logs, strict=True):
        for name in ("loss", "grad_norm"):
            assert second[name] == pytest.approx(first[name], rel=1e-7), name
    losses = [line["loss"] for line in logs[0]]
    # the entropy of single words: half are drawn, half follow from the word before
    shares = 1 / np.arange(1, 61) / (1 / np.arange(1, 61)).sum()
    entropy = np.log(2) - (shares * np.log(shares)).sum()
    assert losses[0] > entropy
    assert np.mean(losses[-5:]) < 0.75 * entropy

    from longspan.train import load_run

    model, task = load_run(tmp_path / "0")
    documents = task.documents("validation")
    piece = documents[0].cut(0, 100)
    tokens, targets = torch.from_numpy(piece.tokens)[None], torch.from_numpy(piece.targets)[None]
    with torch.no_grad():
        logits, _ = model(tokens)
        hidden, _ = model.hidden(tokens)
        assert torch.allclose(logits.exp().sum(-1), torch.ones((), dtype=logits.dtype))
        expected = -logits.gather(-1, targets[..., None]).sum()
        for loss in (
            next_token_loss(logits, targets),
            chunked_next_token_loss(hidden, model.head(), targets, chunk=0),
            chunked_next_token_loss(hidden, model.head(), targets, chunk=9),
        ):
            torch.testing.assert_close(loss, expected)
    carried = place_nats(model, documents, chunk=13, batch=2)
    np.testing.assert_allclose(carried[0][:100].sum(), float(expected), rtol=1e-5)
    evaluation = evaluate_text(model, documents)
    np.testing.assert_allclose([nats.sum() for nats in carried], evaluation.nats, rtol=1e-5)
    place_nats(model, documents, Window(8, 4))


def test_a_step_computes_no_logits_of_other_clusters(worded: dict[str, Any], monkeypatch: Any) -> None:
    from longspan.models import AdaptiveHead
    from longspan.train.config import TrainConfig
    from longspan.train.distributed import Group
    from longspan.train.document_source import DocumentSource
    from longspan.train.lanes import Lanes
    from longspan.train.step import Optimization

    def never(*_: Any) -> None:
        raise AssertionError("logits of the whole vocabulary")

    torch.manual_seed(0)
    task = TextTask(TextConfig(source=worded["task"]["source"], tokenizer="word", vocab_size=VOCABULARY))
    model = ls.Decoder(
        ls.DecoderConfig(
            vocab_size=task.vocab_size,
            dim=16,
            num_layers=1,
            num_heads=2,
            adaptive_cutoffs=(12, 50),
            mixers=({"name": "window", "window": 8},),
        )
    )
    assert adaptive_head(model) is not None
    assert adaptive_head(ls.Decoder(ls.DecoderConfig(dim=16, num_layers=1, num_heads=2))) is None
    batch = next(iter(Lanes(task.documents("train"), lanes=2, segment_length=8, seed=0)))
    expected = next_token_loss(model(batch.tokens, mask=batch.mask, reset=batch.reset)[0], batch.targets, batch.graded)
    monkeypatch.setattr(AdaptiveHead, "logits", never)
    config, group = TrainConfig(lanes=2, segment_length=8), Group(device=torch.device("cpu"))
    source = DocumentSource(model, task.documents("train"), config, group)
    result = Optimization(model, config, group).step(source, 0, 1.0)
    assert result.sums["loss"] == pytest.approx(expected.item(), rel=1e-5)
