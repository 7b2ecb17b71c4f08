"""Keeps a table of encoded words, for tokenizers whose pieces never cross a blank.

There a word's ids don't depend on its neighbours, so each distinct word is encoded once and looked up from then on,
all words of a chunk of text at once: words are found by their polynomial hashes of 64 bits (over bytes, from sums over
the whole chunk), and their ids are copied by position. A word at the start of a document has an entry of its own, with
BOS, since no blank is in front of it.

Shape letters: N bytes of text, W words, D documents, U distinct words, X new ones, E entries of the
table, T tokens.
"""

import unicodedata
from array import array
from collections.abc import Sequence

import numpy as np

from golf.data.shards import DataError
from golf.data.tokenizer import BLANK
from lab.prepare.text_tokenizer import TextTokenizer, check_byte_counts

TABLE_ENTRIES = 400_000
"""Most words in the table, about 30 MB with its index. Later ones are encoded again whenever they come."""
LONGEST_CACHED_WORD = 32
MOST_CHUNK_BYTES = 1 << 24
"""Longer chunks (of one giant document) are encoded in one piece, for sums over them take 50 times their memory."""
GROUP_WORDS = 64
"""New words that are encoded in one piece."""
ANCHOR = "a"
"""A word of one piece to put in front of a word, so that this one stands behind a blank."""
LARGEST_HASH = np.uint64(2**64 - 1)
HASH_BASE, HASH_MIX, FIRST_MARK = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93, 0xA0761D6478BD642F
IS_WORD_BYTE = np.ones(256, dtype=bool)
IS_WORD_BYTE[[9, 10, 13, 32]] = False


def words_are_independent(tokenizer: TextTokenizer) -> bool:
    """Says whether a text's ids are those of its words one after the other, words being what stands between blanks.

    True of a BPE model (its scores are ranks) that makes one blank of each run of blanks, tabs and line ends and
    none of those at the edges, and in whose pieces a blank is nowhere but in front.
    """
    processor = getattr(tokenizer, "processor", None)
    if processor is None:
        return False
    plain = [i for i in range(tokenizer.vocab_size) if not (processor.is_control(i) or processor.is_byte(i))]
    ranks = [processor.get_score(i) for i in plain]
    pair = processor.encode("a a")
    return (
        not any(BLANK in processor.id_to_piece(i)[1:] for i in plain)
        and all(score <= 0 and score == int(score) for score in ranks)
        and len(set(ranks)) > len(ranks) // 2
        and len(processor.encode(ANCHOR)) == 1
        and all(processor.encode(f"a{blank}a") == pair for blank in ("\t", "\n", "\r", "  ", " \n\t"))
        and processor.encode(" \na\t ") == processor.encode("a")
    )


def id_bytes(ids: Sequence[int]) -> bytes:
    return array("H", ids).tobytes()


def words_differ(tokenizer: TextTokenizer) -> DataError:
    return DataError(
        f"{tokenizer.name}: encoding word by word does not give the ids of the whole text; prepare with --no-word-cache"
    )


class WordIndex:
    """Maps hashes (below the largest of 64 bits) to their numbers in the order of insertion, in one sorted array."""

    def __init__(self):
        self.hash_E1 = np.array([LARGEST_HASH])
        self.number_E1 = np.array([-1])
        self.size = 0

    def find(self, hash_W: np.ndarray) -> np.ndarray:
        """Returns the number of each hash, -1 where it is not there."""
        place_W = np.searchsorted(self.hash_E1, hash_W)
        return np.where(self.hash_E1[place_W] == hash_W, self.number_E1[place_W], -1)

    def insert(self, hash_W: np.ndarray) -> None:
        """Numbers new hashes, in rising order, from `size` on."""
        place_W = np.searchsorted(self.hash_E1, hash_W)
        self.hash_E1 = np.insert(self.hash_E1, place_W, hash_W)
        self.number_E1 = np.insert(self.number_E1, place_W, np.arange(self.size, self.size + len(hash_W)))
        self.size += len(hash_W)


