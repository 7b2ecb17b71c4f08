"""Corrects the mixture of golf/score/counts.py at last: tokens that followed a known context are weighed against each
other in the log domain.

Up to `mixture_successors` are taken: the latest of the longest contexts, in the document before elsewhere.
For each of them q is the mixture's probability, and its new one is in proportion to

    q exp(sum of w_i f_i + biases),   f = ln of the four distributions over q, and ln q

while all other tokens keep q; then all are divided by their sum, so that they are a distribution again. The weights w
are learned by what is known of the contexts, by the last target's probability and by the last token; the biases by the
longest context that the token followed in each scope, how often and how lately, and by the token itself: online, by the
gradient of each target's log-probability, after it was scored. It is the mixing of the best lossless compressors
(Mahoney 2005, adaptive weighing of context models), over whole distributions in place of bits.

K successors, V tokens of the vocabulary, M targets.
"""

import functools
import os
from typing import Any, NamedTuple

import numpy as np

from golf.score.counts import (
    DISCOUNT,
    HITS,
    compile_kernels,
    compiled_kernels,
    count_everywhere,
    count_level,
    fill_shares,
    hit_class,
    longest_known,
    look_up_contexts,
    mixed_probability,
    spread_of,
)

SUCCESSOR_FEATURES, MOST_NATS = 5, 6.0
"""Of a successor, and the most that a distribution may differ from the mixture, in nats."""
FEATURE_RATE, BIAS_RATE = 0.001, 0.02
TIMES, PLACES = 5, 3
"""Classes of a successor's count, and of its place in the list: the latest, the one before, and those before."""


class SuccessorWeights(NamedTuple):
    """Holds what is learned online."""

    weight: np.ndarray
    """Of the features, by the longest known context over all and in the document."""
    weight_by_hit: np.ndarray
    weight_by_token: np.ndarray
    bias: np.ndarray
    """By scope and the class of the successor in it."""
    bias_by_token: np.ndarray


def new_successor_weights(orders: int, vocabulary: int) -> SuccessorWeights:
    """Returns weights that change nothing yet."""
    weights = (np.zeros((*shape, SUCCESSOR_FEATURES)) for shape in ((orders + 2, orders + 2), (HITS,), (vocabulary,)))
    return SuccessorWeights(*weights, np.zeros((2, 1 + (orders + 1) * TIMES * PLACES)), np.zeros(vocabulary))


def successor_class(order, count, place):
    """Returns the class of a successor in a context: 0 is that of tokens that followed none."""
    times = count - 1 if count <= 2 else 2 + (count > 4) + (count > 8)
    return 1 + (order * TIMES + times) * PLACES + min(place, PLACES - 1)


def list_successors(scopes, contexts, longest, successor_K, place_V, count_2OK, class_2K):
    """Lists up to K successors with their counts in all contexts, and their classes; returns how many there are.

    `place_V` is -1 for all tokens but those that the last call listed."""
    found = 0
    count_2OK[:] = 0
    class_2K[:] = 0
    for order in range(longest, 0, -1):
        for scope in (1, 0):
            tables, behind = scopes[scope], 0
            entry = tables.first[contexts[scope, order]]
            while entry >= 0:
                token = tables.token[entry]
                if place_V[token] < 0 and found < len(successor_K):
                    successor_K[found], place_V[token] = token, found
                    found += 1
                place = place_V[token]
                if place >= 0:
                    count_2OK[scope, order, place] = tables.count[entry]
                    if class_2K[scope, place] == 0:
                        class_2K[scope, place] = successor_class(order, tables.count[entry], behind)
                entry, behind = tables.following[entry], behind + 1
    for scope in (1, 0):
        found = list_all_tokens(scopes[scope], successor_K, place_V, found)
    for scope in range(2):
        look_up_all_tokens(scopes[scope], successor_K[:found], count_2OK[scope, 0], class_2K[scope])
    return found


def list_all_tokens(tables, successor_K, place_V, found):
    """Lists the latest tokens of a scope until there are K; returns how many there are."""
    entry = tables.first[0]
    while entry >= 0 and found < len(successor_K):
        token = tables.token[entry]
        if place_V[token] < 0:
            successor_K[found], place_V[token] = token, found
            found += 1
        entry = tables.following[entry]
    return found


