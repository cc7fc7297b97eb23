"""A base in 4 bit: what a GPU runs, and what is refused before a run starts.

Without a GPU the runs are planned for one, and an unquantized one is run on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.gpus import DEVICE, REHEARSED
from support.paths import SOKOBAN
from support.plain_forward import completion_logprobs
from support.runs import plan_on_gpus, records, run_on_gpus

from minidistill.config import LoadedConfig, load_config
from minidistill.errors import EXIT_ENVIRONMENT, EXIT_OK, UserError
from minidistill.models.hub import load_tokenizer
from minidistill.models.registry import resolve
from minidistill.placement.machine import GIB, Machine
from minidistill.placement.model_shape import read_shape
from minidistill.placement.planner import plan_run
from minidistill.trainer import checkpoint
from minidistill.trainer.loading import four_bit, load_policy
from minidistill.types import Role

Configure = Callable[..., LoadedConfig]
DORA = ("--trainer.model.lora.use_dora",)
NF4 = ("--model.quantization", "nf4")
GPU = Machine(1, 24 * GIB, vllm=True, bf16=True, bitsandbytes=True)


@pytest.mark.parametrize(
    ("machine", "what"),
    [
        (replace(GPU, gpus=0, vllm=False), "runs on NVIDIA GPUs only, and there is none"),
        (replace(GPU, bitsandbytes=False), "needs the package bitsandbytes"),
    ],
)
def test_a_machine_that_cannot_run_it(configure: Configure, machine: Machine, what: str) -> None:
    with pytest.raises(UserError, match=what) as caught:
        plan_run(configure(*NF4), machine)
    assert (caught.value.exit_code, caught.value.where) == (EXIT_ENVIRONMENT, "model.quantization")


def test_the_plan_counts_4_bit_weights_and_samples_in_the_trainer(configure: Configure) -> None:
    plain = plan_run(configure("--inference.engine", "embedded"), GPU)
    plan = plan_run(configure(*NF4), GPU)
    assert plan.placement.student.in_trainer
    assert any("4-bit" in warning for warning in plan.warnings)
    (before,), (after,) = plain.devices, plan.devices
    linears = 4 * (4 * 128 * 128 + 3 * 128 * 384)
    saved = 2 * linears - linears * (4 + 8 / 64 + 32 / (64 * 256)) / 8
    weights = "trainer: weights"
    difference = before.phases["training"][weights] - after.phases["training"][weights]
    assert difference == pytest.approx(saved, abs=1)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [(), DORA], ids=["LoRA", "DoRA"])
def test_a_run_on_a_4_bit_base(tmp_path: Path, kind: tuple[str, ...]) -> None:
    """The teacher's KL falls, and the sampler's log-probs are the trainer's."""
    needs_bitsandbytes()
    flags = (
        "--max_steps", "6", "--no-orchestrator.eval", "--trainer.scheduler.warmup_steps", "0",
        "--no-orchestrator.teacher_model.eval_baseline", "--orchestrator.batch_size", "16",
        "--orchestrator.env.0.args.num_train_examples", "16", *kind,
    )  # fmt: skip
    if REHEARSED:
        plan_on_gpus(*flags, *NF4)
    embedded = ("--inference.engine", "embedded", "--max_steps", "2")
    assert run_on_gpus(tmp_path / "run", (*flags, *NF4), (*flags, *embedded)) == EXIT_OK
    steps = [r for r in records(tmp_path / "run") if "teacher_kl" in r]
    assert steps[-1]["teacher_kl"] < steps[0]["teacher_kl"]
    assert all(r["kl/sampler_mismatch"] < 0.01 for r in steps)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [(), DORA], ids=["LoRA", "DoRA"])
def test_a_4_bit_policy_is_transformers_and_pefts(tmp_path: Path, kind: tuple[str, ...]) -> None:
    """Both roles run on the same 4-bit weights, which take the memory that was planned."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    needs_bitsandbytes()
    flags = ("--inference.engine", "embedded", "--model.dtype", "float32", *kind)
    config = load_config([SOKOBAN, *flags, *(() if REHEARSED else NF4)]).config
    placement = plan_run(load_config([SOKOBAN, *flags]), Machine.local()).placement
    policy = load_policy(config, load_tokenizer(config), placement, DEVICE)
    with torch.no_grad():
        for name, parameter in policy.parameters:
            if "lora_B" in name:
                parameter.normal_(std=0.03)
            elif "magnitude" in name:  # the norms of the rows of a weight
                parameter.mul_(1.1)
    folder = checkpoint.save_model(policy, tmp_path)
    arguments = {} if REHEARSED else {"quantization_config": four_bit(torch.float32)}
    base = AutoModelForCausalLM.from_pretrained(
        resolve("tiny-sokoban"), dtype=torch.float32, device_map={"": DEVICE}, **arguments
    ).eval()
    held = sum(p.nbytes for n, p in policy.model.named_parameters() if ".lora_" not in n)
    planned = read_shape(policy.config).weight_bytes(4, config.model.quantization)
    assert held == pytest.approx(planned, rel=0.05)  # the scales are no parameters
    prompt, completion = tuple(range(5, 40)), tuple(range(60, 80))
    with policy.running_as(Role.TEACHER):
        teacher = completion_logprobs(policy.causal, prompt, completion)
    student = completion_logprobs(policy.student, prompt, completion)
    assert torch.allclose(teacher, completion_logprobs(base, prompt, completion), atol=1e-3)
    loaded = PeftModel.from_pretrained(base, folder).eval()
    assert torch.allclose(student, completion_logprobs(loaded, prompt, completion), atol=1e-3)
    assert not torch.allclose(student, teacher, atol=1e-2)


def needs_bitsandbytes() -> None:
    """Skip on a GPU without the package. Without a GPU nothing is quantized."""
    if not REHEARSED:
        pytest.importorskip("bitsandbytes", reason="needs bitsandbytes, which is not installed")
