"""Checks parity: the trained model on its grid, the reloaded artifact and the scorer agree on one row of text."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from golf.config.config import Config
from golf.config.knobs import UserError
from golf.config.scoring import ScoreConfig
from golf.data.tokenizer import ByteTable
from golf.model.gpt import GPT
from golf.quant.grid import QuantizedState, QuantizedTensor, dequantize_state
from golf.quant.qat import install_fake_quantization, load_gpt
from golf.runtime import Runtime
from golf.score.scorer import evaluation_mode, plain_settings, score_stream, sliding_settings

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Largest difference of a token's nats, by compute dtype."""


class ParityError(UserError):
    """Reports two forms of one model that score the same text differently."""


@torch.no_grad()
def parity_row(
    weights: Mapping[str, Tensor] | None, stored: QuantizedState, config: Config, ids: list[int], runtime: Runtime
) -> dict[str, Any]:
    """Returns parity.json's content: a row of training text and its tokens' nats under the trained weights.

    They run through the forward pass and the grid of training, rounded to fp16 where they are stored as fp16. Without
    `weights`, or with quantizer=waterfill, the stored weights give the nats.
    """
    if config.quant.quantizer == "waterfill" or weights is None:
        model = load_gpt(config.model, dequantize_state(stored), runtime)
    else:
        bits = {name: entry.bits for name, entry in stored.items() if isinstance(entry, QuantizedTensor)}
        state = {name: part if name in bits else part.half().float() for name, part in weights.items()}
        model = load_gpt(config.model, state, runtime)
        install_fake_quantization(model, config.quant, bits)
    return {"ids": ids, "losses": row_losses(model, ids).tolist()}


@torch.no_grad()
def row_losses(model: GPT, ids: list[int]) -> Tensor:
    """Returns fp32 nats of every token but the first."""
    ids_1T = torch.tensor([ids], device=model.skip_weights.device)
    return model.token_losses(ids_1T[:, :-1], ids_1T[:, 1:])[0].cpu()


@torch.no_grad()
def ntk_effect(model: GPT, record: Mapping[str, Any], score: ScoreConfig) -> float:
    """Returns the largest change of a token's nats in the row under the scaled RoPE base; 0 where none is used."""
    ids_1T = torch.tensor([record["ids"]], device=model.skip_weights.device)
    scaled_base = sliding_settings(score, model.config).rope_base
    plain_1T, scaled_1T = (model.token_losses(ids_1T[:, :-1], ids_1T[:, 1:], base) for base in (None, scaled_base))
    return (plain_1T - scaled_1T).abs().max().item()


def check_parity(model: GPT, record: Mapping[str, Any], byte_table: ByteTable, runtime: Runtime) -> dict[str, float]:
    """Returns the row's mean nats under the trained model, the reloaded one and the scorer. Raises ParityError."""
    trained_N = torch.tensor(record["losses"])
    with evaluation_mode(model):
        reloaded_N = row_losses(model, record["ids"])
    alone = replace(runtime, rank=0, world_size=1)
    tokens, settings = np.array(record["ids"], dtype=np.uint16), plain_settings(model.config, batch_seqs=1)
    score = score_stream(model, tokens, byte_table, settings, alone, announce=False)
    difference = (trained_N - reloaded_N).abs().max().item()
    means = {"trained": trained_N.mean().item(), "reloaded": reloaded_N.mean().item(), "scorer": score.val_loss}
    tolerance = TOLERANCES[runtime.compute_dtype]
    if not (difference <= tolerance and abs(means["scorer"] - means["reloaded"]) <= tolerance):
        raise ParityError(
            f"one row of text has {means['trained']:.6f} nats by the trained model, {means['reloaded']:.6f} by the "
            f"reloaded artifact, {means['scorer']:.6f} by the scorer: the artifact is not the model that was trained"
        )
    return means | {"largest_difference": difference}
