"""The text of a Sokoban prompt, and the parsing of an answer."""

from __future__ import annotations

import re

from minidistill.envs.sokoban.board import MOVES

RULES = """Sokoban: push every box onto a goal.
Symbols: {legend}.
Moves: U up, D down, L left, R right. Walking into a box pushes it one cell when the cell behind \
it is free; walls and second boxes stop it. Boxes cannot be pulled.
"""
TASK = "Solve this puzzle."
TAGGED = "Give the moves (U, D, L, R) inside <answer></answer>."
BARE = "Give the moves (U, D, L, R) alone."

_ANSWER = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.IGNORECASE | re.DOTALL)
_WORDS = {"up": "U", "down": "D", "left": "L", "right": "R"}
_TOKEN = re.compile(
    r"(up|down|left|right)(?![a-z])|([udlr]+)|[\s,;.:>\-→'\"`\[\]()]+", re.IGNORECASE
)


def instruction(tagged: bool, most: int | None = None) -> str:
    """How to answer. With `most`, an answer has at most so many moves, and others follow it."""
    text = TAGGED if tagged else BARE
    return text if most is None else text.replace("the moves", f"the next moves, at most {most}", 1)


def prompt_text(
    board: str, symbols: dict[str, str], rules: bool, tagged: bool, most: int | None = None
) -> str:
    """The user message of a rendered board."""
    task = f"{TASK} {instruction(tagged, most)}"
    if rules:
        legend = ", ".join(
            f"{'space' if char == ' ' else char} {kind.replace('_', ' ')}"
            for kind, char in symbols.items()
        )
        return f"{RULES.format(legend=legend)}\n{task}\n\n{board}"
    return f"{task}\n\n{board}"


def parse_moves(completion: str, tagged: bool) -> str | None:
    """The moves of an answer over "UDLR", or None if there is no well-formed answer.

    The answer is the last `<answer>…</answer>`, or the whole completion if `tagged` is off. It may
    have the letters in either case, the words up, down, left, right, and separators. Anything else
    makes it malformed.
    """
    if tagged:
        answers = _ANSWER.findall(completion)
        if not answers:
            return None
        text = answers[-1]
    else:
        text = completion
    moves: list[str] = []
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            return None
        word, letters = match.groups()
        moves.append(_WORDS[word.lower()] if word else (letters or "").upper())
        position = match.end()
    joined = "".join(moves)
    assert set(joined) <= set(MOVES)
    return joined or None
