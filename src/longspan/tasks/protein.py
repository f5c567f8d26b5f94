"""Proteins: residues are hidden, and said from both sides (Devlin et al. 2019, 3.1; Choromanski et al. 2021, 4.4).

A document is a sequence between a begin and an end token. Of its amino acids 15 % are to be said: in training 8 in 10
of them are hidden behind the mask token, 1 in 10 shows another amino acid at random, 1 in 10 stays; of held-back
sequences all are hidden, else repeating what is seen would be right 1 time in 10. Which they are is a function of the
seed, the sequence and the copy (each sequence comes in `copies` differently masked copies, as in BERT's data), so a
resumed run sees what the stopped one would have seen.

Equal sequences are read once. Proteins come in families, and a model that has seen a sister of a held-back sequence
knows much of it by heart; so sequences that share a stretch of `family` residues are one family (single linkage), and
whole families are held back.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from longspan.config import check_fractions, check_least
from longspan.errors import ConfigError, DataError
from longspan.tasks.base import Array, Document, Documents, Piece, Split
from longspan.tasks.groups import Named, arrays_digest, linked, split_groups
from longspan.tasks.sources import read_source

AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"
AMBIGUOUS = "BJOUXZ"
MASK, BEGIN, END, FIRST = 0, 1, 2, 3
VOCABULARY = ("<mask>", "<begin>", "<end>", *AMINO_ACIDS, *AMBIGUOUS)
_IDS = np.zeros(256, dtype=np.uint8)
_IDS[:] = VOCABULARY.index("X")
_IDS[np.frombuffer("".join(VOCABULARY[FIRST:]).encode(), dtype=np.uint8)] = np.arange(FIRST, len(VOCABULARY))


@dataclass(frozen=True, kw_only=True)
class ProteinConfig:
    """Which sequences, what of them is held back, and what of each is to be said.

    Attributes:
        source: `"proteins"`, a FASTA file, a folder of them (recursive), a glob, or a list of these.
        pattern: which files of a folder are read.
        family: sequences that share so many residues in a row are not parted by the split; 0: only equal ones are one.
        validation_fraction: share of the sequences that is held back, at most.
        share: of a sequence's amino acids that are to be said.
        copies: differently masked ones of each training sequence; an epoch reads all.
        seed: of the split and the masks.
    """

    source: str | tuple[str, ...] = "proteins"
    pattern: str = "*.fasta*"
    family: int = 10
    validation_fraction: float = 0.1
    share: float = 0.15
    copies: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if self.family < 0 or self.family > 12:
            raise ConfigError(f"task.family = {self.family}: 0, or residues in a row, up to 12")
        check_fractions(self, "task", ["validation_fraction", "share"])
        check_least(self, "task", {"copies": 1})


class ProteinDocument:
    """A sequence with its residues partly hidden.

    Args:
        ids: (residues,) token ids of the sequence, without begin and end.
        share: of its amino acids that are to be said.
        seed: of the choice.
        noise: some of them are not hidden: another amino acid stands there, or the right one.
    """

    def __init__(self, ids: Array, share: float, seed: Sequence[int], *, noise: bool = True) -> None:
        self.ids, self.share, self.seed, self.noise = ids, share, seed, noise

    def __len__(self) -> int:
        return len(self.ids) + 2

    @property
    def tokens(self) -> Array:
        """(length,) int64: begin, residues, end, nothing hidden."""
        tokens = np.empty(len(self), dtype=np.int64)
        tokens[0], tokens[1:-1], tokens[-1] = BEGIN, self.ids, END
        return tokens

    def cut(self, first: int, last: int) -> Piece:
        """Places `first` to `last` (excluded)."""
        targets = self.tokens
        tokens, graded = targets.copy(), np.zeros(len(targets), dtype=np.bool_)
        known = np.flatnonzero(is_amino_acid(targets))
        random = np.random.default_rng(self.seed)
        chosen = random.permutation(known)[: max(round(self.share * len(known)), 1)]
        fate, other = random.random(len(chosen)), random.integers(0, len(AMINO_ACIDS), size=len(chosen))
        shown = np.where(fate < 0.9, FIRST + other, targets[chosen])
        tokens[chosen] = np.where((fate < 0.8) | (not self.noise), MASK, shown)
        graded[chosen] = True
        part = slice(first, last)
        return Piece(tokens[part], targets[part], graded[part], np.ones(last - first, dtype=np.int64))


class ProteinTask:
    """Masked language modelling on proteins; a `Task`."""

    unit = "residue"

    def __init__(self, config: ProteinConfig | None = None) -> None:
        self.config = config or ProteinConfig()
        self._sequences: dict[Split, Named] | None = None

    @property
    def vocab_size(self) -> int:
        """Mask, begin, end, 20 amino acids, 6 letters for what is rare or not known."""
        return len(VOCABULARY)

    def prepare(self, folder: Path, *, main: bool = True) -> None:
        """Nothing is kept."""

    def sequences(self, split: Split) -> Named:
        """(accession, (residues,) uint8 token ids) of a split.

        Raises:
            DataError: the sequences are missing, cannot be read, or leave nothing for one of the splits.
        """
        if self._sequences is None:
            config = self.config
            sequences = _encoded(config.source, config.pattern)
            family = families([ids for _, ids in sequences], config.family)
            parts = split_groups(sequences, family, config.validation_fraction, config.seed, at_least_one=False)
            if empty := [verb for verb, part in zip(("train", "validate"), parts.values(), strict=True) if not part]:
                raise DataError(
                    f"{config.source}: {len(sequences)} different sequence(s) of {len(np.unique(family))} families "
                    f"leave nothing to {empty[0]} on; give more, or another task.family or task.validation_fraction"
                )
            self._sequences = parts
        return self._sequences[split]

    def documents(self, split: Split) -> Documents:
        """The sequences of a split, masked; of training `copies` of each.

        Raises:
            DataError: as `sequences`.
        """
        train = split == "train"
        return self._masked(self.sequences(split), self.config.copies if train else 1, noise=train)

    def _masked(self, sequences: Named, copies: int, *, noise: bool) -> Documents:
        config = self.config
        items: list[Document] = []
        names: list[str] = []
        for copy in range(copies):
            for index, (name, ids) in enumerate(sequences):
                items.append(ProteinDocument(ids, config.share, (config.seed, int(noise), copy, index), noise=noise))
                names.append(f"{name}:{copy}" if noise else name)
        digest = arrays_digest((ids for _, ids in sequences), f"{config.share}:{config.copies}:{config.seed}")
        return Documents(items, names, digest)

    def read(self, source: str | Sequence[str], *, pattern: str | None = None) -> Documents:
        """Any other sequences, masked as held-back ones are; arguments as in `ProteinConfig`.

        Raises:
            DataError: the sequences are missing or cannot be read.
        """
        return self._masked(_encoded(source, pattern or self.config.pattern), 1, noise=False)

    def frequencies(self) -> Array:
        """(20,) fp64 shares of the amino acids in the training sequences, in the order of `AMINO_ACIDS`."""
        counts = sum(
            np.bincount(ids, minlength=len(VOCABULARY))[FIRST : FIRST + len(AMINO_ACIDS)]
            for _, ids in self.sequences("train")
        )
        shares: Array = np.asarray(counts, dtype=np.float64) / np.sum(counts)
        return shares


def is_amino_acid(tokens: Array) -> Array:
    """Which token ids are of the twenty amino acids."""
    inside: Array = (tokens >= FIRST) & (tokens < FIRST + len(AMINO_ACIDS))
    return inside


def _encoded(source: str | Sequence[str], pattern: str) -> Named:
    """Sequences with an amino acid in them, each once."""
    sequences: dict[bytes, tuple[str, Array]] = {}
    for name, letters in read_source(source, pattern=pattern):
        ids = _IDS[letters]
        if is_amino_acid(ids).any():
            sequences.setdefault(ids.tobytes(), (name, ids))
    return list(sequences.values())


def families(sequences: Sequence[Array], stretch: int) -> Array:
    """(sequences,) the number of each one's family: the least index of a sequence in it.

    Args:
        sequences: (residues,) uint8 token ids each.
        stretch: two sequences that have so many residues in a row in common are of one family, and so are those that
            others link; 0: each is its own.
    """
    if not stretch or not len(sequences):
        return np.arange(len(sequences))
    return linked(_sharing(sequences, stretch), len(sequences))


def _sharing(sequences: Sequence[Array], stretch: int) -> Array:
    """(pairs, 2) indices of sequences that share a stretch; enough of them to link all that do."""
    border = np.zeros(1, dtype=np.uint8)
    text = np.concatenate([part for ids in sequences for part in (ids, border)])
    owner = np.repeat(np.arange(len(sequences)), [len(ids) + 1 for ids in sequences])
    count = max(len(text) - stretch + 1, 0)
    # five bits a residue: twelve of them in one number
    key, whole = np.zeros(count, dtype=np.uint64), np.ones(count, dtype=np.bool_)
    for offset in range(stretch):
        letters = text[offset : offset + count]
        key = key * np.uint64(32) + letters
        whole &= letters > 0
    key, owner = key[whole], owner[:count][whole]
    order = np.argsort(key, kind="stable")
    key, owner = key[order], owner[order]
    same = (key[1:] == key[:-1]) & (owner[1:] != owner[:-1])
    pairs: Array = np.unique(np.stack([owner[:-1][same], owner[1:][same]], 1), axis=0)
    return pairs
