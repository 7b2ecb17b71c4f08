"""Does a run of a study that quantizes the trained weights of another run: rounded to nearest, or by GPTQ.

N rows of tokens, T time.
"""

import itertools
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from golf.artifact.container import pack_artifact
from golf.artifact.weights import load_weights
from golf.quant.calibration import training_rows
from golf.quant.qat import quantized_gpt
from golf.run.datasets import open_training_data
from golf.runtime import Runtime
from lab.rates.quant_comparison import gptq_moments, parse_variant, quantize_variant
from lab.rates.quantizers import GptqOptions
from lab.study.measures import measure_artifact, open_validation
from lab.study.spec import FINISHED, RunSpec, StudyError, load_result, require
from lab.study.training import check_training_data


def source_state(spec: RunSpec) -> tuple[dict[str, Tensor], str]:
    """Returns (weights, tokenizer_sha256) of the run that is quantized. Raises StudyError."""
    folder = Path(spec.source)
    result = load_result(folder, spec.source_key)
    if result is None or result["status"] != FINISHED:
        state = f"{result['status']}: {result.get('error', '')}" if result else "not run yet"
        raise StudyError(f"{folder}: the run whose weights are to be quantized is {state}")
    saved = load_weights(folder / "weights.safetensors")
    require(saved.model == spec.config.model, f"{folder}: its weights are of another model than the one to quantize")
    return saved.state, saved.tokenizer_sha256


def run_rounding(spec: RunSpec, runtime: Runtime, folder: Path) -> tuple[dict[str, Any], list, list[float], bytes]:
    """Returns (figures, no curve, nats of the blocks, artifact) of quantized weights. Raises UserError."""
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
        model = quantized_gpt(spec.config.model, runtime.compute_dtype)
        model.load_state_dict(state)
        table = not variant.keeps_embedding  # a tied one, by both of its uses
        hessians = gptq_moments(model.to(runtime.device), rows_NT, runtime, table)
    stored = quantize_variant(state, variant, hessians, GptqOptions(act_order=spec.act_order))
    clock.append(time.perf_counter())
    packed, _ = pack_artifact(stored, spec.config.model, tokenizer_sha256, spec.config.quant.codec)
    clock.append(time.perf_counter())
    with torch.no_grad():
        figures, blocks = measure_artifact(packed, stored, spec, validation, runtime)
    clock.append(time.perf_counter())
    setup, quantizing, packing, scoring = (after - before for before, after in itertools.pairwise(clock))
    seconds = {"setup": setup, "quantizing": quantizing, "packing": packing, "scoring": scoring}
    return figures | {"status": FINISHED, "error": "", "seconds": seconds}, [], blocks, packed
