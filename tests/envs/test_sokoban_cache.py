"""Levels that are cached on disk."""

import subprocess
import sys
from pathlib import Path

import pytest

from minidistill.envs.sokoban import cache as cache_module
from minidistill.envs.sokoban import level_set
from minidistill.envs.sokoban.difficulty import Difficulty
from minidistill.envs.sokoban.level_set import LevelSet
from minidistill.envs.sokoban.levels import Level, LevelMaker

SMALL = Difficulty(min_w=5, max_w=6, min_h=5, max_h=6)


def take(*numbers: int, difficulty: Difficulty = SMALL, **other: object) -> list[Level]:
    """Levels of a new level set, which knows only what is cached."""
    arguments = {"seed": 0, "split": "train", "count": 16} | other
    return LevelSet(difficulty, **arguments).take(numbers)  # type: ignore[arg-type]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of the cache file of `take`. All levels count as slow enough to be cached."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(level_set, "SLOW_SECONDS", -1.0)
    path = LevelSet(SMALL, 0, "train", 16).cache.path
    assert path.is_relative_to(tmp_path)
    return path


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the levels that are made, not read."""
    numbers: list[int] = []

    class Maker(LevelMaker):
        def make(self, number: int) -> Level:
            numbers.append(number)
            return super().make(number)

    monkeypatch.setattr(level_set, "LevelMaker", Maker)
    return numbers


def test_cached_levels_are_not_made_again(
    cache: Path, made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = take(3, 9)
    assert [file.name for file in cache.parent.iterdir()] == [cache.name]
    assert take(3, 9) == fresh
    assert take(9, 4, 3)[::2] == fresh[::-1]
    assert made == [3, 9, 4]
    for other in (
        {"seed": 1},
        {"split": "eval"},
        {"count": 20},
        {"difficulty": Difficulty(max_depth=9)},
    ):
        take(3, **other)  # type: ignore[arg-type]
    assert made == [3, 9, 4, 3, 3, 3, 3]
    monkeypatch.setattr(cache_module, "code_version", lambda: "other code")
    assert take(3) == fresh[:1]
    assert made[7:] == [3]


def test_fast_levels_are_not_cached(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(level_set, "SLOW_SECONDS", 60.0)
    take(0, 1, 2, 3)
    assert not cache.exists()


def test_levels_are_cached_although_another_cannot_be_made(
    cache: Path, made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = LevelMaker.make

    def fail(self: LevelMaker, number: int) -> Level:
        if number == 5:
            raise KeyboardInterrupt
        return original(self, number)

    monkeypatch.setattr(LevelMaker, "make", fail)
    with pytest.raises(KeyboardInterrupt):
        take(2, 5, 7)
    assert take(2)
    assert made == [2, 5]


def test_a_damaged_line_is_made_again(cache: Path, made: list[int]) -> None:
    fresh = take(0, 1, 2)
    intact = cache.read_text()
    lines = intact.split("\n")
    checksum, number, solution, board = lines[2].split(" ", 3)
    assert number == "1"
    other = lines[1].split(" ", 3)
    damages = [
        f"{checksum} {number} {solution}U {board}",
        f"{checksum} {number} {solution} {board[:-1]}",
        f"{checksum} {number} {other[2]} {other[3]}",
        f"{other[0]} {number} {solution} {board}",
        f"{checksum} 7 {solution} {board}",
        lines[2][:-9],
        "",
        "\ufffd",
    ]
    for damage in damages:
        made.clear()
        cache.write_text("\n".join([*lines[:2], damage, *lines[3:]]))
        assert take(0, 1, 2) == fresh
        assert made == [1]
        made.clear()
        assert take(0, 1, 2) == fresh  # it has been appended
        assert not made


def test_a_torn_write_costs_its_own_level_only(cache: Path, made: list[int]) -> None:
    fresh = take(0, 1)
    cache.write_bytes(cache.read_bytes()[:-9])
    assert take(2, 0, 1)[1:] == fresh
    made.clear()
    assert take(0, 1) == fresh
    take(2)
    assert not made


@pytest.mark.parametrize("content", [b"", b"\xff\x00\xfe", b"[]\n", b"\n\n 1 2 3 \n"])
def test_a_file_that_is_no_cache_is_ignored(cache: Path, content: bytes) -> None:
    fresh = take(0, 1)
    cache.write_bytes(content)
    assert take(0, 1) == fresh


WRITER = """
import sys
from minidistill.envs.sokoban import level_set
from minidistill.envs.sokoban.difficulty import Difficulty
level_set.SLOW_SECONDS = -1.0
levels = level_set.LevelSet(Difficulty(min_w=5, max_w=6, min_h=5, max_h=6), 0, "train", 512)
for number in range(0, 160):
    levels[number]
"""


def test_several_processes_may_write(cache: Path, made: list[int]) -> None:
    writers = [subprocess.Popen([sys.executable, "-c", WRITER]) for _ in range(2)]
    assert [writer.wait() for writer in writers] == [0, 0]
    numbers = range(160)
    cached = take(*numbers, count=512)
    assert not made
    maker = LevelMaker(LevelSet(SMALL, 0, "train", 512).maker.recipe)
    assert cached == [maker.make(number) for number in numbers]


@pytest.mark.parametrize("place", ["file", "/proc/none", "/dev/full/x"])
def test_a_cache_that_cannot_be_written(
    cache: Path, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = take(0, 1, 2)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / place))
    assert take(0, 1, 2) == fresh


def test_an_empty_cache_home_means_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert LevelSet(SMALL, 0, "train", 1).cache.path.is_relative_to(tmp_path / ".cache")
