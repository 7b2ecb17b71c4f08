"""Attention by segments, which runs on CUDA, with FlashAttention's operators in plain loops: equals the masked form."""

import importlib
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from flash_stand_in import FlashStandIn, flash_on_cpu
from hypothesis import given, settings
from hypothesis import strategies as st
from test_document_attention import BOS, SMALL, STARTS, changed_document, lively_model, random_rows, read_as_one_text
from test_document_attention import train as train_tiny

import golf.model.gpt
import golf.model.segments
from golf.config.config import build_config
from golf.config.knobs import ConfigError, UserError
from golf.data.loader import TokenStream
from golf.data.shards import write_shard
from golf.model.block import causal_attention, visible_keys
from golf.model.cache import KeyValueCache
from golf.model.segments import (
    check_flash,
    flash_arguments,
    flash_gradients,
    flash_runs,
    flash_segments,
    segment_attention,
    segment_bounds,
)
from golf.run.trainer import new_trainer
from golf.runtime import Runtime

CPU = torch.device("cpu")
BOTH = {
    "documents": {},
    "window": {"document_attention": False, "attention_window": 5},
    "both": {"attention_window": 5},
}


@pytest.fixture
def flash(monkeypatch) -> Iterator[FlashStandIn]:
    """The model takes this machine for one with FlashAttention."""
    monkeypatch.setattr(golf.model.gpt, "flash_runs", lambda device, dtype: True)
    with flash_on_cpu() as stand_in:
        yield stand_in


def starts_of(document_BT: torch.Tensor) -> torch.Tensor:
    return document_BT.diff(dim=1, prepend=document_BT[:, :1] - 1) != 0


# ---- the function itself ----


@st.composite
def shapes(draw):
    length, rows = draw(st.integers(1, 9)), draw(st.integers(1, 3))
    starts = draw(st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=rows, max_size=rows))
    window = draw(st.sampled_from([0, 1, 2, 3, 8, 9, 50]))
    return torch.tensor(starts), draw(st.integers(1, length)), window, draw(st.sampled_from([1, 2, 4]))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(shapes())
def test_segments_equal_the_mask_in_values_and_gradients(drawn):
    start_BT, queries, window, groups = drawn
    (rows, length), generator = start_BT.shape, torch.Generator().manual_seed(0)
    document_BT = start_BT.cumsum(1)
    found = []
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        q, k, v, g = (
            torch.randn(rows, heads, size, 8, generator=generator, dtype=torch.float64).to(dtype)
            for heads, size in ((4, queries), (groups, length), (groups, length), (4, queries))
        )
        with flash_on_cpu():
            for by_segments in (False, True):
                parts = [part.clone().requires_grad_() for part in (q, k, v)]
                if by_segments:
                    y = segment_attention(*parts, segment_bounds(starts_of(document_BT)), window)
                else:
                    y = causal_attention(*parts, visible_keys(queries, length, 0, window, CPU, document_BT))
                found.append((y, *torch.autograd.grad(y, parts, g)))
        torch.testing.assert_close(found.pop(), found.pop(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("length", [1, 7])
def test_bounds_are_the_starts_and_then_the_end(length):
    start_BT = torch.tensor([[True] + [False] * (length - 1)] * 3)
    start_BT[1, -1] = True
    bound_M, segments = segment_bounds(start_BT)
    expected = [place for place, start in enumerate(start_BT.flatten().tolist()) if start]
    assert bound_M.dtype == torch.int32 and bound_M.tolist() == expected + [3 * length] * (
        3 * length + 1 - len(expected)
    )
    assert int(segments) == len(expected) and segments.device.type == "cpu"


def test_the_kernels_see_few_numbers_of_segments():
    """Of 1 to 64 documents in a row, seven: what they allocate has as many sizes."""
    counts = set()
    for segments in range(1, 65):
        start_BT = torch.arange(64)[None] < segments
        bound_q, bound_k, most_q, most_k = flash_arguments(*segment_bounds(start_BT), 64, 64)
        assert bound_q is bound_k and (most_q, most_k) == (64, 64)
        assert bound_k.unique().tolist() == [*range(segments), 64] and bound_k[-1] == 64
        counts.add(len(bound_k) - 1)
    assert sorted(counts) == [1, 2, 4, 8, 16, 32, 64]


def test_too_many_segments_are_refused(monkeypatch):
    monkeypatch.setattr(golf.model.segments, "MOST_SEGMENTS", 12)
    model_rows = torch.ones(1, 13, dtype=torch.bool)
    assert len(flash_arguments(*segment_bounds(model_rows[:, :12]), 12, 12)[0]) == 13
    with pytest.raises(UserError, match="13 documents and rows"):
        flash_arguments(*segment_bounds(model_rows), 13, 13)


@pytest.mark.parametrize("queries", [6, 2])
@pytest.mark.parametrize("window", [0, 3])
def test_the_operators_are_what_torch_takes_them_for(queries, window):
    """Schema, shapes of fake tensors, registered gradients and what a graph of them gives."""
    torch.manual_seed(0)
    start_BT = torch.tensor([[True, False, True, True, False, False], [True, False, False, False, True, False]])
    q, k, v = (torch.randn(n, heads, 8, requires_grad=True) for n, heads in ((2 * queries, 4), (12, 2), (12, 2)))
    bounds = segment_bounds(start_BT)
    with flash_on_cpu():
        torch.library.opcheck(segment_bounds, (start_BT,))
        torch.library.opcheck(flash_segments, (q, k, v, *bounds, queries, 6, window))
        y, sums = flash_segments(q, k, v, *bounds, queries, 6, window)
        parts = [part.detach() for part in (torch.randn_like(y), q, k, v, y, sums)]
        torch.library.opcheck(flash_gradients, (*parts, *bounds, queries, 6, window))


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12), reason="before torch 2.12 it takes no grouped queries"
)
@pytest.mark.parametrize("window", [0, 3])
def test_torchs_own_function_calls_the_operators_alike(window):
    torch.manual_seed(0)
    parts = [torch.randn(12, heads, 8, requires_grad=True) for heads in (4, 2, 2)]
    start_BT = torch.tensor([[True, False, True, True, False, False], [True, False, False, False, True, False]])
    bounds = segment_bounds(start_BT)
    bound_M = flash_arguments(*bounds, 6, 6)[0]
    with flash_on_cpu() as stand_in:
        for call in (
            lambda: flash_segments(*parts, *bounds, 6, 6, window)[0],
            lambda: importlib.import_module("torch.nn.attention.varlen").varlen_attn(
                *parts, bound_M, bound_M, 6, 6, window_size=(window - 1, 0), enable_gqa=True
            ),
        ):
            call().square().sum().backward()
    ours, theirs = stand_in.calls[:2], stand_in.calls[2:]
    assert ours == theirs and len(ours) == 2


