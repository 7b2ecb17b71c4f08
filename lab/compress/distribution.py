"""Gives the mixture with counts as a distribution over the whole vocabulary, which a coder needs.

The scorer's own kernels (golf/score/counts.py) find the contexts and learn; here alone every token gets its
probability. It equals what the scorer would give each of them, to float64's rounding (a test compares them).

V tokens of the vocabulary.
"""

import functools
from types import FunctionType
from typing import Any

import numpy as np

from golf.score.counts import (
    DISCOUNT,
    compiled_kernels,
    count_level,
    longest_known,
    look_up_contexts,
    spread_of,
)


def interpolate_counts(tables, contexts, found, longest, probability_V):
    """Turns the distribution that counts fall back on into that of the counts, in place: `discounted_probability`."""
    for order in range(longest + 1):
        total, distinct = found[order, 0], found[order, 1]
        if total > 0:
            probability_V *= DISCOUNT * distinct / total
            entry = tables.first[contexts[order]]
            while entry >= 0:
                probability_V[tables.token[entry]] += (tables.count[entry] - DISCOUNT) / total
                entry = tables.following[entry]


def correct_network(scopes, weights, contexts, found, longest, hit, last, probability_V):
    """Corrects the network's distribution by the counts, in place: `correct_probability`, without its learning."""
    for order in range(1, longest + 1):
        for scope in range(2):
            total, distinct = found[scope, order, 0], found[scope, order, 1]
            if total == 0:
                continue
            logit = weights.share[scope, order, count_level(total), spread_of(total, distinct)]
            logit += weights.share_by_hit[scope, order, hit] + weights.share_by_token[scope, last]
            share = 1 / (1 + np.exp(-logit))
            probability_V *= 1 - share
            entry = scopes[scope].first[contexts[scope, order]]
            while entry >= 0:
                counted = (scopes[scope].count[entry] - DISCOUNT) / (total - DISCOUNT * distinct)
                probability_V[scopes[scope].token[entry]] += share * counted
                entry = scopes[scope].following[entry]


def mixed_distribution(everything, document, weights, tokens, network_V):
    """Returns the mixture's distribution_V of what follows `tokens`, given the network's; learns nothing."""
    scopes, orders = (everything, document), weights.share.shape[1] - 1
    contexts, found = np.zeros((2, orders + 1), np.int64), np.zeros((2, orders + 1, 3), np.int64)
    longest = look_up_contexts(scopes, contexts, found, tokens, 0)
    everything_V = np.full(len(network_V), 1.0 / len(network_V))
    interpolate_counts(everything, contexts[0], found[0], longest, everything_V)
    document_V = everything_V.copy()
    interpolate_counts(document, contexts[1], found[1], longest, document_V)
    hit, last = weights.hit[0], tokens[len(tokens) - 1]
    corrected_V = network_V.copy()
    correct_network(scopes, weights, contexts, found, longest, hit, last, corrected_V)
    known = weights.weight[longest_known(found[0], longest), longest_known(found[1], longest)]
    share_4 = np.exp(known + weights.weight_by_hit[hit] + weights.weight_by_token[last])
    share_4 /= share_4.sum()
    return share_4[0] * network_V + share_4[1] * everything_V + share_4[2] * document_V + share_4[3] * corrected_V


@functools.cache
def compiled_distribution() -> Any:
    """Returns `mixed_distribution` as machine code. Raises ImportError where numba is missing."""
    from numba import njit

    names = globals() | compiled_kernels()
    for function in (interpolate_counts, correct_network, mixed_distribution):
        names[function.__name__] = njit(FunctionType(function.__code__, names, function.__name__))
    return names["mixed_distribution"]
