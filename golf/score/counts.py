"""Predicts targets from counts of what was scored before, mixed with the network's probabilities: score first.

Contexts are the last 0 to K tokens of a document, counted in two scopes: over all that was scored, and in the document.
Four distributions are mixed, each normalised over the vocabulary, so that their mixture is:

    the network's;
    counts of everything: interpolated absolute discounting (Ney, Essen, Kneser 1994), from uniform up to order K;
    counts of the document, which fall back on the former;
    the network's, corrected by the counts of orders 1 to K one after another, with learned shares.

Shares and weights are learned online, by the gradient of each target's log-probability, after the target was scored. A
context is known by a hash of its own tokens alone; its successors are a list, in which the target is looked for.
Nothing depends on a target before it is scored. Loops are plain Python, which numba compiles (`compiled_kernels`).

M targets.
"""

import functools
import os
from collections.abc import Sequence
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np

DISCOUNT = 0.6
"""Taken from every count, for what the context has not been followed by. 0.75 gives 0.001 bits per byte more."""
RATE = 0.1
"""Step size of shares and weights. 0.02 and 0.05 are worse."""
COUNT_LEVELS, SPREADS, HITS = 10, 4, 12
"""Classes of a context's count, of its distinct successors, and of the last target's probability."""


class CountTables(NamedTuple):
    """Holds the contexts of one scope by hash, and a list of successors for each, the latest first."""

    keys: np.ndarray
    """uint64 hashes of contexts in open addressing, 0 where there is none; a power of two of them."""
    slots: np.ndarray
    """Number of the context in each slot."""
    total: np.ndarray
    distinct: np.ndarray
    first: np.ndarray
    """Each context's first entry, -1 where it has none."""
    token: np.ndarray
    count: np.ndarray
    following: np.ndarray
    used: np.ndarray
    """int64 (contexts, entries)."""


class MixtureWeights(NamedTuple):
    """Holds what is learned online, as logits."""

    share: np.ndarray
    """Of a context's counts in the corrected distribution: scope, order, class of count, class of distinct."""
    share_by_hit: np.ndarray
    share_by_token: np.ndarray
    """Scope and last token."""
    seen: np.ndarray
    """Times that an entry of `share` was trained."""
    weight: np.ndarray
    """Of the four distributions, by the longest known context over all and in the document."""
    weight_by_hit: np.ndarray
    weight_by_token: np.ndarray
    hit: np.ndarray
    """The class of the last target's probability, int64 (1,)."""


def new_tables(targets: int, orders: int) -> CountTables:
    """Returns empty tables with room for the contexts of orders 0 to `orders` of so many targets."""
    room = targets * (orders + 1) + 1
    slots = 1 << int(2 * room - 1).bit_length()
    whole = [np.zeros(room, np.int32) for _ in range(4)]
    return CountTables(
        np.zeros(slots, np.uint64), np.zeros(slots, np.int32), whole[0], whole[1], np.full(room, -1, np.int32),
        whole[2], whole[3], np.full(room, -1, np.int32), np.zeros(2, np.int64),
    )  # fmt: skip


def new_weights(orders: int, vocabulary: int) -> MixtureWeights:
    """Returns weights that trust a context the more, the oftener it was seen and the fewer successors it had."""
    seen = np.arange(COUNT_LEVELS)[:, None] + 0.5
    trust = seen * (0.8 - 0.2 * np.arange(SPREADS)) / (seen + 1)
    share = np.broadcast_to(np.log(trust / (1 - trust)), (2, orders + 1, COUNT_LEVELS, SPREADS))
    return MixtureWeights(
        share.copy(), np.zeros((2, orders + 1, HITS)), np.zeros((2, vocabulary)), np.zeros(share.shape),
        np.zeros((orders + 2, orders + 2, 4)), np.zeros((HITS, 4)), np.zeros((vocabulary, 4)),
        np.zeros(1, np.int64),
    )  # fmt: skip


