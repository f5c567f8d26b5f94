"""A small corpus, a tiny model, and a run that takes a second."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longspan.models import Decoder, DecoderConfig
from longspan.tasks import Documents
from longspan.tasks.text import TextDocument
from longspan.tasks.tokenizers import Bytes
from longspan.train import read_log

Losses = Callable[[Path], list[dict[str, Any]]]
WORDS = ["we", "the", "people", "of", "a", "more", "perfect", "union", "establish", "justice", "tranquility"]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models gain nothing from threads, and lose much where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def text_of(seed: int, words: int) -> str:
    """Random words of `WORDS`, which a model can learn."""
    return " ".join(np.random.default_rng(seed).choice(WORDS, words).tolist())


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 12 documents of 60 to 1,800 bytes."""
    folder = tmp_path_factory.mktemp("corpus")
    for index in range(12):
        (folder / f"{index:02d}.txt").write_text(text_of(index, 10 + 27 * index))
    return folder


@pytest.fixture
def recipe(corpus: Path) -> dict[str, Any]:
    """A recipe whose 20 steps take about half a second."""
    return {
        "model": {"dim": 16, "num_layers": 2, "num_heads": 2, "mixers": [{"name": "window", "window": 12}]},
        "task": {"name": "text", "source": str(corpus)},
        "train": {
            "steps": 20,
            "lanes": 4,
            "segment_length": 16,
            "warmup": 4,
            "log_every": 1,
            "eval_every": 8,
            "eval_tokens": 200,
            "checkpoint_every": 5,
            "threads": 1,
        },
    }


@pytest.fixture
def documents() -> Documents:
    """Seven documents of odd lengths."""
    texts = [text_of(seed, words).encode() for seed, words in enumerate((9, 1, 14, 4, 4, 11, 2))]
    tokenizer = Bytes()
    items = [TextDocument(tokenizer.encode(text), tokenizer) for text in texts]
    return Documents(items, [f"d{i}" for i in range(len(items))], "seven")


@pytest.fixture
def model() -> Decoder:
    """A model in fp64."""
    torch.manual_seed(0)
    config = DecoderConfig(dim=16, num_layers=2, num_heads=2, mixers=({"name": "window", "window": 12},), init_std=0.3)
    return Decoder(config).double()


@pytest.fixture
def losses() -> Losses:
    """Reads the part of a run's log that must be identical however often the run was stopped."""

    def read(folder: Path) -> list[dict[str, Any]]:
        names = ("step", "loss", "bits_per_byte", "lr", "grad_norm", "tokens", "validation")
        return [{name: line[name] for name in names if name in line} for line in read_log(folder / "log.jsonl")]

    return read
