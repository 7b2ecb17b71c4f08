"""What a quantizer wants to know of each weight: the second moments of its inputs, and how much its rows count.

Both come from one forward and backward pass over calibration rows with labels drawn from the model itself, so that
the gradients' second moments are the Fisher information and not the data's (Kunstner et al. 2019, arXiv 1905.12558).
With x the inputs of a matrix and g the loss's gradient by its outputs, rounding by E costs about

    1/2 sum_r row_weight_r  e_r^T hessian_CC e_r   nats per token,   hessian = E[x x^T], row_weight_r = E[g_r^2]:

the Kronecker form of Martens and Grosse 2015 (arXiv 1503.05671) less what couples two rows, whose rounding errors
have nothing to do with each other. A position's x counts by the size of its g.

N rows of tokens, T time, B rows at once, P positions, R rows (outputs) and C columns (inputs) of a weight,
D model width, V vocabulary, L number of lookups.
"""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from golf.config.config import Config
from golf.config.features import Feature, register_feature
from golf.data.loader import TokenStream
from golf.model.cache import KeyValueCache
from golf.model.gpt import GPT
from golf.model.layers import Embedding, Linear
from golf.quant.qat import load_gpt
from golf.quant.tensor_classes import QuantError
from golf.runtime import Runtime

UNSEEN = 0.5
"""Added to the count of every row of a table: one that was never looked up will be."""


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """Of one weight: loss added = 1/2 sum_r row_weight_r e_r^T hessian e_r, nats per token; float64, on the CPU."""

    hessian_CC: Tensor
    row_weight_R: Tensor


@dataclass(eq=False)
class Sums:
    """Sums over positions for one weight, float64."""

    hessian_CC: Tensor
    rows_R: Tensor
    weight: Tensor
    """What the sum of `hessian_CC` is to be divided by."""

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hessian_CC, self.rows_R, self.weight


@dataclass(eq=False)
class MomentRecorder:
    """Sums of all matrices over the passes that are made while its hooks are on."""

    model: GPT
    sums: dict[str, Sums] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.model.head is not None:
            raise QuantError("calibration knows tied embeddings alone: train with tie_embeddings=1")
        self.modules: dict[str, Linear | Embedding] = {
            f"{path}.weight": module
            for path, module in self.model.named_modules()
            if isinstance(module, Linear | Embedding)
        }
        device = self.model.tok_emb.weight.device
        shapes = {name: module.weight.shape for name, module in self.modules.items()}
        shapes["head"] = self.model.tok_emb.weight.shape
        for name, (rows, columns) in shapes.items():
            zeros = [
                torch.zeros(shape, dtype=torch.float64, device=device) for shape in ((columns, columns), (rows,), ())
            ]
            self.sums[name] = Sums(*zeros)

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Within it every use of a matrix is added up, in the forward pass or, where gradients flow, the backward."""
        handles = [
            module.register_forward_hook(lambda _, inputs, output, name=name: self.record(name, inputs[0], output))
            for name, module in self.modules.items()
        ]
        handles.append(self.model.final_norm.register_forward_hook(lambda _, inputs, output: self.keep(output)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def keep(self, normed_BTD: Tensor) -> None:
        self.normed_BTD = normed_BTD.detach()

    def record(self, name: str, x: Tensor, output: Tensor) -> None:
        add = self.add_lookups if isinstance(self.modules[name], Embedding) else self.add_product
        if output.requires_grad:
            output.register_hook(lambda gradient: add(name, x.detach(), gradient))
        elif add == self.add_product:
            add(name, x, None)

    def add_product(self, name: str, x_BTC: Tensor, g_BTR: Tensor | None) -> None:
        x_PC, sums = x_BTC.flatten(0, -2).float(), self.sums[name]
        weight_P = torch.ones(len(x_PC), device=x_PC.device)
        if g_BTR is not None:
            g_PR = g_BTR.flatten(0, -2).float()
            weight_P = g_PR.square().sum(1)
            sums.rows_R += g_PR.square().double().sum(0)
        add_outer(sums, x_PC, weight_P)

    def add_lookups(self, name: str, ids_BT: Tensor, g_BTC: Tensor) -> None:
        """A row of a table has the gradients of the positions that looked it up; its share of them is its weight."""
        g_PC, sums = g_BTC.flatten(0, -2).float(), self.sums[name]
        sums.hessian_CC += (g_PC.T @ g_PC).double()
        sums.weight += len(g_PC)
        sums.rows_R += torch.bincount(ids_BT.flatten(), minlength=len(sums.rows_R)).double()

    def add_head(self, logits_BTV: Tensor) -> None:
        """The tied head: its inputs are the final norm's output, its gradients those of the softmax in closed form."""
        cap, sums = self.model.config.logit_softcap, self.sums["head"]
        p_PV = torch.softmax(logits_BTV.flatten(0, 1), -1)
        slope_PV = 1 - (logits_BTV.flatten(0, 1) / cap).square()
        fisher_PV = p_PV * (1 - p_PV) * slope_PV.square()
        sums.rows_R += fisher_PV.double().sum(0)
        add_outer(sums, self.normed_BTD.flatten(0, 1).float(), fisher_PV.sum(1))


