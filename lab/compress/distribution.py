"""Gives the mixture with counts as a distribution over the whole vocabulary, which a coder needs.

The scorer's own kernels (golf/score/counts.py, golf/score/successors.py) find the contexts, weigh and learn; here alone
every token gets its probability. Without the last correction that is linear in the network's probability and in the
token's counts, so that each list of successors is walked once, and nothing else depends on the vocabulary but two
passes. It equals what the scorer would give each token, to float64's rounding (a test compares them).

K successors, O orders of contexts, V tokens of the vocabulary.
"""

import functools
from typing import Any

import numpy as np

from golf.score.counts import DISCOUNT, compile_kernels, fill_shares, look_up_contexts
from golf.score.successors import (
    SUCCESSOR_FEATURES,
    compiled_corrections,
    feature_rows,
    list_successors,
    mixed_probabilities,
    share_of,
    source_stamp,
    weigh_successors,
)


def pass_down(found, longest, factor_O, probability):
    """Adds to `factor_O` what each count of one scope is worth where `probability` goes through its interpolation;
    returns what is left for the distribution that it falls back on: `discounted_probability`, from its end."""
    for order in range(longest, -1, -1):
        total, distinct = found[order, 0], found[order, 1]
        if total > 0:
            factor_O[order] += probability / total
            probability *= DISCOUNT * distinct / total
    return probability


def fill_factors(weights, found, longest, last, share_4, factor_2O):
    """Fills `factor_2O` with what a token's count above DISCOUNT in each context adds to its probability; returns the
    factor of the network's probability, and what every token has beside."""
    corrected = share_4[3]
    for order in range(longest, 0, -1):
        for scope in (1, 0):
            total, distinct = found[scope, order, 0], found[scope, order, 1]
            if total > 0:
                share = share_of(weights, found, scope, order, last)
                factor_2O[scope, order] = corrected * share / (total - DISCOUNT * distinct)
                corrected *= 1 - share
    left = share_4[1] + pass_down(found[1], longest, factor_2O[1], share_4[2])
    left = pass_down(found[0], longest, factor_2O[0], left)
    return share_4[0] + corrected, left / len(weights.weight_by_token)


def add_counts(tables, contexts, longest, factor_O, distribution_V):
    """Adds what the counts of one scope are worth."""
    for token in range(len(distribution_V)):
        entry = tables.by_token[token]
        if entry >= 0:
            distribution_V[token] += factor_O[0] * (tables.count[entry] - DISCOUNT)
    for order in range(1, longest + 1):
        entry = tables.first[contexts[order]]
        while entry >= 0:
            distribution_V[tables.token[entry]] += factor_O[order] * (tables.count[entry] - DISCOUNT)
            entry = tables.following[entry]


def correct_distribution(scopes, weights, learned, lookups, longest, last, network_V, scratch, distribution_V):
    """Does the last correction, in place."""
    contexts, found, share_4 = lookups
    successor_K, place_V, count_2OK, class_2K, part_5K, feature_KF, raised_K = scratch
    listed = list_successors(scopes, contexts, longest, successor_K, place_V, count_2OK, class_2K)
    for place in range(listed):
        part_5K[0, place] = network_V[successor_K[place]]
    mixed_probabilities(weights, found, longest, last, count_2OK, share_4, part_5K[:, :listed])
    rows = feature_rows(weights, learned, found, longest, last)
    total = weigh_successors(learned, rows, successor_K[:listed], class_2K, part_5K, feature_KF, raised_K)
    for place in range(listed):
        distribution_V[successor_K[place]] = raised_K[place]
    for token in range(len(distribution_V)):
        distribution_V[token] /= total


def fill_distribution(scopes, weights, learned, tokens, network_V, lookups, factor_2O, scratch, distribution_V):
    """Does what `mixed_distribution` says, in arrays that are overwritten."""
    contexts, found, share_4 = lookups
    longest, last = look_up_contexts(scopes, contexts, found, tokens, 0), tokens[len(tokens) - 1]
    fill_shares(weights, found, longest, last, share_4)
    network, everywhere = fill_factors(weights, found, longest, last, share_4, factor_2O)
    for token in range(len(network_V)):
        distribution_V[token] = network * network_V[token] + everywhere
    add_counts(scopes[0], contexts[0], longest, factor_2O[0], distribution_V)
    add_counts(scopes[1], contexts[1], longest, factor_2O[1], distribution_V)
    if len(scratch[0]):
        correct_distribution(scopes, weights, learned, lookups, longest, last, network_V, scratch, distribution_V)


def mixed_distribution(everything, document, weights, learned, most, tokens, network_V):
    """Returns the mixture's distribution_V of what follows `tokens`, given the network's, with up to `most` successors
    corrected; learns nothing."""
    orders, vocabulary = weights.share.shape[1], len(network_V)
    lookups = np.zeros((2, orders), np.int64), np.zeros((2, orders, 3), np.int64), np.zeros(4)
    scratch = (
        np.zeros(most, np.int64), np.full(vocabulary if most else 0, -1), np.zeros((2, orders, most)),
        np.zeros((2, most), np.int64), np.zeros((5, most)), np.zeros((most, SUCCESSOR_FEATURES)), np.zeros(most),
    )  # fmt: skip
    factor_2O, distribution_V = np.zeros((2, orders)), np.zeros(vocabulary)
    scopes = everything, document
    fill_distribution(scopes, weights, learned, tokens, network_V, lookups, factor_2O, scratch, distribution_V)
    return distribution_V


KERNELS = pass_down, fill_factors, add_counts, correct_distribution, fill_distribution, mixed_distribution


@functools.cache
def compiled_distribution() -> Any:
    """Returns `mixed_distribution` as machine code. Raises ImportError where numba is missing."""
    return compile_kernels(KERNELS, globals() | compiled_corrections(), source_stamp())["mixed_distribution"]
