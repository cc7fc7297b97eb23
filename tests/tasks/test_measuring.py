"""Prompts that are too long: found before step 1, and refused or left out as asked."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.runs import records
from support.tokenizers import byte_level

from minidistill import cli
from minidistill.envs.jsonl import Line
from minidistill.errors import EXIT_OK, EXIT_USAGE, UserError
from minidistill.tasks.contexts import Choices, Contexts
from minidistill.tasks.lengths import PromptLimit
from minidistill.tasks.measuring import GENERATED, MANY, TRIES, Measurer
from minidistill.tasks.prompts import PromptBuilder
from minidistill.tasks.sampling import TaskSampler
from minidistill.types import Advance, Context, Prompt, Task

LIMIT = PromptLimit(100, 20, "seq_len")


class Env:
    """Tasks whose answers are the lengths of their prompts."""

    def __init__(self, train: Sequence[Task], evaluation: Sequence[Task]) -> None:
        self.train, self.eval = train, evaluation

    def score(self, task: Task, completion: str) -> Any:
        raise AssertionError("nothing is scored")


class Lazy(Sequence[Task]):
    """Tasks that are built when they are asked for, as those of a dataset."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths, self.asked = lengths, []  # type: ignore[var-annotated]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: Any) -> Any:
        self.asked.append(index)
        return task(index, self.lengths[index])


class Generated(Lazy):
    """Tasks that take long to build, so that not every one is measured."""

    def make_tasks(self, indices: Sequence[int], advance: Advance) -> list[Task]:
        return [self[index] for index in indices]


class Builder:
    """Prompts of the lengths that the tasks name."""

    def build(self, env: str, task: Task, *, step: int = 0) -> Prompt:
        return Prompt(env, task, "", "", (1,), (1,) * task.answer)

    def variants(self, env: str, task: Task, chosen: Any = None) -> list[Prompt]:
        return [self.build(env, task)]


def task(index: int, length: int) -> Task:
    return Task(str(index), (), length)


def tasks(*lengths: int) -> list[Task]:
    return [task(index, length) for index, length in enumerate(lengths)]


def measure(env: Env, overlong: Any = "refuse", phase: Any = None) -> Any:
    builder: Any = Builder()
    measurer = Measurer(builder, overlong, phase) if phase else Measurer(builder, overlong)
    return measurer.measure({"e": env}, LIMIT, PromptLimit(100, 50, "seq_len"))


def test_one_prompt_late_in_a_long_list_is_found() -> None:
    with pytest.raises(UserError) as caught:
        measure(Env(tasks(*[10] * 2999, 81), tasks(10)))
    assert "(81 tokens, task 2999 of e)" in caught.value.what
    assert "make 101 tokens, more than seq_len (100)" in caught.value.what
    assert caught.value.where == "task 2999 of e"
    assert (caught.value.exit_code, '"drop"' in caught.value.fix) == (EXIT_USAGE, True)
    assert measure(Env(tasks(*[10] * 2999, 80), tasks(50))).prompts[0].task.id == "0"


def test_each_split_has_its_own_limit_and_all_long_prompts_are_counted() -> None:
    with pytest.raises(UserError, match="3 of 4 prompts are too long"):
        measure(Env(tasks(10), tasks(51, 50, 60, 70)))


def test_long_prompts_are_left_out_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    env = Env(tasks(10, 90, 20, 91), tasks(10))
    measured = measure(env, "drop")
    assert [t.id for t in measured.train["e"]] == ["0", "2"]
    assert measured.eval["e"] is env.eval
    assert [p.task.id for p in measured.prompts] == ["0", "2", "0"]
    assert "left out 2 of 4 prompts of e" in caplog.text
    assert "90 tokens, task 1 of e" in caplog.text
    assert measure(Env(tasks(10), tasks(10)), "drop").train["e"] == tasks(10)
    with pytest.raises(UserError, match="2 of 2 prompts are too long"):
        measure(Env(tasks(90, 90), tasks(10)), "drop")


def test_what_the_teachers_prompts_begin_with() -> None:
    """By environment and in all, without an id of the shortest prompt, or of one left out."""

    class Beginnings(Builder):
        def build(self, env: str, task: Task) -> Prompt:
            beginning = (5, 6, 7) if env == "a" else (5, 6, 8, 8, 8)
            return Prompt(env, task, "", "", (1,), (*beginning, *range(task.answer)))

    builder: Any = Beginnings()
    environments = {"a": Env(tasks(9, 5), tasks(2)), "b": Env(tasks(1, 90), tasks(1))}
    for chosen, expected in (
        ("a", [(5, 6, 7, 0)]),  # the evaluation's prompt is (5, 6, 7, 0, 1)
        ("b", [(5, 6, 8, 8, 8)]),
        ("ab", [(5, 6), (5, 6, 7, 0), (5, 6, 8, 8, 8)]),
    ):
        measurer = Measurer(builder, "drop")
        measured = measurer.measure({e: environments[e] for e in chosen}, LIMIT, LIMIT)
        assert measured.contexts == expected


