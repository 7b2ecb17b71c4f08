"""The second target of a token: its longest proper prefix among the pieces."""

from types import SimpleNamespace

import pytest
import torch
from tokenizer_fixtures import small_tokenizers

from golf.config.config import ConfigError, build_config
from golf.config.features import StepFacts
from golf.config.training import TrainConfig
from golf.model.init import build_model
from golf.optim.prefix_target import NO_PREFIX, PrefixObjective, prefix_table, prefix_weight, prefixes_count

PIECES = ["", "a", "ab", "abcd", "b", "bc", "", "abce"]
TRAIN = TrainConfig(prefix_weight=0.25, prefix_fraction=0.3)


def test_the_longest_proper_prefix_counts():
    table = prefix_table(SimpleNamespace(pieces=PIECES))
    assert table.tolist() == [NO_PREFIX, NO_PREFIX, 1, 2, NO_PREFIX, 4, NO_PREFIX, 2]


@pytest.mark.parametrize("kind", small_tokenizers())
def test_prefixes_of_real_vocabularies_are_those_of_a_search(kind):
    tokenizer = small_tokenizers()[kind]
    pieces, table = tokenizer.pieces, prefix_table(tokenizer).tolist()
    assert len(pieces) == tokenizer.vocab_size and any(number != NO_PREFIX for number in table) == (kind != "bytes")
    for piece, number in zip(pieces, table, strict=True):
        parts = [other for other in pieces if other and len(other) < len(piece) and piece.startswith(other)]
        assert (pieces[number] if number != NO_PREFIX else None) == max(parts, key=len, default=None)


def test_the_weight_stays_falls_and_ends():
    weights = [prefix_weight(progress, TRAIN) for progress in (0.0, 0.3, 0.45, 0.6, 1.0)]
    assert weights == pytest.approx([0.25, 0.25, 0.125, 0.0, 0.0])


def test_the_objective_is_its_formula_in_float64():
    config = build_config("local", {}, {"vocab_size": "8", "model_dim": "16", "bigram_vocab_size": "8"}).model
    model = build_model(config, 0)
    objective = PrefixObjective(model, SimpleNamespace(pieces=PIECES))
    ids_BT, targets_BT = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[2, 3, 0, 7]])
    objective.weight.fill_(0.25)
    with torch.no_grad():
        log_TV = torch.log_softmax(model.logits(ids_BT)[0].double(), -1)
        expected = -(log_TV[0, 2] + log_TV[1, 3] + log_TV[2, 0] + log_TV[3, 7]) / 4
        expected -= 0.25 * (log_TV[0, 1] + log_TV[1, 2] + log_TV[3, 2]) / 4
        assert objective(ids_BT, targets_BT).item() == pytest.approx(expected.item(), rel=1e-6)
        objective.weight.zero_()
        assert objective(ids_BT, targets_BT).item() == pytest.approx(model(ids_BT, targets_BT).item(), rel=1e-6)
    assert objective.state_dict().keys() == {f"model.{name}" for name in model.state_dict()}


def test_a_run_that_ends_early_has_not_shown_it():
    config = SimpleNamespace(train=TRAIN)
    acts = [prefixes_count(config, StepFacts(progress, 16, False, None)) for progress in (0.0, 0.5, 0.7)]
    assert [acted for acted, _ in acts] == [True, True, False] and [bool(effect) for _, effect in acts] == [
        False,
        False,
        True,
    ]


def test_a_second_target_that_never_ends_is_refused():
    with pytest.raises(ConfigError, match="prefix_fraction"):
        build_config("local", {}, {"prefix_weight": "0.25", "prefix_fraction": "0.5"})
