"""The package's interface: imports, backends, README examples, invalid arguments, compile."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.ops_cases import INTERPRETED, make_case

import minidistill_kernels
from minidistill_kernels import (
    backend,
    linear_distill,
    linear_logprob,
    linear_reverse_kl,
    reverse_kl,
    selective_logprob,
)

PACKAGE = Path(minidistill_kernels.__file__).parent


def run_python(code, **environment):
    """Run code in a subprocess, without the variables that choose a backend unless given."""
    env = {
        k: v for k, v in os.environ.items() if k not in ("MINIDISTILL_KERNELS", "TRITON_INTERPRET")
    }
    env |= {"PYTHONPATH": str(PACKAGE.parent), **environment}
    return subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
    )


def test_import_is_light_and_self_contained():
    """Importing the package does not import triton. (An op's first call does, in torch.)"""
    done = run_python(
        "import sys, minidistill_kernels as m\n"
        "assert sorted(m.__all__) == m.__all__ and all(hasattr(m, n) for n in m.__all__)\n"
        "print([n for n in ('triton', 'minidistill') if n in sys.modules])"
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_one_variable_runs_the_triton_kernels_on_a_cpu():
    done = run_python(
        "import sys, torch, minidistill_kernels as m\n"
        "print(m.selective_logprob(torch.ones(1, 8), torch.tensor([3]))[0])\n"
        "from minidistill_kernels.triton_rows import stats_kernel\n"
        "print(type(stats_kernel).__name__)",
        MINIDISTILL_KERNELS="interpret",
    )
    assert "-2.079" in done.stdout, done.stderr
    assert "InterpretedFunction" in done.stdout


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("cuda", "expected one of torch, triton, interpret"),
        ("triton", "needs CUDA tensors, got cpu"),
        ("interpret", "before triton is imported"),
    ],
)
def test_an_unusable_backend_is_an_error(choice, message, monkeypatch):
    monkeypatch.setenv("MINIDISTILL_KERNELS", choice)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=message):
        selective_logprob(torch.ones(1, 8), torch.tensor([3]))


def test_the_choice_of_a_backend(monkeypatch):
    monkeypatch.setenv("MINIDISTILL_KERNELS", "torch")
    assert backend.backend_for(torch.device("cuda")) == "torch"
    monkeypatch.delenv("MINIDISTILL_KERNELS")
    assert backend.backend_for(torch.device("cuda")) == "triton"
    assert backend.backend_for(torch.device("cpu")) == "torch"


def test_the_readmes_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", (PACKAGE / "README.md").read_text(), re.S)
    assert len(blocks) == 3
    for block in blocks:
        exec(block, {})


def drop_all_rows(case):
    case["h_s"], case["ids"] = case["h_s"][:0], case["ids"][:0]


INVALID_TENSORS = {
    "h_s_NH: dtype torch.float64": lambda c: c.update(h_s=c["h_s"].double()),
    "weight_VH: dtype torch.bfloat16, but h_s_NH is torch.float32": lambda c: c.update(
        weight=c["weight"].bfloat16()
    ),
    "weight_VH: on meta, but h_s_NH is on cpu": lambda c: c.update(weight=c["weight"].to("meta")),
    "weight_VH: width 7, but h_s_NH has 8": lambda c: c.update(weight=c["weight"][:, :7]),
    "weight_VH: last dimension is not contiguous": lambda c: c.update(
        weight=c["weight"].t().contiguous().t()
    ),
    "h_s_NH: shape \\(0, 8\\) has no rows": drop_all_rows,
    "h_s_NH: expected 2 dimensions": lambda c: c.update(h_s=c["h_s"][None]),
    "h_s_NH: last dimension is not contiguous": lambda c: c.update(h_s=torch.randn(4, 16)[:, ::2]),
    "h_t_NH: 3 rows, but h_s_NH has 4": lambda c: c.update(h_t=c["h_t"][:3]),
    "ids: 20 is outside the vocabulary of 20": lambda c: c["ids"].__setitem__(2, 20),
    "ids: -1 is outside": lambda c: c["ids"].__setitem__(2, -1),
    "ids_N: dtype torch.float32": lambda c: c.update(ids=c["ids"].float()),
    "ids_N: shape \\(3,\\), expected \\(4,\\)": lambda c: c.update(ids=c["ids"][:3]),
    "advantage_N: shape \\(2,\\)": lambda c: c.update(advantage=c["advantage"][:2]),
    "valid: dtype torch.int64": lambda c: c.update(valid=torch.ones(4, dtype=torch.int64)),
}


@pytest.mark.parametrize("message", INVALID_TENSORS)
def test_invalid_tensors_are_named(message):
    case = make_case(4, 20, 8)
    case["valid"] = None
    INVALID_TENSORS[message](case)
    with pytest.raises(ValueError, match=message):
        linear_distill(
            case["h_s"],
            case["weight"],
            case["ids"],
            h_t_NH=case["h_t"],
            advantage_N=case["advantage"],
            valid=case["valid"],
        )


