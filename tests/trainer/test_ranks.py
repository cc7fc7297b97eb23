"""The trainer with several ranks: the same results as with one, and no hang when one fails."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.lab import Lab, cpu_placement, make_lab
from support.paths import ROOT, SOKOBAN
from support.runs import TINY, records, run

from minidistill.errors import (
    EXIT_HEALTH,
    EXIT_OK,
    UserError,
)
from minidistill.trainer import checkpoint
from minidistill.trainer.batching import share_out
from minidistill.trainer.build import build_trainer
from minidistill.trainer.distributed.launcher import RankLauncher
from minidistill.trainer.token_kl import token_kl
from minidistill.types import Role

TWO = ("--trainer.world_size", "2")
FULL = ("--no-trainer.model.lora", "--trainer.optim.lr", "5e-4")
# The same rollouts trained on again, which the guard would take for an engine's old weights
SMALL = (
    "--orchestrator.batch_size", "12", "--orchestrator.env.0.args.num_train_examples", "8",
    "--trainer.micro_batch_tokens", "700", "--trainer.loss.max_sampler_mismatch", "off",
)  # fmt: skip
BRIEF = (
    "--no-orchestrator.teacher_model.eval_baseline", "--orchestrator.eval.interval", "0",
    "--trainer.scheduler.decay_steps", "6",
)  # fmt: skip
AVERAGE = ("--orchestrator.teacher_model.update", "ema")
Configure = Callable[..., Any]


@contextmanager
def team(loaded: Any, rollouts: Any = None) -> Iterator[Lab]:
    """A lab whose trainer has the other ranks of the configuration."""
    placement = cpu_placement(loaded)
    launcher = RankLauncher(placement.devices)
    try:
        launcher.start(loaded.config, placement)
        lab = make_lab(loaded, trained=False)
        lab.trainer = build_trainer(
            lab.policy, loaded.config, placement, launcher.group, lab.engine.prefixes
        )
        lab.rollouts = rollouts or lab.rollouts
        yield lab
    finally:
        launcher.close()


def steps(lab: Lab, count: int, first: int = 1) -> list[dict[str, float]]:
    records = []
    for step in range(first, first + count):
        metrics = lab.trainer.step(lab.rollouts, step, lambda n: None).metrics
        records.append({k: v for k, v in metrics.items() if not k.startswith(("time/", "perf/"))})
    return records


def assert_close(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    """Equal to float error, which AdamW makes larger from step to step: other micro-batches come
    to other last digits, on one rank too."""
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=5e-5, abs=2e-5)


def local(tensor: Any) -> torch.Tensor:
    """What this rank holds."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def kept(lab: Lab) -> int:
    return sum(local(p).numel() for _, p in lab.policy.parameters)


@pytest.mark.parametrize(
    "flags",
    [
        (),
        (*FULL, *AVERAGE),
        ("--trainer.shard", *AVERAGE),
        (*FULL, "--no-trainer.shard"),
        (*FULL, "--trainer.packing", "--trainer.model.ac.freq", "1"),
    ],
    ids=["lora", "full, divided", "lora, divided", "full, replicated", "packed, recomputed"],
)
def test_two_ranks_train_as_one(configure: Configure, flags: tuple[str, ...]) -> None:
    """Figures of each rollout, metrics, weights, moments and the average."""
    alone = make_lab(configure(*SMALL, *flags), trained=False)
    with team(configure(*SMALL, *flags, *TWO), alone.rollouts) as lab:
        replicated = flags == () or "--no-trainer.shard" in flags
        assert (lab.policy.sharded is None) == replicated
        told: list[int] = []
        tokens = lab.trainer.step(lab.rollouts, 1, told.append).tokens
        reference = alone.trainer.step(alone.rollouts, 1, lambda n: None).tokens
        for ours, theirs in zip(tokens, reference, strict=True):
            torch.testing.assert_close(ours.kl, theirs.kl, rtol=1e-4, atol=1e-5)
        assert sum(told) == sum(len(r.completion.token_ids) for r in lab.rollouts)
        assert_close(steps(lab, 2, 2), steps(alone, 2, 2))
        state, same = lab.trainer.state(), alone.trainer.state()
        assert state.keys() == same.keys()
        for name, value in same.items():
            torch.testing.assert_close(state[name], value, rtol=1e-3, atol=2e-5, msg=name)
        assert any(k.startswith("policy/ema/") for k in state) == (AVERAGE[1] in flags)