def look_up_all_tokens(tables, successor_K, count_K, class_K):
    """Adds the counts of order 0 in a scope, without its long list, and the classes of tokens that followed no longer
    context."""
    first = tables.first[0]
    second = tables.following[first] if first >= 0 else -1
    for place in range(len(successor_K)):
        entry = tables.by_token[successor_K[place]]
        if entry >= 0:
            count_K[place] = tables.count[entry]
            if class_K[place] == 0:
                behind = 0 if entry == first else 1 if entry == second else 2
                class_K[place] = successor_class(0, tables.count[entry], behind)


def interpolate_counts(found, longest, count_OK, probability_K):
    """Turns the probabilities that counts fall back on into those of the counts, in place: `discounted_probability`."""
    for order in range(longest + 1):
        total, distinct = found[order, 0], found[order, 1]
        if total > 0:
            for place in range(len(probability_K)):
                counted = max(count_OK[order, place] - DISCOUNT, 0.0)
                probability_K[place] = (counted + DISCOUNT * distinct * probability_K[place]) / total


def share_of(weights, found, scope, order, last):
    """Returns the share of a known context's counts in the corrected distribution."""
    total, distinct = found[scope, order, 0], found[scope, order, 1]
    logit = weights.share[scope, order, count_level(total), spread_of(total, distinct)]
    logit += weights.share_by_hit[scope, order, weights.hit[0]] + weights.share_by_token[scope, last]
    return 1 / (1 + np.exp(-logit))


def correct_network(weights, found, longest, last, count_2OK, probability_K):
    """Corrects the network's probabilities by the counts, in place: `correct_probability`, without its learning."""
    for order in range(1, longest + 1):
        for scope in range(2):
            total, distinct = found[scope, order, 0], found[scope, order, 1]
            if total == 0:
                continue
            share = share_of(weights, found, scope, order, last)
            for place in range(len(probability_K)):
                counted = max(count_2OK[scope, order, place] - DISCOUNT, 0.0) / (total - DISCOUNT * distinct)
                probability_K[place] = (1 - share) * probability_K[place] + share * counted


def mixed_probabilities(weights, found, longest, last, count_2OK, share_4, part_5K):
    """Fills part_5K, whose first row is the network's probabilities of K tokens, with the other three distributions and
    the mixture: `mixed_probability`, without its learning."""
    network_K, everything_K, document_K, corrected_K, mixed_K = part_5K
    for place in range(len(mixed_K)):
        everything_K[place], corrected_K[place] = 1.0 / len(weights.weight_by_token), network_K[place]
    interpolate_counts(found[0], longest, count_2OK[0], everything_K)
    for place in range(len(mixed_K)):
        document_K[place] = everything_K[place]
    interpolate_counts(found[1], longest, count_2OK[1], document_K)
    correct_network(weights, found, longest, last, count_2OK, corrected_K)
    fill_shares(weights, found, longest, last, share_4)
    for place in range(len(mixed_K)):
        mixed_K[place] = 0.0
        for part in range(4):
            mixed_K[place] += share_4[part] * part_5K[part, place]


def feature_rows(weights, learned, found, longest, last):
    """Returns the three weights of the features that are in force."""
    known = longest_known(found[0], longest), longest_known(found[1], longest)
    return learned.weight[known], learned.weight_by_hit[weights.hit[0]], learned.weight_by_token[last]


def weigh_successors(learned, rows, successor_K, class_2K, part_5K, feature_KF, raised_K):
    """Fills the features of K successors, and their probabilities before all are divided by a sum; returns the sum."""
    total = 1.0
    for place in range(len(successor_K)):
        token, mixed = successor_K[place], part_5K[4, place]
        log_mixed = np.log(mixed)
        logit = log_mixed + learned.bias_by_token[token]
        logit += learned.bias[0, class_2K[0, place]] + learned.bias[1, class_2K[1, place]]
        for part in range(4):
            nats = np.log(part_5K[part, place]) - log_mixed
            feature_KF[place, part] = max(-MOST_NATS, min(MOST_NATS, nats))
        feature_KF[place, 4] = log_mixed
        for feature in range(SUCCESSOR_FEATURES):
            weight = rows[0][feature] + rows[1][feature] + rows[2][feature]
            logit += weight * feature_KF[place, feature]
        raised_K[place] = np.exp(logit)
        total += raised_K[place] - mixed
    return total