def add_outer(sums: Sums, x_PC: Tensor, weight_P: Tensor) -> None:
    weighted_PC = x_PC * weight_P.sqrt().unsqueeze(1)
    sums.hessian_CC += (weighted_PC.T @ weighted_PC).double()
    sums.weight += weight_P.double().sum()


def add_pass(recorder: MomentRecorder, ids_BT: Tensor, generator: torch.Generator) -> None:
    """One forward and backward pass, with labels drawn from the model's own predictions."""
    with recorder.hooks(), torch.enable_grad():
        logits_BTV = recorder.model.logits(ids_BT)
        if not logits_BTV.isfinite().all():
            raise QuantError("the model's predictions are NaN or infinite: the weights are broken")
        with torch.no_grad():
            recorder.add_head(logits_BTV.detach())
            drawn_P = torch.multinomial(torch.softmax(logits_BTV.flatten(0, 1), -1), 1, generator=generator)
        loss = F.cross_entropy(logits_BTV.flatten(0, 1), drawn_P.flatten().to(ids_BT.device), reduction="sum")
        loss.backward()
    recorder.model.zero_grad(set_to_none=True)


def calibrate(
    model: GPT, rows_NT: Tensor, runtime: Runtime, batch_rows: int = 8, seed: int = 0
) -> dict[str, LayerStatistics]:
    """Statistics of every matrix over all ranks' rows; each rank gives its share of `rows_NT`.

    Raises QuantError for no rows, or a model whose gradients are not finite.
    """
    return calibrate_within(math.inf, model, rows_NT, runtime, batch_rows, seed)[0]


def calibrate_within(
    seconds: float, model: GPT, rows_NT: Tensor, runtime: Runtime, batch_rows: int, seed: int
) -> tuple[dict[str, LayerStatistics], int]:
    """`calibrate` on as many of the rows as there is time for on each rank, one batch at least; and their tokens."""
    check_rows(rows_NT, model)
    recorder, generator = MomentRecorder(model), torch.Generator(runtime.device).manual_seed(seed + runtime.rank)
    mine_NT = rows_NT[runtime.rank :: runtime.world_size].to(runtime.device)
    started, tokens = time.perf_counter(), torch.zeros((), dtype=torch.float64, device=runtime.device)
    for done, batch_NT in enumerate(mine_NT.split(batch_rows)):
        spent = time.perf_counter() - started
        if done and spent * (done + 1) / done > seconds:
            break
        add_pass(recorder, batch_NT, generator)
        tokens += batch_NT.numel()
    for part in (tokens, *(part for sums in recorder.sums.values() for part in sums.parts())):
        runtime.sum_over_ranks(part)
    return finalize_statistics(recorder, int(tokens)), int(tokens)


def finalize_statistics(recorder: MomentRecorder, tokens: int) -> dict[str, LayerStatistics]:
    """From sums to what they say of each weight. Raises QuantError."""
    statistics = {}
    for name, module in recorder.modules.items():
        sums = recorder.sums[name]
        if isinstance(module, Embedding):
            count_R = sums.rows_R + UNSEEN
            statistics[name] = LayerStatistics(sums.hessian_CC / tokens, count_R / count_R.sum())
        else:
            statistics[name] = LayerStatistics(sums.hessian_CC / sums.weight.clamp_min(1e-300), sums.rows_R / tokens)
    head = recorder.sums["head"]
    statistics["tok_emb.weight"] = tied_statistics(
        LayerStatistics(head.hessian_CC / head.weight, head.rows_R / tokens), statistics["tok_emb.weight"]
    )
    for name, one in statistics.items():
        if not (one.hessian_CC.isfinite().all() and one.row_weight_R.isfinite().all()):
            raise QuantError(f"calibration gave NaN or infinite values for {name!r}: the weights are broken")
    return {name: LayerStatistics(one.hessian_CC.cpu(), one.row_weight_R.cpu()) for name, one in statistics.items()}