@pytest.mark.parametrize(
    "flags", [(), (*FULL, "--no-trainer.shard"), FULL], ids=["lora", "full, replicated", "divided"]
)
def test_twenty_steps_on_the_same_micro_batches(
    configure: Configure, flags: tuple[str, ...]
) -> None:
    """Two micro-batches of one rank, or one of each of two: the same sum, to the last bit. Divided
    weights have their gradient's norm summed in another order, whence float error."""
    pair = (
        *SMALL, "--orchestrator.batch_size", "2", "--orchestrator.rollouts_per_example", "2",
        "--trainer.micro_batch_tokens", "8",
    )  # fmt: skip
    alone = make_lab(configure(*pair, *flags), trained=False)
    with team(configure(*pair, *flags, *TWO), alone.rollouts) as lab:
        found, expected = steps(lab, 20), steps(alone, 20)
        assert (lab.policy.sharded is not None) == (flags == FULL)
        if flags != FULL:
            assert found == expected
        for ours, theirs in zip(found, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=5e-4, abs=1e-6)
    assert expected[-1]["teacher_kl"] < 0.9 * expected[0]["teacher_kl"], "nothing was learnt"


def test_divided_weights_are_gathered_for_the_driver(configure: Configure, tmp_path: Path) -> None:
    """Sampling, scoring, comparing, syncing and saving after a step; then a step again."""
    alone = make_lab(configure(*SMALL, *FULL), trained=False)
    with team(configure(*SMALL, *FULL, *TWO), alone.rollouts) as lab:
        total = sum(p.numel() for _, p in alone.policy.parameters)
        held = kept(lab)
        assert held <= 0.51 * total, "this rank holds half of the weights"
        seen = []
        for one in (alone, lab):
            steps(one, 2)
            prompts = [r.prompt.student_ids for r in one.rollouts]
            completions = [r.completion.token_ids for r in one.rollouts]
            views = (prompts, [r.prompt.teacher_ids for r in one.rollouts])
            kl = token_kl(
                one.policy,
                completions,
                prompts=views,
                roles=(Role.STUDENT, Role.BASE),
                temperature=1.0,
                budget=4096,
            )
            scores = [
                torch.tensor(
                    [x for row in one.engine.score(prompts, completions, role) for x in row]
                )
                for role in (Role.STUDENT, Role.TEACHER)
            ]
            folder = checkpoint.save_model(one.policy, tmp_path / str(len(seen)))
            weights = {n: w.clone() for n, w in one.policy.weights()}
            assert kept(one) == (held if one is lab else total)
            seen.append(({"kl": kl, **dict(zip("sb", scores, strict=True)), **weights}, folder))
        (theirs, plain), (ours, saved) = seen
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-4, msg=name)
        assert_close(steps(lab, 1, 3), steps(alone, 1, 3))
    from transformers import AutoModelForCausalLM

    one, other = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (plain, saved))
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-4, msg=name)
    assert sorted(p.name for p in saved.iterdir()) == sorted(p.name for p in plain.iterdir())


def test_a_run_resumes_with_another_number_of_ranks(tmp_path: Path) -> None:
    """A checkpoint of 2 ranks continued by 1, and of 1 by 2: the metrics of the whole run."""
    flags = (*FULL, *BRIEF, "--max_steps", "4")
    paths = {n: tmp_path / f"{n}" for n in (1, 2)}
    assert run(paths[1], *flags) == EXIT_OK
    assert run(paths[2], *flags, *TWO) == EXIT_OK
    expected = records(paths[1])
    for path, now in ((paths[2], ()), (paths[1], TWO)):
        (path / "checkpoints/step_000004/MANIFEST.json").write_text("lost")
        (path / "scoreboard.json").unlink()
        assert run(path, *flags, *now, "--resume") == EXIT_OK
        for ours, theirs in zip(records(path), expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("flags", [(), FULL], ids=["lora", "full"])
def test_few_rollouts_and_no_numbers(configure: Configure, flags: tuple[str, ...]) -> None:
    """Fewer rollouts than ranks, as where scoring failed: the same result. Then a loss that is no
    number: nothing is stepped."""
    alone = make_lab(configure(*SMALL, *flags), trained=False)
    alone.rollouts = alone.rollouts[:1]
    with team(configure(*SMALL, *flags, *TWO), alone.rollouts) as lab:
        assert_close(steps(lab, 2), steps(alone, 2))
        before = [p.detach().clone() for _, p in lab.policy.parameters]
        bad = [replace(lab.rollouts[0], advantage=float("nan"))]
        with pytest.raises(UserError, match="the loss is nan") as caught:
            lab.trainer.step(bad, 3, lambda n: None)
        assert caught.value.exit_code == EXIT_HEALTH
        after = (local(p) for _, p in lab.policy.parameters)
        assert all(torch.equal(a, local(b)) for a, b in zip(after, before, strict=True))
        assert all(p.grad is None for _, p in lab.policy.parameters)


def test_ranks_share_a_step_by_tokens() -> None:
    lengths = [5, 90, 40, 40, 7, 3, 60, 1]
    shares = share_out(lengths, 3)
    assert sorted(i for share in shares for i in share) == list(range(8))
    loads = [sum(lengths[i] for i in share) for share in shares]
    assert sorted(loads) == [76, 80, 90]
    assert share_out(lengths, 1) == [list(range(8))]
    assert share_out([4, 2], 3) == [[0], [1], []]


def test_torchrun_gives_the_same_metrics(tmp_path: Path) -> None:
    flags = ("--max_steps", "2", *BRIEF)
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
