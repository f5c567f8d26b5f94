"""Tasks on bytes other than text: tiles of photographs, and tunes in ABC notation (Child et al. 2019, 7.2 and 7.3).

A document is one tile or tune, predicted byte by byte; bits per byte are the paper's bits per dimension or per byte.
Both tasks supply the shape for factorized positions, unless the recipe sets `model.position_shape`: row, column and
channel of a tile; for a tune, row and column in a matrix of `width` columns, as in the paper for text and audio, with
the stride as the width.

Tiles of one image are similar, and so are tunes of one title. Therefore the split keeps images, and families of tunes,
together.
"""

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from longspan.config import check_fractions, check_least
from longspan.errors import DataError
from longspan.packages import package_folder
from longspan.tasks.base import Array, Document, Documents, Split
from longspan.tasks.groups import Named, arrays_digest, linked, split_groups
from longspan.tasks.sources import read_source
from longspan.tasks.text import TextDocument
from longspan.tasks.tokenizers import Bytes

CHANNELS = 3
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
# color photographs that scikit-image ships, one per scene
IMAGES = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
)
# collections that music21 ships in ABC; its Essen folk songs, which exclude commercial use, are left out
TUNES = ("airdsAirs", "oneills1850", "ryansMammoth")


@dataclass(frozen=True, kw_only=True)
class TilesConfig:
    """Fields of the task `tiles`.

    Attributes:
        source: `"images"` (eight photographs that scikit-image ships), an image file, a folder of them (recursive), a
            glob, or a list of these.
        tile: rows and columns of a tile; a document has tile * tile * 3 bytes, ordered by row, column, channel.
            Incomplete tiles at the right and at the bottom are left out.
        validation_fraction: largest share of held-out tiles; whole images (at least one) are held out.
        seed: of the split.
    """

    source: str | tuple[str, ...] = "images"
    tile: int = 64
    validation_fraction: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        check_least(self, "task", {"tile": 1})
        check_fractions(self, "task", ["validation_fraction"])


@dataclass(frozen=True, kw_only=True)
class MusicConfig:
    """Fields of the task `music`.

    Attributes:
        source: `"music"` (fiddle tunes that music21 ships), an ABC file, a folder of them (recursive), a glob, or a
            list of these. A tune begins at a line `X:`.
        pattern: glob of the files to read in a folder.
        width: columns of the matrix of factorized positions.
        max_bytes: longer tunes are left out; the matrix of positions has this size.
        validation_fraction: largest share of held-out tunes; tunes with a common title or equal notes stay together.
        seed: of the split.
    """

    source: str | tuple[str, ...] = "music"
    pattern: str = "*.abc"
    width: int = 64
    max_bytes: int = 4096
    validation_fraction: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        check_least(self, "task", {"width": 1, "max_bytes": 1})
        check_fractions(self, "task", ["validation_fraction"])


class ByteTask:
    """Next-byte prediction on groups of similar documents: a `Task`, base class of `TilesTask` and `MusicTask`."""

    unit = "byte"

    def __init__(self, config: Any) -> None:
        self.config = config
        self._split: dict[Split, Named] | None = None

    @property
    def vocab_size(self) -> int:
        """256; byte 0 begins every document."""
        return Bytes.vocab_size

    @property
    def position_shape(self) -> tuple[int, ...]:
        """Shape of factorized positions; the last coordinate changes fastest along a document."""
        raise NotImplementedError

    def prepare(self, folder: Path, *, main: bool = True) -> None:
        """Do nothing: the task stores no files."""

    def documents(self, split: Split) -> Documents:
        """Return the documents of a split.

        Raises:
            DataError: the data is missing, cannot be read, or is too little for both splits.
        """
        if self._split is None:
            documents, group = self._grouped(self.config.source)
            parts = split_groups(documents, group, self.config.validation_fraction, self.config.seed)
            if not all(parts.values()):
                raise DataError(
                    f"{self.config.source}: {len(documents)} document(s), all of one image or family, cannot be split "
                    "into training and validation; give more files"
                )
            self._split = parts
        return _documents(self._split[split])

    def read(self, source: str | Sequence[str]) -> Documents:
        """Read all documents of another source, which is given as in the configuration.

        Raises:
            DataError: the data is missing or cannot be read.
        """
        return _documents(self._grouped(source)[0])

    def _grouped(self, source: str | Sequence[str]) -> tuple[Named, Array]:
        """Read documents as (name, (bytes,) uint8), and the index of the group of each, (documents,) int64."""
        raise NotImplementedError


