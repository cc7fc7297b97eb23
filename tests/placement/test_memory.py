"""The trainer's estimated memory against the allocations of a step on a CPU."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.lab import Lab, cpu_placement, make_lab

from minidistill.config import LoadedConfig
from minidistill.errors import UserError
from minidistill.models.registry import BUILT_IN
from minidistill.placement.attention import Layout
from minidistill.placement.devices import OTHER_RANKS
from minidistill.placement.machine import GIB, Machine
from minidistill.placement.memory import MicroBatchSize, trainer_memory
from minidistill.placement.model_shape import read_shape
from minidistill.placement.planner import load_models, plan

Configure = Callable[..., Any]
# the same rollouts are trained on twice
COMMON = ("--orchestrator.sampling.max_tokens", "24", "--trainer.loss.max_sampler_mismatch", "off")
SIZES = {
    "llama": {
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 10,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 32,
    },
    "qwen3": {
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
    },
}


def random_model(folder: Path, kind: str, dtype: torch.dtype) -> str:
    """A randomly initialized model of this architecture, with the shipped model's tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(BUILT_IN["tiny-sokoban"], folder)
    facts = json.loads((folder / "config.json").read_text())
    token_ids = {key: facts[key] for key in ("vocab_size", "eos_token_id", "pad_token_id")}
    config = AutoConfig.for_model(
        kind, **SIZES[kind], **token_ids, bos_token_id=None, tie_word_embeddings=True
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    return str(folder)


def measured(lab: Lab) -> int:
    """Peak bytes of live tensors in a training step, from the profiler's allocation events."""
    from torch.profiler import ProfilerActivity, profile

    lab.trainer.step(lab.rollouts, 1, lambda count: None)  # creates the optimizer's moments
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        lab.trainer.step(lab.rollouts, 2, lambda count: None)
    assert record.profiler is not None
    events = record.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    live = peak = 0
    for _, size in changes:
        live += size
        peak = max(peak, live)
    parameters = sum(p.nbytes for p in lab.policy.model.parameters())
    states = lab.trainer.optimizer.state().values()
    return parameters + sum(t.nbytes for t in states) + peak


def estimated(lab: Lab, loaded: LoadedConfig) -> dict[str, int]:
    """The estimate for the largest micro-batch of the lab's step."""
    sizes = []
    placement = cpu_placement(loaded)
    layout = lab.policy.attention.layout
    for rows in lab.trainer.micro_batches.passes(lab.rollouts, sharded=False):
        batch = [lab.rollouts[i] for i in rows]
        student = [r.student_length for r in batch]
        completions = sum(len(r.completion.token_ids) for r in batch)
        tokens = sum(student) if layout is Layout.PACKED else max(student) * len(batch)
        if layout is Layout.SHARED:
            tokens = completions + sum(map(len, {r.prompt.student_ids for r in batch}))
        sizes.append(MicroBatchSize(tokens, max(student), completions))
    largest = max(sizes, key=lambda size: size.tokens)
    shape = read_shape(lab.policy.config)
    itemsize = lab.policy.dtype.itemsize
    device = torch.device("cpu")
    return trainer_memory(loaded.config, placement, shape, largest, device, itemsize)


SLOW = pytest.mark.slow
CASES = [
    ("tiny-sokoban", torch.float32, ""),
    ("tiny-sokoban", torch.float32, "--trainer.micro_batch_tokens 1024"),
    ("tiny-sokoban", torch.float32, "--no-trainer.packing"),
    ("tiny-sokoban", torch.float32, "--trainer.packing --model.attn sdpa"),
    ("qwen3", torch.bfloat16, "--no-trainer.packing"),
    ("llama", torch.float32, ""),
    ("llama", torch.float32, "--trainer.model.lora.use_dora"),
    ("qwen3", torch.bfloat16, ""),
    ("qwen3", torch.bfloat16, "--trainer.model.ac"),
    ("qwen3", torch.bfloat16, "--trainer.model.lora.dtype base"),
    pytest.param("llama", torch.bfloat16, "--trainer.model.lora.dtype base", marks=SLOW),
    pytest.param("llama", torch.float32, "--trainer.model.ac", marks=SLOW),
    pytest.param("llama", torch.float32, "--trainer.model.ac.freq 2", marks=SLOW),
    pytest.param("llama", torch.bfloat16, "", marks=SLOW),
    pytest.param(
        "llama",
        torch.bfloat16,
        '--trainer.model.lora.target_modules ["q_proj","down_proj"]',
        marks=SLOW,
    ),
]


@pytest.mark.parametrize(("model", "dtype", "flags"), CASES)
def test_the_estimate_is_within_20_percent_of_the_measured_peak(
    configure: Configure, tmp_path: Path, model: str, dtype: torch.dtype, flags: str
) -> None:
    name = model if model in BUILT_IN else random_model(tmp_path / "model", model, dtype)
    dtype_name = str(dtype).removeprefix("torch.")
    loaded = configure(
        "--model.name", name, "--model.dtype", dtype_name, *COMMON, *flags.split(),
        "--orchestrator.batch_size", "16",
    )  # fmt: skip
    lab = make_lab(loaded)
    parts = estimated(lab, loaded)
    peak = measured(lab)
    # the profile must include the parts whose size is known exactly
    assert peak > sum(parts[name] for name in ("weights", "adapter", "gradients", "optimizer"))
    assert sum(parts.values()) == pytest.approx(peak, rel=0.2)


def test_the_estimates_of_weights_and_optimizer_are_exact(configure: Configure) -> None:
    loaded = configure(*COMMON)
    lab = make_lab(loaded)
    parts = estimated(lab, loaded)
    lab.trainer.step(lab.rollouts, 1, lambda count: None)
    trained = [p for _, p in lab.policy.parameters]
    total = sum(p.nbytes for p in lab.policy.model.parameters())
    moments = [t.nbytes for k, t in lab.trainer.optimizer.state().items() if "exp_avg" in k]
    assert parts["adapter"] == sum(p.nbytes for p in trained)
    assert parts["weights"] == total - parts["adapter"]
    assert parts["gradients"] == parts["adapter"]
    assert parts["optimizer"] == sum(moments)


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ("--no-trainer.model.lora", "reference copy"),
        ("--no-trainer.model.lora --model.dtype bfloat16", "reference copy"),
        ("--trainer.model.lora.dtype base --model.dtype bfloat16", "adapter"),
    ],
)
def test_the_estimate_of_a_moving_average_is_exact(
    configure: Configure, flags: str, part: str
) -> None:
    """In half precision there is one to compute with and one in fp32."""
    loaded = configure(*COMMON, "--orchestrator.teacher_model.update", "ema", *flags.split())
    lab = make_lab(loaded)
    lab.trainer.step(lab.rollouts, 1, lambda count: None)
    policy = lab.policy
    copies = [p for model in policy.reference_models.values() for p in model.parameters()]
    averages = [tensor for name, tensor in policy.state().items() if name.startswith("ema/")]
    assert {tensor.dtype for tensor in averages} == {torch.float32}
    held = {t.data_ptr(): t.nbytes for t in (*copies, *policy.adapter_parameters, *averages)}
    assert estimated(lab, loaded)[part] == sum(held.values())


