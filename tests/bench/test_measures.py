"""Figures of finished runs that their scoreboards do not have."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from bench.experiments import fixed_point, measures
from bench.experiments.logprobs import both_views, held_out, loaded
from bench.experiments.measures import curve_figures
from bench.experiments.organism_tables import KINDS
from minidistill.cli import main
from minidistill.envs import load_environment
from minidistill.evaluation.unrelated import DRIFT_TOKENS, unrelated_prompts
from minidistill.models.registry import resolve
from minidistill.tasks.prompts import PromptBuilder
from minidistill.types import Role


def teacher_NV(tokens: int = 50, vocabulary: int = 20) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(tokens, vocabulary, generator=generator, dtype=torch.float64)
    return logits.log_softmax(-1)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0, 7.5])
def test_the_power_of_a_teacher_is_found(exponent: float) -> None:
    student_NV = (exponent * teacher_NV()).log_softmax(-1)
    power = fixed_point.fit(student_NV, teacher_NV())
    assert power.exponent == pytest.approx(exponent, abs=1e-9)
    assert power.kl == pytest.approx(0, abs=1e-12)


def test_the_power_of_another_student_has_the_smallest_kl() -> None:
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(50, 20, generator=generator, dtype=torch.float64)
    student_NV = (1.5 * teacher_NV() + noise).log_softmax(-1)
    power = fixed_point.fit(student_NV, teacher_NV())

    def kl(exponent: float) -> float:
        powered_NV = (exponent * teacher_NV()).log_softmax(-1)
        target = torch.distributions.Categorical(logits=powered_NV)
        student = torch.distributions.Categorical(logits=student_NV)
        return float(torch.distributions.kl_divergence(student, target).mean())

    assert power.kl == pytest.approx(kl(power.exponent), abs=1e-12)
    grid = [i / 1000 for i in range(3000)]
    assert power.exponent == pytest.approx(min(grid, key=kl), abs=1e-3)
    assert fixed_point.mean_kl(student_NV, teacher_NV(), 1.0) == pytest.approx(kl(1.0))


def test_a_student_without_doubt_has_the_largest_power() -> None:
    best = teacher_NV().argmax(-1)
    student_NV = torch.nn.functional.one_hot(best, 20).double().add(1e-300).log()
    assert fixed_point.fit(student_NV, teacher_NV()).exponent == pytest.approx(64, rel=1e-6)


def test_entropy() -> None:
    logprobs_NV = torch.tensor([[0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3]]).log()
    expected = torch.tensor([1.5 * 0.6931471805599453, 1.0986122886681098], dtype=torch.float64)
    torch.testing.assert_close(fixed_point.entropy(logprobs_NV), expected, rtol=1e-6, atol=0)


def evaluations(scores: Sequence[float]) -> list[dict[str, Any]]:
    """The lines of a run that was evaluated every 5 steps."""
    baseline = {"eval/a/baseline_student/avg": 0.2, "eval/a/baseline_teacher/avg": 0.7}
    lines: list[dict[str, Any]] = [{"step": 0, "eval/heldout_kl": 1.0, **baseline}]
    for number, score in enumerate(scores, 1):
        lines.append({"step": 5 * number, "teacher_kl": 1.0, "loss/total": 1.0})
        lines.append({"step": 5 * number, "eval/a/student/avg": score})
    return lines


def test_the_curve_says_when_a_share_was_reached_first() -> None:
    figures = curve_figures(evaluations([0.3, 0.5, 0.4, 0.65, 0.6]), 64)
    assert figures["samples_to_half"] == 64 * 10
    assert figures["samples_to_90"] == 64 * 20
    assert figures["mean_closed"] == pytest.approx((0.2 + 0.6 + 0.4 + 0.9 + 0.8) / 5)


def test_a_share_that_was_never_reached() -> None:
    figures = curve_figures(evaluations([0.2, 0.46]), 16)
    assert figures["samples_to_half"] == 160
    assert figures["samples_to_90"] is None
    assert curve_figures(evaluations([0.1]), 16)["samples_to_half"] is None


def test_a_run_without_a_baseline_has_no_curve() -> None:
    with pytest.raises(ValueError, match="no baseline"):
        curve_figures([{"step": 5, "eval/a/student/avg": 0.5}], 16)
    equal = {"eval/a/baseline_student/avg": 0.2, "eval/a/baseline_teacher/avg": 0.2}
    with pytest.raises(ValueError, match="no gap"):
        curve_figures([{"step": 0, **equal}, {"step": 5, "eval/a/student/avg": 0.2}], 16)


# -- a run of two steps ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measures") / "run"
    flags = "--max_steps 2 --trainer.optim.lr 0.02 --trainer.scheduler.warmup_steps 0"
    sizes = "--orchestrator.eval.num_examples 16 --orchestrator.eval.interval 1"
    files = ["configs/sokoban.toml", "@", "configs/overlays/pure.toml"]
    assert main(["run", *files, *flags.split(), *sizes.split(), "--output_dir", str(folder)]) == 0
    return folder


def printed(name: str, run: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert measures.main([name, str(run)]) == 0
    figures: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return figures


def test_the_views_are_those_of_the_engine(run: Path) -> None:
    """The log-probs of the sampled tokens are what the engine says when it scores them."""
    model = loaded(run)
    student_NV, teacher_NV = both_views(model, 8)
    prompts = held_out(model, 8)
    answers = sampled_again(model, [prompt.student_ids for prompt in prompts])
    tokens = torch.tensor([token for answer in answers for token in answer])
    for view, role, logprobs_NV in (
        ([p.student_ids for p in prompts], Role.STUDENT, student_NV),
        ([p.teacher_ids for p in prompts], Role.TEACHER, teacher_NV),
    ):
        scored = model.engine.score(view, answers, role)
        expected = torch.tensor([value for row in scored for value in row], dtype=torch.float64)
        found = logprobs_NV.gather(-1, tokens[:, None])[:, 0]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert (student_NV - teacher_NV).abs().max() > 1  # the views differ


def sampled_again(model: Any, view: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    from minidistill.evaluation.kl import sample

    completions = sample(model.config, model.engine, view, "measure", Role.STUDENT, 12)
    return [tuple(completion.token_ids) for completion in completions]


def test_measures_of_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    power = printed("fixed_point", run, capsys)
    assert power["power"] is not None
    assert power["power_kl"] is not None
    assert power["predicted_kl"] is not None
    assert 0 <= power["power_kl"] <= power["predicted_kl"]
    board = json.loads((run / "scoreboard.json").read_text())
    closed = board["gap_closed"]
    first = curve_figures(map(json.loads, (run / "metrics.jsonl").read_text().splitlines()), 64)
    assert printed("curve", run, capsys) == first
    assert first["mean_closed"] is not None
    steps = [
        json.loads(line)["eval/sokoban-env/student/avg"]
        for line in (run / "metrics.jsonl").read_text().splitlines()
        if "student/avg" in line and "baseline" not in line
    ]
    gap = board["baseline_teacher"] - board["baseline_student"]
    shares = [(score - board["baseline_student"]) / gap for score in steps]
    assert shares[-1] == pytest.approx(closed)
    assert first["mean_closed"] == pytest.approx(sum(shares) / 2)


class Reference:
    """Greedy answers by transformers and peft, of a run's base and of its student."""

    def __init__(self, run: Path) -> None:
        model = loaded(run)
        self.tokenizer, self.builder = model.tokenizer, model.builder
        self.prompts = held_out(model, measures.ANSWERED)
        self.longest = model.config.orchestrator.sampling.max_tokens
        base = AutoModelForCausalLM.from_pretrained(resolve(model.source.base), dtype=torch.float32)
        self.model: Any = PeftModel.from_pretrained(base, model.source.weights).eval()

    @torch.no_grad()
    def answer(self, ids: Sequence[int], longest: int, *, adapted: bool) -> str:
        given = torch.tensor([ids])
        with contextlib.nullcontext() if adapted else self.model.disable_adapter():
            out = self.model.generate(
                input_ids=given, attention_mask=torch.ones_like(given), do_sample=False,
                max_new_tokens=longest,
            )  # fmt: skip
        return str(self.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True))


