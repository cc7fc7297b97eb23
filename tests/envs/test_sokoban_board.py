"""Boards and solvers against an independent Sokoban on the text of a board."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.sokoban import STEPS, brute_force, equal_boards, play_move, replay, trimmed

from minidistill.envs.sokoban.board import RG, XSB, Board
from minidistill.envs.sokoban.difficulty import Difficulty
from minidistill.envs.sokoban.level_set import LevelSet
from minidistill.envs.sokoban.moves import UNREACHABLE, Moves, live_cells
from minidistill.envs.sokoban.solver import solve

EMOJI = dict(zip(XSB, "🧱🙂😎📦🎁🎯⬜", strict=True))
FEW = settings(deadline=None, derandomize=True, max_examples=60)

FOUR_BOXES = """\
######
#. $.#
# $@ #
#  $ #
#.$ .#
######"""


@st.composite
def rooms(draw: st.DrawFn, most_boxes: int = 3) -> str:
    """Walled rooms of up to 4 × 3 cells, possibly solved or unsolvable."""
    width, height = draw(st.integers(2, 4)), draw(st.integers(2, 3))
    cells = [(y, x) for y in range(height) for x in range(width)]
    count = draw(st.integers(1, min(most_boxes, len(cells) - 2)))
    order = draw(st.permutations(cells))
    player, boxes = order[0], set(order[1 : count + 1])
    walls = set(order[count + 1 : count + 1 + draw(st.integers(0, 3))])
    goals = set(draw(st.permutations([c for c in order if c not in walls]))[:count])
    rows = ["#" * (width + 2)]
    for y in range(height):
        row = ""
        for cell in ((y, x) for x in range(width)):
            goal = cell in goals
            if cell in walls:
                row += "#"
            elif cell == player:
                row += "+" if goal else "@"
            elif cell in boxes:
                row += "*" if goal else "$"
            else:
                row += "." if goal else " "
        rows.append(f"#{row}#")
    return "\n".join([*rows, rows[0]])


@FEW
@given(rooms())
def test_boards_round_trip_in_every_notation(text: str) -> None:
    board = Board.parse(text)
    assert board.render() == text
    assert board.solved == ("$" not in text)
    for table in (RG, EMOJI):
        back = {symbol: XSB[kind] for kind, symbol in table.items()}
        rows = board.render(table, " ").split("\n")
        assert "\n".join("".join(back[c] for c in row.split(" ")) for row in rows) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("####\n#@$.\n# #", "+ + + +\n+ * @ X\n+ - + +"),
        ("+ *$#", "% - $ @ +"),
    ],
)
def test_the_rg_notation(text: str, expected: str) -> None:
    assert Board.parse(text).render(RG, " ") == expected


def test_short_rows_are_filled_with_wall() -> None:
    assert Board.parse("\n####\n#@$.#\n###\n").render() == "#####\n#@$.#\n#####"


@pytest.mark.parametrize(
    "text", ["", "#####", "#@@#", "#@+.$$#", "#@$#", "#@.#", "#@$.x#", "#@$.#\r\n#####"]
)
def test_a_malformed_board_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"XSB|player"):
        Board.parse(text)


@FEW
@given(rooms(), st.text("UDLR", max_size=30))
def test_moves(text: str, moves: str) -> None:
    board = Board.parse(text)
    for move in moves:
        after, expected = board.step(move), play_move(text, move)
        assert (after and after.render()) == expected
        board, text = after or board, expected or text


@FEW
@given(rooms(), rooms(), st.integers(0, 2), st.integers(0, 2), st.integers(0, 2))
def test_only_equal_boards_share_a_key(
    one: str, other: str, left: int, right: int, above: int
) -> None:
    key = Board.parse(one).key()
    moved = ["#" * left + row + "#" * right for row in one.split("\n")]
    moved = ["#" * len(moved[0])] * above + moved
    for text in equal_boards("\n".join(moved)):
        assert Board.parse(text).key() == key
    assert (Board.parse(other).key() == key) == (trimmed(other) in equal_boards(one))
    assert key < 2**64


def lone_pushes(text: str) -> dict[tuple[int, int], int]:
    """Fewest pushes of a lone box to a goal from each cell, by relaxation."""
    grid = text.split("\n")
    free = {(y, x) for y, row in enumerate(grid) for x, c in enumerate(row) if c != "#"}
    pushes = {(y, x): 0 if grid[y][x] in ".+*" else UNREACHABLE for y, x in free}
    for _ in free:
        for y, x in free:
            for dy, dx in STEPS.values():
                if (y + dy, x + dx) in free and (y - dy, x - dx) in free:
                    pushes[y, x] = min(pushes[y, x], 1 + pushes[y + dy, x + dx])
    return {cell: min(count, UNREACHABLE) for cell, count in pushes.items()}


@FEW
@given(rooms())
def test_push_distances(text: str) -> None:
    board = Board.parse(text)
    near = Moves(board).to_goals.near
    live = 0
    for (y, x), pushes in lone_pushes(text).items():
        cell = y * board.width + x
        assert near[cell] == pushes
        live |= (pushes < UNREACHABLE) << cell
    floor = ((1 << board.width * board.height) - 1) & ~board.walls
    assert live_cells(floor, board.goals, board.width) == live


@FEW
@given(rooms())
def test_the_solution_is_the_first_of_the_shortest(text: str) -> None:
    expected, board = brute_force(text), Board.parse(text)
    assert solve(board) == expected
    if expected:
        assert solve(board, max_moves=len(expected)) == expected
        assert solve(board, max_moves=len(expected) - 1) is None


@FEW
@given(rooms(most_boxes=5))
def test_solutions_with_many_boxes_are_the_shortest(text: str) -> None:
    expected, solution = brute_force(text), solve(Board.parse(text))
    assert (solution is None) == (expected is None)
    if solution and expected:
        assert len(solution) == len(expected)
        assert "$" not in replay(text, solution)[-1]


def test_ties_go_to_the_first_move() -> None:
    text = "######\n#@   #\n# $  #\n#   .#\n######"
    assert solve(Board.parse(text)) == brute_force(text) == "DRRURD"  # and RDLDRR


def test_solutions_of_long_levels_are_the_shortest() -> None:
    levels = LevelSet(Difficulty(6, 7, 6, 7, 2, 3, min_moves=12), 0, "train", 8)
    for level in levels.take(range(8)):
        assert level.solution == brute_force(level.board)
        assert len(level.solution) >= 12


def test_four_boxes() -> None:
    solution, expected = solve(Board.parse(FOUR_BOXES)), brute_force(FOUR_BOXES)
    assert solution is not None
    assert expected is not None
    assert len(solution) == len(expected)
    assert "$" not in replay(FOUR_BOXES, solution)[-1]


@pytest.mark.parametrize("boxes", [1, 4])
def test_the_search_is_bounded(boxes: int) -> None:
    rows = ["#@ $ .#", *["#  $ .#"] * (boxes - 1), "#     #"]
    text = "\n".join(["#" * 7, *rows, "#" * 7])
    board = Board.parse(text)
    assert solve(board) is not None
    assert solve(board, max_states=3) is None


def test_a_cornered_box_has_no_solution() -> None:
    assert solve(Board.parse("#####\n#$ @#\n#  .#\n#####")) is None
