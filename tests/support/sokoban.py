"""An independent Sokoban on the text of a board, with a brute-force solver."""

from __future__ import annotations

STEPS = {"U": (-1, 0), "D": (1, 0), "L": (0, -1), "R": (0, 1)}
VACATED = {"@": " ", "+": ".", "$": " ", "*": "."}


def tagged(moves: str) -> str:
    """A completion with these moves as its answer."""
    return f"<answer>{moves}</answer>"


def play_move(text: str, move: str) -> str | None:
    """The board after a move, None if the move is illegal."""
    grid = [list(row) for row in text.split("\n")]
    y, x = next((y, x) for y, row in enumerate(grid) for x, c in enumerate(row) if c in "@+")
    dy, dx = STEPS[move]
    ahead = grid[y + dy][x + dx]
    if ahead == "#":
        return None
    if ahead in "$*":
        beyond = grid[y + 2 * dy][x + 2 * dx]
        if beyond not in " .":
            return None
        grid[y + 2 * dy][x + 2 * dx] = "*" if beyond == "." else "$"
    grid[y + dy][x + dx] = "+" if ahead in ".*" else "@"
    grid[y][x] = VACATED[grid[y][x]]
    return "\n".join(map("".join, grid))


def replay(text: str, moves: str) -> list[str]:
    """The board before and after each move. Fails at an illegal move."""
    boards = [text]
    for move in moves:
        after = play_move(boards[-1], move)
        assert after is not None
        boards.append(after)
    return boards


def brute_force(text: str) -> str | None:
    """The first of the shortest solutions in the order U, D, L, R."""
    if "$" not in text:
        return ""
    layer: dict[str, tuple[int, ...]] = {text: ()}
    seen = {text}
    while layer:
        next_layer: dict[str, tuple[int, ...]] = {}
        for board, path in layer.items():
            for index, move in enumerate(STEPS):
                after = play_move(board, move)
                if after is not None and after not in seen:
                    longer = (*path, index)
                    next_layer[after] = min(next_layer.get(after, longer), longer)
        if done := [path for board, path in next_layer.items() if "$" not in board]:
            return "".join(list(STEPS)[i] for i in min(done))
        seen |= next_layer.keys()
        layer = next_layer
    return None


def trimmed(text: str) -> str:
    """A board without its outer rows and columns of wall."""
    rows = text.split("\n")
    for _ in range(4):
        while set(rows[0]) == {"#"}:
            rows = rows[1:]
        rows = ["".join(column) for column in zip(*rows, strict=True)][::-1]
    return "\n".join(rows)


def equal_boards(text: str) -> set[str]:
    """The eight rotations and mirror images of a board, without outer walls."""
    rows = trimmed(text).split("\n")
    forms = set()
    for flipped in (rows, rows[::-1]):
        for mirrored in (flipped, [row[::-1] for row in flipped]):
            forms.add("\n".join(mirrored))
            forms.add("\n".join("".join(column) for column in zip(*mirrored, strict=True)))
    return forms
