"""The walk of one token: few frames between a training step and the kernel, and docs/architecture.md names them all."""

import re
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import longspan
from longspan.engine import flash
from longspan.models import Decoder, DecoderConfig
from longspan.tasks import Documents
from longspan.tasks.text import TextDocument
from longspan.tasks.tokenizers import Bytes
from longspan.train.config import TrainConfig
from longspan.train.distributed import Group
from longspan.train.document_source import DocumentSource
from longspan.train.step import Optimization

PACKAGE = Path(longspan.__file__).parent
PAGE = PACKAGE.parents[1] / "docs" / "architecture.md"
MOST = 12


def walk(monkeypatch: pytest.MonkeyPatch, **fields: Any) -> list[str]:
    """Frames of the library from a training step to the kernel, by name."""
    frames: list[list[str]] = []
    attend = flash.attend

    def record(*args: Any, **kwargs: Any) -> Any:
        names = ["attend"]
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if Path(frame.f_code.co_filename).is_relative_to(PACKAGE):
                names.append(frame.f_code.co_qualname)
            frame = frame.f_back
        frames.append(names[::-1])
        return attend(*args, **kwargs)

    monkeypatch.setattr(flash, "attend", record)
    config = DecoderConfig(
        vocab_size=256, dim=16, num_layers=2, num_heads=2, mixers=({"name": "window", "window": 4},), **fields
    )
    model, train = Decoder(config), TrainConfig(lanes=2, segment_length=200)
    tokenizer = Bytes()
    text = Documents([TextDocument(tokenizer.encode(b"we the people " * 50), tokenizer)], ["text"])
    Optimization(model, train, Group()).step(DocumentSource(model, text, train, Group()), 0, 1.0)
    assert frames
    assert all(names == frames[0] for names in frames[:2])
    return frames[0]


def test_few_frames_lie_between_a_training_step_and_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    names = walk(monkeypatch)
    assert names[:2] == ["Optimization.step", "DocumentSource.loss"]
    assert len(names[1:]) <= MOST, names


def test_the_architecture_names_every_frame_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    assert re.findall(r"^\| `([^`]+)` \|", PAGE.read_text(), re.MULTILINE) == walk(monkeypatch)
