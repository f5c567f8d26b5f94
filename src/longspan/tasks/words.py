"""Words: a vocabulary of whole words, as WikiText-103 is measured by; what is not in it is `<unk>`.

Words lie between white space; the end of a line is a token of its own, `<eos>`, as WikiText counts it. This loses
something: how much white space stood between words, and what an unknown word was. Bits per byte are then those of the
text as the model sees it, with unknown words spelled `<unk>` and one byte of white space behind every word; they say
how well that text is predicted, and are no length of a code for the file.
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

# no word holds white space, so no text can spell this one
BEGIN = "<| document |>"
UNKNOWN = "<unk>"
END = "<eos>"
SPECIALS = (BEGIN, UNKNOWN, END)


class Words(EngineTokenizer):
    """Whole words by the `tokenizers` library (`WordLevel` over white space).

    A word's size is its bytes and one for the white space behind it, the end of a line therefore 0: bytes of the text
    with single spaces. Blank lines and doubled spaces are not counted, so bits per byte are never flattered by them.

    Args:
        engine: of the library, with the words of `SPECIALS` as its first three.

    Raises:
        DataError: an engine without these.
    """

    def __init__(self, engine: "Engine") -> None:
        if [engine.token_to_id(word) for word in SPECIALS] != [0, 1, 2]:
            raise DataError(f"a vocabulary whose first words are not {', '.join(SPECIALS)}, so not one of longspan's")
        super().__init__(engine)
        self.begin, self.unknown, self.end = 0, 1, 2
        # `end` ends a line, not a text
        self.ends: tuple[int, ...] = (self.begin,)
        words = (self._token(index).encode() for index in range(len(SPECIALS), self.vocab_size))
        self._spelled = [b"", UNKNOWN.encode() + b" ", b"\n", *(word + b" " for word in words)]
        self.sizes = np.array([len(word) for word in self._spelled], dtype=np.int64)
        self.sizes[self.end] = 0

    @classmethod
    def of(cls, words: Iterable[str]) -> "Words":
        """A vocabulary of given words, most frequent first by custom; the special ones are put before them."""
        from tokenizers import Tokenizer as Engine
        from tokenizers import models

        known = dict.fromkeys((*SPECIALS, *words))
        engine: Any = Engine(models.WordLevel({word: index for index, word in enumerate(known)}, UNKNOWN))
        _cut_at_white_space(engine)
        return cls(engine)

    @classmethod
    def train(cls, texts: Iterable[tuple[str, Array]], vocab_size: int) -> "Words":
        """The `vocab_size` most frequent words of documents (name, bytes), `SPECIALS` among them; 0: every word.

        Raises:
            DataError: a text that is not UTF-8.
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
        """A vocabulary from a file with a word on each line; what follows behind white space (a count) is left out.

        Raises:
            DataError: the file cannot be read, or holds no word.
        """
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: the vocabulary cannot be read: {error}") from None
        words = [line.split()[0] for line in lines if line.strip()]
        if not words:
            raise DataError(f"{path}: a vocabulary without a word")
        return cls.of(words)

    def decode(self, ids: Iterable[int]) -> bytes:
        """Every word with a space behind it, unknown ones as `<unk>`; the end of a line as a newline."""
        return b"".join(self._spelled[int(index)] for index in ids)

    def text(self) -> str:
        """JSON that says "words", around that of the `tokenizers` library."""
        return json.dumps({"longspan": "words", "engine": self.engine.to_str()})


def _cut_at_white_space(engine: Any) -> None:
    from tokenizers import normalizers, pre_tokenizers

    engine.normalizer = normalizers.Replace("\n", f" {END} ")
    engine.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
