"""Formats log lines as the competition does, so that its readers understand our logs."""

import platform
import sys
from collections.abc import Mapping
from math import prod
from typing import Any

import torch

from golf.config.config import Config, changed_knobs, config_hash
from golf.config.model import ModelConfig
from golf.config.quantization import QuantConfig
from golf.config.site_quantizers import activation_sites, weight_sites
from golf.quant.export import quantized_parameters
from golf.run.datasets import TrainingData
from golf.run.folder import RunFolder
from golf.run.trainer import StepReport, Trainer
from golf.runtime import Runtime, file_sha256
from golf.score.journal import ScoreJournal
from golf.score.scorer import Score


def quantization_name(quant: QuantConfig) -> str:
    """Returns int8 where MLP and attention share a width, int5int6 where they do not; waterfill for that quantizer."""
    if quant.quantizer == "waterfill":
        return "waterfill"
    return f"int{quant.mlp_bits}" + (f"int{quant.attn_bits}" if quant.attn_bits != quant.mlp_bits else "")


def opening_lines(trainer: Trainer, data: TrainingData, folder: RunFolder) -> list[str]:
    config, runtime = trainer.config, trainer.runtime
    model, train, optim, average, quant = config.model, config.train, config.optim, config.average, config.quant
    shapes = {name: tuple(parameter.shape) for name, parameter in trainer.model.named_parameters()}
    parameters, covered = sum(map(prod, shapes.values())), quantized_parameters(shapes, quant)
    return [
        f"{folder.log}",
        f"preset:{config.run.preset} config_hash:{config_hash(config)} data_id:{data.data_id} "
        f"tokenizer_sha256:{data.tokenizer.sha256} code_sha256:{file_sha256(folder.code)}",
        "knobs changed from the preset: "
        + (" ".join(f"{knob}={value}" for knob, value in changed_knobs(config).items()) or "none"),
        f"machine:{machine_description(runtime)} compute:{runtime.compute_dtype} compile:{runtime.compiles} "
        f"python:{platform.python_version()} torch:{torch.__version__}",
        *([f"compile=auto goes on uncompiled: {runtime.compile_fault}"] if runtime.compile_fault else []),
        determinism_line(runtime),
        f"val_bpb:enabled tokenizer_kind={data.tokenizer.kind} tokenizer_path={config.data.tokenizer_path}",
        f"train_loader:dataset:{config.data.data_path} train_shards:{data.shards}",
        f"val_loader:shards pattern={config.data.data_path}/*_val_*.bin, closed until the artifact is scored",
        f"model_params:{parameters}",
        f"quantized_params:{covered} ({covered / parameters:.1%}; the rest is exported as fp16)",
        *low_bit_lines(model, quant),
        f"world_size:{runtime.world_size} grad_accum_steps:{trainer.micro_steps}",
        f"attention_mode:gqa num_heads:{model.num_heads} num_kv_heads:{model.num_kv_heads}",
        f"tie_embeddings:{model.tie_embeddings} embed_lr:{optim.embed_lr} head_lr:0.0 matrix_lr:{optim.matrix_lr} "
        f"scalar_lr:{optim.scalar_lr}",
        f"train_batch_tokens:{train.train_batch_tokens} train_seq_len:{model.train_seq_len} "
        f"iterations:{train.iterations} warmup_steps:{train.warmup_steps} "
        f"max_wallclock_seconds:{train.max_wallclock_seconds:.3f}",
        f"seed:{config.run.seed}",
        f"qat:{quant.qat_enabled}(start={quant.qat_start}) bigram:{model.bigram_vocab_size}x{model.bigram_dim} "
        f"swa:{average.swa_enabled}(start={average.swa_start},snapshots={average.swa_snapshots}) "
        f"quantizer:{quant.quantizer} prune:{quant.prune_frac} eval_seq_len:{config.score.eval_seq_len} "
        f"warmdown:{train.warmdown_shape}",
    ]


def determinism_line(runtime: Runtime) -> str:
    """Returns a line that says whether another run of the same steps ends in the same bytes."""
    return f"deterministic:no ({runtime.nondeterminism})" if runtime.nondeterminism else "deterministic:yes"


def low_bit_lines(model: ModelConfig, quant: QuantConfig) -> list[str]:
    """Returns a line with the quantizers of single sites and other changes of the model, where there are any."""
    if not (weight_sites(quant) or activation_sites(model) or model.knowledge_tokens):
        return []
    sites = [f"weight_{name}={site.text}" for name, site in weight_sites(quant).items()]
    sites += [f"act_{name}={site.text}" for name, site in activation_sites(model).items()]
    if model.knowledge_tokens:
        sites.append(f"knowledge_tokens={model.knowledge_tokens} at {model.knowledge_at}")
    return [f"low_bit:{' '.join(sites)} mlp_activation={model.mlp_activation}"]