def planned_on_a_cpu(config: Any) -> Any:
    """The planned memory of a CPU with 8 GiB."""
    machine = Machine(0, 8 * GIB, vllm=False, bf16=False)
    (device,) = plan(config, load_models(config), machine).devices
    return device


def test_the_memory_of_all_processes_on_a_cpu_is_counted(configure: Configure) -> None:
    """Each rank holds a trainer; each replica of an engine holds the weights and a cache."""
    small = ("--trainer.micro_batch_tokens", "256", "--trainer.world_size")
    one, two = (planned_on_a_cpu(configure(*small, n).config) for n in "12")
    training = one.phases["training"]
    ranks = sum(size for name, size in training.items() if name.startswith("trainer: "))
    assert two.phases["training"] == training | {OTHER_RANKS: ranks}
    flags = ("--inference.engine", "vllm", "--teacher_inference.share", "false")
    dp = "--inference.parallel.dp"
    single, double = (planned_on_a_cpu(configure(*flags, dp, n).config).phases for n in "12")
    weights = single["sampling"]["student: weights"]
    assert weights == 4 * 935_296
    for phase in ("sampling", "training"):
        for part in ("weights", "keys and values"):
            assert double[phase][f"student: {part}"] == 2 * single[phase][f"student: {part}"]
    with pytest.raises(UserError, match="3 processes do not divide"):
        planned_on_a_cpu(configure(*small, "3").config)
