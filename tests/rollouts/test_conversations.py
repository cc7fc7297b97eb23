"""Conversations with an engine: what is trained on, what the two roles read, and faults."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.lab import Lab, cpu_placement, make_lab
from support.objective_reference import objective
from support.plain_forward import completion_logits
from support.runs import board, records, run

from minidistill.envs.isolated import close_environments
from minidistill.envs.registry import load_environments
from minidistill.errors import EXIT_HEALTH, EXIT_OK, EXIT_USAGE, UserError
from minidistill.evaluation.evaluator import Evaluator
from minidistill.reporting.html.read import read_run
from minidistill.reporting.terminal import open_display
from minidistill.rollouts.collector import Collector
from minidistill.run.preflight import check_conversations
from minidistill.tasks.prompts import PromptBuilder
from minidistill.tasks.rewards import with_advantages
from minidistill.types import Completion, Inserted, Prompt, Reward, Role, Rollout, Task

Configure = Callable[..., Any]
ARGS = "--orchestrator.env.0.args."
MULTI = (f"{ARGS}mode", "multi", f"{ARGS}max_turns", "3")
STEP = (
    "--orchestrator.batch_size", "8", "--orchestrator.rollouts_per_example", "4",
    f"{ARGS}num_train_examples", "8", f"{ARGS}num_eval_examples", "4", "--seq_len", "320",
)  # fmt: skip
ECHO = ("--orchestrator.env", '[{id = "support.multi_turn:load", name = "echo"}]')


class Recording:
    """An engine that keeps what it was asked and what it sampled."""

    def __init__(self, engine: Any, fails_at: int | None = None) -> None:
        self.engine, self.fails_at = engine, fails_at
        self.calls: list[tuple[Sequence[Any], Sequence[Completion], Role]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def generate(self, requests: Any, params: Any, role: Role, *rest: Any) -> list[Completion]:
        if len(self.calls) == self.fails_at:
            raise UserError("the engine died", "there", "start it again")
        completions: list[Completion] = self.engine.generate(requests, params, role, *rest)
        self.calls.append((requests, completions, role))
        return completions


class Stage:
    """A lab with a collector of multi-turn environments."""

    def __init__(self, loaded: Any, fails_at: int | None = None) -> None:
        self.loaded, self.lab = loaded, make_lab(loaded)
        self.engine: Any = Recording(self.lab.engine, fails_at)
        self.environments = load_environments(loaded.config.orchestrator.env, "")
        self.display = open_display()
        self.placement = cpu_placement(loaded)
        self.collector = self.collecting()

    def collecting(self, **changes: Any) -> Collector:
        placement = replace(self.placement, **changes)
        return Collector(
            self.loaded.config, self.environments, self.lab.builder, placement, self.display
        )

    def collect(self, step: int = 1) -> tuple[list[Rollout], dict[str, float]]:
        return self.collector.collect(self.engine, step, step - 1)

    def evaluator(self) -> Evaluator:
        prompts = {
            name: [self.lab.builder.build(name, task) for task in env.eval]
            for name, env in self.environments.items()
        }
        return Evaluator(
            self.loaded.config,
            self.environments,
            prompts,
            self.lab.builder,
            self.engine,
            self.display,
            self.placement.max_length,
        )


@pytest.fixture
def staged(configure: Configure) -> Any:
    stages: list[Stage] = []

    def make(*flags: str, **options: Any) -> Stage:
        stages.append(Stage(configure(*STEP, *flags), **options))
        return stages[-1]

    yield make
    for stage in stages:
        close_environments(stage.environments.values())


def conversation_ids(rollout: Rollout) -> list[int]:
    """The student's whole sequence, joined as the docstrings say, and not by the code's own."""
    ids, left = [*rollout.prompt.student_ids], list(rollout.completion.token_ids)
    taken = 0
    for inserted in rollout.completion.inserted:
        ids += left[taken : inserted.at]
        ids += inserted.ids
        taken = inserted.at
    return ids + left[taken:]


def test_trained_tokens_are_those_sampled_and_those_inserted(staged: Any) -> None:
    stage = staged(*MULTI)
    rollouts, metrics = stage.collect()
    assert len(rollouts) == 8
    assert len(stage.engine.calls) == 3
    assert metrics["turns/restarts"] == 0
    assert 1 < metrics["turns/mean"] <= 3
    assert metrics["env/errors"] == 0
    turns = [
        (request, completion)
        for requests, completions, role in stage.engine.calls
        for request, completion in zip(requests, completions, strict=True)
    ]
    assert len({request.seed for request, _ in turns}) == len(turns)
    used = 0
    for rollout in rollouts:
        whole = conversation_ids(rollout)
        own = [
            (request.prompt_ids, completion)
            for request, completion in turns
            if [*request.prompt_ids, *completion.token_ids]
            == whole[: len(request.prompt_ids) + len(completion.token_ids)]
            and completion.logprobs[0] in rollout.completion.logprobs
        ]
        assert tuple(t for _, c in own for t in c.token_ids) == rollout.completion.token_ids
        assert tuple(p for _, c in own for p in c.logprobs) == rollout.completion.logprobs
        assert len(own) == 1 + len(rollout.completion.inserted)
        for (prompt, completion), inserted in zip(own, rollout.completion.inserted, strict=False):
            after = len(prompt) + len(completion.token_ids)
            assert tuple(whole[after : after + len(inserted.ids)]) == inserted.ids
        used += len(own)
    assert used == len(turns)
    assert any(len(r.completion.inserted) == 2 for r in rollouts)


def test_the_same_step_is_the_same_conversations(staged: Any) -> None:
    stage, again = staged(*MULTI), staged(*MULTI)
    assert stage.collect()[0] == again.collect()[0]
    assert stage.collect(2)[0] != again.collect(1)[0]


def plain_loss(rollouts: Sequence[Rollout], lab: Lab) -> torch.Tensor:
    """One rollout at a time, with transformers' logits, of the sampled tokens only."""
    loss, total = torch.zeros(()), sum(len(r.completion.token_ids) for r in rollouts)
    for rollout in rollouts:
        prompt, whole = rollout.prompt, conversation_ids(rollout)
        after = whole[len(prompt.student_ids) :]
        inserted: set[int] = set()
        shift = 0
        for each in rollout.completion.inserted:
            inserted |= set(range(each.at + shift, each.at + shift + len(each.ids)))
            shift += len(each.ids)
        rows = [i for i in range(len(after)) if i not in inserted]
        model = lab.policy.model
        with torch.no_grad(), model.disable_adapter():
            teacher_NV = completion_logits(model, prompt.teacher_ids, after)[rows]
        student_NV = completion_logits(model, prompt.student_ids, after)[rows]
        count = len(rows)
        result = objective(
            student_NV,
            teacher_NV,
            torch.tensor(rollout.completion.token_ids),
            advantage_N=torch.full((count,), rollout.advantage),
            sampler_logp_N=torch.tensor(rollout.completion.logprobs),
            estimator="full",
        )
        loss = loss + result.loss.sum() / total
    return loss


