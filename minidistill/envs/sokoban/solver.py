"""Move-optimal Sokoban solutions: A* over pushes from both ends at once.

A forward state is (boxes, player) right after a push, and its cost the moves so far. A backward
state is (boxes, player) right before a push, and its cost the moves that remain. The two meet in
states with equal boxes, between which the player only walks. Both searches order their states by
the same potential of the boxes, with opposite signs: pushes to the nearest goals minus pushes from
the nearest boxes of the start. So they agree on the cost of every path, and stop when no path that
they have not seen can be shorter (Ikeda et al., 1994). Boxes and players are bit masks.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator

from minidistill.envs.sokoban.board import MOVES, Board
from minidistill.envs.sokoban.moves import UNREACHABLE, Moves, bits

UNIQUE_BOXES = 3  # up to this many boxes the solution is the first of the shortest
# A solvable level's first solution is found in a small part of the states that prove the shortest.
TO_FIND = 10  # a level without one after this part of the states is given up

State = tuple[int, int]
"""Boxes and player."""
Queue = dict[int, list[tuple[int, int, int]]]
"""Open states as (cost, boxes, player), by twice their cost plus or minus their potential."""


def solve(board: Board, max_moves: int = 10**6, max_states: int = 500_000) -> str | None:
    """A shortest solution as a string over "UDLR", or None if there is none within the limits.

    The board is surrounded by walls. With up to three boxes the solution is the first of the
    shortest ones in the order U, D, L, R, so a level has one answer. `max_states` bounds the states
    whose successors are looked at; a tenth of them must lead to some solution.
    """
    if board.solved:
        return ""
    return _Search(Moves(board), max_moves, max_states).run()


class _Search:
    """One search. `run` may be called once."""

    def __init__(self, moves: Moves, max_moves: int, max_states: int) -> None:
        self.moves, self.board = moves, moves.board
        self.best = max_moves + 1
        self.states_left = max_states
        self.states_to_prove = max_states - max_states // TO_FIND
        # all shortest paths are followed, not one of them
        self.exhaustive = self.board.boxes.bit_count() <= UNIQUE_BOXES
        to_goals, from_start = moves.to_goals.near, moves.from_start.near
        self.difference = {1 << cell: to_goals[cell] - from_start[cell] for cell in to_goals}
        """The part of a box in the potential, by its bit."""
        self.potentials: dict[int, int | None] = {}
        """By boxes; None if no solution has a state with these boxes."""
        # costs by boxes and player
        self.forward: dict[int, dict[int, int]] = defaultdict(dict)
        self.backward: dict[int, dict[int, int]] = defaultdict(dict)
        self.parents: dict[State, list[State]] = {}
        """The states before a forward state, on all shortest ways to it or on one."""
        self.meetings: list[State] = []
        """Forward states from which a shortest path goes on through backward states."""

    def run(self) -> str | None:
        boxes, player, goals = self.board.boxes, 1 << self.board.player, self.board.goals
        start_potential, goal_potential = self._potential(boxes), self._potential(goals)
        if start_potential is None or goal_potential is None:
            return None
        ahead: Queue = defaultdict(list)
        behind: Queue = defaultdict(list)
        self.potentials = {boxes: start_potential, goals: goal_potential}
        self.forward[boxes][player] = 0
        self.parents[boxes, player] = []
        ahead[start_potential].append((0, boxes, player))
        # before the last push the player may be anywhere beside a box
        self._pull(0, goals, self.moves.floor & ~goals, behind)
        while ahead and behind:
            next_ahead, next_behind = min(ahead), min(behind)
            if next_ahead + next_behind >= 2 * self.best + self.exhaustive:
                break
            if self.states_left < (0 if self.meetings else self.states_to_prove):
                return None
            if sum(map(len, ahead.values())) <= sum(map(len, behind.values())):
                for cost, boxes, player in ahead.pop(next_ahead):
                    if self.forward[boxes][player] == cost:
                        self._push(cost, boxes, player, ahead)
            else:
                for cost, boxes, player in behind.pop(next_behind):
                    if self.backward[boxes][player] == cost:
                        self._pull(cost, boxes, player, behind)
        return self._solution() if self.meetings else None

    def _potential(self, boxes: int) -> int | None:
        moves = self.moves
        if not (moves.to_goals.is_possible(boxes) and moves.from_start.is_possible(boxes)):
            return None
        return sum(self.difference[bit] for bit in bits(boxes))

    def _push(self, cost: int, boxes: int, player: int, queue: Queue) -> None:
        """Reach the successors of a forward state."""
        self.states_left -= 1
        state, potentials, difference = (boxes, player), self.potentials, self.difference
        before = potentials[boxes]
        assert before is not None
        for moves, box, target in self.moves.pushes(boxes, player):
            after = boxes ^ (box | target)
            if after not in potentials:
                possible = self.moves.to_goals.is_possible(after)
                stuck = not possible or self.moves.is_frozen(after, target)
                potentials[after] = None if stuck else before + difference[target] - difference[box]
            potential = potentials[after]
            if potential is None:
                continue
            reached, total = self.forward[after], cost + moves
            known = reached.get(box, UNREACHABLE)  # the player is where the box was
            if total < known:
                reached[box] = total
                self.parents[after, box] = [state]
                queue[2 * total + potential].append((total, after, box))
                if after in self.backward:
                    for other, left in self.backward[after].items():
                        self._meet(after, box, total, other, left)
            elif total == known and self.exhaustive:
                self.parents[after, box].append(state)

    def _pull(self, cost: int, boxes: int, player: int, queue: Queue) -> None:
        """Reach the predecessors of a backward state."""
        self.states_left -= 1
        potentials, difference = self.potentials, self.difference
        after = potentials[boxes]
        assert after is not None
        for moves, box, target, stands in self.moves.pulls(boxes, player):
            before = boxes ^ (box | target)
            if before not in potentials:
                possible = self.moves.from_start.is_possible(before)
                potentials[before] = (
                    after + difference[target] - difference[box] if possible else None
                )
            potential = potentials[before]
            if potential is None:
                continue
            reached, total = self.backward[before], cost + moves
            if total < reached.get(stands, UNREACHABLE):
                reached[stands] = total
                queue[2 * total - potential].append((total, before, stands))
                if before in self.forward:
                    for other, made in self.forward[before].items():
                        self._meet(before, other, made, stands, total)

    def _meet(self, boxes: int, player: int, cost: int, other: int, left: int) -> None:
        """Note the path through a forward and a backward state with the same boxes."""
        # a path as long as the best one known is of use only if all shortest paths are followed
        equal = self.exhaustive and bool(self.meetings)
        longest = self.best - cost - left - (not equal)
        walk = self.moves.walk(boxes, player, other, longest) if longest >= 0 else None
        if walk is None:
            return
        if cost + walk + left < self.best:
            self.best = cost + walk + left
            self.meetings = []
        self.meetings.append((boxes, player))

    # -- the solution --------------------------------------------------------------------------

    def _solution(self) -> str:
        """The first of the known shortest solutions, in the order U, D, L, R."""
        on_path: set[State] = set()
        unseen = list(self.meetings)
        while unseen:
            state = unseen.pop()
            if state not in on_path:
                on_path.add(state)
                unseen += self.parents[state]
        state, moves = (self.board.boxes, 1 << self.board.player), ""
        while state[0] != self.board.goals:
            # no option begins another: the last move of each is a push, and its only one
            step, state = min(self._options(state, len(moves), on_path))
            moves += step
        return moves.translate({ord(str(i)): move for i, move in enumerate(MOVES)})

    def _options(self, state: State, done: int, on_path: set[State]) -> Iterator[tuple[str, State]]:
        """The ways to the next push on a shortest path, moves as digits, and the state after it."""
        boxes, player = state
        start = player.bit_length() - 1
        walks = {start: ""}
        queue = deque([start])
        while queue:
            cell = queue.popleft()
            for index, offset in enumerate(self.board.offsets):
                target, moves = cell + offset, walks[cell] + str(index)
                if self.board.walls >> target & 1 or target in walks:
                    continue
                if not boxes >> target & 1:
                    walks[target] = moves
                    queue.append(target)
                elif not (self.board.walls | boxes) >> target + offset & 1:
                    after = boxes ^ (1 << target | 1 << target + offset), 1 << target
                    if self._continues(after, done + len(moves), on_path):
                        yield moves, after

    def _continues(self, state: State, done: int, on_path: set[State]) -> bool:
        """Whether a known shortest path is in a state after `done` moves."""
        boxes, player = state
        left = self.best - done
        if boxes == self.board.goals:
            return left == 0
        if state in on_path and self.forward[boxes][player] == done:
            return True
        return any(
            self.moves.walk(boxes, player, other, left - rest) == left - rest
            for other, rest in self.backward.get(boxes, {}).items()
            if rest <= left
        )
