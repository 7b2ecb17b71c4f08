"""Fused forms of the network equal the plain ones, and their kernels compile for an H100. Needs no GPU."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from golf.config.config import build_config
from golf.config.knobs import ConfigError
from golf.model.fused import CappedLoss, fused_places, install_fused
from golf.model.gpt import GPT
from golf.runtime import check_kernels

needs_triton = pytest.mark.skipif(not find_spec("triton"), reason="triton is not installed")


def interpret(repository: Path, *words: str) -> subprocess.CompletedProcess:
    paths = f"{repository}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    command = [sys.executable, "tests/interpret_network_kernels.py", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=repository, env=environment)


@needs_triton
def test_kernels_and_their_gradients_equal_the_plain_forms(repository):
    finished = interpret(repository)
    assert finished.returncode == 0 and finished.stdout == "20 agree\n", finished.stderr


@needs_triton
@pytest.mark.parametrize("kernel", ["activated_product", "exclusive_heads"])
def test_a_wrong_gradient_is_found(repository, kernel):
    """Planted: a third of a kernel's gradients are a twentieth too large."""
    finished = interpret(repository, kernel)
    assert finished.returncode == 1 and f"AssertionError: {kernel}: " in finished.stderr


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize(("rows", "columns", "cap"), [(5, 64, 30.0), (3, 1001, 15.0), (1, 3, 2.0), (7, 97, 40.0)])
def test_the_loss_in_closed_form(dtype, most, rows, columns, cap):
    """Differences are shares of the largest value; in bf16 logits are rounded before they are capped."""
    generator = torch.Generator().manual_seed(rows)
    x_ND, head_VD = (torch.randn(size, 16, generator=generator) for size in (rows, columns))
    target_N, weight_N = torch.randint(columns, (rows,), generator=generator), torch.rand(rows, generator=generator)
    given = [part.to(dtype).requires_grad_() for part in (x_ND, head_VD)]
    exact = [part.detach().double().requires_grad_() for part in given]
    capped_NV = cap * torch.tanh(exact[0] @ exact[1].T / cap)
    wanted_N = F.cross_entropy(capped_NV, target_N, reduction="none")
    found_N = CappedLoss.apply(*given, target_N, cap)
    assert found_N.dtype == torch.float32
    (found_N * weight_N).sum().backward(), (wanted_N * weight_N).sum().backward()
    pairs = [(found_N, wanted_N), *((one.grad, other.grad) for one, other in zip(given, exact, strict=True))]
    assert all((one.double() - other).abs().max() <= most * other.abs().max() for one, other in pairs)


def test_the_loss_stands_logits_far_beyond_the_cap():
    x_ND, head_VD = torch.full((1, 4), 100.0, requires_grad=True), torch.cat((torch.ones(1, 4), -torch.ones(6, 4)))
    losses = [CappedLoss.apply(x_ND, head_VD, torch.tensor([target]), 40.0) for target in (0, 1)]
    assert losses[0].item() == pytest.approx(0.0, abs=1e-5) and losses[1].item() == pytest.approx(80.0)
    losses[1].backward()
    assert x_ND.grad.isfinite().all()


@pytest.mark.parametrize(
    ("knobs", "parts"),
    [
        ({}, {"token_losses": 1, "forward": 11, "finish": 11}),
        ({"mlp_activation": "relu2"}, {"token_losses": 1, "forward": 11, "finish": 11}),
        ({"mlp_activation": "tanh"}, {"token_losses": 1, "finish": 11}),
        ({"act_hidden": "int8"}, {"token_losses": 1, "finish": 11}),
        ({"attention_gate_dims": "0"}, {"token_losses": 1, "forward": 11}),
        ({"logit_softcap": "50"}, {"forward": 11, "finish": 11}),
    ],
)
def test_only_parts_that_have_a_fused_form_are_replaced(knobs, parts):
    with torch.device("meta"):
        model = GPT(build_config("frontier-base", {}, knobs).model)
    places = [name for _, name, _ in fused_places(model)]
    assert {name: places.count(name) for name in places} == parts
    names = set(model.state_dict())
    install_fused(model)
    assert set(model.state_dict()) == names


def test_kernels_that_cannot_run_are_refused(monkeypatch):
    check_kernels("auto", torch.device("cpu"))
    with pytest.raises(ConfigError, match="on CUDA alone.*set kernels=off"):
        check_kernels("on", torch.device("cpu"))
    check_kernels("on", torch.device("cuda")) if find_spec("triton") else None
    monkeypatch.setattr("golf.runtime.find_spec", lambda name: None)
    for wanted in ("on", "auto"):
        with pytest.raises(ConfigError, match=f"kernels={wanted}: .*triton.* set kernels=off"):
            check_kernels(wanted, torch.device("cuda"))


def test_a_run_that_asks_for_kernels_on_a_cpu_ends_before_it_starts(repository, tmp_path):
    command = [sys.executable, "train_gpt.py", "--preset", "local", "kernels=on", f"runs_root={tmp_path}/runs"]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=repository, timeout=300)
    assert finished.returncode == 2 and finished.stderr.count("\n") == 1 and "set kernels=off" in finished.stderr


MACHINE_CODE = """
import linecache
from lab.machine.fake_gpu import pretend
pretend()
import torch
import golf.model.kernels as module
from lab.bundle.packer import minify_source
from lab.machine.machine_code import launched_codes

def empty(*shape):
    return torch.empty(shape, dtype=torch.bfloat16)

def codes():
    found = []
    for rows, width, hidden in ((256, 512, 2048), (200, 128, 320)):
        for slope in (0.0, 0.5):
            x, up, h = empty(rows, width), empty(hidden, width), empty(rows, hidden)
            found += launched_codes(lambda: module.mlp_hidden._init_fn(x, up, slope))
            found += launched_codes(lambda: module.mlp_hidden_gradient._init_fn(x, empty(width, hidden), h, slope))
    for heads, groups, width in ((8, 4, 64), (6, 6, 128), (8, 2, 32)):
        y, v, gates = empty(64, heads, width), empty(64, groups, width), empty(64, heads)
        found += launched_codes(lambda: module.exclusive_heads._init_fn(y, v, gates))
        found += launched_codes(lambda: module.exclusive_heads_gradient._init_fn(y, y, v, gates))
    return found

found = codes()
assert len(found) == 14 and all(code.opcodes for code in found)
assert [(code.name, code.spills, code.shared_bytes) for code in found if code.spills or code.shared_bytes > 227e3] == []
products = [code for code in found if code.name == "activated_product_kernel"]
assert all(any(opcode.startswith("HGMMA") for opcode in code.opcodes) for code in products), "no tensor cores"
assert all(2 * code.shared_bytes <= 227e3 for code in products), "an SM holds only one program"
packed = minify_source(open(module.__file__).read())  # the kernels as they ship
linecache.cache["packed"] = len(packed), None, packed.splitlines(True), "packed"
names = {}
exec(compile(packed.replace("golf::", "packed::"), "packed", "exec"), names)
module.activated_product_kernel, module.exclusive_heads_kernel = (
    names[name] for name in ("activated_product_kernel", "exclusive_heads_kernel")
)
assert [code.opcodes for code in codes()] == [code.opcodes for code in found]
"""


@needs_triton
@pytest.mark.slow
def test_no_kernel_spills_a_register_or_differs_when_packed(repository):
    finished = subprocess.run([sys.executable, "-c", MACHINE_CODE], capture_output=True, text=True, cwd=repository)
    assert finished.returncode == 0, finished.stderr