# ---- the model ----


@pytest.mark.parametrize("options", BOTH.values(), ids=BOTH)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_the_model_is_that_of_the_mask(flash, monkeypatch, options, dtype, tolerance):
    model, ids_BT = lively_model(replace(SMALL, **options), dtype).to(dtype), random_rows()
    found = []
    for by_segments in (True, False):
        monkeypatch.setattr(golf.model.gpt, "flash_runs", lambda device, dtype, runs=by_segments: runs)
        model.zero_grad()
        x0_BTD = model.embed(ids_BT, model.tok_emb.effective_weight())
        x_BTD = model.trunk(x0_BTD, model.positions(ids_BT, 10_000.0), 32)
        x_BTD.square().mean().backward()
        found.append([x_BTD.detach(), *(weight.grad for weight in model.parameters())])
    assert len(flash.calls) == 2 * SMALL.num_layers
    for one, other in zip(*found, strict=True):
        assert (one - other).abs().max() <= tolerance * other.abs().max()


@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize("options", [{}, {"last": 8}, {"last": 1}, {"rope_base": 30_000.0}])
@pytest.mark.parametrize("window", [0, 4])
def test_another_document_leaves_the_logits_bit_identical(flash, number, options, window):
    model, ids_BT = lively_model(replace(SMALL, attention_window=window)), random_rows()
    begin, end = (*STARTS, 32)[number : number + 2]
    with torch.no_grad():
        before, after = (model.logits(rows, **options) for rows in (ids_BT, changed_document(ids_BT, number)))
    assert len(flash.calls) == 2 * SMALL.num_layers
    others = [place for place in range(32 - before.size(1), 32) if not begin < place < end]
    kept = [place - (32 - before.size(1)) for place in others]
    assert kept and torch.equal(before[:, kept], after[:, kept])
    assert before.size(1) < 32 or not torch.equal(before[:, begin:end], after[:, begin:end])


def test_the_next_row_is_another_text(flash):
    """Rows without a start: their bounds alone keep them apart."""
    model, ids_BT = lively_model(), random_rows().where(random_rows() != BOS, 5)
    with torch.no_grad():
        together, alone = model.logits(ids_BT)[1:], model.logits(ids_BT[1:])
    assert torch.equal(together, alone) and flash.calls[0].segments == 2


@pytest.mark.parametrize("case", ["knowledge", "cache", "32 bits on CUDA", "16 bits on a CPU"])
def test_the_mask_stays_where_segments_can_not_say_it(flash, monkeypatch, case):
    model, cache = lively_model(replace(SMALL, knowledge_tokens=2 * (case == "knowledge"))), None
    if case == "cache":
        cache = KeyValueCache(SMALL)
    if "bits" in case:
        device, dtype = (torch.device("cuda"), torch.float32) if "CUDA" in case else (CPU, torch.bfloat16)
        monkeypatch.setattr(golf.model.gpt, "flash_runs", lambda *_: flash_runs(device, dtype))
    with torch.no_grad():
        model.logits(random_rows(), cache=cache)
    assert flash.calls == []


