"""A trainer with several ranks gives the results of a trainer with one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.conversations import MULTI, STEP, Stage
from support.lab import NO_MISMATCH_LIMIT, make_lab
from support.paths import ROOT, SOKOBAN
from support.ranks import (
    ALL_WEIGHTS,
    NO_EVALUATION,
    SMALL,
    TWO_RANKS,
    assert_close,
    local_part,
    local_size,
    ranked_lab,
    train,
)
from support.runs import TINY, records, run

from minidistill.envs.isolated import close_environments
from minidistill.errors import EXIT_HEALTH, EXIT_OK, UserError
from minidistill.trainer import checkpoint
from minidistill.trainer.batching import share_out
from minidistill.trainer.step import StepRollouts
from minidistill.trainer.token_budget import TokenBudget
from minidistill.trainer.token_kl import token_kl
from minidistill.types import Role

EMA_TEACHER = ("--orchestrator.teacher_model.update", "ema")
Configure = Callable[..., Any]


@pytest.mark.parametrize(
    "flags",
    [
        (),
        (*ALL_WEIGHTS, *EMA_TEACHER),
        ("--trainer.shard", *EMA_TEACHER),
        (*ALL_WEIGHTS, "--no-trainer.shard"),
        (*ALL_WEIGHTS, "--trainer.packing", "--trainer.model.ac.freq", "1"),
    ],
    ids=["lora", "full, sharded", "lora, sharded", "full, replicated", "packed, recomputed"],
)
def test_two_ranks_train_as_one(configure: Configure, flags: tuple[str, ...]) -> None:
    """The KL of each token, metrics, weights, optimizer state and averaged teacher agree."""
    alone = make_lab(configure(*SMALL, *flags), trained=False)
    with ranked_lab(configure(*SMALL, *flags, *TWO_RANKS), alone.rollouts) as lab:
        replicated = flags == () or "--no-trainer.shard" in flags
        assert (lab.policy.sharded is None) == replicated
        progress: list[int] = []
        tokens = lab.trainer.step(lab.rollouts, 1, progress.append).tokens
        reference = alone.trainer.step(alone.rollouts, 1, lambda n: None).tokens
        for ours, theirs in zip(tokens, reference, strict=True):
            torch.testing.assert_close(ours.kl, theirs.kl, rtol=1e-4, atol=1e-5)
        assert sum(progress) == sum(len(r.completion.token_ids) for r in lab.rollouts)
        assert_close(train(lab, 2, 2), train(alone, 2, 2))
        state, expected = lab.trainer.state(), alone.trainer.state()
        assert state.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value, rtol=1e-3, atol=2e-5, msg=name)
        assert any(k.startswith("policy/ema/") for k in state) == (EMA_TEACHER[1] in flags)


@pytest.mark.parametrize("flags", [(), ALL_WEIGHTS], ids=["replicated", "sharded"])
def test_two_ranks_train_on_parts_that_arrive_as_one_does_on_all(
    configure: Configure, flags: tuple[str, ...]
) -> None:
    """The last part has a single rollout, and so nothing for one of the ranks."""
    alone = make_lab(configure(*SMALL, *flags), trained=False)
    with ranked_lab(configure(*SMALL, *flags, *TWO_RANKS), alone.rollouts) as lab:
        rollouts, progress, results = lab.rollouts, [], []
        assert len(rollouts) == 12
        for step in (1, 2):
            arriving = StepRollouts(
                parts=(rollouts[a:b] for a, b in ((0, 5), (5, 11), (11, 12))),
                teacher_prompts=[r.prompt.teacher_ids for r in rollouts],
                tokens=1000,
            )
            result = lab.trainer.stream_step(arriving, step, progress.append)
            assert result.rollouts == rollouts
            results.append(result.metrics)
        assert sum(progress) == 2 * len(rollouts)
        expected = train(alone, 2)
        assert_close(
            [{k: r[k] for k in e} for r, e in zip(results, expected, strict=True)], expected
        )
        state = lab.trainer.state()
        for name, value in alone.trainer.state().items():
            torch.testing.assert_close(state[name], value, rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize(
    "flags",
    [(), (*ALL_WEIGHTS, "--no-trainer.shard"), ALL_WEIGHTS],
    ids=["lora", "full, replicated", "full, sharded"],
)
def test_twenty_steps_on_the_same_micro_batches(
    configure: Configure, flags: tuple[str, ...]
) -> None:
    """Two micro-batches on one rank, or one on each of two ranks, give bitwise equal results.

    With sharded weights the gradient's norm is summed in another order, so up to float error.
    """
    pair = (
        *SMALL, "--orchestrator.batch_size", "2", "--orchestrator.rollouts_per_example", "2",
        "--trainer.micro_batch_tokens", "8",
    )  # fmt: skip
    alone = make_lab(configure(*pair, *flags), trained=False)
    with ranked_lab(configure(*pair, *flags, *TWO_RANKS), alone.rollouts) as lab:
        records, expected = train(lab, 20), train(alone, 20)
        assert (lab.policy.sharded is not None) == (flags == ALL_WEIGHTS)
        if flags != ALL_WEIGHTS:
            assert records == expected
        for ours, theirs in zip(records, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=5e-4, abs=1e-6)
    assert expected[-1]["teacher_kl"] < 0.9 * expected[0]["teacher_kl"], "the KL did not fall"


def test_sharded_weights_are_complete_on_the_driver_between_steps(
    configure: Configure, tmp_path: Path
) -> None:
    """After two steps: scores, KL, synced and saved weights. Then another step."""
    alone = make_lab(configure(*SMALL, *ALL_WEIGHTS), trained=False)
    with ranked_lab(configure(*SMALL, *ALL_WEIGHTS, *TWO_RANKS), alone.rollouts) as lab:
        total = sum(p.numel() for _, p in alone.policy.parameters)
        shard = local_size(lab)
        assert shard <= 0.51 * total, "this rank holds half of the weights"
        results = []
        for one in (alone, lab):
            train(one, 2)
            prompts = [r.prompt.student_ids for r in one.rollouts]
            completions = [r.completion.token_ids for r in one.rollouts]
            views = (prompts, [r.prompt.teacher_ids for r in one.rollouts])
            kl = token_kl(
                one.policy,
                completions,
                prompts=views,
                roles=(Role.STUDENT, Role.BASE),
                temperature=1.0,
                budget=TokenBudget(4096),
                doing="testing",
            )
            scores = [
                torch.tensor(
                    [x for row in one.engine.score(prompts, completions, role) for x in row]
                )
                for role in (Role.STUDENT, Role.TEACHER)
            ]
            folder = checkpoint.save_model(one.policy, tmp_path / str(len(results)))
            weights = {n: w.clone() for n, w in one.policy.weights()}
            assert local_size(one) == (shard if one is lab else total)
            results.append(({"kl": kl, **dict(zip("sb", scores, strict=True)), **weights}, folder))
        (theirs, plain), (ours, saved) = results
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-4, msg=name)
        assert_close(train(lab, 1, 3), train(alone, 1, 3))
    from transformers import AutoModelForCausalLM

    one, other = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (plain, saved))
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-4, msg=name)
    assert sorted(p.name for p in saved.iterdir()) == sorted(p.name for p in plain.iterdir())


def test_a_run_resumes_with_another_number_of_ranks(tmp_path: Path) -> None:
    """A checkpoint of 2 ranks continued by 1, and of 1 by 2, gives the uninterrupted metrics."""
    flags = (*ALL_WEIGHTS, *NO_EVALUATION, "--max_steps", "4")
    paths = {n: tmp_path / f"{n}" for n in (1, 2)}
    assert run(paths[1], *flags) == EXIT_OK
    assert run(paths[2], *flags, *TWO_RANKS) == EXIT_OK
    expected = records(paths[1])
    for path, ranks in ((paths[2], ()), (paths[1], TWO_RANKS)):
        (path / "checkpoints/step_000004/MANIFEST.json").write_text("lost")
        (path / "scoreboard.json").unlink()
        assert run(path, *flags, *ranks, "--resume") == EXIT_OK
        for ours, theirs in zip(records(path), expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("flags", [(), ALL_WEIGHTS], ids=["lora", "full"])
def test_fewer_rollouts_than_ranks_and_a_nan_loss(
    configure: Configure, flags: tuple[str, ...]
) -> None:
    """Fewer rollouts than ranks, as when scoring failed, give the same result.

    A NaN loss then raises an error and changes no weights.
    """
    alone = make_lab(configure(*SMALL, *flags), trained=False)
    alone.rollouts = alone.rollouts[:1]
    with ranked_lab(configure(*SMALL, *flags, *TWO_RANKS), alone.rollouts) as lab:
        assert_close(train(lab, 2), train(alone, 2))
        before = [p.detach().clone() for _, p in lab.policy.parameters]
        nan_rollouts = [replace(lab.rollouts[0], advantage=float("nan"))]
        with pytest.raises(UserError, match="the loss is nan") as caught:
            lab.trainer.step(nan_rollouts, 3, lambda n: None)
        assert caught.value.exit_code == EXIT_HEALTH
        after = (local_part(p) for _, p in lab.policy.parameters)
        assert all(torch.equal(a, local_part(b)) for a, b in zip(after, before, strict=True))
        assert all(p.grad is None for _, p in lab.policy.parameters)


def test_rollouts_are_balanced_over_ranks_by_tokens() -> None:
    lengths = [5, 90, 40, 40, 7, 3, 60, 1]
    shares = share_out(lengths, 3)
    assert sorted(i for share in shares for i in share) == list(range(8))
    loads = [sum(lengths[i] for i in share) for share in shares]
    assert sorted(loads) == [76, 80, 90]
    assert share_out(lengths, 1) == [list(range(8))]
    assert share_out([4, 2], 3) == [[0], [1], []]


def test_torchrun_gives_the_same_metrics(tmp_path: Path) -> None:
    flags = ("--max_steps", "2", *NO_EVALUATION)
    assert run(tmp_path / "alone", *flags) == EXIT_OK
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m",
               "minidistill", "run", SOKOBAN, *TINY, *flags]  # fmt: skip
    done = subprocess.run(
        [*command, "--output_dir", str(tmp_path / "two")],
        capture_output=True, text=True, cwd=ROOT, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == EXIT_OK, done.stdout + done.stderr
    for ours, theirs in zip(records(tmp_path / "two"), records(tmp_path / "alone"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("flags", [(), ALL_WEIGHTS], ids=["replicated", "sharded"])
def test_conversations_on_two_ranks(configure: Configure, flags: tuple[str, ...]) -> None:
    """As on one: the KL of the sampled tokens alone, and the update."""
    stage = Stage(configure(*STEP, *MULTI, *flags))
    rollouts = stage.collect()[0]
    close_environments(stage.environments.values())
    assert any(r.completion.inserted for r in rollouts)
    settings = (*STEP, *NO_MISMATCH_LIMIT, *flags)
    alone = make_lab(configure(*settings), trained=False)
    with ranked_lab(configure(*settings, *TWO_RANKS), rollouts) as lab:
        ours, theirs = (x.trainer.step(rollouts, 1, lambda n: None).tokens for x in (lab, alone))
        for rollout, one, other in zip(rollouts, ours, theirs, strict=True):
            assert len(one.kl) == len(rollout.completion.token_ids)
            torch.testing.assert_close(one.kl, other.kl, rtol=1e-4, atol=1e-5)
        state = lab.trainer.state()
        for name, value in alone.trainer.state().items():
            torch.testing.assert_close(state[name], value, rtol=1e-3, atol=2e-5, msg=name)
