"""The rewards of Sokoban answers, and the environment's arguments."""

import inspect
from typing import Any, Literal

import pytest
from support.sokoban import tagged

from minidistill.envs.sokoban import SokobanEnv, level_set, load
from minidistill.envs.sokoban.board import RG, XSB, Board
from minidistill.envs.sokoban.levels import Level, LevelMaker
from minidistill.errors import EXIT_USAGE, UserError
from minidistill.tasks.sampling import TaskSampler
from minidistill.types import Reward, Task


def test_the_prompt_asks_for_the_accepted_format() -> None:
    formats: tuple[Literal["tag", "bare"], ...] = ("tag", "bare")
    for answer in formats:
        env = load(num_train_examples=1, num_eval_examples=1, answer=answer)
        task = env.train[0]
        moves = task.answer.solution
        requested = tagged(moves) if "<answer>" in task.messages[0]["content"] else moves
        other = moves if requested != moves else tagged(moves)
        assert env.score(task, requested).value == 1.0
        assert env.score(task, other).value == 0.0


@pytest.mark.parametrize(
    ("symbols", "table", "separator"),
    [
        ("xsb", XSB, ""),
        ("rg", RG, " "),
        (dict(reversed(RG.items())), RG, ""),
        (dict(zip(XSB, ["██", "me", "ME", "[]", "<>", "..", "  "], strict=True)), None, ""),
    ],
)
def test_symbols(symbols: Any, table: dict[str, str] | None, separator: str) -> None:
    env = load(num_train_examples=2, num_eval_examples=1, symbols=symbols)
    table = table or symbols
    for task in env.train:
        text = task.messages[0]["content"]
        assert text.endswith("\n\n" + Board.parse(task.answer.board).render(table, separator))
        assert f"{table['wall']} wall, {table['player']} player, " in text


def score(board: str, solution: str, answer: str, **weights: float) -> Reward:
    env = load(num_train_examples=1, num_eval_examples=1, weights=weights)
    return env.score(Task("t", (), Level(board, solution)), tagged(answer))


@pytest.mark.parametrize(
    ("answer", "solved", "on_goal", "shortness", "illegal", "deadlock"),
    [
        ("R", 1, 1, 1.0, 0, 0),
        ("LR", 1, 1, 0.5, 1, 0),
        ("UDLR", 1, 1, 0.25, 3, 0),
        ("RL", 1, 1, 0.5, 0, 0),
        ("RR", 0, 0, 0.0, 0, 0),
        ("RRR", 0, 0, 0.0, 0, 1),
        ("RRRR", 0, 0, 0.0, 1, 1),
        ("L", 0, 0, 0.0, 1, 0),
    ],
)
def test_rewards_of_a_corridor(
    answer: str, solved: float, on_goal: float, shortness: float, illegal: int, deadlock: int
) -> None:
    board = "#######\n#@$.  #\n#######"
    assert score(board, "R", answer) == Reward(
        solved,
        {
            "solved": solved,
            "boxes_on_goal": on_goal,
            "format": 1.0,
            "length_vs_optimal": shortness,
            "parse_failures": 0.0,
            "illegal_moves": illegal,
            "deadlocks": deadlock,
        },
    )


@pytest.mark.parametrize("answer", ["", " ", "push it right", "R!"])
def test_no_answer_earns_nothing(answer: str) -> None:
    board = "######\n#@$.*#\n######"
    reward = score(board, "R", answer, solved=1, boxes_on_goal=1, format=1, length_vs_optimal=1)
    assert reward.value == 0
    assert reward.metrics["parse_failures"] == 1
    assert sum(reward.metrics.values()) == 1


def test_weights_add_up() -> None:
    board = "#######\n#@$. *#\n#######"
    weights = {"solved": 8.0, "boxes_on_goal": 4.0, "format": 2.0, "length_vs_optimal": 1.0}
    assert score(board, "R", "R", **weights).value == 15.0
    assert score(board, "R", "RL", **weights).value == 14.5
    assert score(board, "R", "L", **weights).value == 4.0
    assert score(board, "R", "L").value == 0.0
    assert score(board, "R", "R", solved=0).value == 0.0


def test_shortest_solutions_earn_the_full_reward() -> None:
    env = load(8, 4, max_boxes=2, weights={"length_vs_optimal": 1.0})
    for task in (*env.train, *env.eval):
        assert env.score(task, tagged(task.answer.solution)).value == 2.0
        assert env.score(task, tagged("")).value == 0.0


def test_arguments_of_the_public_environment_are_supported() -> None:
    public = {
        "num_train_examples": 6, "num_eval_examples": 3, "seed": 7, "min_w": 6, "max_w": 7,
        "min_h": 6, "max_h": 7, "min_boxes": 4, "max_boxes": 4, "max_depth": 60,
    }  # fmt: skip
    assert list(public) == list(inspect.signature(load).parameters)[: len(public)]
    env = load(**public)  # type: ignore[arg-type]
    assert (len(env.train), len(env.eval)) == (6, 3)
    for task in env.eval:
        assert task.answer.board.count("$") + task.answer.board.count("*") == 4
        assert env.score(task, tagged(task.answer.solution)).value == 1.0


def test_a_step_makes_no_level_but_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    class Maker(LevelMaker):
        def make(self, number: int) -> Level:
            made.append(number)
            return super().make(number)

    monkeypatch.setattr(level_set, "LevelMaker", Maker)
    env = load(15_000, 256, min_w=4, max_w=9, min_h=4, max_h=9, max_boxes=7)
    tasks = TaskSampler({"sokoban": env}, seed=0).draw(1, 8)
    assert [f"train/{number}" for number in made] == [task.id for _, task in tasks]
    assert max(made) > 1000


def test_tasks_are_a_sequence() -> None:
    env: SokobanEnv = load(num_train_examples=5, num_eval_examples=2)
    assert [task.id for task in env.train] == [f"train/{i}" for i in range(5)]
    assert [task.id for task in env.eval] == ["eval/0", "eval/1"]
    assert env.train[-1] == env.train[4]
    assert env.train[1:3] == [env.train[1], env.train[2]]
    for index in (5, -6):
        with pytest.raises(IndexError):
            env.train[index]


@pytest.mark.parametrize(
    "args",
    [
        {"num_train_examples": 0},
        {"num_eval_examples": "9"},
        {"seed": "a/b"},
        {"rules": "none"},
        {"answer": ["tag"]},
        {"symbols": "ascii"},
        {"symbols": None},
        {"symbols": ["#"]},
        {"symbols": {"wall": "#"}},
        {"symbols": {**XSB, "wall": "@"}},
        {"symbols": {**XSB, "wall": ""}},
        {"symbols": {**XSB, "wall": "\n"}},
        {"symbols": {**XSB, "wall": ["#"]}},
        {"symbols": {**XSB, "wall": "@@"}},
        {"weights": {"solve": 1.0}},
        {"weights": {"solved": "1"}},
        {"weights": {"solved": float("nan")}},
        {"weights": 1.0},
        {"min_w": 7},
    ],
    ids=str,
)
def test_refused_arguments(args: dict[str, Any]) -> None:
    with pytest.raises(UserError) as caught:
        load(**args)
    assert caught.value.exit_code == EXIT_USAGE
    assert caught.value.what.startswith(f"sokoban-env: {next(iter(args))} = ")
    assert caught.value.fix
