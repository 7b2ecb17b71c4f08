"""A run of an ablation that quantizes the trained weights of another run: rounded to nearest, or by GPTQ.

N rows of tokens, T time.
"""

import itertools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from golf.artifact.weights import load_weights
from golf.quant.calibration import training_rows
from golf.quant.qat import quantized_gpt
from golf.run.datasets import open_training_data
from golf.runtime import Runtime
from lab.rates.quant_comparison import QuantVariant, gptq_moments, parse_variant, quantize_variant
from lab.rates.quantizers import GptqOptions
from lab.study.measures import measure_artifact, open_validation, pack_for
from lab.study.spec import FINISHED, AblationError, AblationSpec, load_result
from lab.study.training import check_training_data


def moments_of_inputs(
    state: Mapping[str, Tensor], spec: AblationSpec, variant: QuantVariant, rows_NT: Tensor, runtime: Runtime
) -> dict[str, Tensor]:
    """hessian_CC of each matrix; of a tied table, by both of its uses."""
    model = quantized_gpt(spec.config.model, runtime.compute_dtype)
    model.load_state_dict(state)
    return gptq_moments(model.to(runtime.device), rows_NT, runtime, table=not variant.keeps_embedding)


def source_state(spec: AblationSpec) -> tuple[dict[str, Tensor], str]:
    """(weights, tokenizer_sha256) of the run that is quantized. Raises AblationError."""
    folder = Path(spec.source)
    result = load_result(folder, spec.source_key)
    if result is None or result["status"] != FINISHED:
        state = f"{result['status']}: {result.get('error', '')}" if result else "not run yet"
        raise AblationError(f"{folder}: the run whose weights are to be quantized is {state}")
    saved = load_weights(folder / "weights.safetensors")
    if saved.model != spec.config.model:
        raise AblationError(f"{folder}: its weights are of another model than the one to quantize")
    return saved.state, saved.tokenizer_sha256


def run_rounding(spec: AblationSpec, runtime: Runtime, folder: Path) -> tuple[dict[str, Any], list, list[float], bytes]:
    """(figures, no curve, nats of the blocks, artifact) of quantized weights. Raises UserError."""
    clock = [time.perf_counter()]
    data = open_training_data(spec.config)
    check_training_data(spec, data)
    variant = parse_variant(spec.method, keeps_embedding=not spec.quantizes_embedding)
    state, tokenizer_sha256 = source_state(spec)
    validation = open_validation(spec, tokenizer_sha256)
    hessians: dict[str, Tensor] = {}
    clock.append(time.perf_counter())
    if variant.method == "gptq":
        length = spec.config.model.train_seq_len
        rows_NT = training_rows(data.stream, spec.calibration_sequences * length, length, spec.config.run.seed)
        hessians = moments_of_inputs(state, spec, variant, rows_NT, runtime)
    stored = quantize_variant(state, variant, hessians, GptqOptions(act_order=spec.act_order))
    clock.append(time.perf_counter())
    packed = pack_for(spec, stored, tokenizer_sha256)
    clock.append(time.perf_counter())
    with torch.no_grad():
        figures, blocks = measure_artifact(packed, stored, spec, validation, runtime)
    clock.append(time.perf_counter())
    setup, quantizing, packing, scoring = (after - before for before, after in itertools.pairwise(clock))
    seconds = {"setup": setup, "quantizing": quantizing, "packing": packing, "scoring": scoring}
    return figures | {"status": FINISHED, "error": "", "seconds": seconds}, [], blocks, packed