INVALID_OPTIONS = {
    "estimator: 'exact'": {"estimator": "exact"},
    "h_t_NH: estimator 'full' needs": {"h_t_NH": None},
    "teacher_logp_N: estimator 'sampled' needs": {"h_t_NH": None, "estimator": "sampled"},
    "topk_ids_NK: estimator 'top_k' needs": {"h_t_NH": None, "estimator": "top_k"},
    "teacher_logp_N: given as well": {"teacher_logp_N": torch.zeros(4)},
    "teacher_topk_logp_NK: topk_ids_NK and": {"topk_ids_NK": torch.zeros(4, 2).long()},
    "temperature: 0": {"temperature": 0.0},
    "kl_clip: -1": {"kl_clip": -1.0},
    "teacher_tau: nan": {"teacher_tau": float("nan")},
    "token_mask_low: 9": {"token_mask_low": 9.0},
    "top_k: 0": {"top_k": 0},
    "chunk: 0": {"chunk": 0},
}


@pytest.mark.parametrize("message", INVALID_OPTIONS)
def test_invalid_options_are_named(message):
    case = make_case(4, 20, 8)
    options = {"h_t_NH": case["h_t"], **INVALID_OPTIONS[message]}
    with pytest.raises(ValueError, match=message):
        linear_distill(case["h_s"], case["weight"], case["ids"], **options)


def test_top_k_ids_out_of_range_are_named():
    case = make_case(4, 20, 8)
    with pytest.raises(ValueError, match="topk_ids_NK: an id is outside"):
        linear_distill(
            case["h_s"],
            case["weight"],
            case["ids"],
            estimator="top_k",
            topk_ids_NK=torch.full((4, 2), 20),
            teacher_topk_logp_NK=torch.zeros(4, 2),
        )


def test_the_other_functions_name_invalid_arguments():
    case = make_case(4, 20, 8)
    logits, ids = torch.randn(4, 20), case["ids"]
    checks = [
        ("logits: last dimension", lambda: selective_logprob(logits.t(), ids.repeat(5))),
        ("ids: 20 is outside", lambda: selective_logprob(logits, torch.tensor([0, 20, 0, 0]))),
        ("weight: requires a gradient", lambda: linear_logprob(
            case["h_s"], case["weight"].clone().requires_grad_(), case["ids"])),
        ("teacher_weight: requires a gradient", lambda: linear_distill(
            case["h_s"], case["weight"], case["ids"], h_t_NH=case["h_t"],
            teacher_weight=case["teacher_head"].clone().requires_grad_())),
        ("t_logits: requires", lambda: reverse_kl(logits, logits.clone().requires_grad_())),
        ("t_logits: shape", lambda: reverse_kl(logits, logits[:, :19].contiguous())),
        ("t_logits: dtype", lambda: reverse_kl(logits, logits.half())),
        ("h_t: requires", lambda: linear_reverse_kl(
            case["h_s"], case["h_t"].requires_grad_(), case["weight"])),
        ("hidden: dtype", lambda: linear_logprob(case["h_s"].long(), case["weight"], ids)),
        ("weight: requires", lambda: linear_logprob(
            case["h_s"], torch.nn.Parameter(case["weight"]), ids)),
    ]  # fmt: skip
    for message, call in checks:
        with pytest.raises(ValueError, match=message):
            call()


def test_a_trainable_head_may_score_without_gradients():
    case = make_case(4, 20, 8)
    with torch.no_grad():
        linear_logprob(case["h_s"], torch.nn.Parameter(case["weight"]), case["ids"])


def test_a_distributed_tensor_is_refused(tmp_path):
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    case = make_case(4, 20, 8)
    init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        weight = distribute_tensor(case["weight"], mesh, [Replicate()])
        with pytest.raises(ValueError, match="weight: is a DTensor"):
            linear_logprob(case["h_s"], weight, case["ids"])
    finally:
        destroy_process_group()


@pytest.mark.skipif(INTERPRETED, reason="the graph does not depend on the backend")
def test_no_graph_break_under_compile():
    case = make_case(6, 40, 8)

    def loss(hidden):
        out = linear_distill(hidden, case["weight"], case["ids"], h_t_NH=case["h_t"])
        logp, _ = linear_logprob(hidden, case["weight"], case["ids"])
        kl = linear_reverse_kl(hidden, case["h_t"], case["weight"])
        return (out.loss + logp + kl).sum()

    plain, compiled = (case["h_s"].clone().requires_grad_() for _ in range(2))
    loss(plain).backward()
    torch.compile(loss, backend="aot_eager", fullgraph=True)(compiled).backward()
    assert torch.allclose(plain.grad, compiled.grad)