def tied_statistics(head: LayerStatistics, table: LayerStatistics) -> LayerStatistics:
    """One Kronecker form for a table that is also the head: rows by the sum of both costs, columns by their mean."""
    head_size, table_size = head.hessian_CC.trace(), table.hessian_CC.trace()
    hessian_CC = head.row_weight_R.sum() * head.hessian_CC + table.row_weight_R.sum() * table.hessian_CC
    row_weight_R = head.row_weight_R * head_size + table.row_weight_R * table_size
    return LayerStatistics(hessian_CC / hessian_CC.trace(), row_weight_R)


def check_rows(rows_NT: Tensor, model: GPT) -> None:
    if rows_NT.dim() != 2 or rows_NT.numel() == 0:
        raise QuantError("the calibration set is empty: give rows of training tokens")
    if int(rows_NT.max()) >= model.config.vocab_size:
        raise QuantError(
            f"calibration token {int(rows_NT.max())} is beyond the vocabulary of {model.config.vocab_size}"
        )


@torch.no_grad()
def generated_rows(model: GPT, count: int, length: int, seed: int) -> Tensor:
    """Rows_NT of text that the model makes up itself, each from a document's start: calibration without any data."""
    generator, cache = torch.Generator().manual_seed(seed), KeyValueCache(model.config)
    drawn_N1 = torch.full((count, 1), model.config.bos_id)
    drawn = [drawn_N1]
    for _ in range(length - 1):
        logits_NV = model.logits(drawn_N1.to(model.tok_emb.weight.device), last=1, cache=cache)[:, -1]
        drawn_N1 = torch.multinomial(torch.softmax(logits_NV.cpu(), -1), 1, generator=generator)
        drawn.append(drawn_N1)
    return torch.cat(drawn, dim=1)


@dataclass(frozen=True, eq=False)
class RunCalibration:
    """Statistics of all matrices, and how they came about."""

    statistics: dict[str, LayerStatistics]
    record: dict[str, Any]


NO_CALIBRATION: dict[str, Any] = {"calibration_seconds": 0.0, "calibration_tokens": 0}


def training_rows(stream: TokenStream, tokens: int, length: int, seed: int) -> Tensor:
    """int64 rows_NT of `length` tokens from all over the stream, distinct, in order; the same for a seed.

    Raises QuantError where there is no row.
    """
    rows, whole = tokens // length, len(stream) // length
    if rows < 1 or whole < 1:
        raise QuantError(
            f"no row to calibrate on: {tokens:,} tokens of the training shards' {len(stream):,}, in rows of {length:,}"
        )
    numbers = np.sort(np.random.default_rng(seed).choice(whole, min(rows, whole), replace=False))
    return torch.from_numpy(np.stack([stream.tokens(int(number) * length, length) for number in numbers]))


def calibrate_run(
    state: Mapping[str, Tensor],
    config: Config,
    stream: TokenStream,
    runtime: Runtime,
    seconds: float = math.inf,
    rows: int = 0,
) -> RunCalibration:
    """Calibrate trained weights as the configuration says, all ranks together, within `seconds`: what was trained and
    what is calibrated share one cap. On fewer `rows` for a rehearsal."""
    quant, length, started = config.quant, config.model.train_seq_len, time.perf_counter()
    model = load_gpt(config.model, state, runtime)
    tokens = rows * length or quant.calibration_tokens
    if quant.calibration_text == "train":
        rows_NT = training_rows(stream, tokens, length, config.run.seed)
    else:
        rows_NT = generated_rows(model, tokens // length, length, config.run.seed)
    batch_rows = max(1, config.train.micro_batch_tokens // length)
    left = seconds - (time.perf_counter() - started)
    statistics, tokens = calibrate_within(left, model, rows_NT, runtime, batch_rows, config.run.seed)
    record = {
        "calibration_seconds": time.perf_counter() - started,
        "calibration_tokens": tokens,
        "calibration_text": quant.calibration_text,
        "calibration_seed": config.run.seed,
    }
    return RunCalibration(statistics, record)


def calibration_acts(files: Mapping[str, Any]) -> tuple[int, bool, str]:
    """Tokens that were calibrated on, the codes that this moved from the nearest, the matrices that it left in fp16."""
    moved, left = files["pruning"]["codes_not_nearest"], files["pruning"].get("matrices_fp16", 0)
    text = f"{moved} codes are not the nearest to their weights" + (f", {left} matrices are in fp16" if left else "")
    return files["pruning"]["calibration_tokens"], moved + left > 0, text


register_feature(
    Feature(
        "calibration", lambda config: config.quant.quantizer == "waterfill", "set quantizer=rtn",
        in_files=calibration_acts,
    )
)  # fmt: skip
