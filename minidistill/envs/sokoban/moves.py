"""Pushes and pulls within the player's reach, and boxes that can never reach a goal.

Players, boxes and goals are bit masks. A player's reach grows a layer of cells at a time, so all
directions and cells are handled by a few operations on whole masks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

from minidistill.envs.sokoban.board import Board

UNREACHABLE = 10**6


def bits(mask: int) -> Iterator[int]:
    """The bits of a mask, each as a mask, the lowest first."""
    while mask:
        low = mask & -mask
        yield low
        mask ^= low


def cells(mask: int) -> list[int]:
    """The cells of a mask, in ascending order."""
    return [bit.bit_length() - 1 for bit in bits(mask)]


def _distances(board: Board, places: Iterable[int], pulled: bool) -> list[int]:
    """For each cell, the fewest pulls (or pushes) that bring a lone box there from a place."""
    distance = [UNREACHABLE] * (board.width * board.height)
    queue = deque(places)
    for cell in queue:
        distance[cell] = 0
    while queue:
        cell = queue.popleft()
        for offset in board.offsets:
            target = cell + offset
            player = target + offset if pulled else cell - offset
            if board.walls >> target & 1 or distance[target] != UNREACHABLE:
                continue
            # `target` and `cell` are not walls, so they are inside the border, and `player` is on
            # the board
            if not board.walls >> player & 1:
                distance[target] = distance[cell] + 1
                queue.append(target)
    return distance


def live_cells(floor: int, goals: int, width: int) -> int:
    """The cells from which a lone box can be pushed to a goal, wherever the player is."""
    live, grown = 0, goals
    while grown != live:
        live = grown
        grown |= floor & (
            live << 1 & floor >> 1
            | live >> 1 & floor << 1
            | live << width & floor >> width
            | live >> width & floor << width
        )
    return live


class Assignment:
    """Between which places (goals, or the boxes of the start) and cells a lone box can be moved."""

    def __init__(self, board: Board, places: int, pulled: bool) -> None:
        distances = [_distances(board, [place], pulled) for place in cells(places)]
        floor = cells(((1 << board.width * board.height) - 1) & ~board.walls)
        self.near = {cell: min(distance[cell] for distance in distances) for cell in floor}
        """Pushes between a cell and the nearest place."""
        self.cells = sum(1 << cell for cell, pushes in self.near.items() if pushes < UNREACHABLE)
        """The cells that any place can be reached from."""
        self._places = {
            1 << cell: sum(1 << k for k, d in enumerate(distances) if d[cell] < UNREACHABLE)
            for cell in floor
        }
        every = (1 << len(distances)) - 1
        self._restricted = sum(bit for bit, reach in self._places.items() if reach != every)
        self._known: dict[tuple[int, ...], bool] = {}

    def is_possible(self, boxes: int) -> bool:
        """Whether each box can have a place of its own."""
        restricted = boxes & self._restricted
        if not restricted:
            return True
        # few sets of places occur, whatever the boxes
        choices = []
        while restricted:
            box = restricted & -restricted
            restricted ^= box
            choices.append(self._places[box])
        choices.sort()
        known = self._known.get(key := tuple(choices))
        if known is None:
            taken = {0}
            for places in choices:
                taken = {used | place for used in taken for place in bits(places & ~used)}
            known = self._known[key] = bool(taken)
        return known


class Moves:
    """The moves in a level. Its boxes are those of the start."""

    def __init__(self, board: Board) -> None:
        self.board, self.width = board, board.width
        self.floor = ((1 << board.width * board.height) - 1) & ~board.walls
        self.to_goals = Assignment(board, board.goals, pulled=True)
        self.from_start = Assignment(board, board.boxes, pulled=False)

    def pushes(self, boxes: int, player: int) -> list[tuple[int, int, int]]:
        """(moves, box, its target) of each push within reach, but pushes into dead squares."""
        width, free = self.width, self.floor & ~boxes
        allowed = free & self.to_goals.cells
        # the cells from which a box can be pushed, by direction
        right = (boxes & allowed >> 1) >> 1 & free
        left = (boxes & allowed << 1) << 1 & free
        down = (boxes & allowed >> width) >> width & free
        up = (boxes & allowed << width) << width & free
        waiting = right | left | down | up
        reached = layer = player
        moves = 1
        pushes = []
        while layer and waiting:
            if hits := layer & waiting:
                waiting ^= hits
                while hits:
                    bit = hits & -hits
                    hits ^= bit
                    if bit & right:
                        pushes.append((moves, bit << 1, bit << 2))
                    if bit & left:
                        pushes.append((moves, bit >> 1, bit >> 2))
                    if bit & down:
                        pushes.append((moves, bit << width, bit << 2 * width))
                    if bit & up:
                        pushes.append((moves, bit >> width, bit >> 2 * width))
            layer = (layer << 1 | layer >> 1 | layer << width | layer >> width) & free & ~reached
            reached |= layer
            moves += 1
        return pushes

    def pulls(self, boxes: int, player: int) -> list[tuple[int, int, int, int]]:
        """(moves, box, its target, player) of each push that can be undone within reach.

        The player walks to the box, which then follows the last move. `player` may have several
        cells.
        """
        width, free = self.width, self.floor & ~boxes
        allowed = free & self.from_start.cells
        # the cells to which a box can be pulled, by the direction of the push that is undone
        right = boxes >> 1 & allowed & free << 1
        left = boxes << 1 & allowed & free >> 1
        down = boxes >> width & allowed & free << width
        up = boxes << width & allowed & free >> width
        waiting = right | left | down | up
        reached = layer = player
        moves = 1
        pulls = []
        while layer and waiting:
            if hits := layer & waiting:
                waiting ^= hits
                while hits:
                    bit = hits & -hits
                    hits ^= bit
                    if bit & right:
                        pulls.append((moves, bit << 1, bit, bit >> 1))
                    if bit & left:
                        pulls.append((moves, bit >> 1, bit, bit << 1))
                    if bit & down:
                        pulls.append((moves, bit << width, bit, bit >> width))
                    if bit & up:
                        pulls.append((moves, bit >> width, bit, bit << width))
            layer = (layer << 1 | layer >> 1 | layer << width | layer >> width) & free & ~reached
            reached |= layer
            moves += 1
        return pulls

    def walk(self, boxes: int, player: int, target: int, longest: int) -> int | None:
        """Moves from one cell to another without a push, None if more than `longest`."""
        width, free = self.width, self.floor & ~boxes
        layer = reached = player
        for moves in range(longest + 1):
            if layer & target:
                return moves
            layer = (layer << 1 | layer >> 1 | layer << width | layer >> width) & free & ~reached
            if not layer:
                return None
            reached |= layer
        return None

    def is_frozen(self, boxes: int, box: int) -> bool:
        """Whether a box can never move again, and it or one that holds it is not on a goal."""
        return bool(self._frozen(self.board.walls, boxes, box) & ~self.board.goals)

    def _frozen(self, solid: int, boxes: int, box: int) -> int:
        """A box and the boxes that hold it if it can never move again, else 0.

        It cannot if along each axis one side is solid or holds a frozen box, or if both sides are
        dead squares.
        """
        solid |= box
        held = box
        for offset in (1, self.width):
            one, other = box >> offset, box << offset
            if solid & (one | other) or not self.to_goals.cells & (one | other):
                continue
            frozen = self._frozen(solid, boxes, one) if boxes & one else 0
            if not frozen and boxes & other:
                frozen = self._frozen(solid, boxes, other)
            if not frozen:
                return 0
            held |= frozen
        return held