def learn_successors(learned, rows, successor_K, class_2K, feature_KF, raised_K, total, target_place):
    """Trains weights and biases by the gradient of the target's log-probability; its place is -1 where it is none of
    the successors."""
    for place in range(len(successor_K)):
        token, slope = successor_K[place], (place == target_place) - raised_K[place] / total
        learned.bias_by_token[token] += BIAS_RATE * slope
        for scope in range(2):
            learned.bias[scope, class_2K[scope, place]] += BIAS_RATE * slope
        for feature in range(SUCCESSOR_FEATURES):
            for row_F in rows:
                row_F[feature] += FEATURE_RATE * slope * feature_KF[place, feature]


def correct_each(scopes, weights, learned, scratch, tokens, begin, network_MV, mixed_M, plain_M):
    """Does what `score_distributions` says, in arrays that are overwritten."""
    contexts, found, part_24, successor_K, place_V, count_2OK, class_2K, part_5K, feature_KF, raised_K = scratch
    for m in range(len(network_MV)):
        n = begin + m
        target, last = tokens[n + 1], tokens[n]
        longest = look_up_contexts(scopes, contexts, found, tokens[: n + 1], target)
        k = list_successors(scopes, contexts, longest, successor_K, place_V, count_2OK, class_2K)
        for place in range(k):
            part_5K[0, place] = network_MV[m, successor_K[place]]
        mixed_probabilities(weights, found, longest, last, count_2OK, part_24[0], part_5K[:, :k])
        rows = feature_rows(weights, learned, found, longest, last)
        total = weigh_successors(learned, rows, successor_K[:k], class_2K, part_5K, feature_KF, raised_K)
        network = network_MV[m, target]
        plain_M[m] = mixed_probability(scopes, weights, contexts, found, tokens[: n + 1], target, network, part_24)
        mixed_M[m] = (raised_K[place_V[target]] if place_V[target] >= 0 else plain_M[m]) / total
        learn_successors(learned, rows, successor_K[:k], class_2K, feature_KF, raised_K, total, place_V[target])
        for place in range(k):
            place_V[successor_K[place]] = -1
        weights.hit[0] = hit_class(plain_M[m])
        count_everywhere(scopes[0], contexts[0], longest, target)
        count_everywhere(scopes[1], contexts[1], longest, target)


def score_distributions(everything, document, weights, learned, most, tokens, begin, network_MV, mixed_M, plain_M):
    """Writes the corrected mixture's probabilities of M targets of a document from `begin` on to `mixed_M`, given the
    network's distributions, and those without the correction to `plain_M`: each is scored, then counted. `tokens` begin
    with the document's start."""
    orders, vocabulary = weights.share.shape[1], network_MV.shape[1]
    scratch = (
        np.zeros((2, orders), np.int64), np.zeros((2, orders, 3), np.int64), np.zeros((2, 4)),
        np.zeros(most, np.int64), np.full(vocabulary, -1), np.zeros((2, orders, most)), np.zeros((2, most), np.int64),
        np.zeros((5, most)), np.zeros((most, SUCCESSOR_FEATURES)), np.zeros(most),
    )  # fmt: skip
    correct_each((everything, document), weights, learned, scratch, tokens, begin, network_MV, mixed_M, plain_M)


CORRECTIONS = (
    successor_class, list_all_tokens, look_up_all_tokens, list_successors, interpolate_counts, share_of,
    correct_network, mixed_probabilities, feature_rows, weigh_successors, learn_successors, correct_each,
    score_distributions,
)  # fmt: skip
"""Functions that call only those before them and those of golf/score/counts.py. The last alone makes arrays."""


@functools.cache
def compiled_corrections() -> dict[str, Any]:
    """Returns the names of golf/score/counts.py and of this file, the functions as machine code. Raises ImportError
    where numba is missing."""
    return compile_kernels(CORRECTIONS, globals() | compiled_kernels(), source_stamp())


def source_stamp() -> str:
    """Returns a name for this state of the two files, whose functions others call in machine code."""
    paths = {function.__code__.co_filename for function in (count_everywhere, weigh_successors)}
    return "_".join(str(os.stat(path).st_mtime_ns) for path in sorted(paths) if os.path.exists(path))
