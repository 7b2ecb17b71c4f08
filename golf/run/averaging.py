"""From the last state of a training to the weights that count, and what became of the learned features."""

from typing import Any

from torch import Tensor

from golf.run.checkpoint import TrainingState
from golf.run.witness import Witness


def final_weights(state: TrainingState, witness: Witness) -> dict[str, Tensor]:
    """The mean of the snapshots where at least two were taken, else the last weights."""
    last, mean = (
        {name.removeprefix(kind): tensor for name, tensor in state.tensors.items() if name.startswith(kind)}
        for kind in ("model.", "average.")
    )
    snapshots = state.numbers["average"][0]
    if snapshots >= 2:
        moved = max((mean[name] - last[name]).abs().max().item() for name in last)
        witness.prove("swa", moved > 0, f"mean of {snapshots} snapshots, at most {moved:.3g} from the last weights")
    return mean if snapshots >= 2 else last


def prove_learned_features(weights: dict[str, Tensor], steps: int, witness: Witness) -> dict[str, Any]:
    """Features that act by what they learn: they act in every step, and their weights must have moved from zero."""
    for feature, name in (("smear_gate", "smear.gate"), ("bigram_hash", "bigram.embed.weight")):
        if name in weights:
            moved = int((weights[name] != 0).sum())
            witness.act(feature, 1)
            witness.act(feature, steps, steps - 1)
            witness.prove(feature, moved > 0, f"{moved} of {weights[name].numel()} weights moved from zero")
    return witness.record()
