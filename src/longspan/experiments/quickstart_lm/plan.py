"""What a quickstart does: sizes that follow the recipe and the text, and where everything goes."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longspan.errors import ConfigError, DataError

# of the first bytes after the resumption, and before memory is measured first
COMPARED = 65_536
BLOCK = 65_536
# of each held-back document, in the comparison of memories
HEAD = 4096
PROMPT, WRITTEN = 300, 500
# the same outputs with less work: keys and values are carried in place of hidden states
INFERENCE = "model.mixers.0.memory=kv"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A quickstart.

    Attributes:
        recipe: plain data.
        folder: of all output.
        text: the file that is streamed.
        text_name: what it is called.
        text_argument: how the verb was told about it.
        size: bytes of it.
        mem_len: memory the model is trained with.
    """

    recipe: Mapping[str, Any]
    folder: Path
    text: Path
    text_name: str
    text_argument: str
    size: int
    mem_len: int

    @property
    def run(self) -> Path:
        """The folder of the run."""
        return self.folder / "run"

    @property
    def device(self) -> str:
        """Where it is trained and read, as `--device` names it."""
        return str(self.recipe.get("train", {}).get("device", "auto"))

    @property
    def half(self) -> int:
        """Bytes before the state is saved."""
        return self.size // 2

    @property
    def compared(self) -> int:
        """Bytes after the resumption that are compared with a stream that was never stopped.

        Whole blocks: were the last one cut short in one of the two, the shapes of its products would differ, and with
        them perhaps the last bit.
        """
        return max(min(COMPARED, self.size // 4) // self.block, 1) * self.block

    @property
    def block(self) -> int:
        """Bytes between two measurements."""
        return min(BLOCK, max(1024, self.size // 60))

    @property
    def memory_lengths(self) -> tuple[int, ...]:
        """Memories that are compared, from none to four times what the model was trained with."""
        length = self.mem_len
        return tuple(sorted({0, length // 4, length // 2, length, 2 * length, 4 * length}))

    def describe_training(self) -> str:
        """What is trained, in words."""
        train, source = self.recipe.get("train", {}), self.recipe.get("task", {}).get("source", "sotu")
        minutes, steps = train.get("minutes"), train.get("steps")
        end = f"for {minutes:g} minutes" if minutes is not None else f"for {steps or 1000:,} steps"
        return f"a byte-level Transformer-XL on {'speeches (sotu)' if source == 'sotu' else source} {end}"


def make_plan(recipe: Mapping[str, Any], folder: Path, text: str, *, command_text: str) -> Plan:
    """A plan, with the text as a file.

    Raises:
        ConfigError: a recipe that is not of a byte-level transformer_xl.
        DataError: a text that is missing or too short to be cut in two.
    """
    first = (recipe.get("model", {}).get("mixers") or [{}])[0]
    if first.get("name") != "transformer_xl" or recipe.get("task", {}).get("tokenizer", "bytes") != "bytes":
        raise ConfigError(
            "quickstart-lm: wants a recipe of bytes whose first mixer is transformer_xl; use `longspan train`"
        )
    path = _text_file(text, folder)
    size = path.stat().st_size
    if size < 4096:
        raise DataError(f"{path}: {size:,} bytes are too few to be stopped halfway; 4,096 at least")
    return Plan(
        recipe=recipe,
        folder=folder,
        text=path,
        text_name="the King James Bible" if text == "kjv" else path.name,
        text_argument=command_text,
        size=size,
        mem_len=first.get("mem_len", 512),
    )


def _text_file(text: str, folder: Path) -> Path:
    if text != "kjv":
        if not Path(text).is_file():
            raise DataError(f"{text}: no such file; --text wants kjv or a file")
        return Path(text)
    from longspan.files import write_atomically
    from longspan.tasks.sources import read_source

    ((_, data),) = read_source("kjv")
    return write_atomically(folder / "kjv.txt", lambda path: path.write_bytes(data.tobytes()))