@pytest.mark.parametrize(
    "flags", [(), ("--trainer.packing",), ("--model.attn", "varlen")], ids=" ".join
)
def test_the_gradient_leaves_out_what_was_inserted(staged: Any, flags: tuple[str, ...]) -> None:
    stage = staged(*MULTI, *flags, "--trainer.loss.kl_clip", "off")
    lab = stage.lab
    lab.rollouts = stage.collect()[0]
    assert any(r.completion.inserted for r in lab.rollouts)
    loss = plain_loss(lab.rollouts, lab)
    parameters = dict(lab.policy.parameters)
    expected = torch.autograd.grad(loss, list(parameters.values()))
    gradients = lab.gradients()
    scale = max(float(g.abs().max()) for g in expected)
    assert scale > 1e-3
    for name, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(
            gradients[name], gradient, rtol=2e-3, atol=1e-5 * max(scale, 1.0)
        )
    result = lab.trainer.step(lab.rollouts, 1, lambda count: None)
    assert result.metrics["loss/total"] == pytest.approx(float(loss.detach()), rel=1e-4, abs=1e-6)
    assert result.metrics["kl/sampler_mismatch"] < 1e-8, "the positions are those of the sampler"
    for rollout, figures in zip(result.rollouts, result.tokens, strict=True):
        assert len(figures.kl) == len(rollout.completion.token_ids)


