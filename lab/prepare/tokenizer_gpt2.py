"""GPT-2's tokenizer from a local file of its merges (`vocab.bpe` or `merges.txt`); tiktoken joins the pieces.

A merges file spells bytes as printable characters: a byte that prints in Latin-1 is itself, the others are U+0100,
U+0101, ... in their order. Ids 0 to 255 are those bytes in that order (printing ones first), then one id for each
merge, then `<|endoftext|>`, which starts a document.
"""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from golf.data.shards import DataError
from golf.data.tokenizers_plain import PlainTokenizer


def gpt2_alphabet() -> dict[str, int]:
    """The byte that each character of a merges file stands for, in the order of their ids."""
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in printing]
    return {chr(value): value for value in printing} | {chr(256 + n): value for n, value in enumerate(others)}


def gpt2_units(merges: str, name: str) -> list[bytes]:
    """The bytes of each id, the end of text last. Raises DataError for a file that holds no merges."""
    alphabet = gpt2_alphabet()
    units = [bytes([value]) for value in alphabet.values()]
    lines = [line for line in merges.splitlines() if line.strip() and not line.startswith("#version")]
    for number, line in enumerate(lines, start=1):
        parts = line.split(" ")
        if len(parts) != 2 or not all(parts) or not set(line) - {" "} <= set(alphabet):
            raise DataError(f"{name}: merge {number} is {line[:40]!r}: give GPT-2's vocab.bpe (or merges.txt)")
        units.append(bytes(alphabet[character] for part in parts for character in part))
    if len(set(units)) != len(units) or len(units) >= 2**16:
        raise DataError(f"{name}: merges that make one piece twice, or over 65,535 ids: give GPT-2's vocab.bpe")
    return [*units, b""]


class Gpt2Tokenizer(PlainTokenizer):
    """Byte-pair encoding with GPT-2's merges; the JSON file that describes it holds them whole."""

    def read(self, record: dict) -> tuple[list[bytes], int]:
        units = gpt2_units(record["merges"], self.name)
        return units, len(units) - 1

    @cached_property
    def encoding(self) -> tiktoken.Encoding:
        ranks = {unit: rank for rank, unit in enumerate(self.units[:-1])}
        return tiktoken.Encoding("golf-gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={})

    def encode(self, text: str) -> list[int]:
        return self.encoding.encode_ordinary(text)

    def encode_documents(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        return self.encoding.encode_ordinary_batch(list(texts), num_threads=threads)


def gpt2_tokenizer_file(merges_path: str | Path) -> bytes:
    """The file of GPT-2's tokenizer with the merges in `merges_path`. Raises DataError."""
    path = Path(merges_path)
    try:
        merges = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: can't be read ({error}): give GPT-2's vocab.bpe (or merges.txt)") from None
    gpt2_units(merges, str(path))
    return json.dumps({"kind": "gpt2", "merges": merges}).encode() + b"\n"