@pytest.mark.parametrize("queries", [32, 8])
def test_one_graph_serves_every_number_of_documents(flash, queries):
    """From none to one at each position: nothing is compiled again, and the losses stay those of the eager model."""
    model, generator = lively_model(), torch.Generator().manual_seed(3)
    graphs, buckets = [], set()

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    losses = torch.compile(model.token_losses, backend=backend, dynamic=False, fullgraph=True)
    for share in (0.0, 0.02, 0.1, 0.3, 0.6, 1.0):
        ids_BT = torch.randint(2, 64, (2, 32), generator=generator)
        ids_BT[torch.rand(2, 32, generator=generator) < share] = BOS
        with torch.no_grad():
            batch = ids_BT, ids_BT[:, -queries:]
            assert torch.equal(losses(*batch), model.token_losses(*batch))
        buckets.add(flash.calls[-1].segments)
    assert len(graphs) == 1 and len(buckets) >= 5


@pytest.mark.slow
def test_the_compiled_gradients_are_those_of_the_eager_model(flash):
    found, ids_BT = [], random_rows()
    for compiles in (False, True):
        model = lively_model(replace(SMALL, num_layers=2, bigram_vocab_size=0, smear_gate=False))
        step = torch.compile(model, dynamic=False, fullgraph=True) if compiles else model
        loss = step(ids_BT, ids_BT.roll(-1, 1))
        loss.backward()
        found.append([loss, *(weight.grad for weight in model.parameters())])
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)


# ---- a run ----


def compile_step(trainer) -> None:
    trainer.forward = torch.compile(trainer.model, backend="eager", dynamic=False, fullgraph=True)


@pytest.mark.parametrize(("plant", "proven"), [(compile_step, True), (read_as_one_text, False)])
def test_a_step_that_joins_documents_is_found(flash, tmp_path, plant, proven):
    trainer = train_tiny(tmp_path, 7, plant, qat_enabled="0", iterations="2")
    assert trainer.audit.records["document_attention"].proven == proven and flash.calls


def test_a_step_that_loses_the_bounds_of_documents_is_found(flash, tmp_path, monkeypatch):
    """Planted: the compiled step takes rows for segments, the model it is held against does not."""

    def plant(trainer) -> None:
        bounds_of = segment_bounds

        def forward(*batch: torch.Tensor) -> torch.Tensor:
            rows_only = torch.zeros_like(batch[0], dtype=torch.bool)
            rows_only[:, 0] = True
            with monkeypatch.context() as patch:
                patch.setattr(golf.model.gpt, "segment_bounds", lambda _: bounds_of(rows_only))
                return trainer.model(*batch)

        trainer.forward = forward

    trainer = train_tiny(tmp_path, 7, plant, qat_enabled="0", iterations="2")
    assert not trainer.audit.records["document_attention"].proven
    assert any(finding.startswith("document_attention") for finding in trainer.audit.findings())


@pytest.mark.parametrize(
    ("knobs", "capability", "built", "refused"),
    [
        ({}, (9, 0), True, False),
        ({}, (7, 5), True, True),
        ({}, (9, 0), False, True),
        ({"num_heads": 8}, (9, 0), True, True),
        ({"model_dim": 2048}, (8, 0), True, True),
        ({"num_heads": 8, "knowledge_tokens": 2}, (7, 5), False, False),
    ],
)
def test_a_device_without_flash_is_refused(monkeypatch, knobs, capability, built, refused):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: built)
    check_flash(replace(SMALL, **knobs), CPU)
    if refused:
        with pytest.raises(ConfigError, match="heads of a multiple of 8"):
            check_flash(replace(SMALL, **knobs), torch.device("cuda"))
    else:
        check_flash(replace(SMALL, **knobs), torch.device("cuda"))


@pytest.mark.parametrize("knob", ["document_attention=1", "attention_window=8"])
def test_it_is_refused_before_a_model_is_built(tmp_path, monkeypatch, knob):
    write_shard(tmp_path / "a_train_000000.bin", torch.arange(4096).numpy() % 60)
    name, value = knob.split("=")
    config = build_config("local", {}, {"train_seq_len": "16", "train_batch_tokens": "128", name: value})
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    monkeypatch.setattr("golf.run.trainer.build_model", lambda *_: pytest.fail("a model was built"))
    with pytest.raises(ConfigError, match="Ampere"):
        new_trainer(config, Runtime(torch.device("cuda")), TokenStream([tmp_path / "a_train_000000.bin"]))