def test_an_engine_scores_the_sampled_tokens_of_the_same_sequence(staged: Any) -> None:
    stage = staged(*MULTI)
    teacher = replace(stage.placement.teacher, scorer="engine")
    stage.collector = stage.collecting(teacher=teacher)
    scored, _ = stage.collect()
    result = stage.lab.trainer.step(
        [replace(r, teacher=None) for r in scored], 1, lambda count: None
    )
    for rollout, figures in zip(scored, result.tokens, strict=True):
        assert rollout.teacher is not None
        assert [*rollout.teacher.logprobs] == pytest.approx(figures.teacher_logp.tolist(), abs=1e-4)


def test_likeliest_ids_are_scored_at_the_sampled_tokens_alone(staged: Any) -> None:
    stage = staged("--trainer.loss.estimator", "top_k", "--trainer.loss.top_k", "2")
    teacher = replace(stage.placement.teacher, scorer="engine")
    collector = stage.collecting(teacher=teacher)
    asked: list[Any] = []

    class Scoring(Recording):
        def score_ids(self, prompts: Any, sequences: Any, ids: Any, role: Role) -> Any:
            asked.extend([prompts, sequences, ids, role])
            return [-rows.astype(np.float32) for rows in ids]

    completion = Completion(
        (1, 2, 3),
        (-1.0,) * 3,
        "eos",
        top_ids=np.array([[11, 12], [21, 22], [31, 32]]),
        inserted=(Inserted(1, (7, 8)),),
    )
    prompt = stage.lab.rollouts[0].prompt
    engine: Any = Scoring(stage.lab.engine)
    [rollout] = collector.score_with_teacher(engine, [Rollout(prompt, 0, completion, "")])
    assert asked[:2] == [[prompt.teacher_ids], [(1, 7, 8, 2, 3)]]
    assert asked[2][0].tolist() == [[1, 11, 12], [7, 7, 7], [8, 8, 8], [2, 21, 22], [3, 31, 32]]
    assert rollout.teacher is not None
    assert rollout.teacher.logprobs == [-1, -2, -3]
    assert rollout.teacher.top is not None
    assert rollout.teacher.top.tolist() == [[-11, -12], [-21, -22], [-31, -32]]


def test_the_teacher_reads_the_context_once_and_the_student_never(staged: Any) -> None:
    stage = staged(*ECHO)
    rollouts, _ = stage.collect()
    context = stage.loaded.config.orchestrator.teacher_model.context.strip()

    def times(ids: Sequence[int]) -> int:
        return str(stage.lab.builder.tokenizer.decode(list(ids))).count(context)

    for rollout in rollouts:
        whole = conversation_ids(rollout)
        assert times(whole) == 0
        assert times([*rollout.prompt.teacher_ids, *rollout.completion.sequence]) == 1
    for role, context_added, expected in (
        (Role.STUDENT, False, 0), (Role.TEACHER, True, 1), (Role.STUDENT, True, 1),
    ):  # fmt: skip
        stage.engine.calls.clear()
        stage.evaluator().run("x", role, context=context_added)
        assert len(stage.engine.calls) == 2
        for requests, _, asked in stage.engine.calls:
            assert asked is role
            assert {times(r.prompt_ids) for r in requests} == {expected}


def test_an_evaluation_plays_conversations_with_the_same_seeds(staged: Any) -> None:
    stage = staged(*MULTI, "--orchestrator.eval.batch_size", "3")
    scores = stage.evaluator().run("student", Role.STUDENT, context=False)
    [rewards] = scores.rewards.values()
    assert len(rewards) == 4
    sampled = [c for _, completions, _ in stage.engine.calls for c in completions]
    assert scores.length == sum(len(c.token_ids) for c in sampled) / 4
    assert stage.evaluator().run("student", Role.STUDENT, context=False) == scores


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