class WordTable:
    """Encodes documents through the table."""

    def __init__(self, tokenizer: TextTokenizer):
        self.tokenizer = tokenizer
        pieces = map(tokenizer.processor.id_to_piece, range(tokenizer.vocab_size))
        self.leads_V = np.array([piece.startswith(BLANK) for piece in pieces])
        self.index = WordIndex()
        self.ids_T = np.empty(0, dtype="<u2")
        self.end_E = np.zeros(1, dtype=np.int64)  # entry e is ids_T[end_E[e] : end_E[e + 1]]
        self.power_N = self.inverse_N = np.empty(0, dtype=np.uint64)

    def with_bos(self, ids: Sequence[int]) -> bytes:
        return id_bytes([self.tokenizer.bos_id, *ids])

    def encode(self, texts: Sequence[str]) -> bytes:
        """Returns the ids of all texts with BOS before each, little-endian uint16. Raises DataError."""
        parts = [text.encode() for text in texts]
        data = b"\n".join(parts)
        if len(data) > MOST_CHUNK_BYTES:
            return b"".join(map(self.with_bos, self.tokenizer.encode_documents(texts)))
        begin_W, end_W, hash_W = self.hash_words(np.frombuffer(data, dtype=np.uint8))
        first_D = np.searchsorted(begin_W, np.cumsum([0, *(len(part) + 1 for part in parts)]))
        firsts = first_D[:-1][first_D[:-1] < first_D[1:]]
        hash_W[firsts] ^= np.uint64(FIRST_MARK)
        hash_W = np.minimum(hash_W, LARGEST_HASH - np.uint64(1))
        hash_U, place_U, inverse_W = np.unique(hash_W, return_index=True, return_inverse=True)
        number_U = self.index.find(hash_U)
        new_X = np.flatnonzero(number_U < 0)
        spans = zip(begin_W[place_U[new_X]].tolist(), end_W[place_U[new_X]].tolist(), strict=True)
        words = [data[begin:end].decode() for begin, end in spans]
        ids_X = self.learn(words, np.isin(place_U[new_X], firsts).tolist())
        number_U[new_X] = self.index.size + np.arange(len(new_X))
        tokens_T, stop_W = self.gather(number_U[inverse_W], ids_X)
        odd_W = np.isin(inverse_W, [number for number, ids in zip(new_X, ids_X, strict=True) if ids is None])
        whole = {number for number, text in enumerate(texts) if BLANK in text}
        whole.update(np.flatnonzero(first_D[:-1] == first_D[1:]).tolist())
        whole.update((np.searchsorted(first_D[:-1], np.flatnonzero(odd_W), side="right") - 1).tolist())
        self.keep(hash_U[new_X], words, ids_X)
        return self.splice(texts, tokens_T, stop_W[first_D], sorted(whole))

    def hash_words(self, bytes_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns begin, end and hash of what stands between blanks, tabs and line ends."""
        edges_N = np.diff(IS_WORD_BYTE[bytes_N].view(np.int8), prepend=0, append=0)
        begin_W, end_W = np.flatnonzero(edges_N == 1), np.flatnonzero(edges_N == -1)
        if len(self.power_N) < len(bytes_N):
            bases = (HASH_BASE, pow(HASH_BASE, -1, 2**64))
            self.power_N, self.inverse_N = (np.cumprod(np.full(len(bytes_N), b, dtype=np.uint64)) for b in bases)
        sum_N = np.zeros(len(bytes_N) + 1, dtype=np.uint64)
        np.cumsum((bytes_N.astype(np.uint64) + np.uint64(1)) * self.power_N[: len(bytes_N)], out=sum_N[1:])
        hash_W = (sum_N[end_W] - sum_N[begin_W]) * self.inverse_N[begin_W]
        hash_W ^= (end_W - begin_W).astype(np.uint64) * np.uint64(FIRST_MARK)
        return begin_W, end_W, (hash_W ^ (hash_W >> np.uint64(32))) * np.uint64(HASH_MIX)

    def learn(self, words: list[str], is_first: list[bool]) -> list[bytes | None]:
        """Returns the ids of new words: at the start of a document with BOS, else behind a blank.

        None for those whose document is to be encoded in one piece: they could join with what stands before the
        blank, hold SentencePiece's blank, or leave nothing at the start. Raises DataError where the ids of a text of
        these words are not theirs put together, or their bytes are not those of its decoded text.
        """
        usable = [BLANK not in word for word in words]
        firsts = [word for word, use, first in zip(words, usable, is_first, strict=True) if use and first]
        behind = [word for word, use, first in zip(words, usable, is_first, strict=True) if use and not first]
        stream: list[int] = []
        at_start: dict[str, bytes] = {}
        for word, ids in zip(firsts, self.tokenizer.encode_documents(firsts), strict=True):
            if ids:
                at_start[word] = self.with_bos(ids)
                stream += [self.tokenizer.bos_id, *ids]
        learned = self.learn_behind(behind, stream)
        check_byte_counts(self.tokenizer, self.tokenizer.target_bytes(stream), stream)
        return [(at_start if first else learned).get(word) for word, first in zip(words, is_first, strict=True)]

    def learn_behind(self, words: list[str], stream: list[int]) -> dict[str, bytes]:
        """Returns the ids of words behind a blank; adds documents of all of them to `stream`."""
        plain = [word for word in words if word.isascii() and word.isprintable()]
        odd = [word for word in set(words).difference(plain) if not unicodedata.combining(word[0])]
        encoded = self.tokenizer.encode_documents([f"{ANCHOR} {word}" for word in odd])
        learned = {word: id_bytes(ids[1:]) for word, ids in zip(odd, encoded, strict=True)}
        for group, ids in self.encode_groups(plain):
            data, starts = id_bytes(ids[1:]), (2 * np.flatnonzero(self.leads_V[ids[1:]])).tolist()
            if len(starts) != len(group) or starts[0]:  # each of these words begins with its blank
                raise words_differ(self.tokenizer)
            learned.update(zip(group, map(data.__getitem__, map(slice, starts, [*starts[1:], len(data)])), strict=True))
            stream += [self.tokenizer.bos_id, *ids]
        for group, ids in self.encode_groups(odd):
            if id_bytes(ids[1:]) != b"".join(map(learned.__getitem__, group)):
                raise words_differ(self.tokenizer)
            stream += [self.tokenizer.bos_id, *ids]
        return learned

    def encode_groups(self, words: list[str]) -> list[tuple[list[str], list[int]]]:
        """Returns words in groups, and the ids of a text of the anchor and each group."""
        groups = [words[start : start + GROUP_WORDS] for start in range(0, len(words), GROUP_WORDS)]
        encoded = self.tokenizer.encode_documents([" ".join([ANCHOR, *group]) for group in groups])
        return list(zip(groups, encoded, strict=True))

    def gather(self, number_W: np.ndarray, ids_X: list[bytes | None]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the ids of words, put together, and where each word's begin (and the last one's end)."""
        ids_T = np.concatenate([self.ids_T, np.frombuffer(b"".join(ids or b"" for ids in ids_X), dtype="<u2")])
        lengths_X = [len(ids or b"") // 2 for ids in ids_X]
        end_E = np.concatenate([self.end_E, self.end_E[-1] + np.cumsum(lengths_X, dtype=np.int64)])
        begin_W = end_E[number_W]
        length_W = end_E[number_W + 1] - begin_W
        stop_W = np.concatenate([[0], np.cumsum(length_W)])
        return ids_T[np.repeat(begin_W - stop_W[:-1], length_W) + np.arange(stop_W[-1])], stop_W

    def keep(self, hash_X: np.ndarray, words: list[str], ids_X: list[bytes | None]) -> None:
        """Takes new words in while there is room."""
        room = max(0, TABLE_ENTRIES - self.index.size)
        kept = [n for n, word in enumerate(words) if ids_X[n] is not None and len(word) <= LONGEST_CACHED_WORD][:room]
        if kept:
            ids = [ids_X[n] for n in kept]
            self.index.insert(hash_X[kept])
            self.ids_T = np.concatenate([self.ids_T, np.frombuffer(b"".join(ids), dtype="<u2")])
            ends = self.end_E[-1] + np.cumsum([len(part) // 2 for part in ids], dtype=np.int64)
            self.end_E = np.concatenate([self.end_E, ends])

    def splice(self, texts: Sequence[str], tokens_T: np.ndarray, stop_D: np.ndarray, whole: list[int]) -> bytes:
        """Returns the tokens with those of the documents `whole` encoded in one piece."""
        pieces, done = [], 0
        for number, ids in zip(whole, self.tokenizer.encode_documents([texts[n] for n in whole]), strict=True):
            pieces += [tokens_T[done : stop_D[number]].tobytes(), self.with_bos(ids)]
            done = stop_D[number + 1]
        return b"".join([*pieces, tokens_T[done:].tobytes()])
