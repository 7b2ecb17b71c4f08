"""Verifies that the training step, as it is compiled, has the features that are on.

B batch rows, T time.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from golf.config.features import Feature, StepFacts, Verdict
from golf.model.gpt import GPT
from golf.run.feature_audit import FeatureAudit

Batch = tuple[Tensor, Tensor]
"""ids_BT and targets_BT."""
MOST_BATCHES = 100
"""Most batches to search for one that can show a feature."""


def verify_features(
    audit: FeatureAudit, facts: StepFacts, forward: Callable, model: GPT, batches: Callable[[], Iterator[Batch]],
    at_start: bool,
) -> Iterable[str]:  # fmt: skip
    """Verifies features at the start (or the end) of training; yields a line for each whose effect was not seen.

    Considers those that are verified at that time and act in such a step. `batches` starts over at each call.
    """
    for name, feature in audit.features.items():
        shown = feature.without or feature.verify_step
        if not shown or feature.verified_at_start != at_start or not feature.in_step(audit.config, facts)[0]:
            continue
        holds, effect = verify_feature(feature, forward, model, batches())
        audit.verify(name, holds, effect)
        if not holds:
            yield f"feature audit: the compiled step does not show {name} ({effect}): this run is INVALID"


def verify_feature(feature: Feature, forward: Callable, model: GPT, batches: Iterator[Batch]) -> Verdict:
    """Compares the compiled loss of a batch with that of the model, and with that of the model without the feature."""
    fits = feature.shows_in or (lambda model, ids_BT: True)
    batch = next((batch for _, batch in zip(range(MOST_BATCHES), batches, strict=False) if fits(model, batch[0])), None)
    if batch is None:
        return False, f"no row of {MOST_BATCHES} batches can show it"
    if feature.verify_step:
        return feature.verify_step(forward, model, batch)
    compiled = forward(*batch).item()
    with torch.no_grad():
        on = model(*batch).item()
        with feature.without(model):
            off = model(*batch).item()
    effect = f"loss with it {on:.6f}, without {off:.6f}, compiled {compiled:.6f}"
    return abs(compiled - on) < abs(off - on) / 2, effect
