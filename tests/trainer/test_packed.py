"""Packed copies of the weights: the same products, whatever the role and the adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.lab import Lab, make_lab
from support.packed_attention import PACKED, tiny_config, tiny_model, tiny_policy

from minidistill.placement.engine_memory import packed_copy
from minidistill.placement.machine import Machine
from minidistill.placement.model_shape import read_shape
from minidistill.trainer import packed
from minidistill.trainer.half_weights import HalfWeights, half_product
from minidistill.trainer.packed import can_pack, packed_weights
from minidistill.trainer.policy import Policy
from minidistill.types import Role

SMALL = ("--orchestrator.batch_size", "4", "--orchestrator.env.0.args.num_train_examples", "4")
ADAPTER = "--trainer.model.lora"
CASES: dict[str, tuple[str, ...]] = {
    "an average": ("--orchestrator.teacher_model.update", "ema"),
    "DoRA": (f"{ADAPTER}.use_dora",),
    "rsLoRA of some layers": (f"{ADAPTER}.use_rslora", f"{ADAPTER}.target_modules", '["v_proj"]'),
    "dropout": (f"{ADAPTER}.dropout", "0.5"),
    "all weights": ("--no-trainer.model.lora",),
}


def logits(policy: Policy, head: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    ids = torch.arange(3, 11)[:, None]
    return head(policy.body(input_ids=ids, use_cache=False).last_hidden_state[:, -1])


def round_weights(policy: Policy) -> None:
    """Make the weights those of a checkpoint that was published in bfloat16."""
    for model in (policy.student, *policy.reference_models.values()):
        for name, parameter in model.named_parameters():
            if "lora" not in name:
                parameter.copy_(parameter.bfloat16().float())


def own_forwards(policy: Policy) -> list[Any]:
    return [m for m in policy.causal.modules() if "forward" in vars(m)]


@torch.no_grad()
@pytest.mark.parametrize("published", ["float32", "bfloat16"])
@pytest.mark.parametrize("flags", CASES.values(), ids=CASES)
def test_the_products_are_the_same(
    configure: Any, flags: tuple[str, ...], published: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "MIN_PACKED", 0)  # the shipped model is small
    lab = make_lab(configure(*SMALL, *flags))
    policy, outputs = lab.policy, []
    if published == "bfloat16":
        round_weights(policy)
    for role in (Role.STUDENT, Role.TEACHER):
        with policy.inference(), policy.running_as(role):
            expected = logits(policy, policy.logits)
            halved = policy.half_weights.of(policy.causal.get_output_embeddings()) is not None
            trained = role is Role.STUDENT and flags[:1] == ("--no-trainer.model.lora",)
            assert halved == (published == "bfloat16" and not trained)
            with packed_weights(policy, 8) as head:
                packs = role is Role.TEACHER or not flags[-1].endswith("use_dora")
                assert bool(own_forwards(policy)) == packs
                torch.testing.assert_close(logits(policy, head), expected, rtol=0, atol=2e-5)
            assert not own_forwards(policy)
            outputs.append(expected)
    assert float((outputs[0] - outputs[1]).abs().max()) > 1e-3, "the roles are equal"


@torch.no_grad()
def test_copies_are_of_the_current_weights(configure: Any) -> None:
    lab: Lab = make_lab(configure(*SMALL))
    policy = lab.policy
    with packed_weights(policy, 8) as head:
        before = logits(policy, head)
    for _, parameter in policy.parameters:
        parameter.add_(0.05)
    now = logits(policy, policy.logits)
    with packed_weights(policy, 8) as head:
        torch.testing.assert_close(logits(policy, head), now, rtol=0, atol=2e-5)
    assert float((now - before).abs().max()) > 1e-2


@torch.no_grad()
def test_float16_takes_only_weights_that_it_holds() -> None:
    layer = torch.nn.Linear(96, 64).requires_grad_(False)
    halves = HalfWeights()
    assert halves.of(layer) is None, "float32 has more digits"
    layer.weight.copy_(layer.weight.bfloat16().float())
    states = torch.randn(3, 5, 96)
    expected = layer.double()(states.double())
    layer.float()
    output = half_product(states, halves.of(layer))
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-6)
    layer.weight.mul_(-2)
    expected = 3 * layer.bias - 2 * expected.float()
    torch.testing.assert_close(
        half_product(states, halves.of(layer)), expected, rtol=1e-4, atol=1e-5
    )
    assert halves.of(layer) is halves.of(layer), "copied once"
    for value in (1e5, float("nan"), float("inf")):
        layer.weight[1, 2] = value
        assert halves.of(layer) is None, value
    layer.weight[1, 2] = 0.5
    assert halves.of(layer) is not None
    assert halves.of(layer.requires_grad_()) is None, "it will change"
    assert halves.of(layer.requires_grad_(False).bfloat16()) is None


def test_an_error_leaves_the_model_as_it_was(configure: Any) -> None:
    policy = make_lab(configure(*SMALL)).policy

    def fail() -> None:
        with packed_weights(policy, 8):
            assert own_forwards(policy)
            raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        fail()
    assert not own_forwards(policy)


def test_what_is_not_packed() -> None:
    half = tiny_policy(tiny_model(tiny_config("llama"), "varlen", torch.bfloat16), PACKED)
    single = tiny_policy(tiny_model(tiny_config("llama"), "varlen", torch.float32), PACKED)
    assert can_pack(single, 20)
    assert not can_pack(single, 2), "a copy for few passes"
    assert not can_pack(half, 20), "16 bit would lose the adapter"
    assert not can_pack(replace(single, device=torch.device("cuda", 0)), 20)


@pytest.mark.parametrize("tied", [True, False])
def test_a_copy_takes_an_eighth_of_the_memory_at_most(
    tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan counts what the engine makes."""
    config = tiny_config("llama", tie_word_embeddings=tied)
    policy = tiny_policy(tiny_model(config, "varlen", torch.float32), PACKED)
    layers, head = policy.model.model.layers.parameters(), policy.model.lm_head.weight
    size = sum(p.nbytes for p in layers if p.dim() == 2) + head.nbytes
    for memory, makes in ((8 * size, True), (8 * size - 8, False)):
        machine = Machine(gpus=0, bytes=memory, vllm=False, bf16=False)
        monkeypatch.setattr(Machine, "local", lambda machine=machine: machine)
        assert can_pack(policy, 20) == makes
        assert packed_copy(read_shape(config), 4, memory) == (size if makes else 0)
    assert packed_copy(read_shape(config), 2, 8 * size) == 0
