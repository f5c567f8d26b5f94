"""Masked language modeling of proteins (Devlin et al. 2019, section 3.1; Choromanski et al. 2021, section 4.4).

A document is a protein sequence between a begin and an end token. 15 % of its amino acids are predicted from
bidirectional context. In training, 8 in 10 of these are replaced by the mask token, 1 in 10 by a random amino acid, and
1 in 10 is unchanged. In held-out sequences all are masked, because otherwise copying the input would be correct 1 time
in 10. The choice depends only on the seed, the sequence and the copy (each training sequence occurs in `copies`
differently masked copies, as in BERT's data), so a resumed run sees the same data as an uninterrupted one.

Duplicate sequences are read once. Proteins come in families, and a model that has seen a relative of a held-out
sequence can recall much of it. Therefore sequences that share `family` consecutive residues form one family (single
linkage), and whole families are held out.
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
    """Fields of the task `protein`.

    Attributes:
        source: `"proteins"`, a FASTA file, a folder of them (recursive), a glob, or a list of these.
        pattern: glob of the files to read in a folder.
        family: sequences that share this many consecutive residues stay in one split; 0: every sequence is its own
            family.
        validation_fraction: largest share of held-out sequences.
        share: share of the amino acids of a sequence that are predicted.
        copies: number of differently masked copies of each training sequence; an epoch reads all of them.
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
            raise ConfigError(f"task.family = {self.family}: must be from 0 to 12 consecutive residues")
        check_fractions(self, "task", ["validation_fraction", "share"])
        check_least(self, "task", {"copies": 1})


class ProteinDocument:
    """A protein sequence in which some amino acids are masked.

    Args:
        ids: (residues,) token ids of the sequence, without begin and end.
        share: share of its amino acids that are predicted.
        seed: of the choice of amino acids.
        noise: of those predicted, replace 1 in 10 by a random amino acid and leave 1 in 10 unchanged, instead of
            masking all.
    """

    def __init__(self, ids: Array, share: float, seed: Sequence[int], *, noise: bool = True) -> None:
        self.ids, self.share, self.seed, self.noise = ids, share, seed, noise

    def __len__(self) -> int:
        return len(self.ids) + 2

    @property
    def tokens(self) -> Array:
        """(length,) int64: begin, residues and end, without masks."""
        tokens = np.empty(len(self), dtype=np.int64)
        tokens[0], tokens[1:-1], tokens[-1] = BEGIN, self.ids, END
        return tokens

    def cut(self, first: int, last: int) -> Piece:
        """Return positions `first` to `last` (excluded)."""
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
    """Masked language modeling of proteins; a `Task`."""

    unit = "residue"

    def __init__(self, config: ProteinConfig | None = None) -> None:
        self.config = config or ProteinConfig()
        self._sequences: dict[Split, Named] | None = None

    @property
    def vocab_size(self) -> int:
        """29: mask, begin, end, 20 amino acids, and 6 letters for rare or unknown ones."""
        return len(VOCABULARY)

    def prepare(self, folder: Path, *, main: bool = True) -> None:
        """Do nothing: the task stores no files."""

    def sequences(self, split: Split) -> Named:
        """Return the sequences of a split as (accession, (residues,) uint8 token ids).

        Raises:
            DataError: the sequences are missing, cannot be read, or are too few for both splits.
        """
        if self._sequences is None:
            config = self.config
            sequences = _encoded(config.source, config.pattern)
            family = families([ids for _, ids in sequences], config.family)
            parts = split_groups(sequences, family, config.validation_fraction, config.seed, at_least_one=False)
            if empty := [verb for verb, part in zip(("train", "validate"), parts.values(), strict=True) if not part]:
                raise DataError(
                    f"{config.source}: {len(sequences)} different sequence(s) in {len(np.unique(family))} families "
                    f"leave none to {empty[0]} on; give more, or change task.family or task.validation_fraction"
                )
            self._sequences = parts
        return self._sequences[split]

    def documents(self, split: Split) -> Documents:
        """Return the masked sequences of a split, each training sequence in `copies` copies.

        Raises:
            DataError: the sequences are missing, cannot be read, or are too few for both splits.
        """
        train = split == "train"
        return self._masked(self.sequences(split), self.config.copies if train else 1, noise=train)

    def _masked(self, sequences: Named, copies: int, *, noise: bool) -> Documents:
        """Return `copies` differently masked documents of each sequence; `noise` as in `ProteinDocument`."""
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
        """Read other sequences and mask them like held-out ones; arguments are those of `ProteinConfig`.

        Raises:
            DataError: the sequences are missing or cannot be read.
        """
        return self._masked(_encoded(source, pattern or self.config.pattern), 1, noise=False)

    def frequencies(self) -> Array:
        """Return the shares of the amino acids in the training sequences, (20,) fp64 in the order of `AMINO_ACIDS`."""
        counts = sum(
            np.bincount(ids, minlength=len(VOCABULARY))[FIRST : FIRST + len(AMINO_ACIDS)]
            for _, ids in self.sequences("train")
        )
        shares: Array = np.asarray(counts, dtype=np.float64) / np.sum(counts)
        return shares


def is_amino_acid(tokens: Array) -> Array:
    """Return which token ids are one of the twenty amino acids, bool of the same shape."""
    inside: Array = (tokens >= FIRST) & (tokens < FIRST + len(AMINO_ACIDS))
    return inside


def _encoded(source: str | Sequence[str], pattern: str) -> Named:
    """Read and encode sequences, (name, (residues,) uint8), without duplicates and those without an amino acid."""
    sequences: dict[bytes, tuple[str, Array]] = {}
    for name, letters in read_source(source, pattern=pattern):
        ids = _IDS[letters]
        if is_amino_acid(ids).any():
            sequences.setdefault(ids.tobytes(), (name, ids))
    return list(sequences.values())


def families(sequences: Sequence[Array], stretch: int) -> Array:
    """Group sequences into families by shared stretches of residues, also indirectly through other sequences.

    Args:
        sequences: (residues,) uint8 token ids each.
        stretch: number of consecutive residues that two sequences of a family have in common; 0: each sequence is its
            own family.

    Returns:
        (sequences,) int64, the least index of a sequence in the same family.
    """
    if not stretch or not len(sequences):
        return np.arange(len(sequences))
    return linked(_sharing(sequences, stretch), len(sequences))


def _sharing(sequences: Sequence[Array], stretch: int) -> Array:
    """Return pairs of sequences that share `stretch` consecutive residues, (pairs, 2), enough to link all that do."""
    border = np.zeros(1, dtype=np.uint8)
    text = np.concatenate([part for ids in sequences for part in (ids, border)])
    owner = np.repeat(np.arange(len(sequences)), [len(ids) + 1 for ids in sequences])
    count = max(len(text) - stretch + 1, 0)
    # five bits per residue, so twelve residues fit into one 64-bit number
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
