"""tools/compare_quant.py and what is behind it: the same tokens for all forms, paired differences, their intervals."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from golf.artifact.container import pack_artifact
from golf.artifact.weights import load_weights, save_weights
from golf.data.loader import TokenStream
from golf.model.gpt import GPT
from golf.quant.calibration import training_rows
from golf.quant.grid import QuantizedTensor, same_stored
from golf.quant.tensor_classes import QuantError
from golf.runtime import Runtime
from golf.score.scorer import plain_settings, score_stream
from lab.cli import run_command
from lab.compare.statistics import StatisticsError, block_numbers, bootstrap_ratio
from lab.rates.grids import QuantSpec
from lab.rates.quant_comparison import (
    ComparisonSubject,
    collect_hessians,
    compare_variants,
    parse_variant,
    parse_variants,
    quantize_variant,
)
from lab.rates.quantizers import quantize_matrix
from lab.rates.targets import first_targets, target_nats
from lab.rates.trained_run import TrainedRun, open_trained_run
from tests.trained_run_fixtures import copied_run, make_trained_run
from tools import compare_quant

torch.set_num_threads(1)
CPU = Runtime(torch.device("cpu"))


# ---- the interval ----


def test_blocks_are_documents_or_equally_long():
    starts_N = np.array([0, 0, 1, 0, 1, 1, 0], dtype=bool)
    assert block_numbers(starts_N, 0).tolist() == [0, 0, 1, 1, 2, 3, 3]
    assert block_numbers(starts_N[2:], 0).tolist() == [0, 0, 1, 2, 2]
    assert block_numbers(starts_N, 3).tolist() == [0, 0, 0, 1, 1, 1, 2]


@given(st.integers(0, 2**32 - 1), st.floats(-3, 3), st.floats(0.01, 10))
def test_the_interval_holds_the_mean_moves_and_scales_with_the_data(seed, shift, factor):
    values = np.random.default_rng(seed).normal(size=30)
    counts = np.random.default_rng(seed + 1).integers(1, 9, size=30)
    found = bootstrap_ratio(values, counts, draws=200)
    assert found.low <= found.difference <= found.high and found.difference == pytest.approx(
        values.sum() / counts.sum()
    )
    moved = bootstrap_ratio(factor * values + shift * counts, counts, draws=200)
    expected = [factor * value + shift for value in (found.low, found.difference, found.high)]
    assert [moved.low, moved.difference, moved.high] == pytest.approx(expected, abs=1e-9)
    assert bootstrap_ratio(values, counts, draws=200) == found
    assert bootstrap_ratio(values, counts, draws=200, seed=1) != found


def test_the_interval_is_students_on_independent_blocks():
    values = np.random.default_rng(5).normal(0.3, 1, size=400)
    found = bootstrap_ratio(values, np.ones(400))
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.03 * (high - low))


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng, covered = np.random.default_rng(7), 0
    for seed in range(300):
        counts = rng.integers(5, 60, size=60)
        sums = 0.1 * counts + rng.normal(size=60) * counts  # a document's own shift: its tokens go together
        found = bootstrap_ratio(sums, counts, draws=500, seed=seed)
        covered += found.low <= 0.1 <= found.high
    assert 0.9 <= covered / 300 <= 0.98


def test_blocks_matter_where_their_tokens_go_together():
    rng = np.random.default_rng(2)
    values_N = np.repeat(rng.normal(size=40), 50)
    whole, alone = np.repeat(np.arange(40), 50), np.arange(2000)
    wide, narrow = (bootstrap_ratio(np.bincount(b, values_N), np.bincount(b), draws=500) for b in (whole, alone))
    assert wide.high - wide.low > 4 * (narrow.high - narrow.low)


def test_no_difference_is_not_resolved():
    found = bootstrap_ratio(np.zeros(20), np.ones(20))
    assert (found.low, found.high, found.resolved) == (0, 0, False)


@pytest.mark.parametrize(("values", "alpha", "draws"), [([1.0], 0.05, 1000), ([1, 2], 0, 1000), ([1, 2], 0.05, 9)])
def test_what_gives_no_interval(values, alpha, draws):
    with pytest.raises(StatisticsError):
        bootstrap_ratio(values, np.ones(len(values)), alpha, draws)


# ---- forms of the weights ----


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_trained_run(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def opened(run) -> TrainedRun:
    return open_trained_run(run)


@pytest.fixture(scope="module")
def hessians(opened) -> dict[str, torch.Tensor]:
    model = GPT(opened.saved.model)
    model.load_state_dict(opened.saved.state)
    return collect_hessians(model.eval(), training_rows(TokenStream(opened.train_paths), 4096, 32, 0))


def subject(opened: TrainedRun, hessians: dict[str, torch.Tensor], targets: int = 600) -> ComparisonSubject:
    settings = plain_settings(opened.saved.model, 8)
    return ComparisonSubject(opened, opened.tokens_N[: targets + 1], settings, "lzma", hessians, CPU)


def test_names_of_variants():
    names = [variant.name for variant in parse_variants("rtn8, gptq4-g64,naive8,fp16,rtn8")]
    assert names == ["fp32", "rtn8", "gptq4-g64", "naive8", "fp16"]
    grouped = parse_variant("gptq4-g64", False)
    assert (grouped.method, grouped.spec) == ("gptq", QuantSpec(4, "group", 64)) and not grouped.keeps_embedding
    assert parse_variant("naive8", False).keeps_embedding and parse_variant("rtn1", True).keeps_embedding


@pytest.mark.parametrize("word", ["rtn9", "rtn0", "magic", "", "gptq", "rtn4-g0", "fp8", "rtn4-g"])
def test_names_that_are_no_variant(word):
    with pytest.raises(QuantError, match=f"unknown method '{word}'"):
        parse_variant(word, False)


def test_each_form_quantizes_what_its_name_says(opened, hessians):
    state = opened.saved.state
    bits = {
        name: getattr(entry, "bits", 16)
        for name, entry in quantize_variant(state, parse_variant("rtn3", False), {}).items()
    }
    assert {name for name, width in bits.items() if width == 3} == {
        name for name, tensor in state.items() if tensor.dim() == 2 and name.endswith("weight")
    }
    naive = quantize_variant(state, parse_variant("naive8", False), {})
    assert torch.equal(naive["tok_emb.weight"], state["tok_emb.weight"].half())
    weight = state["blocks.0.mlp.fc.weight"]
    codes = (weight / (weight.abs().amax(1, keepdim=True) / 127).half().float()).round()
    assert torch.equal(naive["blocks.0.mlp.fc.weight"].codes_RC.float(), codes)
    halves = quantize_variant(state, parse_variant("fp16", False), {})
    assert not any(isinstance(entry, QuantizedTensor) for entry in halves.values())


def test_gptq_uses_the_inputs_and_rounds_lookups_to_nearest(opened, hessians):
    state = opened.saved.state
    near, gptq = (quantize_variant(state, parse_variant(word, False), hessians) for word in ("rtn3", "gptq3"))
    name = "blocks.1.mlp.fc.weight"
    assert same_stored(gptq[name], quantize_matrix(state[name], QuantSpec(3), hessians[name]))
    assert not same_stored(gptq[name], near[name])
    assert "bigram.embed.weight" not in hessians
    assert same_stored(gptq["bigram.embed.weight"], near["bigram.embed.weight"])


# ---- the comparison ----


def test_nats_of_targets_are_the_scorers(opened):
    model = GPT(opened.saved.model)
    model.load_state_dict(opened.saved.state)
    settings = plain_settings(opened.saved.model, 8)
    for targets in (600, len(opened.tokens_N) - 1):
        tokens_N1 = opened.tokens_N[: targets + 1]
        nats_N, byte_count = target_nats(model, *first_targets(opened.tokens_N, opened.counter, targets), settings, CPU)
        score = score_stream(model, tokens_N1, opened.counter, settings, CPU, announce=False)
        assert len(nats_N) == targets and byte_count == score.bytes
        assert nats_N.sum() == pytest.approx(score.nats, rel=1e-12)


def test_differences_are_paired_on_the_same_targets(opened, hessians):
    words = "fp32,fp16,rtn8,rtn2"
    found = compare_variants(parse_variants(words), subject(opened, hessians), block_tokens=32)
    fp32, fp16, rtn8, rtn2 = found.results
    assert (found.tokens, found.of_tokens) == (
        600,
        len(opened.tokens_N) - 1,
    ) and found.blocks == "19 blocks of 32 tokens"
    assert found.token_unit == "byte" and fp32.difference is None and fp32.verdict == "reference"
    for result in (fp16, rtn8, rtn2):
        assert result.difference.difference == pytest.approx(result.nll - fp32.nll, abs=1e-12)
        assert result.bpb_difference == pytest.approx(result.bpb - fp32.bpb, abs=1e-12)
        assert result.perplexity == pytest.approx(np.exp(result.nll))
    assert rtn2.verdict == "worse" and rtn2.difference.low > 0.05
    assert abs(rtn8.difference.difference) < 0.01 < rtn2.difference.difference
    assert fp32.bytes == opened.weights_path.stat().st_size > fp16.bytes > rtn8.bytes > rtn2.bytes
    stored = quantize_variant(opened.saved.state, parse_variant("rtn8", False), {})
    assert rtn8.bytes == len(pack_artifact(stored, opened.saved.model, opened.saved.tokenizer_sha256, "lzma")[0])


def test_weights_that_fp16_holds_exactly_lose_nothing_in_it(opened, tmp_path):
    folder, saved = copied_run(opened.path, tmp_path), opened.saved
    state = {name: tensor.half().float() for name, tensor in saved.state.items()}
    save_weights(folder / "weights.safetensors", state, saved.model, saved.quant, saved.tokenizer_sha256)
    found = compare_variants(parse_variants("fp16"), subject(open_trained_run(folder), {}))
    assert found.results[1].difference.difference == 0 and found.results[1].verdict == "not resolved"
    assert found.results[1].nll == found.results[0].nll


def test_a_better_form_is_called_better(opened, hessians, monkeypatch):
    """The reference is made worse behind the comparison's back, so that fp16 wins."""
    noise = torch.Generator().manual_seed(0)
    damaged = {
        name: tensor + 0.3 * torch.randn(tensor.shape, generator=noise) for name, tensor in opened.saved.state.items()
    }
    load = GPT.load_state_dict
    calls = []

    def load_once_damaged(model, state):
        calls.append(1)
        return load(model, damaged if len(calls) == 1 else state)

    monkeypatch.setattr(GPT, "load_state_dict", load_once_damaged)
    found = compare_variants(parse_variants("fp16"), subject(opened, hessians))
    assert found.results[1].verdict == "better" and found.results[1].difference.high < 0


