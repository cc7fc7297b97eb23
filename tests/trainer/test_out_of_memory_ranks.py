"""Out of memory on one rank: with sharded weights all ranks repeat the step together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import limited_memory
from support.lab import make_lab
from support.paths import TESTS
from support.ranks import (
    ALL_WEIGHTS,
    SMALL,
    TWO_RANKS,
    assert_close,
    local_part,
    ranked_lab,
    train,
)
from torch.distributed.fsdp import FSDPModule

from minidistill.errors import EXIT_ENVIRONMENT, UserError
from minidistill.trainer.distributed import launcher
from minidistill.trainer.distributed.fsdp import can_repeat_passes

Configure = Callable[..., Any]
needs_repeats = pytest.mark.skipif(
    not can_repeat_passes(), reason="FSDPModule of this torch has no reset_iter_state"
)
FLAGS = (*SMALL, "--trainer.micro_batch_tokens", "900", "--no-trainer.packing")
CASES = {
    "on the driver, in the loss": (0, "loss", ()),
    "on rank 1, forward": (1, "forward", ()),
    "on rank 1, backward": (1, "backward", ()),
    "on rank 1, recomputed": (1, "backward", ("--trainer.model.ac.freq", "1")),
    "on rank 1, in an averaged teacher": (
        1,
        "teacher",
        ("--orchestrator.teacher_model.update", "ema"),
    ),
}


@pytest.fixture
def limit_rank(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Limits one rank's memory: passes of more than `size` tokens fail at `place`."""

    def limit(rank: int, place: str, size: int) -> None:
        monkeypatch.setenv("MEMORY_LIMIT", f"{rank}:{place}:{size}")
        monkeypatch.setenv("PYTHONPATH", str(TESTS), prepend=":")
        monkeypatch.setattr(launcher, "MODULE", "support.limited_memory")
        if rank == 0:
            undo.append(limited_memory.limit_memory(place, size))

    undo: list[Callable[[], None]] = []
    yield limit
    for restore in undo:
        restore()


@needs_repeats
@pytest.mark.parametrize("case", CASES)
def test_sharded_ranks_repeat_the_step_together(
    configure: Configure, limit_rank: Any, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    """The result is that of a step with enough memory, and later steps use the smaller size."""
    number, place, flags = CASES[case]
    alone = make_lab(configure(*FLAGS, *ALL_WEIGHTS, *flags), trained=False)
    expected = train(alone, 2)
    limit_rank(number, place, 150)
    with ranked_lab(configure(*FLAGS, *ALL_WEIGHTS, *flags, *TWO_RANKS), alone.rollouts) as lab:
        progress: list[int] = []
        assert lab.policy.sharded is not None
        records = [lab.trainer.step(lab.rollouts, 1, progress.append).metrics]
        warnings = list(caplog.messages)
        records += train(lab, 1, 2)
        compared = [{k: r[k] for k in e} for r, e in zip(records, expected, strict=True)]
        assert_close(compared, expected)
        assert sum(progress) == sum(len(r.completion.token_ids) for r in lab.rollouts)
        state = lab.trainer.state()
        for name, value in alone.trainer.state().items():
            torch.testing.assert_close(state[name], value, rtol=1e-3, atol=2e-5, msg=name)
        where = f" on rank {number}" if number else ""
        size = lab.trainer.micro_batches.budget
        assert warnings[-1] == (
            f"out of memory{where} ({limited_memory.ERROR}): "
            f"trainer.micro_batch_tokens is {size} from here on"
        )
        assert caplog.messages == warnings, "the new size is kept"


@needs_repeats
@pytest.mark.parametrize("number", [0, 1])
def test_one_sequence_that_does_not_fit_on_a_rank(
    configure: Configure, limit_rank: Any, number: int
) -> None:
    """Only the shortest rollout, of 73 tokens, fits: the rank uses it to take part in collectives.

    All ranks leave the step, no weights change, and the driver raises the error.
    """
    alone = make_lab(configure(*FLAGS, *ALL_WEIGHTS), trained=False)
    limit_rank(number, "backward", 73)
    with ranked_lab(configure(*FLAGS, *ALL_WEIGHTS, *TWO_RANKS), alone.rollouts) as lab:
        lab.policy.reshard()
        before = [local_part(p).clone() for _, p in lab.policy.parameters]
        with pytest.raises(UserError, match=r"one sequence of 109 tokens does not fit") as caught:
            lab.trainer.step(lab.rollouts, 1, lambda n: None)
        assert caught.value.exit_code == EXIT_ENVIRONMENT
        after = [local_part(p) for _, p in lab.policy.parameters]
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@needs_repeats
def test_a_rank_that_cannot_run_any_sequence_fails_the_step(
    configure: Configure, limit_rank: Any
) -> None:
    """A rank that cannot take part in collectives ends the run with an error and no hang."""
    alone = make_lab(configure(*FLAGS, *ALL_WEIGHTS), trained=False)
    limit_rank(1, "forward", 0)
    with ranked_lab(configure(*FLAGS, *ALL_WEIGHTS, *TWO_RANKS), alone.rollouts) as lab:
        with pytest.raises(UserError, match=r"rank 1 .* one sequence of 105 tokens") as caught:
            lab.trainer.step(lab.rollouts, 1, lambda n: None)
        assert caught.value.exit_code == EXIT_ENVIRONMENT


@pytest.mark.parametrize("number", [0, 1])
def test_a_torch_that_cannot_repeat_a_pass(
    configure: Configure, limit_rank: Any, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """The run ends with an error that says so, whichever rank ran out of memory."""
    monkeypatch.setenv("NO_REPEAT", "1")
    monkeypatch.delattr(FSDPModule, "reset_iter_state", raising=False)
    alone = make_lab(configure(*FLAGS, *ALL_WEIGHTS), trained=False)
    limit_rank(number, "forward", 150)
    with ranked_lab(configure(*FLAGS, *ALL_WEIGHTS, *TWO_RANKS), alone.rollouts) as lab:
        with pytest.raises(UserError, match="cannot repeat a pass") as caught:
            lab.trainer.step(lab.rollouts, 1, lambda n: None)
        error = caught.value
        assert error.exit_code == EXIT_ENVIRONMENT
        for words in (f"torch {torch.__version__}", "a newer torch can", limited_memory.ERROR):
            assert words in error.what
        for words in ("trainer.micro_batch_tokens", "trainer.model.ac.freq"):
            assert words in error.fix
