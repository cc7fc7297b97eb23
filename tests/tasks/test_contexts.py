"""Which context the teacher reads: of the environment, the row, drawn ones, and examples."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from minidistill.config import load_config
from minidistill.envs import load_environment
from minidistill.envs.jsonl import Line
from minidistill.errors import EXIT_USAGE, UserError
from minidistill.tasks.contexts import Contexts
from minidistill.tasks.lengths import PromptLimit
from minidistill.tasks.measuring import KEPT, Measurer
from minidistill.tasks.sampling import ROUND, TaskSampler
from minidistill.types import Context, Prompt, Task

TOML = """
[orchestrator]
batch_size = 4
rollouts_per_example = 2
[orchestrator.sampling]
max_tokens = 8
[orchestrator.teacher_model]
{teacher}
"""


@pytest.fixture(autouse=True)
def _working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(count: int, path: str = "rows.jsonl", **keys: Any) -> None:
    rows = [{"prompt": f"p{i}", "answer": f"a{i}", "hint": f"h{i}"} | keys for i in range(count)]
    Path(path).write_text("\n".join(map(json.dumps, rows)))


def load(teacher: str, *tables: str) -> Any:
    Path("run.toml").write_text(TOML.format(teacher=teacher) + "\n".join(tables))
    return load_config(["run.toml"]).config


def env(name: str, args: str = "", text: str = "") -> str:
    args = f'path = "rows.jsonl"{args}'
    return f'[[orchestrator.env]]\nid = "dataset"\nname = "{name}"\nargs = {{ {args} }}\n{text}\n'


def made(config: Any) -> tuple[Contexts, dict[str, Any]]:
    envs = {e.name: load_environment(e.id, e.args) for e in config.orchestrator.env}
    return Contexts.of(config, envs, envs), envs


def task(id: str, context: str | None = None) -> Task:
    return Task(id, ({"role": "user", "content": id},), context=context)


def refused(teacher: str, *tables: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        made(load(teacher, *tables))
    assert caught.value.exit_code == EXIT_USAGE
    errors = getattr(caught.value, "problems", [caught.value])
    return [f"{error.what} @ {error.where}" for error in errors]


def test_an_environment_has_its_own_context_or_the_teachers() -> None:
    write(20)
    Path("own.txt").write_text("From a file. ")
    tables = [env("a"), env("b", text='context = "For b. "'), env("c", text='context = ""')]
    config = load('context = "For all. "', *tables, env("d", text='context_file = "own.txt"'))
    contexts, _ = made(config)
    texts = {name: contexts.draw(name, task("t")).text for name in "abcd"}
    assert texts == {"a": "For all. ", "b": "For b. ", "c": "", "d": "From a file. "}
    assert contexts.draw("unrelated", task("t")).text == "For all. "
    assert [contexts.draw(name, task("t")).name for name in "ab"] == ["context", "b"]
    assert not contexts.are_drawn


def test_a_file_named_in_a_flag_beats_the_context_of_an_environment() -> None:
    write(20)
    Path("own.txt").write_text("From a file. ")
    load("", env("a", text='context = "x"'))
    flag = ["--orchestrator.env.0.context_file", "own.txt"]
    loaded = load_config(["run.toml", *flag])
    assert loaded.config.orchestrator.env[0].context == "From a file. "
    assert loaded.provenance["orchestrator.env.0.context"] == flag[0]


def test_a_rows_context_stands_at_its_mark_or_at_the_end() -> None:
    write(20)
    own = ', context_column = "hint"'
    config = load(
        'context = "Rules. "',
        env("end", own),
        env("mark", own, 'context = "Read {context}! {other}"'),
        env("none"),
    )
    contexts, envs = made(config)
    row = envs["end"].train[0]
    number = row.messages[0]["content"][1:]
    assert contexts.draw("end", row).text == f"Rules. h{number}"
    assert contexts.draw("mark", row).text == f"Read h{number}! {{other}}"
    assert contexts.draw("end", row).name == f"end/{row.id}"
    assert contexts.draw("none", envs["none"].train[0]).text == "Rules. "
    # what a row says is never read as a mark
    assert contexts.draw("mark", task("t", "{context}{examples}")).text.startswith(
        "Read {context}{examples}!"
    )
    with pytest.raises(UserError, match=r"task t of mark: \{context\} is in the context"):
        contexts.draw("mark", task("t"))
    # in a context for all, which may be a template of another program, it is a part of the text
    assert Contexts.single("Say {context}.").draw("e", task("t")).text == "Say {context}."


def test_a_row_without_the_context_of_its_column_is_refused() -> None:
    write(3)
    rows = Path("rows.jsonl").read_text().replace('"h1"', "null")
    Path("rows.jsonl").write_text(rows)
    [error] = refused('context = "x"', env("a", ', context_column = "hint"'))
    assert error == "the row has no `hint` @ rows.jsonl:2"


CHOICES = """
[[orchestrator.env.contexts]]
context = "Short. "
name = "short"
[[orchestrator.env.contexts]]
context_file = "long.txt"
weight = 3
"""


def test_several_contexts_are_drawn_by_weight_and_step() -> None:
    write(20)
    Path("long.txt").write_text("Long. ")
    contexts, _ = made(load("", env("a", text=CHOICES)))
    assert contexts.are_drawn
    drawn = [contexts.draw("a", task("t"), step) for step in range(2000)]
    assert [contexts.draw("a", task("t"), step) for step in range(2000)] == drawn
    counts = Counter((context.name, context.text) for context in drawn)
    assert counts.keys() == {("a/short", "Short. "), ("a/2", "Long. ")}
    assert 430 < counts["a/short", "Short. "] < 570  # 500 ± 3.6 standard deviations
    by_task = {contexts.draw("a", task(str(i)), 1).name for i in range(40)}
    assert by_task == {"a/short", "a/2"}
    assert [c.text for c in contexts.every("a", task("t"))] == ["Short. ", "Long. "]


EXAMPLES = '[orchestrator.env.examples]\npath = "{path}"\nk = {k}\n'


def questions(text: str) -> list[str]:
    return [line.partition(" = ")[0] for line in text.splitlines()]


@pytest.mark.parametrize("per_prompt", ["true", "false"])
def test_examples_are_never_the_prompts_own_row_or_held_out(per_prompt: str) -> None:
    write(12)
    text = EXAMPLES.format(path="rows.jsonl", k=5) + f"per_prompt = {per_prompt}\n"
    text += 'template = "{prompt} = {answer}\\n"\n'
    tables = env("a", ", num_eval_examples = 3", text)
    contexts, envs = made(load('context = "So:\\n{examples}---\\n"', tables))
    again, _ = made(load('context = "So:\\n{examples}---\\n"', tables))
    held_out = {row.messages[0]["content"] for row in envs["a"].eval}
    chosen = {}
    for row in [*envs["a"].train, *envs["a"].eval]:
        context = contexts.draw("a", row, 1)
        assert context == contexts.draw("a", row, 7) == again.draw("a", row)
        lines = context.text.removeprefix("So:\n").removesuffix("---\n")
        shown = questions(lines)
        assert len(set(shown)) == 5
        assert lines == "".join(f"{name} = a{name[1:]}\n" for name in shown)
        assert not {row.messages[0]["content"], *held_out} & set(shown)
        chosen[row.id] = tuple(shown)
    of_held_out = {chosen[row.id] for row in envs["a"].eval}
    assert len(of_held_out) == (3 if per_prompt == "true" else 1)


def test_unusable_examples_are_refused() -> None:
    write(12)
    few = EXAMPLES.format(path="rows.jsonl", k=11)
    [error] = refused('context = "x"', env("a", text=few))
    assert "rows.jsonl has 11 different prompts that are not held out, too few" in error
    write(12, "bare.jsonl", answer=None)
    [error] = refused('context = "x"', env("a", text=EXAMPLES.format(path="bare.jsonl", k=2)))
    assert error == "this example has no answer @ bare.jsonl:1"
    [error] = refused('context = "x"', env("a", text=EXAMPLES.format(path="absent.jsonl", k=2)))
    assert error.endswith("@ orchestrator.env.examples.path")
    text = EXAMPLES.format(path="rows.jsonl", k=2) + "args = { reward = 1 }\n"
    assert "do not take 'reward'" in refused('context = "x"', env("a", text=text))[0]


@pytest.mark.parametrize(
    ("teacher", "tables", "what"),
    [
        ("", [env("a")], "context is empty, so there is nothing to distill"),
        ("", [env("a"), env("b", text='context = "x"')], "'a' has no context of its own"),
        ("", [env("a", text='context = " "')], "the context of every environment is empty"),
        ("", [env("a", text=f'context = "x"\n{CHOICES}')], "both context and contexts are set"),
        ("", [env("a", text='contexts = [{ name = "n" }]')], "one of the contexts is empty"),
        (
            "",
            [env("a", text='contexts = [{ context = "x", name = "2" }, { context = "y" }]')],
            "2 contexts are named '2'",
        ),
        (
            'context = "x"',
            [env("a", text="weight = 1"), env("b")],
            "'b' has no weight, and other environments have one",
        ),
        (
            'context = "x"',
            [
                env("a"),
                '[orchestrator.eval]\n[[orchestrator.eval.env]]\nid = "dataset"\nname = "a"\n'
                'args = { path = "rows.jsonl" }\ncontext = "y"\nweight = 2',
            ],
            "'a' has other contexts in evaluation than in training",
        ),
    ],
)  # fmt: skip
def test_contexts_that_contradict_each_other_are_refused(
    teacher: str, tables: list[str], what: str
) -> None:
    write(12)
    Path("long.txt").write_text("Long. ")
    assert any(what in error for error in refused(teacher, *tables))


class Builder:
    """Prompts of 1,000 contexts of two groups, which have a beginning in common."""

    def variants(self, env: str, task: Task, chosen: Any = None) -> list[Prompt]:
        number = int(task.id[1:])
        context = Context(f"text {number}", f"{env}/{number}", "ab"[number % 2])
        if number == 7:
            context = Context("", group="b")
        teacher = (*range(30 + number % 2), 100 + number, 1)
        return [Prompt(env, task, "", "", (1,), teacher, context=context)]


def test_what_a_thousand_contexts_have_in_common_is_known_before_the_first_step() -> None:
    env: Any = Env("e", 900)
    env.eval = [task(f"e{i}") for i in range(900, 1000)]
    builder: Any = Builder()
    limit = PromptLimit(100, 20, "seq_len")
    measured = Measurer(builder, "refuse").measure({"e": env}, limit, limit)
    assert measured.contexts == [tuple(range(30)), tuple(range(31))]
    assert measured.context_count == 999
    assert [context.group for context in measured.shown[:4]] == ["a", "b", "a", "b"]
    assert len(measured.shown) == 2 * KEPT
    assert all(context.text for context in measured.shown)


# -- weights -----------------------------------------------------------------------------------


class Env:
    def __init__(self, name: str, size: int) -> None:
        self.train = [task(f"{name}{i}") for i in range(size)]
        self.eval: list[Task] = []

    def score(self, task: Task, completion: str) -> Any:
        raise AssertionError("nothing is scored")


def sampler(weights: dict[str, float] | None, **sizes: int) -> TaskSampler:
    return TaskSampler({name: Env(name, size) for name, size in sizes.items()}, 3, None, weights)


def test_weights_decide_how_often_an_environment_is_drawn() -> None:
    tasks = sampler({"a": 3, "b": 1}, a=7, b=400)
    drawn = [pair for step in range(1, 501) for pair in tasks.draw(step, 4)]
    assert Counter(name for name, _ in drawn) == {"a": 1500, "b": 500}
    part = Counter(name for name, _ in drawn[:200])
    assert abs(part["a"] - 150) <= 2
    # each environment's tasks come once before one of them comes again
    of_a = [task.id for name, task in drawn if name == "a"]
    assert all(len(set(of_a[i : i + 7])) == 7 for i in range(0, 1400, 7))
    of_b = [task.id for name, task in drawn if name == "b"]
    assert len(set(of_b[:400])) == 400
    assert len(set(of_b[400:])) == 100


def test_what_is_drawn_with_weights_depends_on_the_step_alone() -> None:
    weights = {"a": 0.2, "b": 0.5, "c": 0.01}
    tasks, other = sampler(weights, a=5, b=9, c=2), sampler(weights, a=5, b=9, c=2)
    expected = {step: tasks.draw(step, 16) for step in range(1, 400)}
    for step in (390, 3, 200, 4):
        assert [(n, t.id) for n, t in other.draw(step, 16)] == [
            (n, t.id) for n, t in expected[step]
        ]
    assert len({name for pairs in expected.values() for name, _ in pairs}) == 3


def test_small_weights_are_drawn_in_each_round() -> None:
    tasks = sampler({"a": 1e-9, "b": 1.0}, a=2, b=2)
    drawn = Counter(name for name, _ in tasks.draw(1, 2 * ROUND))
    assert drawn == {"a": 1, "b": 2 * ROUND - 1}


def test_without_weights_each_task_is_drawn_once_an_epoch() -> None:
    drawn = [t.id for _, t in sampler(None, a=3, b=5).draw(1, 16)]
    assert len(set(drawn[:8])) == len(set(drawn[8:])) == 8
    assert Line("x", (), "y") == Line("x", (), "y", context=None)
