"""The tokenizer of CLIP, which dino.txt reads texts with: ids are those of open_clip.

Source: byte-pair encoding (arXiv 1508.07909) as CLIP (arXiv 2103.00020) has it.  Merges: see data/text/LICENSE.
"""

import gzip
import html
from collections.abc import Callable, Iterable, Sequence
from functools import cache, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputTypeError, UnsupportedError

__all__ = ["CONTEXT", "END", "START", "Tokenizer", "vocabulary"]

CONTEXT = 77  # ids of a text at most
START, END = 49406, 49407
_SPECIAL = {"<start_of_text>": START, "<end_of_text>": END}  # as open_clip spells them inside a text
_MERGES = Path(__file__).parent.parent / "data" / "text" / "merges.txt.gz"


class Tokenizer:
    """Texts to ids and back.  Needs ftfy and regex, which the extra `text` installs."""

    def __call__(self, texts: str | Sequence[str], context_length: int = CONTEXT) -> Tensor:
        """Ids [B, context_length] int64: start, the words, end, zeros.  Long texts are cut before the end.

        Raises: InputTypeError for anything but texts, UnsupportedError where ftfy or regex is not installed.
        """
        each = [texts] if isinstance(texts, str) else list(texts)
        found = torch.zeros(len(each), context_length, dtype=torch.int64, device="cpu")
        for row, text in zip(found, each, strict=True):
            ids = [*[START, *self.encode(text)][: context_length - 1], END]
            row[: len(ids)] = torch.tensor(ids, device="cpu")
        return found

    tokenize = __call__  # Meta's name for it

    def encode(self, text: str) -> list[int]:
        """Ids of the words alone.  Raises: as a call."""
        if not isinstance(text, str):
            raise InputTypeError(f"a text is a str, got {type(text).__name__}; give one str or a list of them")
        words = _words_of()(text)
        return [i for word in words for i in ([_SPECIAL[word]] if word in _SPECIAL else _ids_of(word))]

    def decode(self, ids: Iterable[int]) -> str:
        """The cleaned text that has these ids, with a space after each word."""
        spelled, _ = vocabulary()
        return b"".join(spelled[i] for i in ids).decode("utf-8", "replace")


@cache
def _words_of() -> Callable[[str], list[str]]:
    """A function from a text to its words, cleaned and in lower case."""
    try:
        import ftfy
        import regex
    except ImportError as error:
        raise UnsupportedError(
            f"texts need {error.name}, which is not installed; pip install 'dinov3-infer[text]'"
        ) from None
    # runs of letters, single digits, runs of anything else; "re" has no classes of Unicode
    pattern: Any = regex.compile(
        "|".join((*_SPECIAL, "'(?:s|t|re|ve|m|ll|d)", r"\p{L}+", r"\p{N}", r"[^\s\p{L}\p{N}]+")), regex.IGNORECASE
    )

    def words(text: str) -> list[str]:
        text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()  # more of the ends than pattern calls space
        return pattern.findall(text.lower())  # type: ignore[no-any-return]

    return words


@cache
def vocabulary() -> tuple[list[bytes], dict[tuple[int, int], int]]:
    """What each id spells, with a space where it ends a word; and which id two neighbours are merged into.

    Ids: 256 bytes, the same at the end of a word, 48,894 merges in the order in which they were learnt, start, end.
    """
    letters = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that stand for themselves in the file
    others = [byte for byte in range(256) if byte not in letters]
    spelled = [bytes([byte]) for byte in (*letters, *others)]
    spelled += [byte + b" " for byte in spelled]
    names = [*map(chr, letters), *(chr(256 + i) for i in range(len(others)))]
    ids = {name: i for i, name in enumerate((*names, *(f"{name}</w>" for name in names)))}
    merges: dict[tuple[int, int], int] = {}
    for line in gzip.decompress(_MERGES.read_bytes()).decode("utf-8").split("\n"):
        left, right = line.split(" ")
        pair = ids[left], ids[right]
        merges[pair] = ids[left + right] = len(spelled)
        spelled.append(spelled[pair[0]] + spelled[pair[1]])
    return [*spelled, *(name.encode() for name in _SPECIAL)], merges


@cache
def _of_bytes() -> dict[int, int]:
    """Byte -> its id inside a word."""
    return {spelled[0]: i for i, spelled in enumerate(vocabulary()[0][:256])}


@lru_cache(2**16)
def _ids_of(word: str) -> tuple[int, ...]:
    """Ids of one word: of its neighbours those that were merged first in training are merged first."""
    _, merges = vocabulary()
    ids = [_of_bytes()[byte] for byte in word.encode("utf-8")]
    ids[-1] += 256
    while (best := min((merges.get(pair, END) for pair in pairwise(ids)), default=END)) != END:
        merged: list[int] = []
        for i in ids:
            if merged and merges.get((merged[-1], i)) == best:
                merged[-1] = best
            else:
                merged.append(i)
        ids = merged
    return tuple(ids)
