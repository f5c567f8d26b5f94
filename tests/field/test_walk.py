"""The walk of one token: few frames between a training step and the kernel, and docs/architecture.md names them all."""

import re
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import longspan
from longspan.engine import flash
from longspan.models import Decoder, DecoderConfig
from longspan.train.config import TrainConfig
from longspan.train.distributed import Group
from longspan.train.lanes import Batch
from longspan.train.step import Stepper

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
        vocab_size=16, dim=16, num_layers=2, num_heads=2, mixers=({"name": "window", "window": 4},), **fields
    )
    stepper = Stepper(Decoder(config), TrainConfig(lanes=2), Group())
    tokens = torch.randint(16, (2, 200))
    real = torch.ones(2, 200, dtype=torch.bool)
    stepper.step([Batch(tokens, tokens, real, tokens, tokens, None, None)], step=0, rate=1.0)
    assert frames
    assert all(names == frames[0] for names in frames[:2])
    return frames[0]


def test_few_frames_lie_between_a_training_step_and_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    names = walk(monkeypatch)
    assert names[0] == "Stepper.step"
    assert len(names) <= MOST, names


def test_the_architecture_names_every_frame_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    assert re.findall(r"^\| `([^`]+)` \|", PAGE.read_text(), re.MULTILINE) == walk(monkeypatch)
