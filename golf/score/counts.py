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
    preceding: np.ndarray
    by_token: np.ndarray
    """Entries of the first context, which is that of order 0: its list is long, the others' are short."""
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


def new_tables(targets: int, orders: int, vocabulary: int) -> CountTables:
    """Returns empty tables with room for the contexts of orders 0 to `orders` of so many targets."""
    room = targets * (orders + 1) + 1
    slots = 1 << int(2 * room - 1).bit_length()
    total, distinct, token, count = (np.zeros(room, np.int32) for _ in range(4))
    first, following, preceding = (np.full(room, -1, np.int32) for _ in range(3))
    return CountTables(
        np.zeros(slots, np.uint64), np.zeros(slots, np.int32), total, distinct, first, token, count, following,
        preceding, np.full(vocabulary, -1, np.int32), np.zeros(2, np.int64),
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


def find_successor(tables, context, target):
    """Returns the target's entry in the context's list, -1 where there is none."""
    if context == 0:
        return tables.by_token[target]
    entry = tables.first[context]
    while entry >= 0 and tables.token[entry] != target:
        entry = tables.following[entry]
    return entry


def count_target(tables, context, target):
    """Counts the target behind the context, and moves it to the front of its list."""
    entry, first = find_successor(tables, context, target), tables.first[context]
    if entry < 0:
        entry = tables.used[1]
        tables.used[1] += 1
        tables.token[entry] = target
        tables.distinct[context] += 1
        if context == 0:
            tables.by_token[target] = entry
    elif entry != first:
        before, behind = tables.preceding[entry], tables.following[entry]
        tables.following[before] = behind
        if behind >= 0:
            tables.preceding[behind] = before
    if entry != first:
        tables.following[entry] = first
        if first >= 0:
            tables.preceding[first] = entry
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
    longest = min(contexts.shape[1] - 1, len(tokens))
    look_up(scopes[0], contexts[0], found[0], tokens, target, longest)
    look_up(scopes[1], contexts[1], found[1], tokens, target, longest)
    return longest


def look_up(tables, contexts, found, tokens, target, longest):
    """Looks up the contexts of one scope."""
    key = np.uint64(1)
    for order in range(longest + 1):
        if order:
            key = mix_hash(key, tokens[len(tokens) - order])
        context = find_context(tables, mix_hash(key, order))
        entry = find_successor(tables, context, target)
        contexts[order] = context
        found[order, 0] = tables.total[context]
        found[order, 1] = tables.distinct[context]
        found[order, 2] = tables.count[entry] if entry >= 0 else 0


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


def fill_shares(weights, found, longest, last, share_4):
    """Fills `share_4` with the shares of the four distributions, and returns the weights that they come from."""
    rows = (
        weights.weight[longest_known(found[0], longest), longest_known(found[1], longest)],
        weights.weight_by_hit[weights.hit[0]],
        weights.weight_by_token[last],
    )
    total = 0.0
    for part in range(4):
        share_4[part] = np.exp(rows[0][part] + rows[1][part] + rows[2][part])
        total += share_4[part]
    for part in range(4):
        share_4[part] /= total
    return rows


def mixed_probability(scopes, weights, contexts, found, tokens, target, network, part_24):
    """Returns the mixture's probability of `target` behind `tokens`, given the network's; trains the weights. `part_24`
    is overwritten."""
    longest, last = look_up_contexts(scopes, contexts, found, tokens, target), tokens[len(tokens) - 1]
    share_4, probability_4 = part_24
    probability_4[0] = network
    probability_4[1] = discounted_probability(found[0], longest, 1.0 / len(weights.weight_by_token))
    probability_4[2] = discounted_probability(found[1], longest, probability_4[1])
    rows = fill_shares(weights, found, longest, last, share_4)
    probability_4[3] = correct_probability(found, longest, weights.hit[0], last, weights, network)
    mixed = 0.0
    for part in range(4):
        mixed += share_4[part] * probability_4[part]
    for part in range(4):
        slope = RATE * share_4[part] * (probability_4[part] / mixed - 1)
        for row in rows:
            row[part] += slope
    return mixed


def count_everywhere(tables, contexts, longest, target):
    """Counts the target behind its contexts in one scope."""
    for order in range(longest + 1):
        count_target(tables, contexts[order], target)


def score_each(scopes, weights, contexts, found, part_24, tokens, begin, network_M, mixed_M):
    """Does what `score_targets` says, in arrays that are overwritten."""
    for m in range(len(network_M)):
        n = begin + m
        target, longest = tokens[n + 1], min(contexts.shape[1] - 1, n + 1)
        mixed_M[m] = mixed_probability(scopes, weights, contexts, found, tokens[: n + 1], target, network_M[m], part_24)
        weights.hit[0] = hit_class(mixed_M[m])
        count_everywhere(scopes[0], contexts[0], longest, target)
        count_everywhere(scopes[1], contexts[1], longest, target)


def score_targets(everything, document, weights, tokens, begin, network_M, mixed_M):
    """Writes the mixture's probabilities of M targets of a document from `begin` on to `mixed_M`, given the network's:
    each is scored, then counted. `tokens` begin with the document's start."""
    orders = weights.share.shape[1]
    contexts, found, part_24 = np.zeros((2, orders), np.int64), np.zeros((2, orders, 3), np.int64), np.zeros((2, 4))
    score_each((everything, document), weights, contexts, found, part_24, tokens, begin, network_M, mixed_M)


KERNELS = (
    mix_hash, find_context, find_successor, count_target, count_level, spread_of, hit_class, look_up,
    look_up_contexts, discounted_probability, longest_known, correct_probability, fill_shares, mixed_probability,
    count_everywhere, score_each, score_targets,
)  # fmt: skip
"""Functions that call only those before them. The last alone makes arrays."""


@functools.cache
def compiled_kernels() -> dict[str, Any]:
    """Returns this file's names, those of KERNELS as machine code. Raises ImportError where numba is missing."""
    return compile_kernels(KERNELS, dict(globals()))


def compile_kernels(functions: Sequence[FunctionType], names: dict[str, Any], stamp: str = "") -> dict[str, Any]:
    """Returns `names` with the functions as machine code, which is kept beside the source where that is a file: a
    second in place of five. It is made anew where that file has changed, or the `stamp` of what it calls in others.

    All but the last do without references to arrays being counted, which nobody needs where nothing makes or frees an
    array, and which took most of the time: a count is an atomic operation, and tables are eleven arrays. So the others
    make none (numba refuses it), and none of them returns one to the last, which would count it down.

    numba is imported here, where it is needed. Raises ImportError where it is missing.
    """
    from numba import njit

    for function in functions:
        kernel = FunctionType(function.__code__, names, function.__name__)
        kernel.__qualname__ += stamp
        counted, kept = function is functions[-1], os.path.exists(function.__code__.co_filename)
        names[function.__name__] = njit(kernel, cache=kept, _nrt=counted)
    return names
