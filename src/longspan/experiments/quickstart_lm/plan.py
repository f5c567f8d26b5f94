"""The plan of a quickstart: sizes that follow from the recipe and the text, and paths of the output."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longspan.errors import ConfigError, DataError

# bytes: compared after the resumption; before the first measurement of memory
COMPARED = 65_536
BLOCK = 65_536
# bytes of each held-out document, in the comparison of memories
HEAD = 4096
PROMPT, WRITTEN = 300, 500
# the same outputs with less work: the cache holds keys and values instead of hidden states
INFERENCE = "model.mixers.0.cache=kv"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes, inputs and output paths of one run of the quickstart.

    Attributes:
        recipe: the training recipe, plain data.
        folder: folder of all output.
        text: the file to stream.
        text_name: name of the text on the page.
        size: bytes of the text.
        mem_len: length of the memory in training.
    """

    recipe: Mapping[str, Any]
    folder: Path
    text: Path
    text_name: str
    size: int
    mem_len: int

    @property
    def run(self) -> Path:
        """Folder of the training run."""
        return self.folder / "run"

    @property
    def device(self) -> str:
        """Device of training and reading, as `--device` names it."""
        return str(self.recipe.get("train", {}).get("device", "auto"))

    @property
    def half(self) -> int:
        """Number of bytes read before the state is saved."""
        return self.size // 2

    @property
    def compared(self) -> int:
        """Number of bytes after the resumption that are compared with an uninterrupted stream.

        Whole blocks: if one of the two cut the last block short, its matrix products would have other shapes, and
        perhaps another last bit.
        """
        return max(min(COMPARED, self.size // 4) // self.block, 1) * self.block

    @property
    def block(self) -> int:
        """Number of bytes between two measurements."""
        return min(BLOCK, max(1024, self.size // 60))

    @property
    def memory_lengths(self) -> tuple[int, ...]:
        """Memory lengths to compare, from 0 to four times that of training."""
        length = self.mem_len
        return tuple(sorted({0, length // 4, length // 2, length, 2 * length, 4 * length}))

    def describe_training(self) -> str:
        """Describe the model, the training text and the length of the training in one line."""
        train, source = self.recipe.get("train", {}), self.recipe.get("task", {}).get("source", "sotu")
        minutes, steps = train.get("minutes"), train.get("steps")
        end = f"for {minutes:g} minutes" if minutes is not None else f"for {steps or 1000:,} steps"
        return f"a byte-level Transformer-XL on {'speeches (sotu)' if source == 'sotu' else source} {end}"


def make_plan(recipe: Mapping[str, Any], folder: Path, text: str) -> Plan:
    """Return the plan for a recipe and a text, after writing the text to a file if it is `kjv`.

    Raises:
        ConfigError: the recipe is not for a byte-level transformer_xl.
        DataError: the text is missing, or shorter than 4,096 bytes.
    """
    first = (recipe.get("model", {}).get("mixers") or [{}])[0]
    if first.get("name") != "transformer_xl" or recipe.get("task", {}).get("tokenizer", "bytes") != "bytes":
        raise ConfigError(
            "quickstart-lm: the recipe must model bytes with a transformer_xl first; `longspan train` takes any recipe"
        )
    path = _text_file(text, folder)
    size = path.stat().st_size
    if size < 4096:
        raise DataError(f"{path}: has {size:,} bytes, too few to stop halfway; use a text of at least 4,096 bytes")
    return Plan(
        recipe=recipe,
        folder=folder,
        text=path,
        text_name="the King James Bible" if text == "kjv" else path.name,
        size=size,
        mem_len=first.get("mem_len", 512),
    )


def _text_file(text: str, folder: Path) -> Path:
    """Return the file to stream: `text` itself, or `folder/kjv.txt`, which is written if `text` is `kjv`.

    Raises:
        DataError: there is no such file.
    """
    if text != "kjv":
        if not Path(text).is_file():
            raise DataError(f"{text}: no such file; --text takes kjv or a file")
        return Path(text)
    from longspan.files import write_atomically
    from longspan.tasks.sources import read_source

    ((_, data),) = read_source("kjv")
    return write_atomically(folder / "kjv.txt", lambda path: path.write_bytes(data.tobytes()))