def mix_hash(key, token):
    """Returns the hash of a context with one more token, never 0."""
    key = (key ^ np.uint64(token + 1)) * np.uint64(0x9E3779B97F4A7C15)
    return (key ^ (key >> np.uint64(32))) | np.uint64(1)


def find_context(tables, key):
    """Returns the number of a context, a new one where it is not known yet."""
    mask = np.uint64(len(tables.keys) - 1)
    slot = (key >> np.uint64(7)) & mask
    while tables.keys[slot] != key:
        if tables.keys[slot] == 0:
            tables.keys[slot], tables.slots[slot] = key, tables.used[0]
            tables.used[0] += 1
            break
        slot = (slot + np.uint64(1)) & mask
    return tables.slots[slot]


def count_successor(tables, context, target):
    """Returns how often the target followed the context."""
    entry = tables.first[context]
    while entry >= 0 and tables.token[entry] != target:
        entry = tables.following[entry]
    return tables.count[entry] if entry >= 0 else 0


def count_target(tables, context, target):
    """Counts the target behind the context, and moves it to the front of its list."""
    entry, before = tables.first[context], -1
    while entry >= 0 and tables.token[entry] != target:
        before, entry = entry, tables.following[entry]
    if entry < 0:
        entry = tables.used[1]
        tables.used[1] += 1
        tables.token[entry] = target
        tables.distinct[context] += 1
    elif before >= 0:
        tables.following[before] = tables.following[entry]
    if tables.first[context] != entry:
        tables.following[entry] = tables.first[context]
        tables.first[context] = entry
    tables.count[entry] += 1
    tables.total[context] += 1


def count_level(total):
    """Returns the class of a context's count: 0 to 4 themselves, then up to 6, 10, 20, 60 and above."""
    if total <= 4:
        return total
    return 5 + (total > 6) + (total > 10) + (total > 20) + (total > 60)


def spread_of(total, distinct):
    """Returns the class of a context's distinct successors: one, up to a fourth of its count, up to half, more."""
    if distinct == 1:
        return 0
    return 1 + (4 * distinct > total) + (2 * distinct > total)


def hit_class(probability):
    """Returns the class of the last target's probability, in powers of two."""
    return int(min(HITS - 1.0, max(0.0, np.log2(probability) + HITS - 1)))


def look_up_contexts(scopes, contexts, found, tokens, target):
    """Fills `found` (scope, order, (total, distinct, count of the target)) for the contexts before `target`, the token
    behind `tokens`; returns the longest order whose contexts stay in the document."""
    longest, key = min(contexts.shape[1] - 1, len(tokens)), np.uint64(1)
    for order in range(longest + 1):
        if order:
            key = mix_hash(key, tokens[len(tokens) - order])
        for scope in range(2):
            tables = scopes[scope]
            context = find_context(tables, mix_hash(key, order))
            contexts[scope, order] = context
            found[scope, order, 0] = tables.total[context]
            found[scope, order, 1] = tables.distinct[context]
            found[scope, order, 2] = count_successor(tables, context, target)
    return longest


def discounted_probability(found, longest, probability):
    """Returns the target's probability by the counts of one scope, which fall back order by order on `probability`."""
    for order in range(longest + 1):
        total, distinct, count = found[order]
        if total > 0:
            probability = (max(count - DISCOUNT, 0.0) + DISCOUNT * distinct * probability) / total
    return probability


def longest_known(found, longest):
    """Returns 1 + the longest order that has been counted, 0 where none has: a known context knows its own ends."""
    known = 0
    for order in range(longest + 1):
        if found[order, 0] > 0:
            known = order + 1
    return known


