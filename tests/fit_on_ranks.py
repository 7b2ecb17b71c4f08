"""Fits a toy model to a limit on as many ranks as torchrun started; each prints its bytes' SHA-256 and who had what."""

import hashlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from golf.artifact.fill_limit import fill_limit
from golf.config.model import ModelConfig
from golf.config.quantization import QuantConfig
from golf.config.run import RunConfig
from golf.model.init import build_model
from golf.quant.calibration import LayerStatistics
from golf.quant.spreading import spread_matrices
from golf.quant.tensor_classes import tensor_class
from golf.runtime import Log, leave, start_runtime

MODEL = ModelConfig(
    vocab_size=96, num_layers=3, model_dim=48, num_heads=2, num_kv_heads=1, mlp_mult=4, bigram_vocab_size=64,
    bigram_dim=16, train_seq_len=16, tied_embed_init_std=0.3,
)  # fmt: skip
QUANT = QuantConfig(qat_enabled=False, prune_frac=0.0, quantizer="waterfill", codec="rans")


def correlated_statistics(rows: int, columns: int, generator: torch.Generator) -> LayerStatistics:
    x_NC = torch.randn(2 * columns, columns // 3, generator=generator) @ torch.randn(
        columns // 3, columns, generator=generator
    )
    x_NC += torch.randn(x_NC.shape, generator=generator)
    row_weight_R = torch.exp(torch.randn(rows, generator=generator)).double()
    return LayerStatistics((x_NC.T @ x_NC).double() / len(x_NC), row_weight_R)


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    state = build_model(MODEL, seed=1).state_dict()
    names = [name for name, part in state.items() if tensor_class(name, part.shape) != "small"]
    state |= {name: 0.2 * torch.randn(state[name].shape, generator=generator) for name in names}
    statistics = {name: correlated_statistics(*state[name].shape, generator) for name in names}
    lines: list[str] = []
    with start_runtime(RunConfig(device="cpu", compile="off"), "fit", Log(sys.stderr)) as runtime:
        fitted = fill_limit(statistics, state, QUANT, MODEL, "cd" * 32, 48_000, 0, lines.append, runtime)
        shapes = {name: tuple(state[name].shape) for name in names}
        ranks = list(spread_matrices(shapes, runtime.world_size).values())
        shares = [ranks.count(rank) for rank in range(runtime.world_size)]
        digest = hashlib.sha256(fitted.data + "".join(lines).encode()).hexdigest()
        trellises = sum(fitted.stored[name].trellis for name in names)
        print(f"fitted {digest} {fitted.codes_not_nearest} {trellises} {len(fitted.data)} shares {shares}\n", end="")


if __name__ == "__main__":
    main()
    leave(0)
