"""`python -m bench.step`: the pieces, the counted work, and the arguments."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from bench import step
from bench.our_step import OurRun, open_run, peak_rss
from bench.step_pieces import PIECES, TRAINING, Stopwatch, take_apart
from bench.step_profile import OUTSIDE, kind_of, operations, profile_training
from bench.step_work import Tokens, step_work
from bench.workload import Case, add_arguments, case_of
from minidistill.errors import UserError
from minidistill.placement.model_shape import read_shape

UNCOUNTED: Any = {  # by torch; the tiny model's products are too small for oneDNN's
    torch.ops.aten.addmm_: lambda out, a, b, **more: 2 * a[0] * a[1] * b[1],
}
CASE = Case("tiny-sokoban", context=24, prompt=8, group=2, batch=4, completion=6)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OurRun]:
    with open_run(CASE, tmp_path_factory.mktemp("step")) as opened:
        yield opened


def test_the_pieces_sum_to_the_step(run: OurRun) -> None:
    parts, taken = take_apart(run.session, run.step)
    pieces = parts.pieces
    assert tuple(pieces) == PIECES
    assert sum(pieces.values()) == pytest.approx(taken.seconds, abs=0.02)
    assert parts.step == sum(pieces.values())
    assert all(pieces[name] > 0 for name in (*TRAINING, "prefill", "other"))
    assert parts.training == pytest.approx(taken.metrics["time/train"], abs=0.02)
    assert sum(pieces[name] for name in TRAINING) < parts.training < parts.step


def test_a_step_taken_apart_is_the_step(tmp_path: Path) -> None:
    """Timers change no result: two runs of the same steps, one of them with timers."""
    losses = []
    for number, timed in enumerate((False, True)):
        folder = tmp_path / str(number)
        folder.mkdir()
        with open_run(CASE, folder) as run:
            steps = [take_apart(run.session, run.step)[1] if timed else run.step() for _ in "12"]
        losses.append([taken.metrics["loss/total"] for taken in steps])
        assert {len(r.completion.token_ids) for r in steps[-1].rollouts} == {CASE.completion}
    assert losses[0] == losses[1]


def test_a_piece_within_another_is_counted_once() -> None:
    times = iter([0.0, 1.0, 3.0, 7.0])
    watch = Stopwatch(lambda: next(times))
    with watch.piece("outer"), watch.piece("inner"):
        pass
    assert watch.seconds == {"outer": 1.0 + 4.0, "inner": 2.0}


def test_the_time_of_a_piece_that_fails_is_booked() -> None:
    watch = Stopwatch()
    with pytest.raises(RuntimeError), watch.piece("outer"), watch.piece("inner"):
        raise RuntimeError
    with watch.piece("outer"):
        pass
    assert watch.seconds.keys() == {"outer", "inner"}


def reads(prompts: list[tuple[int, ...]], completions: list[tuple[int, ...]]) -> set[Any]:
    """Every token that must be computed, by what it depends on; completions count separately."""
    needed: set[Any] = set()
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        needed |= {prompt[: i + 1] for i in range(len(prompt))}
        needed |= {(row, prompt, completion[: i + 1]) for i in range(len(completion) - 1)}
    return needed


@pytest.mark.parametrize("beginning", [(), (7, 7, 7)])
@pytest.mark.parametrize("distinct", [1, 2])
def test_needed_tokens_are_counted_once(beginning: tuple[int, ...], distinct: int) -> None:
    prompts = [(*beginning, row % distinct, 5, 6) for row in range(4)]
    completions = [(1, 2, 3), (1, 2), (4,), (9, 9, 9, 9)]
    counted = Tokens.of(prompts, completions)
    needed = reads(prompts, completions)
    assert counted.tokens == len(needed)
    lengths = [len(key[1]) + len(key[2]) if isinstance(key[1], tuple) else len(key)
               for key in needed if len(key) > 1]  # fmt: skip
    assert counted.pairs == sum(lengths) + sum(len(key) == 1 for key in needed)


def test_a_cached_context_is_attended_to_and_not_computed() -> None:
    prompts = [(7, 7, 7, 7, 1), (7, 7, 7, 7, 2)]
    counted = Tokens.of(prompts, [(3, 3), (3, 3)], cached=4)
    assert counted.tokens == 2 + 2
    assert counted.pairs == 2 * 5 + 2 * 6


def test_the_work_is_that_of_the_products(run: OurRun) -> None:
    """Against torch's own count, on a step whose passes compute no token twice."""
    policy = run.session.policy
    prompt = (5, 6, 7, 8, 9)
    rollout = run.step().rollouts[0]
    ids = torch.tensor([[*prompt, *rollout.completion.token_ids[:-1]]])
    shape = read_shape(policy.student.config)
    adapter = sum(p.numel() for _, p in policy.parameters)
    given = replace(rollout.prompt, student_ids=prompt, teacher_ids=prompt)
    work = step_work(shape, adapter, [replace(rollout, prompt=given)], ())
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter, torch.no_grad():
        policy.body(input_ids=ids)
    # torch counts a causal attention's masked half too, and we count norms as parameters
    pairs = ids.shape[1] ** 2 - ids.shape[1] * (ids.shape[1] + 1) // 2
    masked = 4 * shape.attention * shape.layers * pairs
    assert counter.get_total_flops() - masked == pytest.approx(work.flops["forward"], rel=0.02)


