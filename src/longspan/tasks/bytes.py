"""Bytes that are no text: tiles of photographs and tunes in ABC notation (Child et al. 2019, sections 7.2 and 7.3).

A document is a tile or a tune, its bytes are predicted one after the other, and bits per byte are what the paper calls
bits per dimension or per byte. Both know coordinates of a place, for `model.positions = "factorized"`: row, column and
channel of a tile; of a tune the row and column in a matrix of `width` columns, as the paper does for text and audio
with the stride as the width. A recipe that leaves `model.position_shape` out gets them.

Tiles of one image are alike, and so are tunes of one title: the split parts images, and families of tunes.
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
# photographs in color that scikit-image ships, one of each scene
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
# collections that music21 ships as ABC; its Essen folk songs are not for commercial use and are left out
TUNES = ("airdsAirs", "oneills1850", "ryansMammoth")


@dataclass(frozen=True, kw_only=True)
class TilesConfig:
    """Which images, how they are cut, and what of them is held back.

    Attributes:
        source: `"images"` (eight photographs that scikit-image ships), an image file, a folder of them (recursive), a
            glob, or a list of these.
        tile: rows and columns of a tile; a document is tile * tile * 3 bytes, rows first, channels fastest. What does
            not fill a tile at the right and at the bottom is left out.
        validation_fraction: share of the tiles that is held back, at most, in whole images (one at least).
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
    """Which tunes, and what of them is held back.

    Attributes:
        source: `"music"` (fiddle tunes that music21 ships), an ABC file, a folder of them (recursive), a glob, or a
            list of these. A tune begins at a line `X:`.
        pattern: which files of a folder are read.
        width: columns of the matrix that positions count through.
        max_bytes: longer tunes are left out; rows are made for so many bytes.
        validation_fraction: share of the tunes that is held back, at most; tunes that share a title or all of their
            notes are not parted.
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
    """Next-byte prediction on documents of a fixed split; a `Task`. The base of `TilesTask` and `MusicTask`."""

    unit = "byte"

    def __init__(self, config: Any) -> None:
        self.config = config
        self._split: dict[Split, Named] | None = None

    @property
    def vocab_size(self) -> int:
        """The 256 bytes; byte 0 stands before the first."""
        return Bytes.vocab_size

    @property
    def position_shape(self) -> tuple[int, ...]:
        """What places of a document count through, the last coordinate fastest."""
        raise NotImplementedError

    def prepare(self, folder: Path, *, main: bool = True) -> None:
        """Nothing is kept."""

    def documents(self, split: Split) -> Documents:
        """The documents of a split.

        Raises:
            DataError: the data is missing, cannot be read, or leaves nothing for one of the splits.
        """
        if self._split is None:
            documents, group = self._grouped(self.config.source)
            parts = split_groups(documents, group, self.config.validation_fraction, self.config.seed)
            if not all(parts.values()):
                raise DataError(
                    f"{self.config.source}: {len(documents)} document(s), all of one image or family, cannot be parted "
                    "into training and validation; give more"
                )
            self._split = parts
        return _documents(self._split[split])

    def read(self, source: str | Sequence[str]) -> Documents:
        """Any other data as documents; `source` as in the configuration.

        Raises:
            DataError: the data is missing or cannot be read.
        """
        return _documents(self._grouped(source)[0])

    def _grouped(self, source: str | Sequence[str]) -> tuple[Named, Array]:
        """Documents (name, (bytes,) uint8), and (documents,) int64 numbers of what is not to be parted."""
        raise NotImplementedError


class TilesTask(ByteTask):
    """Tiles of images, byte by byte; a `Task`."""

    def __init__(self, config: TilesConfig | None = None) -> None:
        super().__init__(config or TilesConfig())

    @property
    def position_shape(self) -> tuple[int, ...]:
        """Rows, columns, channels."""
        return self.config.tile, self.config.tile, CHANNELS

    def _grouped(self, source: str | Sequence[str]) -> tuple[Named, Array]:
        size, tiles, owner = self.config.tile, [], []
        for index, (name, pixels) in enumerate(_images(source)):
            for row in range(0, len(pixels) - size + 1, size):
                for column in range(0, pixels.shape[1] - size + 1, size):
                    tile = pixels[row : row + size, column : column + size]
                    tiles.append((f"{name}:{row},{column}", tile.reshape(-1)))
                    owner.append(index)
        if not tiles:
            raise DataError(f"{source}: no image of {size} x {size} pixels at least; set task.tile lower")
        return tiles, np.array(owner)


class MusicTask(ByteTask):
    """Tunes in ABC notation, byte by byte; a `Task`."""

    def __init__(self, config: MusicConfig | None = None) -> None:
        super().__init__(config or MusicConfig())

    @property
    def position_shape(self) -> tuple[int, ...]:
        """Rows and columns of a matrix that the longest tune fills."""
        return -(-self.config.max_bytes // self.config.width), self.config.width

    def _grouped(self, source: str | Sequence[str]) -> tuple[Named, Array]:
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
                f"{source}: no tune of at most {self.config.max_bytes} bytes; a tune has a line X: and a line K:"
            )
        documents = [(name, np.frombuffer(tune, dtype=np.uint8)) for tune, name in tunes.items()]
        return documents, families([tune_keys(tune) for tune in tunes])


def families(keys: Sequence[set[bytes]]) -> Array:
    """(documents,) int64: a number that documents share where they have a key in common, or are linked by others."""
    first: dict[bytes, int] = {}
    pairs = [(first.setdefault(key, index), index) for index, those in enumerate(keys) for key in those]
    return linked(np.array(pairs, dtype=np.int64).reshape(-1, 2), len(keys))


def abc_tunes(data: bytes) -> Iterator[bytes]:
    """The tunes of an ABC file: from a line `X:` to the next, with a key (`K:`, where the notes begin)."""
    text = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    for part in re.split(rb"^(?=X:)", text, flags=re.MULTILINE)[1:]:
        tune = part.strip() + b"\n"
        if b"\nK:" in tune:
            yield tune


def tune_keys(tune: bytes) -> set[bytes]:
    """What tells that tunes are the same: their titles, without articles and punctuation, and their notes."""
    head, _, body = tune.partition(b"\nK:")
    keys = {b"K:" + re.sub(rb"\s", b"", body)}
    for title in re.findall(rb"^T:(.*)$", head, flags=re.MULTILINE):
        # what follows two dashes is the kind of dance
        words = sorted(set(re.findall(rb"[a-z0-9]+", title.partition(b" -- ")[0].lower().replace(b"'", b""))))
        name = b" ".join(word for word in words if word not in (b"the", b"a"))
        keys |= {b"T:" + name} if name else set()
    return keys


def _images(source: str | Sequence[str]) -> Iterator[tuple[str, Array]]:
    """Images as (name, (rows, columns, 3) uint8)."""
    from PIL import Image

    if source == "images":
        folder = package_folder("skimage", "these images", "scikit-image") / "data"
        files = read_source([str(folder / name) for name in IMAGES])
    else:
        files = [file for file in read_source(source, pattern="*") if file[0].lower().endswith(SUFFIXES)]
        if not files:
            raise DataError(f"{source}: no image in it ({', '.join(SUFFIXES)})")
    for name, data in files:
        try:
            with Image.open(io.BytesIO(data.tobytes())) as image:
                pixels = np.asarray(image.convert("RGB"))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"{name}: cannot be read as an image: {error}") from None
        yield name, pixels


def _documents(documents: Named) -> Documents:
    tokenizer = Bytes()
    items: list[Document] = [TextDocument(data, tokenizer) for _, data in documents]
    return Documents(items, [name for name, _ in documents], arrays_digest(data for _, data in documents))
