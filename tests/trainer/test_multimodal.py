"""Multimodal models, which are trained for text alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.lab import cpu_placement
from support.plain_forward import completion_logprobs
from support.tiny_models import build
from support.tiny_runs import train, write_config
from support.verification import load_float64

from minidistill.config import LoadedConfig, load_config
from minidistill.errors import EXIT_OK, UserError
from minidistill.models.auto import decoder_layers, skeleton
from minidistill.models.hub import load_tokenizer
from minidistill.placement.machine import GIB, Machine
from minidistill.placement.planner import plan_run
from minidistill.trainer import checkpoint
from minidistill.trainer.loading import load_policy
from minidistill.trainer.policy import Policy

NAMES = ["gemma3_vision", "qwen2_5_vl", "mistral3"]
EVERY_WEIGHT = ("--no-trainer.model.lora",)
TEXT = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def configured(folder: Path, name: str, *flags: str) -> tuple[LoadedConfig, Path]:
    model = build(name, folder)
    return load_config([write_config(folder, model), *flags]), model


def load(loaded: LoadedConfig) -> Policy:
    return load_policy(loaded.config, load_tokenizer(loaded.config), cpu_placement(loaded))


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_adapter_is_the_language_models_alone(name: str, tmp_path: Path) -> None:
    """Plain peft puts it on the same layers, and computes the same."""
    from peft import PeftModel

    loaded, model = configured(tmp_path, name)
    policy = load(loaded)
    generator = torch.Generator().manual_seed(0)
    for _, parameter in policy.parameters:
        parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    folder = checkpoint.save_model(policy, tmp_path)
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert set(settings["target_modules"]) == TEXT
    tensors = load_file(folder / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * len(TEXT)
    assert not any("vision" in tensor or "visual" in tensor for tensor in tensors)
    prompt, completion = tuple(range(5, 30)), tuple(range(60, 80))
    ours = completion_logprobs(policy.student, prompt, completion)
    base = load_float64(model).float()
    before = completion_logprobs(base, prompt, completion)
    theirs = completion_logprobs(PeftModel.from_pretrained(base, folder).eval(), prompt, completion)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    assert (ours - before).abs().max() > 0.1


@pytest.mark.parametrize("name", NAMES)
def test_the_plan_counts_what_is_trained(name: str, tmp_path: Path) -> None:
    loaded, _ = configured(tmp_path, name, *EVERY_WEIGHT)
    policy = load(loaded)
    trained = sum(p.numel() for _, p in policy.parameters)
    held = sum(p.numel() for p in policy.model.parameters())
    plan = plan_run(loaded, Machine(gpus=0, bytes=16 * GIB, vllm=False, bf16=False))
    assert (plan.shape.text, plan.shape.parameters) == (trained, held)
    assert trained < held
    parts = plan.devices[0].phases["training"]
    assert parts["trainer: weights"] == 4 * held
    assert parts["trainer: gradients"] == 4 * trained
    assert parts["trainer: optimizer"] == 8 * trained
    head = policy.head_VH.numel()
    layers = sum(p.numel() for p in policy.model.get_decoder().parameters()) - head
    assert plan.shape.body == layers
    work, completions = plan.work["train"], 6 * 6  # rollouts of 6 tokens
    assert work.flops == 6 * layers * work.tokens + 4 * head * completions


def test_no_other_weight_is_trained(tmp_path: Path) -> None:
    """In a run on two ranks, which shard what is trained and what is not."""
    model = build("gemma3_vision", tmp_path)
    flags = (*EVERY_WEIGHT, "--trainer.world_size", "2", "--max_steps", "1")
    assert train(tmp_path, model, *flags) == EXIT_OK
    before = load_file(model / "model.safetensors")
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("language_model.")}


def test_the_layers_of_a_decoder(tmp_path: Path) -> None:
    """Neither a deeper vision tower's nor the experts of a layer."""
    from transformers import AutoConfig

    settings = AutoConfig.from_pretrained(build("gemma3_vision", tmp_path))
    settings.vision_config.num_hidden_layers = 5
    layers = decoder_layers(skeleton(settings))
    assert [type(layer).__name__ for layer in layers] == ["Gemma3DecoderLayer"] * 2
    experts = skeleton(AutoConfig.from_pretrained(build("llama", tmp_path)))
    for layer in experts.model.layers:
        layer.mlp.experts = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(9))
    assert decoder_layers(experts) == list(experts.model.layers)


def test_a_model_without_a_list_of_layers(tmp_path: Path) -> None:
    from transformers import AutoConfig

    model: Any = skeleton(AutoConfig.from_pretrained(build("llama", tmp_path)))
    model.model.layers = torch.nn.Sequential(*model.model.layers)
    with pytest.raises(UserError, match="the layers of LlamaForCausalLM are not in a list"):
        decoder_layers(model)
