"""Prompts that are too long: found before step 1, and refused or left out as asked."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.runs import records

from minidistill import cli
from minidistill.envs.jsonl import Line
from minidistill.errors import EXIT_OK, EXIT_USAGE, UserError
from minidistill.tasks.lengths import PromptLimit
from minidistill.tasks.measuring import GENERATED, Measurer
from minidistill.types import Advance, Prompt, Task

LIMIT = PromptLimit(100, 20, "seq_len")


class Env:
    """Tasks whose answers are the lengths of their prompts."""

    def __init__(self, train: Sequence[Task], evaluation: Sequence[Task]) -> None:
        self.train, self.eval = train, evaluation

    def score(self, task: Task, completion: str) -> Any:
        raise AssertionError("nothing is scored")


class Generated(Sequence[Task]):
    """Tasks that are built when they are asked for."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths, self.asked = lengths, []  # type: ignore[var-annotated]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: Any) -> Any:
        self.asked.append(index)
        return task(index, self.lengths[index])


class Builder:
    """Prompts of the lengths that the tasks name."""

    def build(self, env: str, task: Task) -> Prompt:
        return Prompt(env, task, "", "", (1,), (1,) * task.answer)


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
    """An environment that generates its tasks, some of them too long for the test's runs."""

    class Messages(Generated):
        def __getitem__(self, index: Any) -> Task:
            text = "again " * (200 if index % 40 >= long else 1)
            return Line(str(index), ({"role": "user", "content": f"{index} {text}"},))

    return Env(Messages([0] * 400), Messages([0] * 8))


def test_generated_prompts_are_refused_or_left_out_when_they_are_drawn(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    lazily = {"id": "test_measuring:lazy", "args": "{ long = 32 }"}
    flags = ("--max_steps", "8", "--seed", "1")
    assert run(*flags, **lazily) == EXIT_USAGE
    error = capsys.readouterr().err
    assert "of test_measuring:lazy) plus max_tokens (4)" in error
    assert run(*flags, "--orchestrator.overlong", "drop", "--output_dir", "b", **lazily) == EXIT_OK
    steps = [r for r in records(Path("b")) if "teacher_kl" in r]
    dropped = [int(r["prompts/overlong"]) for r in steps]
    assert sum(dropped) > 0
    for step, count in enumerate(dropped, 1):
        lines = Path(f"b/rollouts/step_{step:06d}.jsonl").read_text().splitlines()
        assert len(lines) == 8 - 2 * count
