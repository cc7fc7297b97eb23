"""Move-optimal Sokoban solutions: breadth-first search up to three boxes, A* for more."""

from __future__ import annotations

import heapq
from collections import deque

from minidistill.envs.sokoban.board import MOVES, Board

UNREACHABLE = 10**6


def push_distances(board: Board) -> list[int]:
    """For each cell, the fewest pushes from it to a goal for a lone box, wherever the player is.

    Computed by pulling a box away from the goals. Dead squares have `UNREACHABLE`.
    """
    distance = [UNREACHABLE] * (board.width * board.height)
    queue = deque(c for c in range(len(distance)) if board.goals >> c & 1)
    for cell in queue:
        distance[cell] = 0
    while queue:
        cell = queue.popleft()
        for offset in board.offsets:
            source, player = cell + offset, cell + 2 * offset
            if board.walls >> source & 1 or distance[source] != UNREACHABLE:
                continue
            # `source` is not a wall, so it is inside the border and `player` is on the board
            if not board.walls >> player & 1:
                distance[source] = distance[cell] + 1
                queue.append(source)
    return distance


def solve(board: Board, max_moves: int = 10**6, max_states: int = 2_000_000) -> str | None:
    """A shortest solution as a string over "UDLR", or None if there is none within the limits.

    With up to three boxes it is the first of the shortest solutions in the order U, D, L, R, so a
    level has one answer. `max_states` bounds the number of states that are searched.
    """
    if board.solved:
        return ""
    distance = push_distances(board)
    cells = [c for c in range(len(distance)) if board.boxes >> c & 1]
    if sum(distance[c] for c in cells) >= UNREACHABLE:
        return None
    if len(cells) <= 3:
        return breadth_first(board, distance, max_moves, max_states)
    return a_star(board, distance, max_moves, max_states)


def _neighbors(
    board: Board, distance: list[int], player: int, boxes: int
) -> list[tuple[int, int, int, int]]:
    """(move, player, boxes, change of distance) of each legal move but pushes into dead squares."""
    neighbors = []
    for index, offset in enumerate(board.offsets):
        target = player + offset
        bit = 1 << target
        if board.walls & bit:
            continue
        if not boxes & bit:
            neighbors.append((index, target, boxes, 0))
            continue
        behind = target + offset
        if (board.walls | boxes) >> behind & 1 or distance[behind] >= UNREACHABLE:
            continue
        moved = boxes ^ (bit | 1 << behind)
        neighbors.append((index, target, moved, distance[behind] - distance[target]))
    return neighbors


Parents = dict[tuple[int, int], tuple[tuple[int, int], int] | None]


def _path(parents: Parents, state: tuple[int, int]) -> str:
    moves = []
    while (link := parents[state]) is not None:
        state, index = link
        moves.append(MOVES[index])
    return "".join(reversed(moves))


def breadth_first(board: Board, distance: list[int], max_moves: int, max_states: int) -> str | None:
    start = (board.player, board.boxes)
    parents: Parents = {start: None}
    frontier = [start]
    for _ in range(max_moves):
        next_frontier = []
        for state in frontier:
            for index, player, boxes, _ in _neighbors(board, distance, *state):
                reached = (player, boxes)
                if reached in parents:
                    continue
                parents[reached] = (state, index)
                if boxes == board.goals:
                    return _path(parents, reached)
                next_frontier.append(reached)
        if not next_frontier or len(parents) > max_states:
            return None
        frontier = next_frontier
    return None


def a_star(board: Board, distance: list[int], max_moves: int, max_states: int) -> str | None:
    """A* on moves. The heuristic, the boxes' push distances, is admissible and consistent."""
    start = (board.player, board.boxes)
    estimate = sum(distance[c] for c in range(len(distance)) if board.boxes >> c & 1)
    parents: Parents = {start: None}
    cost = {start: 0}
    heap = [(estimate, 0, start, estimate)]
    closed = set()
    while heap and len(cost) <= max_states:
        _, _, state, remaining = heapq.heappop(heap)
        if state in closed:
            continue
        closed.add(state)
        if state[1] == board.goals:
            return _path(parents, state)
        moves = cost[state] + 1
        for index, player, boxes, change in _neighbors(board, distance, *state):
            reached = (player, boxes)
            estimate = remaining + change
            if moves + estimate <= max_moves and moves < cost.get(reached, UNREACHABLE):
                cost[reached] = moves
                parents[reached] = (state, index)
                heapq.heappush(heap, (moves + estimate, -moves, reached, estimate))
    return None
