"""The smallest artifact that keeps a score: the coarsest water level whose artifact still has it."""

from collections.abc import Callable

from golf.artifact.fill_limit import COARSEST, FINEST, FitError, LevelArtifact, LevelSearch

FIRST_TARGET_GUESS, STRIDE = -23.0, 2.0
FINE_ENOUGH = 0.03
"""Octaves of level between the artifact that is returned and one that misses the score: 0.015 bit a weight."""


def smallest_at_score(
    search: LevelSearch, score_of: Callable[[bytes], float], target: float, log: Callable[[str], None]
) -> LevelArtifact:
    """The smallest artifact met whose score is at most `target`, `score_of` being measured on its bytes.

    Raises FitError where even the finest level misses it.
    """
    keeps = misses = None
    guess = FIRST_TARGET_GUESS
    while keeps is None or misses is None or misses - keeps > FINE_ENOUGH:
        found = search.at(guess)
        score = score_of(found.data)
        log(f"fit: {len(found.data):,} bytes have {score:.5f} bits per byte, {target:.5f} are wanted")
        keeps, misses = (guess, misses) if score <= target else (keeps, guess)
        if keeps == COARSEST:
            break
        if misses == FINEST:
            raise FitError(
                f"no artifact of these weights has {target:g} bits per byte: the finest, of {len(found.data):,} bytes, "
                f"has {score:.5f}; ask for no less than that"
            )
        if keeps is None or misses is None:
            guess = min(COARSEST, guess + STRIDE) if misses is None else max(FINEST, guess - STRIDE)
        else:
            guess = (keeps + misses) / 2
    return search.at(keeps)