def test_documents_are_blocks_where_there_are_enough(opened, hessians):
    variants = parse_variants("fp32")
    assert compare_variants(variants, subject(opened, hessians, len(opened.tokens_N) - 1)).blocks == "30 documents"
    assert compare_variants(variants, subject(opened, hessians)).blocks == "19 blocks of 32 tokens"
    assert compare_variants(variants, subject(opened, hessians), block_tokens=0).blocks.endswith("documents")


# ---- the tool ----


@pytest.fixture
def run_tool(monkeypatch, capsys, run, tmp_path) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: str, folder: Path = run) -> tuple[int, str, str]:
        common = ["--run", str(folder), "--device", "cpu", "--threads", "1", "--out", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", ["compare_quant.py", *common, "--calibration-tokens", "2048", *arguments])
        return run_command(compare_quant.Options, compare_quant.__doc__, compare_quant.work), *capsys.readouterr()

    return call


def test_table_markdown_figures_and_picture(run_tool, tmp_path):
    methods = "naive8,rtn8,gptq8,rtn3,gptq3"
    status, output, complaint = run_tool("--methods", methods, "--tokens", "800", "--block-tokens", "32")
    assert status == 0, complaint
    out = tmp_path / "out"
    content = json.loads((out / "compare_quant.json").read_text())
    assert [result["name"] for result in content["results"]] == ["fp32", *methods.split(",")]
    assert content["tokens"] == 800 and content["calibration_tokens"] == 2048
    assert (out / "compare_quant.png").read_bytes().startswith(b"\x89PNG")
    text = (out / "compare_quant.md").read_text()
    for result in content["results"]:
        assert f"| {result['name']} | {result['nll']:.5f} |" in text and result["name"] in output
    assert "the first 800 of" in text and "perplexity per byte" in text and "25 blocks of 32 tokens" in text
    own = {result["name"]: result for result in content["results"]}
    assert own["gptq3"]["nll"] < own["rtn3"]["nll"] and own["rtn3"]["verdict"] == "worse"


def test_equal_options_give_equal_figures(run_tool, tmp_path):
    found = [json.loads(run_tool("--methods", "rtn4,gptq4", "--tokens", "300", "--json")[1]) for _ in range(2)]
    for content in found:
        for result in content["results"]:
            for key in ("quantize_seconds", "pack_seconds", "score_seconds"):
                assert result.pop(key) >= 0
    assert found[0] == found[1]


def damage_weights(folder: Path) -> None:
    saved = load_weights(folder / "weights.safetensors")
    saved.state["tok_emb.weight"][3, 3] = torch.inf
    save_weights(folder / "weights.safetensors", saved.state, saved.model, saved.quant, saved.tokenizer_sha256)


@pytest.mark.parametrize(
    ("damage", "arguments", "message"),
    [
        (shutil.rmtree, [], "is not the folder of a run"),
        (lambda run: (run / "weights.safetensors").unlink(), [], "weights.safetensors is missing"),
        (lambda run: (run / "weights.safetensors").write_bytes(b"x"), [], "cannot read weights"),
        (damage_weights, [], "has NaN or infinite values"),
        (None, ["--methods", "rtn8,magic"], "unknown method 'magic'"),
        (None, ["--tokens", "-1"], "--tokens -1: the stream has"),
        (None, ["--tokens", "99999999"], "--tokens 99999999"),
        (None, ["--methods", "gptq8", "--calibration-tokens", "7"], "no row to calibrate on"),
        (None, ["--calibration", "{data}/text_val_000000.bin"], "is a validation shard"),
        (None, ["--tokenizer", "{data}/text_val_000000.bin"], "not a SentencePiece model"),
        (None, ["--block-tokens", "-2"], "--block-tokens -2"),
        (None, ["--alpha", "1", "--methods", "fp16"], "alpha=1.0"),
        (None, ["--out", "{run}/config.json"], "is no folder"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_nothing_is_written(run_tool, run, tmp_path, damage, arguments, message):
    folder = copied_run(run, tmp_path)
    if damage:
        damage(folder)
    words = [word.format(run=folder, data=run.parent / "data") for word in arguments]
    status, output, complaint = run_tool(*words, folder=folder)
    assert (status, output) == (2, "")
    *before, last = complaint.splitlines()
    assert (
        last.startswith("compare_quant: ") and message in last and not any("compare_quant" in line for line in before)
    )
    assert not (tmp_path / "out").exists()
