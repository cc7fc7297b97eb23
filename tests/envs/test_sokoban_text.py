"""The text of Sokoban prompts, and the parsing of answers."""

import time

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.sokoban import tagged

from minidistill.envs.sokoban.board import RG, XSB
from minidistill.envs.sokoban.text import parse_moves, prompt_text

MANY = settings(deadline=None, derandomize=True, max_examples=200)
WORDS = {"up": "U", "down": "D", "left": "L", "right": "R"}
SEPARATORS = " \t\n,;.:>-→'\"`[]()"


def reference_parse(text: str) -> str | None:
    """An independent parser: split at the separators, every piece is moves."""
    for separator in SEPARATORS:
        text = text.replace(separator, " ")
    moves = ""
    for piece in text.lower().split():
        if piece in WORDS:
            moves += WORDS[piece]
        elif set(piece) <= set("udlr"):
            moves += piece.upper()
        else:
            return None
    return moves or None


def reference_parse_tagged(text: str) -> str | None:
    """The same for the content of the last complete pair of tags."""
    low = text.lower()
    start = low.rfind("<answer>", 0, max(low.rfind("</answer>"), 0))
    return None if start < 0 else reference_parse(text[start + 8 : low.find("</answer>", start)])


PIECES = [
    *("<answer>", "</answer>", "<ANSWER>", "</Answer>", "<answer", "answer>", "<", "/", "1", "x"),
    *("U", "d", "LR", "rr", "up", "UP", "Left", "right", "down", "then", "I go "),
    *("é", "ſ", "\u2003"),
    *SEPARATORS,
]


@MANY
@given(st.lists(st.sampled_from(PIECES), max_size=14).map("".join))
def test_answers_are_parsed_as_by_the_reference(text: str) -> None:
    assert parse_moves(text, tagged=True) == reference_parse_tagged(text)
    assert parse_moves(tagged(text), tagged=True) == reference_parse_tagged(tagged(text))
    assert parse_moves(text, tagged=False) == reference_parse(text)


@MANY
@given(st.text())
def test_no_text_breaks_the_parser(text: str) -> None:
    for moves in (parse_moves(text, False), parse_moves(tagged(text), True)):
        assert moves is None or (moves and set(moves) <= set("UDLR"))


@MANY
@given(
    st.lists(st.tuples(st.sampled_from("UDLR"), st.booleans(), st.booleans()), min_size=1),
    st.text(SEPARATORS, min_size=1, max_size=3),
    st.text(SEPARATORS, max_size=2),
    st.text("abc <>/\n", max_size=10),
)
def test_letters_and_words_in_any_case(
    moves: list[tuple[str, bool, bool]], separator: str, edge: str, noise: str
) -> None:
    names = {letter: word for word, letter in WORDS.items()}
    parts = [names[m] if word else m for m, word, _ in moves]
    parts = [p.upper() if move[2] else p.lower() for p, move in zip(parts, moves, strict=True)]
    answer = edge + separator.join(parts) + edge
    expected = "".join(m for m, _, _ in moves)
    assert parse_moves(noise + tagged(answer) + noise, tagged=True) == expected
    assert parse_moves(answer, tagged=False) == expected
    unseparated = "".join(m.upper() if upper else m.lower() for m, _, upper in moves)
    assert parse_moves(tagged(unseparated), tagged=True) == expected


@MANY
@given(
    st.text("UDLR ", max_size=6),
    st.characters(exclude_characters=SEPARATORS + "udlrUDLR"),
    st.text("UDLR ", max_size=6),
)
def test_any_other_character_is_refused(before: str, char: str, after: str) -> None:
    assume(not char.isspace())
    assert parse_moves(tagged(f"{before}{char}{after}"), tagged=True) is None


@pytest.mark.parametrize(
    ("completion", "moves"),
    [
        ("<answer>UU</answer> no: <answer>LR</answer>", "LR"),
        ("<answer>UU</answer> no: <answer>go left</answer>", None),
        ("<answer>UU</answer> no: <answer></answer>", None),
        ("<answer>UU</answer> and then <answer>LR", "UU"),
        ("<answer>UU<answer>LR</answer>", "LR"),
        ("<answer>LR</answer></answer>", "LR"),
        ("<Answer>l, R</ANSWER>", "LR"),
        ("<answer>\nUp\nup -> RIGHT\n</answer>", "UUR"),
        ("<answer>[U, 'D']</answer>", "UD"),
        ("<answer>1. U</answer>", None),
        ("<answer>upright</answer>", None),
        ("<answer>I would push it up</answer>", None),
        ("<answer> \n </answer>", None),
        ("UDLR", None),
        ("", None),
    ],
)
def test_tagged_answers(completion: str, moves: str | None) -> None:
    assert parse_moves(completion, tagged=True) == moves


@pytest.mark.parametrize(
    ("completion", "moves"),
    [("ul dr", "ULDR"), ("Up, left", "UL"), ("<answer>UL</answer>", None), ("The answer: U", None)],
)
def test_bare_answers(completion: str, moves: str | None) -> None:
    assert parse_moves(completion, tagged=False) == moves


def test_long_malformed_answers_are_parsed_quickly() -> None:
    began = time.monotonic()
    assert parse_moves("<answer>" * 50_000, tagged=True) is None
    assert parse_moves(tagged("u" * 200_000 + "x"), tagged=True) is None
    assert parse_moves(tagged("u" * 200_000), tagged=True) == "U" * 200_000
    assert time.monotonic() - began < 10, "the time is not linear in the length"


def legend(symbols: dict[str, str]) -> str:
    text = prompt_text("(board)", symbols, rules=True, tagged=True)
    return next(line for line in text.split("\n") if line.startswith("Symbols: "))


def test_legends() -> None:
    assert legend(XSB) == (
        "Symbols: # wall, @ player, + player on goal, $ box, * box on goal, . goal, space floor."
    )
    assert legend(RG) == (
        "Symbols: + wall, * player, % player on goal, @ box, $ box on goal, X goal, - floor."
    )
    odd = dict(zip(XSB, [" ", "'", '"', "\\", "_", "{x}", "🧱"], strict=True))
    assert legend(odd) == (
        "Symbols: space wall, ' player, \" player on goal, \\ box, _ box on goal, {x} goal, "
        "🧱 floor."
    )


def test_prompts_with_and_without_rules() -> None:
    full, bare = (prompt_text("#@#", XSB, rules, tagged=True) for rules in (True, False))
    assert full.endswith(bare)
    assert "Symbols" in full
    assert "pushes" in full
    assert bare == "Solve this puzzle. Give the moves (U, D, L, R) inside <answer></answer>.\n\n#@#"
    assert "<answer>" not in prompt_text("#@#", XSB, rules=True, tagged=False)
