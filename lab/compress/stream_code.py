"""Turns streams of tokens into bytes and back with a model's probabilities, by one loop for both directions."""

import zlib
from collections.abc import Callable, Sequence

import numpy as np

from golf.config.knobs import UserError
from lab.compress.predictor import StreamPredictor
from lab.compress.range_coder import CodeError, RangeDecoder, RangeEncoder, whole_frequencies

BLOCK = 1024
"""Symbols between two checksums."""
Progress = Callable[[int, int], None]


class CompressionError(UserError):
    """Reports a file that can't be written or read back."""


def code_streams(
    predictor: StreamPredictor, coder: RangeEncoder | RangeDecoder, known: Sequence[Sequence[int]] | None,
    check: Callable[[int], None], progress: Progress = lambda done, total: None,
) -> None:  # fmt: skip
    """Codes all targets of all streams: `known` ones are written, else they are read. They end in the predictor's
    tokens.

    `check` is called after each block with the checksum of its tokens, and may raise.
    """
    total, done, checksum = sum(predictor.lengths), 0, 0
    for target in range(max(predictor.lengths)):
        predictor.predict()
        for number, length in enumerate(predictor.lengths):
            if target < length:
                frequencies_V = whole_frequencies(predictor.distribution(number))
                token = coder.code(frequencies_V, known[number][target] if known else None)
                predictor.learn(number, token)
                checksum, done = zlib.crc32(token.to_bytes(4, "little"), checksum), done + 1
                if done % BLOCK == 0 or done == total:
                    check(checksum)
                    progress(done, total)
        predictor.advance()


def encode_streams_of(
    predictor: StreamPredictor, tokens: Sequence[Sequence[int]], progress: Progress = lambda done, total: None
) -> tuple[bytes, np.ndarray]:
    """Returns the coded bytes of the streams' targets, and uint32 checksums of their blocks."""
    coder, checksums = RangeEncoder(), []
    code_streams(predictor, coder, tokens, checksums.append, progress)
    return coder.finish(), np.array(checksums, np.uint32)


def decode_streams_of(
    predictor: StreamPredictor, data: bytes, checksums: np.ndarray, made_on: str,
    progress: Progress = lambda done, total: None,
) -> list[list[int]]:  # fmt: skip
    """Returns the targets of all streams. Raises CompressionError where they are not what was coded."""
    left = iter(enumerate(checksums.tolist()))

    def check(checksum: int) -> None:
        block, expected = next(left)
        if checksum != expected:
            raise CompressionError(
                f"block {block} of {len(checksums)} comes out wrong: this machine's arithmetic gives other bits than"
                f" that which compressed ({made_on}), or the file is damaged; decompress on such a machine"
            )

    try:
        code_streams(predictor, RangeDecoder(data), None, check, progress)
    except CodeError as error:
        raise CompressionError(
            f"{error}: block {next(left)[0]} of {len(checksums)} can't be read ({made_on})"
        ) from None
    pairs = zip(predictor.tokens_BN, predictor.lengths, strict=True)
    return [tokens_N[1 : length + 1].tolist() for tokens_N, length in pairs]