def step_line(report: StepReport, config: Config) -> str:
    milliseconds = 1000 * report.elapsed
    return (
        f"step:{report.step}/{config.train.iterations} train_loss:{report.train_loss:.4f} "
        f"train_time:{milliseconds:.0f}ms step_avg:{milliseconds / report.step:.2f}ms"
    )


def stop_line(report: StepReport, config: Config) -> str:
    """Returns the line that says that the clock, not the number of steps, ended the training."""
    milliseconds = 1000 * report.elapsed
    return f"stopping_early: wallclock_cap train_time:{milliseconds:.0f}ms step:{report.step}/{config.train.iterations}"


def holdout_line(score: Score, report: StepReport, config: Config) -> str:
    """Returns a line on the last weights, before averaging and quantization, scored on training text.

    It is not the artifact's score.
    """
    milliseconds = 1000 * report.elapsed
    return (
        f"step:{report.step}/{config.train.iterations} holdout_loss:{score.val_loss:.4f} "
        f"holdout_bpb:{score.val_bpb:.4f} train_time:{milliseconds:.0f}ms"
    )


def progress_text(report: StepReport, config: Config) -> str:
    """Returns the text of the terminal's progress line."""
    tokens_per_second = report.step * config.train.train_batch_tokens / report.elapsed
    left = report.elapsed / max(report.progress, 1e-9) - report.elapsed
    return (
        f"step {report.step}  loss {report.train_loss:.4f}  {tokens_per_second:,.0f} tokens/s  "
        f"{report.progress:.0%}  {left:.0f} s left"
    )


def packing_lines(folder: RunFolder, config: Config) -> list[str]:
    name = f"{quantization_name(config.quant)}+{config.quant.codec}"
    files = (folder.weights, folder.artifact, folder.code)
    bytes_raw, bytes_model, bytes_code = (path.stat().st_size for path in files)
    pruning = folder.load_json(folder.pruning)
    return [
        f"prune:changed {pruning['pruned_codes']} of {pruning['codes']} codes",
        f"Serialized model: {bytes_raw} bytes",
        f"Code size: {bytes_code} bytes",
        f"Serialized model {name}: {bytes_model} bytes",
        f"Total submission size {name}: {bytes_model + bytes_code} bytes",
    ]


def scoring_lines(config: Config, model: ModelConfig) -> list[str]:
    """Returns lines that say how the artifact is about to be scored."""
    score = config.score
    scaled = f" ({'NTK-scaled' if score.eval_rope == 'ntk' else 'unscaled'} RoPE, {score.eval_seq_len} tokens)"
    longer = [f"eval_seq_len:{score.eval_seq_len}{scaled}"] if score.eval_seq_len > model.train_seq_len else []
    return [*longer, f"final_eval_mode:sliding_window stride:{score.eval_stride} batch_seqs:{score.eval_batch_seqs}"]


def final_lines(score: Score, quant: QuantConfig) -> list[str]:
    name = f"final_{quantization_name(quant)}_{quant.codec}_roundtrip"
    return [
        f"{name} val_loss:{score.val_loss:.4f} val_bpb:{score.val_bpb:.4f} eval_time:{1000 * score.seconds:.0f}ms",
        f"{name}_exact val_loss:{score.val_loss:.8f} val_bpb:{score.val_bpb:.8f}",
    ]


def partial_line(journal: ScoreJournal) -> str:
    """Returns a line with the sums of an interrupted scoring so far, which says that they are no score."""
    done = journal.sums
    return f"score:partial tokens:{done.tokens} nats:{done.nats:.4f} of this process, no score: go on with --resume"


def result_line(result: Mapping[str, Any]) -> str:
    """Returns the last line of a log, with the figures of result.json."""
    return (
        f"result: {'valid' if result['valid'] else 'INVALID'} val_loss:{result['val_loss']:.8f} "
        f"val_bpb:{result['val_bpb']:.8f} bytes_total:{result['bytes_total']} steps:{result['steps']} "
        f"train_seconds:{result['train_seconds']:.1f} eval_seconds:{result['eval_seconds']:.1f} "
        f"config_hash:{result['config_hash']} code_sha256:{result['code_sha256']} "
        f"artifact_sha256:{result['artifact_sha256']}"
    )


def machine_description(runtime: Runtime) -> str:
    if runtime.device.type == "cuda":
        return f"{runtime.world_size} x {torch.cuda.get_device_name(runtime.device)}"
    return f"{runtime.world_size} x {platform.machine()} CPU process, {torch.get_num_threads()} threads, {sys.platform}"
