"""Word-level tokenizer, as used for published results on WikiText-103; unknown words are `<unk>`.

Words are separated by white space; the end of a line is a token, `<eos>`, as WikiText counts it. This is lossy: the
amount of white space and the spelling of unknown words are not kept. Bits per byte refer to the text as the model sees
it, with `<unk>` for unknown words and one byte of white space after every word; they are not the length of a code for
the original file.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from longspan.errors import DataError
from longspan.tasks.base import Array
from longspan.tasks.tokenizers import EngineTokenizer, utf8

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Engine

# contains white space, which no word of a text does
BEGIN = "<| document |>"
UNKNOWN = "<unk>"
END = "<eos>"
SPECIALS = (BEGIN, UNKNOWN, END)


class Words(EngineTokenizer):
    """Word-level tokenizer by the `tokenizers` library (`WordLevel` over white space).

    The size of a word is its bytes plus one for the white space after it, so the end of a line has size 0. Blank lines
    and repeated spaces do not count, so they cannot lower bits per byte.

    Args:
        engine: tokenizer of the library whose first three words are `SPECIALS`.

    Raises:
        DataError: the engine has other first words.
    """

    def __init__(self, engine: "Engine") -> None:
        if [engine.token_to_id(word) for word in SPECIALS] != [0, 1, 2]:
            raise DataError(f"the first words of the vocabulary must be {', '.join(SPECIALS)}; build it with Words.of")
        super().__init__(engine)
        self.begin, self.unknown, self.end = 0, 1, 2
        # `end` is the end of a line, not of a text
        self.ends: tuple[int, ...] = (self.begin,)
        words = (self._token(index).encode() for index in range(len(SPECIALS), self.vocab_size))
        self._spelled = [b"", UNKNOWN.encode() + b" ", b"\n", *(word + b" " for word in words)]
        self.sizes = np.array([len(word) for word in self._spelled], dtype=np.int64)
        self.sizes[self.end] = 0

    @classmethod
    def of(cls, words: Iterable[str]) -> "Words":
        """Build a tokenizer from a list of words, usually the most frequent first; special tokens come before them."""
        from tokenizers import Tokenizer as Engine
        from tokenizers import models

        known = dict.fromkeys((*SPECIALS, *words))
        engine: Any = Engine(models.WordLevel({word: index for index, word in enumerate(known)}, UNKNOWN))
        _cut_at_white_space(engine)
        return cls(engine)

    @classmethod
    def train(cls, texts: Iterable[tuple[str, Array]], vocab_size: int) -> "Words":
        """Learn the `vocab_size` most frequent words (including `SPECIALS`) of documents (name, bytes); 0: every word.

        Raises:
            DataError: a text is not valid UTF-8.
        """
        from tokenizers import Tokenizer as Engine
        from tokenizers import models, trainers

        engine: Any = Engine(models.WordLevel(unk_token=UNKNOWN))
        _cut_at_white_space(engine)
        trainer = trainers.WordLevelTrainer(vocab_size=1 << 31, show_progress=False, special_tokens=[])
        engine.train_from_iterator((utf8(data, name) for name, data in texts), trainer)
        ids = engine.get_vocab()
        learned = [word for word in sorted(ids, key=ids.__getitem__) if word not in SPECIALS]
        return cls.of(learned[: vocab_size - len(SPECIALS)] if vocab_size else learned)

    @classmethod
    def read(cls, path: str | Path) -> "Words":
        """Build a tokenizer from a file with one word per line; text after the word (such as a count) is ignored.

        Raises:
            DataError: the file cannot be read, or has no words.
        """
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"{path}: the vocabulary cannot be read: {error}; task.vocabulary must be a UTF-8 file with one word "
                "per line"
            ) from None
        words = [line.split()[0] for line in lines if line.strip()]
        if not words:
            raise DataError(f"{path}: has no words; task.vocabulary must be a file with one word per line")
        return cls.of(words)

    def decode(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of ids: every word followed by a space, `<unk>` for unknown ones, newlines for line ends."""
        return b"".join(self._spelled[int(index)] for index in ids)

    def text(self) -> str:
        """Serialize the tokenizer as JSON."""
        return json.dumps({"longspan": "words", "engine": self.engine.to_str()})


def _cut_at_white_space(engine: Any) -> None:
    """Configure an engine to split at white space and to turn newlines into the end-of-line token."""
    from tokenizers import normalizers, pre_tokenizers

    engine.normalizer = normalizers.Replace("\n", f" {END} ")
    engine.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
