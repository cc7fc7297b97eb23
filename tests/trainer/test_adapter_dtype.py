"""Adapters in the base's dtype: fp32 where it counts, and nowhere else."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.lab import NO_MISMATCH_LIMIT, SMALL_STEP, Lab, make_lab
from support.ranks import TWO_RANKS, ranked_lab, train
from support.runs import board, records, run

from minidistill.driver.model_checks import check_model
from minidistill.errors import EXIT_ENVIRONMENT, EXIT_OK, UserError
from minidistill.placement.machine import GIB, Machine
from minidistill.placement.placement import place
from minidistill.placement.planner import load_models
from minidistill.trainer import checkpoint
from minidistill.trainer.batching import Tokens, collate
from minidistill.trainer.forward import hidden_states
from minidistill.trainer.policy import Weights
from minidistill.trainer.token_budget import TokenBudget
from minidistill.types import Role

BF16 = ("--model.dtype", "bfloat16", *NO_MISMATCH_LIMIT)
BASE = (*BF16, "--trainer.model.lora.dtype", "base")
EMA = ("--orchestrator.teacher_model.update", "ema")
Configure = Callable[..., Any]


@pytest.mark.parametrize(
    ("gpus", "flags", "expected"),
    [
        (0, (), "float32"),
        (0, ("--model.dtype", "bfloat16"), "float32"),
        (0, ("--model.dtype", "bfloat16", "--trainer.model.lora.dtype", "base"), "bfloat16"),
        (1, (), "bfloat16"),
        (1, ("--model.dtype", "float32"), "float32"),
        (1, ("--model.dtype", "float16"), "float32"),
        (1, ("--model.dtype", "float16", "--trainer.model.lora.dtype", "base"), "float16"),
        (1, ("--trainer.model.lora.dtype", "float32"), "float32"),
        (1, ("--no-trainer.model.lora",), None),
    ],
)
def test_which_dtype(
    configure: Configure, gpus: int, flags: tuple[str, ...], expected: str | None
) -> None:
    config = configure(*flags).config
    machine = Machine(gpus, 24 * GIB, vllm=False, bf16=gpus > 0)
    assert place(config, load_models(config), machine).adapter_dtype == expected


def tokens_of(lab: Lab) -> Tokens:
    """The student's view of the lab's rollouts."""
    prompts = [r.prompt.student_ids for r in lab.rollouts]
    completions = [r.completion.token_ids for r in lab.rollouts]
    return collate(prompts, completions, pad_id=lab.policy.pad_id)


def saved_bytes(lab: Lab) -> int:
    """Bytes that a forward pass of the student saves for its backward pass."""
    storages: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in lab.policy.model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = tokens_of(lab)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        kept = hidden_states(lab.policy, tokens)
    assert kept.requires_grad
    return sum(storages.values())


def test_no_fp32_copies_of_the_activations_are_saved(configure: Configure) -> None:
    wide = saved_bytes(make_lab(configure(*SMALL_STEP, *BF16)))
    narrow = saved_bytes(make_lab(configure(*SMALL_STEP, *BASE)))
    assert narrow < 0.65 * wide, (narrow, wide)


@pytest.mark.parametrize(
    "flags",
    [(), EMA, ("--trainer.model.lora.dropout", "0.1", "--trainer.model.ac.freq", "1")],
    ids=["frozen", "ema", "dropout, recomputed"],
)
def test_the_optimizer_holds_fp32_weights(configure: Configure, flags: tuple[str, ...]) -> None:
    lab = make_lab(configure(*SMALL_STEP, *BASE, *flags), trained=False)
    first = dict(lab.policy.parameters)
    assert {p.dtype for p in lab.policy.adapter_parameters} == {torch.bfloat16}
    before = {n: p.clone() for n, p in first.items()}
    metrics = train(lab, 3)
    assert all(m["optim/grad_norm"] > 0 for m in metrics)
    masters = lab.trainer.optimizer.masters
    assert {m.dtype for m in masters.values()} == {torch.float32}
    for name, parameter in lab.policy.parameters:
        assert torch.equal(parameter, masters[name].bfloat16()), "it computes with the rounded copy"
    assert any(not torch.equal(p, before[n]) for n, p in lab.policy.parameters)
    assert any(not torch.equal(m, m.bfloat16().float()) for m in masters.values())


def test_roles_run_with_their_weights(configure: Configure) -> None:
    untrained = make_lab(configure(*SMALL_STEP, *BASE), trained=False)
    check_model(untrained.policy, [r.prompt for r in untrained.rollouts], TokenBudget(4096))
    lab = make_lab(configure(*SMALL_STEP, *BASE, *EMA))
    tokens = tokens_of(lab)
    outputs = {}
    with torch.no_grad():
        for role in (Role.STUDENT, Role.TEACHER, Role.BASE):
            with lab.policy.running_as(role):
                outputs[role] = hidden_states(lab.policy, tokens)
    # the student's weights were changed after the average was taken, when both were the base's
    assert torch.equal(outputs[Role.TEACHER], outputs[Role.BASE])
    assert not torch.equal(outputs[Role.STUDENT], outputs[Role.BASE])
    assert {o.dtype for o in outputs.values()} == {torch.bfloat16}


def test_an_averaged_adapter_keeps_small_updates(configure: Configure) -> None:
    """Steps of 1e-4 on an average of 0.5 are below bfloat16's resolution."""
    lab = make_lab(configure(*SMALL_STEP, *BASE, *EMA), trained=False)
    policy = lab.policy
    state = {k: torch.full_like(v, 0.5) for k, v in policy.state().items() if k.startswith("ema/")}
    assert {v.dtype for v in state.values()} == {torch.float32}
    policy.load_state(state.items())
    for _, parameter in policy.parameters:
        parameter.data.fill_(1.0)
    for _ in range(200):
        policy.update_ema(0.9998)
    expected = 1 - 0.5 * 0.9998**200
    averages = [v for k, v in policy.state().items() if k.startswith("ema/")]
    for average in averages:
        torch.testing.assert_close(average, torch.full_like(average, expected))
    for _, tensor in policy.adapter(Weights.EMA):
        assert torch.equal(tensor, torch.full_like(tensor, expected)), "rounded once"