@pytest.mark.parametrize("fault", ["raise", "NaN"])
def test_a_failure_in_turn_2_drops_the_conversation_and_is_counted(
    staged: Any, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    faults = f'args = {{faults = {{3 = "{fault}"}}, count = 8}}'
    env = f'[{{id = "support.multi_turn:load", name = "echo", {faults}}}]'
    flags = ("--orchestrator.env", env, "--orchestrator.batch_size", "32")
    stage = staged(*flags, "--orchestrator.max_env_error_frac", "0.125")
    rollouts, metrics = stage.collect()
    assert metrics["env/errors"] == 4
    assert {r.prompt.task.id for r in rollouts} == {"0", "1", "2", "4", "5", "6", "7"}
    assert "4 rollouts dropped: task 3 of echo: " in caplog.text
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


def test_each_sample_of_a_conversation_has_its_advantage_and_counts_once() -> None:
    prompt, later = (Prompt("env", Task(id, ()), "", "", (1, 2), (1, 2)) for id in ("t", "t"))
    end = Completion((3,), (-1.0,), "eos")

    def sample(number: int, value: float, part: int = 0) -> Rollout:
        of = later if part else prompt
        return Rollout(of, number, end, "", Reward(value), part=part, first=prompt)

    group = [sample(0, 1.0), sample(0, 1.0, 1), sample(0, 1.0, 2), sample(1, 0.0)]
    assert [r.advantage for r in with_advantages(group, False)] == [0.5, 0.5, 0.5, -0.5]
    assert [r.advantage for r in with_advantages(group, True)] == [1, 1, 1, -1]


def test_the_sequence_of_a_completion() -> None:
    completion = Completion(
        (1, 2, 3, 4), (0.0,) * 4, "eos", inserted=(Inserted(1, (7, 8)), Inserted(3, (9,)))
    )
    assert completion.sequence == (1, 7, 8, 2, 3, 9, 4)
    assert completion.sampled_at == (0, 3, 4, 6)


def test_a_template_that_forgets_makes_a_sample_of_each_turn(
    staged: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ loop.length }}{{ m['content'] }}<|end|>"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    stage = staged(*ECHO)
    tokenizer = stage.lab.builder.tokenizer
    tokenizer.chat_template = template
    rollouts, metrics = stage.collect()
    assert metrics["turns/restarts"] == 1
    assert [(r.sample, r.part) for r in rollouts] == [
        (sample, part) for _ in range(2) for sample in range(4) for part in range(2)
    ]
    assert not any(r.completion.inserted for r in rollouts)
    for first, second in zip(rollouts[::2], rollouts[1::2], strict=True):
        assert first.advantage == second.advantage
        assert first.reward is second.reward
        assert second.prompt.student_text.startswith("<|user|>3Solve this puzzle.")
        assert first.text in second.prompt.student_text
        assert "world-class" not in second.prompt.student_text
        assert second.prompt.teacher_text.count("world-class") == 1
    stage.lab.rollouts = rollouts
    result = stage.lab.trainer.step(rollouts, 1, lambda count: None)
    values = [r.reward.value for r in rollouts[::2]]
    assert result.metrics["reward/mean"] == pytest.approx(sum(values) / len(values))


RUN = (*MULTI, "--seq_len", "320", "--trainer.scheduler.type", "constant")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("conversations") / "whole"
    assert run(path, *RUN, "--max_steps", "4") == EXIT_OK
    return path


def test_a_run_that_is_continued_is_the_uninterrupted_one(finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "halved"
    assert run(path, *RUN, "--max_steps", "2") == EXIT_OK
    assert run(path, *RUN, "--max_steps", "4", "--resume") == EXIT_OK
    steps = {r["step"]: r for r in records(finished) if "teacher_kl" in r}
    continued = {r["step"]: r for r in records(path) if "teacher_kl" in r}
    assert continued == steps
    assert sorted(steps) == [1, 2, 3, 4]
    assert board(path)["student"] == board(finished)["student"]


def test_the_run_records_conversations(finished: Path) -> None:
    step = finished / "rollouts" / "step_000003"
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
