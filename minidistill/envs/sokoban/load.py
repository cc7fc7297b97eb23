"""The arguments of the environment `sokoban-env`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

from minidistill.envs.sokoban.difficulty import Difficulty
from minidistill.envs.sokoban.env import SokobanEnv, require, reward_weights, symbol_table
from minidistill.envs.sokoban.turns import SokobanTurns

MAX_TURNS = 5


def load(
    num_train_examples: int = 1000,
    num_eval_examples: int = 256,
    seed: int = 0,
    min_w: int = 6,
    max_w: int = 6,
    min_h: int = 6,
    max_h: int = 6,
    min_boxes: int = 1,
    max_boxes: int = 1,
    max_depth: int = 80,
    min_moves: int = 1,
    max_moves: int | None = None,
    min_pushes: int = 1,
    max_pushes: int | None = None,
    min_boxes_off_goal: int = 1,
    rules: Literal["prompt", "omit"] = "prompt",
    symbols: str | dict[str, str] = "xsb",
    answer: Literal["tag", "bare"] = "tag",
    weights: dict[str, float] | None = None,
    mode: Literal["single", "multi"] = "single",
    max_turns: int | None = None,
    moves_per_turn: int | None = None,
) -> SokobanEnv:
    """An environment of generated levels.

    Sizes include the outer walls. `max_depth` and `max_moves` bound the shortest solution. A level
    depends on the arguments and its index. A split's number of examples counts only as rounded up
    to a power of two.
    `symbols` is "xsb", "rg" (cells separated by spaces), or a table with the keys wall, player,
    player_on_goal, box, box_on_goal, goal, floor. `weights` has the weight of each part of the
    reward: solved, boxes_on_goal, format, length_vs_optimal.
    With `mode` "multi" the board is shown again after each turn, for up to `max_turns` turns (5)
    with up to `moves_per_turn` moves each, by default any number. Raises UserError for values it
    cannot use.
    """
    require(rules in ("prompt", "omit"), "rules", rules, 'use "prompt" or "omit"')
    require(answer in ("tag", "bare"), "answer", answer, 'use "tag" or "bare"')
    for name, count in (
        ("num_train_examples", num_train_examples),
        ("num_eval_examples", num_eval_examples),
    ):
        require(isinstance(count, int) and count > 0, name, count, "use a whole number above 0")
    require(isinstance(seed, int), "seed", seed, "use a whole number")
    require(mode in ("single", "multi"), "mode", mode, 'use "single" or "multi"')
    for name, limit in (("max_turns", max_turns), ("moves_per_turn", moves_per_turn)):
        whole = type(limit) is int and limit > 0
        require(limit is None or whole, name, limit, "use a whole number above 0")
        require(limit is None or mode == "multi", name, limit, 'set mode = "multi" with it')
    difficulty = Difficulty(
        min_w=min_w,
        max_w=max_w,
        min_h=min_h,
        max_h=max_h,
        min_boxes=min_boxes,
        max_boxes=max_boxes,
        max_depth=max_depth,
        min_moves=min_moves,
        max_moves=max_moves,
        min_pushes=min_pushes,
        max_pushes=max_pushes,
        min_boxes_off_goal=min_boxes_off_goal,
    )
    turns = partial(SokobanTurns, max_turns or MAX_TURNS)
    kind: Callable[..., SokobanEnv] = turns if mode == "multi" else SokobanEnv
    return kind(
        difficulty,
        num_train_examples,
        num_eval_examples,
        seed,
        symbols=symbol_table(symbols),
        separator=" " if symbols == "rg" else "",
        rules=rules == "prompt",
        tagged=answer == "tag",
        weights=reward_weights(weights),
        most_moves=moves_per_turn,
    )