@pytest.mark.parametrize(
    "flags",
    [BASE, (*BASE, *EMA, "--trainer.shard"), (*BF16, "--no-trainer.model.lora")],
    ids=["lora, replicated", "lora, sharded", "full, sharded"],
)
def test_two_ranks_train_as_one(configure: Configure, flags: tuple[str, ...]) -> None:
    """Up to bfloat16's rounding of one pass: many passes add up in fp32 on each rank."""
    small = (*SMALL_STEP, "--trainer.micro_batch_tokens", "300", "--trainer.optim.lr", "5e-4")
    alone = make_lab(configure(*small, *flags), trained=False)
    with ranked_lab(configure(*small, *flags, *TWO_RANKS), alone.rollouts) as lab:
        ours, theirs = train(lab, 3), train(alone, 3)
        for one, other in zip(ours, theirs, strict=True):
            for name in ("loss/total", "optim/grad_norm", "teacher_kl"):
                assert one[name] == pytest.approx(other[name], rel=2e-2, abs=1e-3), name
        state, expected = lab.trainer.state(), alone.trainer.state()
        assert state.keys() == expected.keys()
        assert {k: v.dtype for k, v in state.items()} == {k: v.dtype for k, v in expected.items()}


@pytest.mark.parametrize("update", ["frozen", "ema"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, update: str) -> None:
    """Masters and averages are in the checkpoint. The adapter is what the model computes with."""
    flags = (*BASE, "--orchestrator.teacher_model.update", update, "--max_steps", "4")
    assert run(tmp_path / "whole", *flags) == EXIT_OK
    path = tmp_path / "cut"
    assert run(path, *flags) == EXIT_OK
    (path / "scoreboard.json").unlink()
    for folder in ("checkpoints/step_000004", "adapter"):
        shutil.rmtree(path / folder)
    assert run(path, *flags, "--resume") == EXIT_OK
    assert records(path) == records(tmp_path / "whole")
    assert board(path) == board(tmp_path / "whole")
    name = "adapter/adapter_model.safetensors"
    ours, whole = load_file(path / name), load_file(tmp_path / "whole" / name)
    assert {t.dtype for t in ours.values()} == {torch.bfloat16}
    assert all(torch.equal(ours[key], whole[key]) for key in whole)


def test_a_checkpoint_of_another_dtype_is_refused(configure: Configure, tmp_path: Path) -> None:
    """Its adapter has no fp32 copies that would belong to the rounded one."""
    wide = make_lab(configure(*SMALL_STEP, *BF16))
    checkpoint.save(wide.trainer, tmp_path, 1, {}, keep=1)
    narrow = make_lab(configure(*SMALL_STEP, *BASE))
    with pytest.raises(UserError, match="another number format") as caught:
        checkpoint.restore(narrow.trainer, tmp_path)
    assert caught.value.exit_code == EXIT_ENVIRONMENT