def correct_probability(found, longest, hit, last, weights, probability):
    """Returns the network's `probability` of the target corrected by its counts; trains the shares.

    No share may change before the last is used: it would know the target.
    """
    by_token = weights.share_by_token[0, last], weights.share_by_token[1, last]
    for order in range(1, longest + 1):
        for scope in range(2):
            total, distinct, count = found[scope, order]
            if total == 0:
                continue
            counted = max(count - DISCOUNT, 0.0) / (total - DISCOUNT * distinct)
            level, spread = count_level(total), spread_of(total, distinct)
            logit = weights.share[scope, order, level, spread] + weights.share_by_hit[scope, order, hit]
            share = 1 / (1 + np.exp(-logit - by_token[scope]))
            mixed = (1 - share) * probability + share * counted
            slope = (counted - probability) / mixed * share * (1 - share)
            weights.seen[scope, order, level, spread] += 1
            faster = max(RATE, 0.2 / np.sqrt(weights.seen[scope, order, level, spread] + 1))
            weights.share[scope, order, level, spread] += faster * slope
            weights.share_by_hit[scope, order, hit] += RATE * slope
            weights.share_by_token[scope, last] += RATE * slope
            probability = mixed
    return probability


def mix_probabilities(weight, weight_by_hit, weight_by_token, probability_4):
    """Returns the weighted mean of the four probabilities of the target, and trains the weights."""
    share_4 = np.exp(weight + weight_by_hit + weight_by_token)
    share_4 /= share_4.sum()
    mixed = (share_4 * probability_4).sum()
    slope_4 = RATE * share_4 * (probability_4 / mixed - 1)
    weight += slope_4
    weight_by_hit += slope_4
    weight_by_token += slope_4
    return mixed


def mixed_probability(scopes, weights, contexts, found, tokens, target, network):
    """Returns the mixture's probability of `target` behind `tokens`, given the network's; trains the weights."""
    longest = look_up_contexts(scopes, contexts, found, tokens, target)
    everything = discounted_probability(found[0], longest, 1.0 / len(weights.weight_by_token))
    document = discounted_probability(found[1], longest, everything)
    hit, last = weights.hit[0], tokens[len(tokens) - 1]
    corrected = correct_probability(found, longest, hit, last, weights, network)
    weight = weights.weight[longest_known(found[0], longest), longest_known(found[1], longest)]
    probability_4 = np.array([network, everything, document, corrected])
    return mix_probabilities(weight, weights.weight_by_hit[hit], weights.weight_by_token[last], probability_4)


def score_targets(everything, document, weights, tokens, begin, network_M, mixed_M):
    """Writes the mixture's probabilities of M targets of a document from `begin` on to `mixed_M`, given the network's:
    each is scored, then counted. `tokens` begin with the document's start."""
    scopes, orders = (everything, document), weights.share.shape[1] - 1
    contexts, found = np.zeros((2, orders + 1), np.int64), np.zeros((2, orders + 1, 3), np.int64)
    for m in range(len(network_M)):
        n = begin + m
        target = tokens[n + 1]
        mixed_M[m] = mixed_probability(scopes, weights, contexts, found, tokens[: n + 1], target, network_M[m])
        weights.hit[0] = hit_class(mixed_M[m])
        for order in range(min(orders, n + 1) + 1):
            for scope in range(2):
                count_target(scopes[scope], contexts[scope, order], target)


KERNELS = (
    mix_hash, find_context, count_successor, count_target, count_level, spread_of, hit_class, look_up_contexts,
    discounted_probability, longest_known, correct_probability, mix_probabilities, mixed_probability, score_targets,
)  # fmt: skip
"""Functions that call only those before them."""


@functools.cache
def compiled_kernels() -> dict[str, Any]:
    """Returns this file's names, those of KERNELS as machine code. Raises ImportError where numba is missing."""
    return compile_kernels(KERNELS, dict(globals()))


def compile_kernels(functions: Sequence[FunctionType], names: dict[str, Any], stamp: str = "") -> dict[str, Any]:
    """Returns `names` with the functions as machine code, which is kept beside the source where that is a file: a
    second in place of five. It is made anew where that file has changed, or the `stamp` of what it calls in others.

    numba is imported here, where it is needed. Raises ImportError where it is missing.
    """
    from numba import njit

    for function in functions:
        kernel = FunctionType(function.__code__, names, function.__name__)
        kernel.__qualname__ += stamp
        names[function.__name__] = njit(kernel, cache=os.path.exists(function.__code__.co_filename))
    return names
