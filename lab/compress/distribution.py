"""Gives the mixture with counts as a distribution over the whole vocabulary, which a coder needs.

The scorer's own kernels (golf/score/counts.py, golf/score/successors.py) find the contexts, weigh and learn; here alone
every token gets its probability. It equals what the scorer would give each of them, to float64's rounding (a test
compares them).

V tokens of the vocabulary.
"""

import functools
from typing import Any

import numpy as np

from golf.score.counts import compile_kernels, longest_known, look_up_contexts
from golf.score.successors import (
    SUCCESSOR_FEATURES,
    compiled_corrections,
    list_successors,
    mixed_probabilities,
    source_stamp,
    weigh_successors,
)


def mixed_distribution(everything, document, weights, learned, most, tokens, network_V):
    """Returns the mixture's distribution_V of what follows `tokens`, given the network's, with up to `most` successors
    corrected; learns nothing."""
    scopes, orders, vocabulary = (everything, document), weights.share.shape[1] - 1, len(network_V)
    contexts, found = np.zeros((2, orders + 1), np.int64), np.zeros((2, orders + 1, 3), np.int64)
    token_V, place_V = np.zeros(vocabulary, np.int64), np.full(vocabulary, -1)
    count_2OV, class_2V = np.zeros((2, orders + 1, vocabulary)), np.zeros((2, vocabulary), np.int64)
    longest, last = look_up_contexts(scopes, contexts, found, tokens, 0), tokens[len(tokens) - 1]
    listed = list_successors(scopes, contexts, longest, token_V, place_V, count_2OV, class_2V)
    placed = listed
    for token in range(vocabulary):
        if place_V[token] < 0:
            token_V[placed] = token
            placed += 1
    part_5V = np.zeros((5, vocabulary))
    part_5V[0] = network_V[token_V]
    mixed_probabilities(weights, found, longest, last, count_2OV, part_5V)
    raised_V = part_5V[4].copy()
    known = longest_known(found[0], longest), longest_known(found[1], longest)
    rows = learned.weight[known], learned.weight_by_hit[weights.hit[0]], learned.weight_by_token[last]
    corrected_K = token_V[: min(listed, most)]
    raised_V /= weigh_successors(
        learned, rows, corrected_K, class_2V, part_5V, np.zeros((len(corrected_K), SUCCESSOR_FEATURES)), raised_V
    )
    distribution_V = np.zeros(vocabulary)
    distribution_V[token_V] = raised_V
    return distribution_V


@functools.cache
def compiled_distribution() -> Any:
    """Returns `mixed_distribution` as machine code. Raises ImportError where numba is missing."""
    names = compile_kernels((mixed_distribution,), globals() | compiled_corrections(), source_stamp())
    return names["mixed_distribution"]
