"""Texts → token ids many at once, and the proof that the tokens spell the texts.

Tokens of most vocabularies are strings of bytes: a document's tokens, end to end, are its text in UTF-8. So positions
follow from cumulative lengths, and a comparison of bytes proves that nothing was lost; an engine needs to give ids
alone. Where a vocabulary is of another kind, or a text does not come back byte for byte, the caller has to take the
slower way that knows about normalisers.

Legend: N texts, K tokens of all of them, V vocabulary.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from tokenizers import Tokenizer


SPELLED_AT_ONCE = 2**19
"""Tokens; each takes some sixty bytes on the way."""


class Engine(Protocol):
    """Turns texts into ids; ``name`` is for people."""

    name: str

    def ids(self, texts: Sequence[bytes]) -> tuple[NDArray[np.integer], NDArray[np.int64]]:
        """Ids of all texts (UTF-8) end to end, (K,), and where each text begins among them, (N+1,)."""
        ...


class GigatokenEngine:
    """The package gigatoken: the same ids as tokenizers, an order of magnitude faster."""

    name = "gigatoken"

    def __init__(self, described: str) -> None:
        from gigatoken import Tokenizer as Gigatoken

        self._engine = Gigatoken.from_json(described)

    def ids(self, texts: Sequence[bytes]) -> tuple[NDArray[np.integer], NDArray[np.int64]]:
        """See :class:`Engine`.

        The library gives either arrays of a package that takes a fifth of a second to import, or padded matrices. These
        are taken, of texts of about the same length, so that little is padding; and with a source of bytes, because it
        asks of lists whether they are such arrays.
        """
        from gigatoken.gigatoken_rs import BytesSource

        sizes_N = np.fromiter(map(len, texts), np.int64, len(texts))
        counts_N = np.zeros(sizes_N.size, np.int64)
        parts: list[tuple[NDArray[np.int64], NDArray[np.uint32]]] = []
        doublings_N = np.frexp(sizes_N)[1]
        for doubling in np.unique(doublings_N[sizes_N > 0]).tolist():
            numbers = np.flatnonzero((doublings_N == doubling) & (sizes_N > 0))
            source = BytesSource([texts[number] for number in numbers.tolist()])
            padded, counts = self._engine.encode_batch_padded(source, pad_id=0)
            counts_N[numbers] = counts
            parts.append((numbers, padded[np.arange(padded.shape[1]) < counts[:, None]]))
        offsets_N = np.concatenate(([0], np.cumsum(counts_N)))
        ids_K = np.empty(int(offsets_N[-1]), np.int32)
        for numbers, flat in parts:
            counts = counts_N[numbers]
            ids_K[np.arange(flat.size) + np.repeat(offsets_N[numbers] - (np.cumsum(counts) - counts), counts)] = flat
        return ids_K, offsets_N


class TokenizersEngine:
    """The package tokenizers, that transformers uses."""

    name = "tokenizers"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def ids(self, texts: Sequence[bytes]) -> tuple[NDArray[np.integer], NDArray[np.int64]]:
        """See :class:`Engine`."""
        found = self._tokenizer.encode_batch_fast([text.decode() for text in texts], add_special_tokens=False)
        parts = [encoding.ids for encoding in found]
        offsets_N = np.zeros(len(parts) + 1, np.int64)
        np.cumsum([len(part) for part in parts], out=offsets_N[1:])
        ids_K = np.empty(int(offsets_N[-1]), np.int32)
        for part, first, last in zip(parts, offsets_N[:-1].tolist(), offsets_N[1:].tolist(), strict=True):
            ids_K[first:last] = part
        return ids_K, offsets_N


def find_engine(tokenizer: Tokenizer, described: str) -> tuple[Engine, str | None]:
    """The fastest engine for a tokenizer whose JSON is ``described``; and why it is not gigatoken, where it is not."""
    if any(token.get("single_word") for token in json.loads(described).get("added_tokens", ())):
        return TokenizersEngine(tokenizer), "gigatoken finds added tokens inside words, where this tokenizer does not"
    try:
        return GigatokenEngine(described), None
    except ImportError:
        why = "gigatoken is not installed (pip install 'trainkit[fast]')"
    except Exception as error:
        why = f"gigatoken does not know this tokenizer ({' '.join(str(error).split())[:80]})"
    except BaseException as error:
        # A Rust library's failed assertion: it derives from BaseException and is no reason to give up.
        if type(error).__name__ != "PanicException":
            raise
        why = "gigatoken does not know this tokenizer"
    return TokenizersEngine(tokenizer), why


@dataclass(frozen=True)
class TokenBytes:
    """The bytes of every token: token v is ``blob[begins_V[v]:begins_V[v] + lengths_V[v]]``.

    ``space_before``: the tokenizer may put one space before a text, which its first token then spells too.
    """

    blob: NDArray[np.uint8]
    begins_V: NDArray[np.int32]
    lengths_V: NDArray[np.int32]
    space_before: bool

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> TokenBytes | None:
        """Of a byte-level or SentencePiece-like vocabulary, told by its decoder; None for any other."""
        kinds = _kinds(None if tokenizer.decoder is None else json.loads(tokenizer.decoder.__getstate__()))
        if "ByteLevel" in kinds:
            spell = _spelled_by_byte_level
        elif kinds & {"ByteFallback", "Metaspace"}:
            spell = _spelled_by_sentencepiece
        else:
            return None
        id_of = tokenizer.get_vocab(with_added_tokens=True)
        texts = [""] * (max(id_of.values(), default=-1) + 1)
        for text, number in id_of.items():
            texts[number] = text
        added = {number: token.content.encode() for number, token in tokenizer.get_added_tokens_decoder().items()}
        for number in added:
            texts[number] = ""
        blob, lengths_V = spell(texts)
        begins_V = np.cumsum(lengths_V, dtype=np.int32) - lengths_V
        for number, content in added.items():
            begins_V[number], lengths_V[number] = len(blob), len(content)
            blob += content
        return cls(np.frombuffer(bytes(blob), np.uint8), begins_V, lengths_V, "ByteLevel" not in kinds)

    def spell(self, ids_K: NDArray[np.integer]) -> bytes:
        """The bytes of tokens, end to end; works on a part at a time, so that memory holds little else."""
        parts = []
        for first in range(0, ids_K.size, SPELLED_AT_ONCE):
            part_K = ids_K[first : first + SPELLED_AT_ONCE]
            lengths_K = self.lengths_V[part_K]
            ends_K = np.cumsum(lengths_K, dtype=np.int32)  # a part, and a vocabulary, have less than 2 GiB
            shift_K = self.begins_V[part_K] - (ends_K - lengths_K)
            at = np.repeat(shift_K, lengths_K)
            at += np.arange(at.size, dtype=np.int32)
            parts.append(self.blob[at].tobytes())
        return b"".join(parts)


@dataclass(frozen=True)
class FastTokens:
    """What it takes to tokenise in bulk; without ``table`` it cannot be done.

    ``slow_reason`` says why it is not gigatoken that makes the ids, where it is not.
    """

    engine: Engine | None
    table: TokenBytes | None
    slow_reason: str | None


NOTHING_FAST = FastTokens(None, None, "its tokens are no strings of bytes, so each example is encoded by itself")


def fast_tokens(tokenizer: Tokenizer, described: str) -> FastTokens:
    """The engine and the bytes of a tokenizer whose JSON is ``described``; a large one takes half a second."""
    table = TokenBytes.of(tokenizer)
    if table is None:
        return NOTHING_FAST
    engine, slow_reason = find_engine(tokenizer, described)
    return FastTokens(engine, table, slow_reason)


@dataclass(frozen=True)
class TokenizedTexts:
    """Ids of all texts end to end, where each text begins, and where in its text (in bytes) each token does.

    ``spelled_N``: the tokens are the text, byte for byte; of the others ids and positions mean nothing.
    """

    ids_K: NDArray[np.int32]
    offsets_N: NDArray[np.int64]
    starts_K: NDArray[np.int64]
    spelled_N: NDArray[np.bool_]


def tokenize(engine: Engine, table: TokenBytes, texts: Sequence[bytes]) -> TokenizedTexts:
    """Tokenise texts and compare what the tokens spell with them."""
    found_K, offsets_N = engine.ids(texts)
    ids_K = np.asarray(found_K, np.int32)
    known = ids_K.size == 0 or (int(ids_K.min()) >= 0 and int(ids_K.max()) < table.lengths_V.size)
    if not known:
        nothing_N = np.zeros(len(texts), np.bool_)
        return TokenizedTexts(ids_K, offsets_N, np.zeros(ids_K.size, np.int64), nothing_N)
    lengths_K = table.lengths_V[ids_K].astype(np.int64)
    ends_K = np.concatenate(([0], np.cumsum(lengths_K)))
    begins_N, wanted_N = ends_K[offsets_N[:-1]], np.fromiter(map(len, texts), np.int64, len(texts))
    found_N = ends_K[offsets_N[1:]] - begins_N
    extra_N = found_N - wanted_N
    spelled = table.spell(ids_K)
    allowed = (0, 1) if table.space_before else (0,)
    spelled_N = np.zeros(len(texts), np.bool_)
    if not extra_N.any() and spelled == b"".join(texts):
        spelled_N[:] = True
    else:
        for number, (text, begin, extra) in enumerate(zip(texts, begins_N.tolist(), extra_N.tolist(), strict=True)):
            if extra in allowed:
                spelled_N[number] = spelled[begin : begin + len(text) + extra] == b" " * extra + text
    document_K = np.repeat(np.arange(len(texts)), np.diff(offsets_N))
    starts_K = ends_K[:-1] - begins_N[document_K] - np.maximum(extra_N, 0)[document_K]
    return TokenizedTexts(ids_K, offsets_N, np.maximum(starts_K, 0), spelled_N)


def _kinds(described: Any) -> set[str]:
    """The types of a decoder and of its parts."""
    if not isinstance(described, dict):
        return set()
    return {described.get("type", "")}.union(*(_kinds(part) for part in described.get("decoders", ())))


def _spelled_by_byte_level(texts: list[str]) -> tuple[bytearray, NDArray[np.int32]]:
    """The bytes of all tokens end to end, and how many each has, one for each letter of its text.

    GPT-2's alphabet (openai/gpt-2, encoder.py): printable bytes stand for themselves, the others for U+0100 onwards.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = str.maketrans("".join(chr(256 + at) for at in range(len(others))), "".join(map(chr, others)))
    # What is no letter of the alphabet becomes a question mark, which no text is taken for by mistake: it is compared.
    blob = bytearray("".join(texts).translate(letters).encode("latin-1", "replace"))
    return blob, np.fromiter(map(len, texts), np.int32, len(texts))


def _spelled_by_sentencepiece(texts: list[str]) -> tuple[bytearray, NDArray[np.int32]]:
    """The same where ``▁`` is a space and ``<0x0A>`` a byte."""
    spelled = [text.replace("▁", " ").encode() for text in texts]
    for number, text in enumerate(texts):
        if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            spelled[number] = bytes([int(text[3:5], 16)])
    return bytearray(b"".join(spelled)), np.fromiter(map(len, spelled), np.int32, len(spelled))