def test_of_very_many_contexts_every_prompt_is_measured_with_the_longest() -> None:
    """And a few with all, so that what the prompts of each context begin with is known."""
    texts = [f"{'very ' * (7 * i % 50)}quick number {i}. " for i in range(60)]
    made = Contexts(Choices([Context(text, text, text) for text in texts], [1.0] * 60), {})
    builder = PromptBuilder(byte_level(), made, "user")
    built: Counter[str] = Counter()
    build = builder.build

    def counted(env: str, task: Task, *rest: Any, **more: Any) -> Prompt:
        built[task.id] += 1
        return build(env, task, *rest, **more)

    builder.build = counted  # type: ignore[method-assign]
    questions = [Task(str(i), ({"role": "user", "content": "go " * (i + 1)},)) for i in range(40)]
    held_out = [Task("x", ({"role": "user", "content": "stop"},))]
    lengths = [len(build("e", questions[-1], context=Context(text)).teacher_ids) for text in texts]
    room, short = (PromptLimit(max(lengths) + 20 - less, 20, "seq_len") for less in (0, 1))
    measured = Measurer(builder, "refuse").measure({"e": Env(questions, held_out)}, room, room)
    assert [built[str(i)] for i in (0, 10, 20, 30)] == [60] * 4
    assert Counter(built.values()) == {MANY: 36, 60: 5}
    assert measured.context_count == 60
    for text in texts:
        begin = builder.encode(builder.render([{"role": "user", "content": text}]).split(text)[0])
        begin += builder.encode(text)
        assert (
            max(len(ids) for ids in measured.contexts if begin[: len(ids)] == ids) > len(begin) - 4
        )
    with pytest.raises(UserError, match="task 39 of e"):
        Measurer(builder, "refuse").measure({"e": Env(questions, held_out)}, short, short)


def test_tasks_that_are_generated_stay_so() -> None:
    generated = Generated([10] * 1000 + [99])
    measured = measure(Env(generated, tasks(10)))
    assert generated.asked == list(range(GENERATED))
    assert measured.train["e"] is generated
    early = Generated([99, 10, 10])
    with pytest.raises(UserError, match="task 0 of e"):
        measure(Env(early, tasks(10)))
    assert measure(Env(early, tasks(10)), "drop").train["e"] is early
    with pytest.raises(UserError, match="2 of 2 prompts are too long"):
        measure(Env(Generated([99, 99]), tasks(10)), "drop")


def test_a_dataset_is_measured_whole_and_stays_lazy() -> None:
    dataset = Lazy([10] * 100 + [99, 10])
    with pytest.raises(UserError, match="task 100 of e"):
        measure(Env(dataset, tasks(10)))
    before = measure(Env(Lazy([10] * 102), tasks(10))).fingerprint
    measured = measure(Env(dataset, tasks(10)), "drop")
    assert measured.fingerprint != before
    dataset.asked.clear()
    train = measured.train["e"]
    assert (len(train), train[99].id, train[100].id) == (101, "99", "101")
    assert dataset.asked == [99, 101]


def draw(env: Env, step: int, count: int, overlong: Any = "drop", seed: int = 3) -> Any:
    builder: Any = Builder()
    sampler = TaskSampler({"e": env}, seed)
    prompts, dropped = Measurer(builder, overlong).draw(sampler, step, count, LIMIT)
    return [prompt.task.id for prompt in prompts], dropped


def test_prompts_that_are_too_long_are_replaced_as_seed_and_step_say() -> None:
    lengths = [10 if index % 4 == 0 else 99 for index in range(400)]
    env = Env(Generated(lengths), [])
    steps = {step: draw(env, step, 8) for step in range(1, 9)}
    for step in (8, 3, 1):  # whatever was drawn before
        assert draw(env, step, 8) == steps[step]
    assert draw(env, 1, 8, seed=4)[0] != steps[1][0]
    for step, (ids, dropped) in steps.items():
        plain, _ = draw(Env(Generated([10] * 400), []), step, 8)
        assert [lengths[int(id)] for id in ids] == [10] * 8
        # those that fit are kept, in their places
        assert all(a == b for a, b in zip(ids, plain, strict=True) if lengths[int(b)] == 10)
        assert dropped >= sum(lengths[int(id)] == 99 for id in plain)
    with pytest.raises(UserError, match="make 119 tokens") as caught:
        draw(env, 1, 8, "refuse")
    assert '"drop"' in caught.value.fix


def test_a_replacement_is_of_the_same_environment() -> None:
    builder: Any = Builder()
    mixed = {"a": Env(Generated([99, 99, 10] * 30), []), "b": Env(Generated([10] * 90), [])}
    sampler = TaskSampler(mixed, 3)
    for step in range(1, 6):
        prompts, _ = Measurer(builder, "drop").draw(sampler, step, 9, LIMIT)
        assert [p.env for p in prompts] == [name for name, _ in sampler.draw(step, 9)]