class TilesTask(ByteTask):
    """Tiles of images, byte by byte; a `Task`."""

    def __init__(self, config: TilesConfig | None = None) -> None:
        super().__init__(config or TilesConfig())

    @property
    def position_shape(self) -> tuple[int, ...]:
        """Rows, columns and color channels of a tile."""
        return self.config.tile, self.config.tile, CHANNELS

    def _grouped(self, source: str | Sequence[str]) -> tuple[Named, Array]:
        """Cut images into square tiles, each a document of uint8 bytes; the group is the index of its image.

        Raises:
            DataError: no image is as large as one tile.
        """
        size, tiles, owner = self.config.tile, [], []
        for index, (name, pixels) in enumerate(_images(source)):
            for row in range(0, len(pixels) - size + 1, size):
                for column in range(0, pixels.shape[1] - size + 1, size):
                    tile = pixels[row : row + size, column : column + size]
                    tiles.append((f"{name}:{row},{column}", tile.reshape(-1)))
                    owner.append(index)
        if not tiles:
            raise DataError(f"{source}: all images are smaller than {size} x {size} pixels; lower task.tile")
        return tiles, np.array(owner)


class MusicTask(ByteTask):
    """Tunes in ABC notation, byte by byte; a `Task`."""

    def __init__(self, config: MusicConfig | None = None) -> None:
        super().__init__(config or MusicConfig())

    @property
    def position_shape(self) -> tuple[int, ...]:
        """Rows and columns of the matrix that a tune of `max_bytes` fills."""
        return -(-self.config.max_bytes // self.config.width), self.config.width

    def _grouped(self, source: str | Sequence[str]) -> tuple[Named, Array]:
        """Read distinct tunes of at most `max_bytes`, each a document of uint8 bytes; related tunes are one group.

        Raises:
            DataError: the source has no such tune.
        """
        tunes: dict[bytes, str] = {}
        if source == "music":
            folder = package_folder("music21", "these tunes") / "corpus"
            files = read_source([str(folder / name) for name in TUNES], pattern="*.abc")
        else:
            files = read_source(source, pattern=self.config.pattern)
        for name, data in files:
            for number, tune in enumerate(abc_tunes(data.tobytes())):
                if len(tune) <= self.config.max_bytes:
                    tunes.setdefault(tune, f"{name}:{number}")
        if not tunes:
            raise DataError(
                f"{source}: has no tune of at most {self.config.max_bytes} bytes (a tune has a line X: and a line K:); "
                "raise task.max_bytes, or give other files"
            )
        documents = [(name, np.frombuffer(tune, dtype=np.uint8)) for tune, name in tunes.items()]
        return documents, families([tune_keys(tune) for tune in tunes])


def families(keys: Sequence[set[bytes]]) -> Array:
    """Group documents that have a key in common, also indirectly through other documents.

    Args:
        keys: of each document.

    Returns:
        (documents,) int64, the least index of a document in the same group.
    """
    first: dict[bytes, int] = {}
    pairs = [(first.setdefault(key, index), index) for index, those in enumerate(keys) for key in those]
    return linked(np.array(pairs, dtype=np.int64).reshape(-1, 2), len(keys))


def abc_tunes(data: bytes) -> Iterator[bytes]:
    """Yield the tunes of an ABC file: from a line `X:` to the next, if it has a line `K:`, after which notes begin."""
    text = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    for part in re.split(rb"^(?=X:)", text, flags=re.MULTILINE)[1:]:
        tune = part.strip() + b"\n"
        if b"\nK:" in tune:
            yield tune


def tune_keys(tune: bytes) -> set[bytes]:
    """Return the keys by which tunes count as the same: titles without articles and punctuation, and the notes."""
    head, _, body = tune.partition(b"\nK:")
    keys = {b"K:" + re.sub(rb"\s", b"", body)}
    for title in re.findall(rb"^T:(.*)$", head, flags=re.MULTILINE):
        # the kind of dance follows two dashes
        words = sorted(set(re.findall(rb"[a-z0-9]+", title.partition(b" -- ")[0].lower().replace(b"'", b""))))
        name = b" ".join(word for word in words if word not in (b"the", b"a"))
        keys |= {b"T:" + name} if name else set()
    return keys


def _images(source: str | Sequence[str]) -> Iterator[tuple[str, Array]]:
    """Read images as (name, (rows, columns, 3) uint8); raises DataError if one is missing or damaged."""
    from PIL import Image

    if source == "images":
        folder = package_folder("skimage", "these images", "scikit-image") / "data"
        files = read_source([str(folder / name) for name in IMAGES])
    else:
        files = [file for file in read_source(source, pattern="*") if file[0].lower().endswith(SUFFIXES)]
        if not files:
            raise DataError(f"{source}: has no image files ({', '.join(SUFFIXES)}); give other files")
    for name, data in files:
        try:
            with Image.open(io.BytesIO(data.tobytes())) as image:
                pixels = np.asarray(image.convert("RGB"))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"{name}: cannot be read as an image: {error}") from None
        yield name, pixels


def _documents(documents: Named) -> Documents:
    """Return named bytes as documents that are predicted byte by byte."""
    tokenizer = Bytes()
    items: list[Document] = [TextDocument(data, tokenizer) for _, data in documents]
    return Documents(items, [name for name, _ in documents], arrays_digest(data for _, data in documents))