def test_the_profile_shares_out_the_training_phase(run: OurRun) -> None:
    found = profile_training(run.session.trainer, run.step)
    assert sum(found.shares.values()) == pytest.approx(1, abs=0.02)
    assert found.shares["products"] > 0
    assert OUTSIDE in found.shares
    assert found.products_per_second > 0


def test_operations_of_products_are_counted() -> None:
    x, weight = torch.ones(5, 300), torch.ones(300, 400)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, with_flops=True) as record:
        torch.ops.mkldnn._linear_pointwise(x, weight.t(), None, "none", [], "")
        torch.mm(x, weight)
    events = record.key_averages(group_by_input_shape=True)
    found = {event.key: operations(event) for event in events}
    assert found["mkldnn::_linear_pointwise"] == found["aten::mm"] == 2 * 5 * 300 * 400


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::mm", "products"),
        ("aten::addmm", "products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::copy_", "copies"),
        ("aten::mul", "element by element"),
    ],
)
def test_operations_have_a_kind(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_the_peak_is_of_this_process() -> None:
    before = peak_rss()
    torch.ones(1 << 26)  # 256 MiB
    assert peak_rss() >= before
    assert 1 << 26 < before < 1 << 40


@pytest.mark.parametrize(
    ("flags", "where"),
    [
        (["--group", "3"], "--group"),
        (["--batch", "0"], "--batch"),
        (["--context", "-1"], "--context"),
        (["--model", "/no/such/model"], "--model"),
    ],
)
def test_impossible_sizes_are_refused(
    flags: list[str], where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert step.main(["--model", "tiny", *flags]) == 2
    assert where in capsys.readouterr().err


def test_repeats_have_limits(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        step.main(["--model", "tiny", "--repeats", "0"])
    assert "--repeats" in capsys.readouterr().err


def test_arguments_are_a_case() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    case = case_of(parser.parse_args(["--model", "tiny", "--context", "9", "--group", "4"]))
    assert (case.model, case.context, case.group, case.batch) == ("tiny-sokoban", 9, 4, 8)
    with pytest.raises(UserError, match="divisor"):
        case_of(parser.parse_args(["--model", "tiny", "--group", "5"]))


def test_the_report_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bench.pair.RESULTS", tmp_path)
    monkeypatch.setattr("bench.step.use_cpu", lambda threads: None)
    monkeypatch.setattr("bench.step.matrix_peak", lambda clock: 1e11)
    monkeypatch.setattr("bench.step.memory_peak", lambda clock: 1e10)
    flags = ["--context", "24", "--prompt", "8", "--batch", "2", "--completion", "4"]
    assert step.main(["--model", "tiny", "--repeats", "1", "--clock", "cpu", *flags]) == 0
    (result,) = json.loads((tmp_path / "step.json").read_text()).values()
    useful = sum(result["useful_gflop"].values())
    expected = useful * 1e9 / result["training"] / 1e11
    assert result["training_share_of_matrix_peak"] == pytest.approx(expected)
    assert result["tokens_per_second"] == pytest.approx(8 / result["step"])
    assert "of the matrix peak" in capsys.readouterr().out
