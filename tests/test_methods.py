"""The competitors of the rate curve: each gives what packs and reads back, more of it at more rate."""

import pytest
import torch

from golf.artifact.container import pack_artifact, read_artifact, same_stored_state
from golf.artifact.weights import SavedWeights
from golf.config.model import ModelConfig
from golf.config.quantization import QuantConfig
from golf.model.gpt import GPT
from golf.model.init import build_model
from golf.quant.grid import QuantizedTensor, dequantize_state, dequantize_tensor
from golf.runtime import Runtime
from lab.rates.methods import METHODS, MethodInput, prepare_method_input
from lab.rates.rescaling import refit_scales

MODEL = ModelConfig(
    vocab_size=80, num_layers=2, model_dim=32, num_heads=2, num_kv_heads=1, mlp_mult=2, bigram_vocab_size=40,
    bigram_dim=16, train_seq_len=16, tied_embed_init_std=0.3,
)  # fmt: skip
ROWS_NT = torch.randint(2, 80, (12, 16), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def given() -> MethodInput:
    model = build_model(MODEL, seed=1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, part in model.named_parameters():
            if name.startswith("bigram"):
                part.add_(0.1 * torch.randn(part.shape, generator=generator))
    saved = SavedWeights(dict(model.state_dict()), MODEL, QuantConfig(), "ab" * 32)
    return prepare_method_input(saved, ROWS_NT, Runtime(torch.device("cpu")))


QUICK_METHODS = ("recipe", "fit-nearest")


def divergence(given, weights) -> float:
    """KL from the unquantized predictions, nats per token."""
    model, predictions = GPT(MODEL), []
    for state in (given.state, weights):
        model.load_state_dict(state)
        with torch.no_grad():
            predictions.append(torch.log_softmax(model.logits(ROWS_NT), -1))
    return (predictions[0].exp() * (predictions[0] - predictions[1])).sum(-1).mean().item()


@pytest.mark.parametrize(
    "name", [name if name in QUICK_METHODS else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
)
def test_more_rate_is_more_bytes_and_a_nearer_model(given, name):
    method = METHODS[name]
    assert method.name == name and len(method.rates) >= 6 and list(method.rates) == sorted(method.rates)
    low, high = (method.encode(given, rate) for rate in (method.rates[1], method.rates[-2]))
    packed = [pack_artifact(stored, MODEL, "ab" * 32, method.codec)[0] for stored in (low, high)]
    assert len(packed[0]) < len(packed[1])
    assert same_stored_state(read_artifact(packed[1]).state, high)
    assert divergence(given, dequantize_state(low)) > divergence(given, dequantize_state(high)) >= 0


def test_the_variants_do_what_their_names_say(given):
    corrected = METHODS["frontier-lqer"].encode(given, 1.0)
    matrices = [entry for entry in corrected.values() if isinstance(entry, QuantizedTensor)]
    assert sum(entry.low_rank is not None for entry in matrices) == 3
    protected = METHODS["frontier-awq"].encode(given, 1.0)["tok_emb.weight"]
    assert sorted(protected.column_scale_C.unique().tolist()) in ([0.25], [0.25, 1.0])
    assert any(isinstance(e, QuantizedTensor) and e.trellis for e in METHODS["waterfill"].encode(given, 27.0).values())
    assert not any(
        isinstance(e, QuantizedTensor) and e.trellis for e in METHODS["fit-plain"].encode(given, 27.0).values()
    )


def test_refitted_scales_lessen_the_predicted_loss_and_keep_the_codes(given):
    matrices = given.search.matrices
    before = METHODS["fit-nearest"].encode(given, 20.0)
    for name, matrix in matrices.items():
        refitted = refit_scales(matrix, before[name])
        assert torch.equal(refitted.codes_RC, before[name].codes_RC)
        losses = [matrix.loss_added(dequantize_tensor(entry)) for entry in (refitted, before[name])]
        assert losses[0] <= 1.001 * losses[1], name


def test_one_step_a_matrix_and_columns_alone(given):
    for method, rows, columns in (("gptq-step", 1, False), ("watersic", None, True)):
        stored = METHODS[method].encode(given, 22.0)
        for name, matrix in given.search.matrices.items():
            entry = stored[name]
            assert entry.scale_SG.shape == (rows or len(matrix.weight_RC), 1)
            assert (entry.column_scale_C is not None) == columns
