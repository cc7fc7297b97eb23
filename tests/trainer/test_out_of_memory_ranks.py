"""OOM on one of several ranks: those with sharded weights start the step again together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import scarce
from support.lab import make_lab
from support.paths import TESTS
from test_ranks import FULL, SMALL, TWO, assert_close, local, steps, team

from minidistill.errors import EXIT_ENVIRONMENT, UserError
from minidistill.trainer.distributed import launcher

Configure = Callable[..., Any]
FLAGS = (*SMALL, "--trainer.micro_batch_tokens", "900")
CASES = {
    "on the driver, in the loss": (0, "loss", ()),
    "on the other, forward": (1, "forward", ()),
    "on the other, backward": (1, "backward", ()),
    "on the other, recomputed": (1, "backward", ("--trainer.model.ac.freq", "1")),
    "on the other, in another teacher": (
        1,
        "teacher",
        ("--orchestrator.teacher_model.update", "ema"),
    ),
}


@pytest.fixture
def scarcely(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make one rank short of memory above so many tokens in a pass."""

    def limit(rank: int, place: str, size: int) -> None:
        monkeypatch.setenv("SCARCE", f"{rank}:{place}:{size}")
        monkeypatch.setenv("PYTHONPATH", str(TESTS), prepend=":")
        monkeypatch.setattr(launcher, "MODULE", "support.scarce")
        if rank == 0:
            undo.append(scarce.limit(place, size))

    undo: list[Callable[[], None]] = []
    yield limit
    for act in undo:
        act()


@pytest.mark.parametrize("case", CASES)
def test_divided_ranks_repeat_the_step_together(
    configure: Configure, scarcely: Any, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    """The step's result is that of a rank with memory enough, and the size that fits is kept."""
    number, place, flags = CASES[case]
    alone = make_lab(configure(*FLAGS, *FULL, *flags), trained=False)
    expected = steps(alone, 2)
    scarcely(number, place, 150)
    with team(configure(*FLAGS, *FULL, *flags, *TWO), alone.rollouts) as lab:
        told: list[int] = []
        assert lab.policy.sharded is not None
        found = [lab.trainer.step(lab.rollouts, 1, told.append).metrics]
        warned = list(caplog.messages)
        found += steps(lab, 1, 2)
        assert_close([{k: f[k] for k in e} for f, e in zip(found, expected, strict=True)], expected)
        assert sum(told) == sum(len(r.completion.token_ids) for r in lab.rollouts)
        state = lab.trainer.state()
        for name, value in alone.trainer.state().items():
            torch.testing.assert_close(state[name], value, rtol=1e-3, atol=2e-5, msg=name)
        where = f" on rank {number}" if number else ""
        size = lab.trainer.micro_batches.budget
        assert warned[-1] == (
            f"out of memory{where} ({scarce.ERROR}): "
            f"trainer.micro_batch_tokens is {size} from here on"
        )
        assert caplog.messages == warned, "the new size is kept"


@pytest.mark.parametrize("number", [0, 1])
def test_one_sequence_that_does_not_fit_on_a_rank(
    configure: Configure, scarcely: Any, number: int
) -> None:
    """The shortest, of 73 tokens, lets the rank keep up with the others; those of 74 are too long:
    all ranks come out of the step, nothing is stepped, and the driver says why."""
    alone = make_lab(configure(*FLAGS, *FULL), trained=False)
    scarcely(number, "backward", 73)
    with team(configure(*FLAGS, *FULL, *TWO), alone.rollouts) as lab:
        lab.policy.reshard()
        before = [local(p).clone() for _, p in lab.policy.parameters]
        with pytest.raises(UserError, match=r"one sequence of 109 tokens does not fit") as caught:
            lab.trainer.step(lab.rollouts, 1, lambda n: None)
        assert caught.value.exit_code == EXIT_ENVIRONMENT
        after = [local(p) for _, p in lab.policy.parameters]
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_memory_that_holds_no_sequence_at_all(configure: Configure, scarcely: Any) -> None:
    """A rank that cannot even keep up ends the run, which says so; nothing hangs."""
    alone = make_lab(configure(*FLAGS, *FULL), trained=False)
    scarcely(1, "forward", 0)
    with team(configure(*FLAGS, *FULL, *TWO), alone.rollouts) as lab:
        with pytest.raises(UserError, match=r"rank 1 .* one sequence of 105 tokens") as caught:
            lab.trainer.step(lab.rollouts, 1, lambda n: None)
        assert caught.value.exit_code == EXIT_ENVIRONMENT
