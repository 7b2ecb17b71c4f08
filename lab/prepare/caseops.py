"""CaseOps: a lossless way to write text without capital letters (parameter-golf PR #1729).

Every maximal run of ASCII letters is written in lower case. Operators from the private use area say what it was:
ALLCAPS in front of a run of two or more capitals, TITLE in front of one that begins with a capital, CAPNEXT in front
of any other capital. An operator that is in the text itself has ESC in front. Nothing else changes.

Shape letters: N bytes or tokens, U capital letters, K operators.
"""

import re

import numpy as np

from golf.data.tokenizer import CASE_OPERATORS

TITLE, ALLCAPS, CAPNEXT, ESC = range(4)
OPERATOR_BYTES = np.array([list(operator.encode()) for operator in CASE_OPERATORS], dtype=np.uint8)
LITERAL_OPERATOR = re.compile(f"[{CASE_OPERATORS}]")
MARKED_SPAN = re.compile("{3}[{0}-{3}]?|{1}[a-z]*|{0}[a-z]?|{2}[a-z]?".format(*CASE_OPERATORS))
"""What one operator acts on."""


def encode_caseops(text: str) -> str:
    """`text` with operators in place of its capital letters; `decode_caseops` gives it back."""
    if not text.isascii():
        text = LITERAL_OPERATOR.sub(rf"{CASE_OPERATORS[ESC]}\g<0>", text)
    data = text.encode()
    bytes_N = np.frombuffer(data, dtype=np.uint8)
    upper_U = np.flatnonzero(bytes_N - ord("A") < 26)  # below "A" wraps around
    if not len(upper_U):
        return text
    places_K, operators_K = case_operators(bytes_N, upper_U)
    marked_N = np.ones(len(bytes_N) + 3 * len(places_K), dtype=bool)
    firsts_K = places_K + 3 * np.arange(len(places_K))
    written_N = np.empty(len(marked_N), dtype=np.uint8)
    for part in range(3):
        marked_N[firsts_K + part] = False
        written_N[firsts_K + part] = OPERATOR_BYTES[operators_K, part]
    written_N[marked_N] = np.frombuffer(data.lower(), dtype=np.uint8)
    return written_N.tobytes().decode()


def case_operators(bytes_N: np.ndarray, upper_U: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(where, which) of the operators for the capitals at `upper_U` of a text."""
    others = np.flatnonzero((bytes_N | 0x20) - ord("a") >= 26)  # no ASCII letters
    ends = np.concatenate([others, [len(bytes_N)]])
    run_U = np.searchsorted(others, upper_U)  # letters between the same two others are one run
    first_U = np.concatenate([[True], run_U[1:] != run_U[:-1]])
    begin_U = np.where(run_U > 0, others[run_U - 1] + 1, 0) if len(others) else np.zeros_like(upper_U)
    capitals_U = np.diff(np.concatenate([np.flatnonzero(first_U), [len(upper_U)]]))[np.cumsum(first_U) - 1]
    whole_U = (capitals_U == ends[run_U] - begin_U) & (capitals_U > 1)
    operators_U = np.where(whole_U, ALLCAPS, np.where(begin_U == upper_U, TITLE, CAPNEXT))
    kept_U = first_U | ~whole_U
    return upper_U[kept_U], operators_U[kept_U]


def decode_caseops(text: str) -> str:
    """The text that `encode_caseops` wrote; operators with nothing to act on (a model may say so) leave nothing."""
    return MARKED_SPAN.sub(lambda match: match[0][1:].upper(), text)


def literal_operators(ids_N: np.ndarray, operators: list[int]) -> np.ndarray:
    """Which tokens are operators of the text itself: those behind an ESC that is not itself behind one.

    `operators` are the ids of TITLE, ALLCAPS, CAPNEXT and ESC. In a run of ESC every second one is literal.
    """
    escape_N = ids_N == operators[ESC]
    number_N = np.arange(len(ids_N))
    run_start_N = np.maximum.accumulate(np.where(escape_N, 0, number_N + 1))  # one behind the last that is no ESC
    behind_N = np.concatenate([[0], (number_N - run_start_N + 1)[:-1]])  # ESC in the unbroken run in front
    return np.isin(ids_N, operators) & (behind_N % 2 == 1)
