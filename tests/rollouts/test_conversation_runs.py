"""Conversations in steps, evaluations and runs: limits, faults, records, resuming."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from html import escape
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.conversations import ECHO, MULTI, STEP
from support.lab import make_lab
from support.multi_turn import not_a_number
from support.plain_forward import completion_logits
from support.runs import board, records, run
from torch.nn.functional import one_hot

from minidistill.driver.preflight import check_conversations
from minidistill.envs.registry import load_environments
from minidistill.errors import EXIT_HEALTH, EXIT_OK, EXIT_USAGE, UserError
from minidistill.evaluation.kl import Answer, teacher_kl
from minidistill.reporting.html.read import read_run
from minidistill.reporting.rollout_log import with_inserted
from minidistill.rollouts.async_collector import AsyncCollector
from minidistill.tasks.prompts import PromptBuilder
from minidistill.trainer.token_budget import TokenBudget
from minidistill.types import Completion, Inserted, Role

Configure = Callable[..., Any]

RUN = (
    *MULTI, "--seq_len", "320", "--trainer.scheduler.type", "constant",
    "--orchestrator.eval.num_examples", "4", "--orchestrator.eval.interval", "0",
)  # fmt: skip


class TeacherModel:
    """The model with its adapter off."""

    def __init__(self, model: Any) -> None:
        self.model, self.device = model, model.device

    def __call__(self, **inputs: Any) -> Any:
        with self.model.disable_adapter():
            return self.model(**inputs)


def test_an_evaluation_plays_conversations_with_the_same_seeds(staged: Any) -> None:
    stage = staged(*MULTI, "--orchestrator.eval.batch_size", "3")
    scores = stage.evaluator().run("student", Role.STUDENT, context=False)
    [rewards] = scores.rewards.values()
    assert len(rewards) == 4
    sampled = [c for _, completions, _ in stage.engine.calls for c in completions]
    assert scores.length == sum(len(c.token_ids) for c in sampled) / 4
    assert stage.evaluator().run("student", Role.STUDENT, context=False) == scores


@torch.no_grad()
@pytest.mark.parametrize("holder", ["trainer", "engine"])
def test_the_held_out_kl_is_that_of_whole_conversations(
    staged: Any, monkeypatch: pytest.MonkeyPatch, holder: str
) -> None:
    """Against a plain pass over each. An engine that has the teacher scores the sampled tokens."""
    stage = staged(*ECHO)
    evaluator, policy = stage.evaluator(), stage.lab.policy
    answers = evaluator.student_answers()
    assert evaluator.student_answers() == answers
    monkeypatch.setattr(type(policy), "holds", lambda policy, role: holder == "trainer")
    kl = teacher_kl(
        stage.loaded.config,
        policy,
        stage.engine,
        [*evaluator.held_out(), evaluator.held_out()[0]],
        TokenBudget(),
        answers=[*answers, Answer([], "")],
    )
    assert kl.prompts == [*evaluator.held_out(), evaluator.held_out()[0]]
    assert len(kl.by_prompt.sums) == 5
    assert (kl.by_prompt.sums[4], kl.by_prompt.tokens[4]) == (0, 0)
    assert kl.texts == [*(answer.text for answer in answers), ""]
    for number, answer in enumerate(answers):
        [(prompt, completion)] = answer.samples
        assert len(completion.inserted) == 1
        rows = list(completion.sampled_at)
        student, teacher = (
            completion_logits(model, view, completion.sequence)[rows].log_softmax(-1)
            for model, view in (
                (policy.model, prompt.student_ids),
                (TeacherModel(policy.model), prompt.teacher_ids),
            )
        )
        weights = student.exp()
        if holder == "engine":
            weights = one_hot(torch.tensor(completion.token_ids), weights.shape[1])
        expected = float((weights * (student - teacher)).sum())
        assert kl.by_prompt.sums[number] == pytest.approx(expected, rel=1e-3, abs=1e-4)
        assert kl.by_prompt.tokens[number] == len(completion.token_ids)


def test_a_conversation_of_the_teacher_that_fails_is_not_shown_and_no_more(staged: Any) -> None:
    env = '[{id = "support.multi_turn:load", name = "echo", args = {faults = {9 = "raise"}}}]'
    evaluator = staged("--orchestrator.env", env).evaluator()
    texts = [answer.text for answer in evaluator.teacher_answers()]
    assert [bool(text) for text in texts] == [True, False, True, True]
    with pytest.raises(UserError, match="failed on 1 of 4"):
        evaluator.student_answers()


def test_a_sample_that_is_full_ends_its_conversation(staged: Any) -> None:
    """The second turn of some has no room: their environment is told, and scores what there is."""
    longest = staged(*MULTI)
    first, _ = longest.collect()
    room = max(r.teacher_length for r in first) - 10
    stage = staged(*MULTI, "--seq_len", str(room))
    rollouts, metrics = stage.collect()
    assert metrics["env/errors"] == 0
    assert all(max(r.student_length, r.teacher_length) <= room for r in rollouts)
    cut = [
        (ours, whole)
        for ours, whole in zip(rollouts, first, strict=True)
        if ours.completion.token_ids != whole.completion.token_ids
    ]
    assert cut
    for ours, whole in cut:
        count = len(ours.completion.token_ids)
        assert ours.completion.truncated
        assert ours.completion.token_ids == whole.completion.token_ids[:count]
        assert ours.completion.sequence[-1] == ours.completion.token_ids[-1]
        assert ours.reward is not None


@pytest.mark.parametrize(
    ("fault", "limit", "words"),
    [
        ("raise", "turn_timeout = 30", "RuntimeError: the board is gone"),
        ("NaN", "turn_timeout = 30", "nan, which is not finite"),
        ("hang", "turn_timeout = 0.3", "it took longer than turn_timeout = 0.3 s"),
        ("slow", "episode_timeout = 0.25", "it took longer than episode_timeout = 0.25 s"),
    ],
)
def test_a_failure_in_turn_2_drops_the_conversation_and_is_counted(
    staged: Any, caplog: pytest.LogCaptureFixture, fault: str, limit: str, words: str
) -> None:
    faults = f'args = {{faults = {{3 = "{fault}"}}, count = 8}}'
    env = f'[{{id = "support.multi_turn:load", name = "echo", {limit}, {faults}}}]'
    flags = ("--orchestrator.env", env, "--orchestrator.batch_size", "32")
    stage = staged(*flags, "--orchestrator.max_env_error_frac", "0.125")
    rollouts, metrics = stage.collect()
    assert metrics["env/errors"] == 4
    assert {r.prompt.task.id for r in rollouts} == {"0", "1", "2", "4", "5", "6", "7"}
    assert "4 rollouts dropped: task 3 of echo: " in caplog.text
    assert words in caplog.text
    strict = staged(*flags, "--orchestrator.max_env_error_frac", "0.12")
    with pytest.raises(UserError, match="failed on 4 of 32 rollouts") as caught:
        strict.collect()
    assert caught.value.exit_code == EXIT_HEALTH
    scores = staged(*flags).evaluator().run("student", Role.STUDENT, context=False)
    assert len(scores.rewards["echo"]) == 4


def test_an_error_of_the_engine_in_the_middle_ends_the_conversations(staged: Any) -> None:
    stage = staged(*ECHO, fails_at=1)
    with pytest.raises(UserError, match="the engine died"):
        stage.collect()
    stage.engine.fails_at = None  # after a restart
    stage.engine.calls.clear()
    assert stage.collect()[0] == staged(*ECHO).collect()[0]


def test_single_turns_and_conversations_in_one_step(staged: Any) -> None:
    envs = (
        '[{id = "sokoban-env", args = {num_train_examples = 8, num_eval_examples = 4, rules = '
        '"omit"}}, {id = "support.multi_turn:load", name = "echo"}]'
    )
    stage = staged("--orchestrator.env", envs, "--orchestrator.batch_size", "16")
    rollouts, metrics = stage.collect()
    assert {r.prompt.env for r in rollouts} == {"sokoban-env", "echo"}
    assert [r.sample for r in rollouts] == [0, 1, 2, 3] * 4
    assert {bool(r.completion.inserted) for r in rollouts if r.prompt.env == "echo"} == {True}
    assert not any(r.completion.inserted for r in rollouts if r.prompt.env != "echo")
    assert all(r.reward is not None for r in rollouts)
    assert metrics["env/errors"] == 0
    scores = stage.evaluator().run("student", Role.STUDENT, context=False)
    assert {name: len(rewards) for name, rewards in scores.rewards.items()} == {
        "sokoban-env": 4, "echo": 4,
    }  # fmt: skip


def test_without_rewards_the_environment_still_plays(staged: Any) -> None:
    pure = ("--orchestrator.buffer.skip_verification", "--trainer.loss.adv_tau", "0")
    rollouts, metrics = staged(*ECHO, *pure).collect()
    assert all(r.reward is None and r.advantage == 0 for r in rollouts)
    assert metrics["env/errors"] == 0


def test_an_environment_without_rewards_is_evaluated_for_its_length(staged: Any) -> None:
    pure = ("--orchestrator.buffer.skip_verification", "--trainer.loss.adv_tau", "0")
    stage = staged(*ECHO, *pure)
    environment = stage.environments["echo"].environment.environment
    environment.has_rewards = False
    environment.faults = {task.id: not_a_number for task in environment.eval}
    scores = stage.evaluator().run("student", Role.STUDENT, context=False)
    assert scores.rewards == {}
    assert scores.length > 1


def test_conversations_are_collected_a_step_ahead(staged: Any) -> None:
    stage, plain = staged(*ECHO), staged(*ECHO)
    collector = AsyncCollector(stage.collector, stage.engine)
    try:
        collector.start(1, 0)
        rollouts, metrics = collector.take(1, 0)
        collector.start(2, 0)
        ahead, later = collector.take(2, 1)
    finally:
        collector.close()
    assert rollouts == plain.collect(1)[0]
    assert ahead == plain.collector.collect(plain.engine, 2, 0)[0]
    assert (metrics["async/staleness"], later["async/staleness"]) == (0, 1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("conversations") / "whole"
    assert run(path, *RUN, "--max_steps", "3") == EXIT_OK
    return path


def test_a_run_that_is_continued_is_the_uninterrupted_one(finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "halved"
    assert run(path, *RUN, "--max_steps", "1") == EXIT_OK
    assert run(path, *RUN, "--max_steps", "3", "--resume") == EXIT_OK
    steps = {r["step"]: r for r in records(finished) if "teacher_kl" in r}
    continued = {r["step"]: r for r in records(path) if "teacher_kl" in r}
    assert continued == steps
    assert sorted(steps) == [1, 2, 3]
    assert board(path)["student"] == board(finished)["student"]


def test_the_run_records_conversations(finished: Path) -> None:
    step = finished / "rollouts" / "step_000002"
    lines = [json.loads(line) for line in step.with_suffix(".jsonl").read_text().splitlines()]
    tensors = load_file(step.with_suffix(".safetensors"))
    offsets = tensors["offsets"].tolist()
    assert any(len(line["inserted"]) == 2 for line in lines)
    for number, line in enumerate(lines):
        assert line["part"] == 0
        assert len(line["tokens"]) == offsets[number + 1] - offsets[number]
        assert "world-class" not in line["prompt_text"] + line["completion"]
        for inserted in line["inserted"]:
            assert "[user] " in line["completion"]
            assert inserted["text"].startswith("<|user|>")
            assert 0 < inserted["at"] < len(line["tokens"])
    assert "eval/sokoban-env/baseline_diff" in records(finished)[0]
    assert board(finished)["student"] is not None


def test_whole_conversations_are_shown_side_by_side(finished: Path) -> None:
    """Of the student, of the teacher and of the trained student: on the scoreboard and the page."""
    rows = board(finished)["completions"]
    assert len(rows) == 4
    page = (finished / "report.html").read_text()
    for kind in ("before", "teacher", "after"):
        talks = [row[kind].split("\n[user] ") for row in rows]
        assert all(1 <= len(talk) <= 3 for talk in talks)
        assert kind == "teacher" or any(len(talk) > 1 for talk in talks)
        for talk in talks:
            assert all("#" in reply and "\n\n" in reply for reply in talk[1:])
            assert page.count(escape(talk[-1])) >= 1
    assert "world-class" not in str(rows)


def test_the_display_gets_the_whole_conversation() -> None:
    completion = Completion((1, 2, 3), (0.0,) * 3, "eos", inserted=(Inserted(1, (7, 8)),))
    tokens, kl = with_inserted(completion, lambda ids: [str(id) for id in ids], [0.1, 0.2, 0.3])
    assert tokens == ("1", "7", "8", "2", "3")
    assert kl == (0.1, None, None, 0.2, 0.3)


def test_the_page_shows_what_was_inserted(finished: Path) -> None:
    rollouts = [rollout for _, step in read_run(finished).rollouts for rollout in step]
    shown = [r for r in rollouts if any("<|user|>" in text for text, _ in r.tokens)]
    assert shown
    for rollout in shown:
        for text, kl in rollout.tokens:
            assert (kl is None) == ("<|user|>" in text)


def test_a_template_without_answers_is_refused_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}{% if m['role'] != 'assistant' %}<|{{ m['role'] }}|>"
        "{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    path = tmp_path / "out"
    assert run(path, *RUN, "--model.chat_template", str(template)) == EXIT_USAGE
    assert "does not show answers" in capsys.readouterr().err
    assert not path.exists()


def test_a_teacher_with_another_template_is_refused(configure: Configure) -> None:
    stage = make_lab(configure(*STEP))
    tokenizer = deepcopy(stage.builder.tokenizer)
    tokenizer.chat_template = "Hello. " + str(tokenizer.chat_template)
    builder = PromptBuilder(stage.builder.tokenizer, "Think.", "user", teacher_tokenizer=tokenizer)
    environments = load_environments(configure(*STEP, *ECHO).config.orchestrator.env, "")
    with pytest.raises(UserError, match="a chat template of its own"):
        check_conversations(builder, environments, [])