def test_answers_are_those_of_transformers_and_peft(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = Reference(run)
    longest = reference.longest
    expected = [
        {
            "prompt": prompt.task.messages[-1]["content"],
            "base": reference.answer(prompt.student_ids, longest, adapted=False),
            "in_context": reference.answer(prompt.teacher_ids, longest, adapted=False),
            "student": reference.answer(prompt.student_ids, longest, adapted=True),
        }
        for prompt in reference.prompts
    ]
    assert measures.main(["answers", str(run)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"answers": expected}
    assert len({texts["base"] for texts in expected} | {t["in_context"] for t in expected}) > 1


def test_answers_that_stay_the_same(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference = Reference(run)
    same = [
        reference.answer(prompt.student_ids, DRIFT_TOKENS, adapted=False)
        == reference.answer(prompt.student_ids, DRIFT_TOKENS, adapted=True)
        for prompt in unrelated_prompts(reference.builder)
    ]
    assert printed("forgetting", run, capsys)["same_answers"] == sum(same) / len(same)


def test_parts_are_scored_on_the_same_answers(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two measures at once; every second answer is given one of the behaviors, or both."""
    parts = ["Ahoy! A ship.", "A ship. Stay safe!", "Ahoy! A ship. Stay safe!", "A ship."]
    texts = itertools.cycle(parts)
    monkeypatch.setattr(PromptBuilder, "decode", lambda self, ids: next(texts))
    assert measures.main(["parts", "curve", str(run)]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (figures["persona"], figures["sign_off"]) == (0.5, 0.5)
    assert "mean_closed" in figures


def test_larger_boards(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measures, "LEVEL_COUNT", 12)
    figures = printed("larger_boards", run, capsys)
    assert set(measures.LEVELS) == {kind for kind, _ in KINDS}
    for name in measures.LEVELS:
        for view in ("base", "in_context", "student"):
            value = figures[f"{name}_{view}"]
            assert value is not None
            assert value * 12 == pytest.approx(round(value * 12))
    base, in_context, student = (figures[f"boxes_{v}"] for v in ("base", "in_context", "student"))
    assert in_context > base + 0.05
    assert figures["boxes_closed"] == pytest.approx((student - base) / (in_context - base))
    assert figures["highest_base"] == max(figures[f"{name}_base"] for name in measures.LEVELS)


def test_the_kinds_of_levels_are_different_ones() -> None:
    tasks = set()
    for levels in measures.LEVELS.values():
        env = load_environment("sokoban-env", {"num_eval_examples": 4, **levels})
        tasks.add(str(env.eval[0].messages))
    assert len(tasks) == len(measures.LEVELS)