def test_the_error_if_no_prompt_fits_is_true() -> None:
    generated = Generated([91, *[95] * 300, 99])
    with pytest.raises(UserError) as caught:
        draw(Env(generated, []), 2, 4)
    assert len(generated.asked) <= (TRIES + 2) * 4
    what, fix = caught.value.what, caught.value.fix
    assert re.search(r"Step 2 drew (\d+) prompts, and \1 of them are too long", what)
    assert "(91 tokens, task 0 of e) plus max_tokens (20) make 111 tokens" in what or "(95" in what
    assert "The step needs 4 with at most 80" in what
    assert "drop" not in fix
    assert "raise seq_len" in fix
    with pytest.raises(UserError) as caught:  # already before the run
        measure(Env(tasks(99), tasks(10)), "drop")
    assert "drop" not in caught.value.fix


def test_the_fingerprint_covers_every_prompt_of_a_list() -> None:
    before = measure(Env(tasks(*[10] * 2500), tasks(10))).fingerprint
    assert measure(Env(tasks(*[10] * 2500), tasks(10))).fingerprint == before
    assert measure(Env(tasks(*[10] * 2499, 11), tasks(10))).fingerprint != before


def test_progress_is_shown() -> None:
    shown: list[Any] = []

    @contextmanager
    def phase(name: str, total: int, unit: str) -> Iterator[Advance]:
        shown.append((name, total, unit))
        yield shown.append

    measure(Env(tasks(10, 10), tasks(10)), phase=phase)
    assert shown == [("measure e", 2, "prompts"), 1, 1, ("measure e", 1, "prompts"), 1]


# -- whole runs --------------------------------------------------------------------------------

RUN = """\
max_steps = 2
seq_len = 256
[trainer.loss]
adv_tau = 0.0
[orchestrator]
batch_size = 8
rollouts_per_example = 2
[orchestrator.sampling]
max_tokens = 4
[orchestrator.buffer]
skip_verification = true
[orchestrator.teacher_model]
context = "Answer in a word.\\n\\n"
[[orchestrator.env]]
id = "{id}"
args = {args}
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """A run on prompts of which one is too long."""
    monkeypatch.chdir(tmp_path)
    prompts = [f"question {i}?" + " again" * (200 if i == 9 else 0) for i in range(12)]
    lines = [json.dumps({"prompt": prompt}) for prompt in prompts]
    Path("prompts.jsonl").write_text("\n".join(lines))

    def run(*flags: str, id: str = "jsonl", args: str = '{ path = "prompts.jsonl" }') -> int:
        Path("run.toml").write_text(RUN.format(id=id, args=args))
        return cli.main(["run", "run.toml", "--output_dir", "out", *flags])

    return run


def test_a_run_names_the_line_before_anything_is_written(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run() == EXIT_USAGE
    assert "where: prompts.jsonl:10\n" in capsys.readouterr().err
    assert not Path("out").exists()


def test_a_run_without_the_long_prompt(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--orchestrator.overlong", "drop", "--max_steps", "3") == EXIT_OK
    assert "left out 1 of 11 prompts of jsonl" in capsys.readouterr().out
    assert [r["prompts/overlong"] for r in records(Path("out")) if "teacher_kl" in r] == [0, 0, 0]
    rollouts = "".join(p.read_text() for p in Path("out/rollouts").glob("*.jsonl"))
    assert "question 8?" in rollouts
    assert "question 9?" not in rollouts


def lazy(long: int) -> Env:
    """An environment that generates its tasks, those from `long` on too long for the runs here."""

    class Messages(Generated):
        def __getitem__(self, index: Any) -> Task:
            text = "again " * (200 if index >= long else 1)
            return Line(str(index), ({"role": "user", "content": f"{index} {text}"},))

    return Env(Messages([0] * 400), Messages([0] * 8))


def test_generated_prompts_are_refused_or_replaced_when_they_are_drawn(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Most steps draw too long prompts only. A resumed run draws the same in their place."""
    lazily = {"id": "test_measuring:lazy", "args": "{ long = 40 }"}
    flags = ("--max_steps", "4", "--seed", "1", "--ckpt.interval", "2")
    assert run(*flags, **lazily) == EXIT_USAGE
    error = capsys.readouterr().err
    assert "of test_measuring:lazy) plus max_tokens (4)" in error
    dropping = (*flags, "--orchestrator.overlong", "drop", "--output_dir", "b")
    assert run(*dropping, **lazily) == EXIT_OK
    steps = [r for r in records(Path("b")) if "teacher_kl" in r]
    assert max(int(r["prompts/overlong"]) for r in steps) >= 4, "a step without one that fits"
    for step in range(1, 5):
        lines = Path(f"b/rollouts/step_{step:06d}.jsonl").read_text().splitlines()
        assert len(lines) == 8
    Path("b/scoreboard.json").unlink()
    Path("b/checkpoints/step_000004").rename("moved")
    assert run(*dropping, "--resume", **lazily) == EXIT_OK
    assert [r for r in records(Path("b")) if "teacher_kl" in r] == steps
