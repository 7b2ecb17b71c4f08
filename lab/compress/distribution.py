"""Gives the mixture with counts as a distribution over the whole vocabulary, which a coder needs.

The scorer's own kernels (golf/score/counts.py, golf/score/successors.py) find the contexts, weigh and learn; here alone
every token gets its probability. It equals what the scorer would give each of them, to float64's rounding (a test
compares them).

V tokens of the vocabulary.
"""

import functools
from typing import Any

import numpy as np

from golf.score.counts import compile_kernels, look_up_contexts
from golf.score.successors import (
    SUCCESSOR_FEATURES,
    compiled_corrections,
    feature_rows,
    list_successors,
    mixed_probabilities,
    source_stamp,
    weigh_successors,
)


def fill_distribution(scopes, weights, learned, most, tokens, network_V, scratch, distribution_V):
    """Does what `mixed_distribution` says, in arrays that are overwritten."""
    contexts, found, token_V, place_V, count_2OV, class_2V, share_4, part_5V, feature_VF, raised_V = scratch
    longest, last = look_up_contexts(scopes, contexts, found, tokens, 0), tokens[len(tokens) - 1]
    listed = list_successors(scopes, contexts, longest, token_V, place_V, count_2OV, class_2V)
    placed = listed
    for token in range(len(network_V)):
        if place_V[token] < 0:
            token_V[placed] = token
            placed += 1
    for place in range(len(network_V)):
        part_5V[0, place] = network_V[token_V[place]]
    mixed_probabilities(weights, found, longest, last, count_2OV, share_4, part_5V)
    for place in range(len(network_V)):
        raised_V[place] = part_5V[4, place]
    rows = feature_rows(weights, learned, found, longest, last)
    corrected_K = token_V[: min(listed, most)]
    total = weigh_successors(learned, rows, corrected_K, class_2V, part_5V, feature_VF, raised_V)
    for place in range(len(network_V)):
        distribution_V[token_V[place]] = raised_V[place] / total


def mixed_distribution(everything, document, weights, learned, most, tokens, network_V):
    """Returns the mixture's distribution_V of what follows `tokens`, given the network's, with up to `most` successors
    corrected; learns nothing."""
    orders, vocabulary, distribution_V = weights.share.shape[1], len(network_V), np.zeros(len(network_V))
    scratch = (
        np.zeros((2, orders), np.int64), np.zeros((2, orders, 3), np.int64), np.zeros(vocabulary, np.int64),
        np.full(vocabulary, -1), np.zeros((2, orders, vocabulary)), np.zeros((2, vocabulary), np.int64),
        np.zeros(4), np.zeros((5, vocabulary)), np.zeros((vocabulary, SUCCESSOR_FEATURES)), np.zeros(vocabulary),
    )  # fmt: skip
    fill_distribution((everything, document), weights, learned, most, tokens, network_V, scratch, distribution_V)
    return distribution_V


@functools.cache
def compiled_distribution() -> Any:
    """Returns `mixed_distribution` as machine code. Raises ImportError where numba is missing."""
    names = compile_kernels((fill_distribution, mixed_distribution), globals() | compiled_corrections(), source_stamp())
    return names["mixed_distribution"]
