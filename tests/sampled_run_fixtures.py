"""A small run with an artifact: weights that have learned a few sentences, on 8 bits."""

from pathlib import Path

from golf.artifact.container import write_artifact
from golf.artifact.weights import load_weights
from golf.config.quantization import QuantConfig
from golf.quant.export import quantize_state
from tests.trained_run_fixtures import make_trained_run

EIGHT_BITS = QuantConfig(qat_enabled=False, mlp_bits=8, attn_bits=8, bigram_bits=8, embed_bits=8, prune_frac=0.0)


def make_sampled_run(root: Path) -> Path:
    """root/run with its artifact and configuration, and root/data with the tokenizer; returns the folder of the run."""
    run = make_trained_run(root)
    saved = load_weights(run / "weights.safetensors")
    stored = quantize_state(saved.state, EIGHT_BITS)
    write_artifact(run / "model.golf", stored, saved.model, saved.tokenizer_sha256, "lzma")
    return run
