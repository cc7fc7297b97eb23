"""What a run does before its first step, it does once."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from support.runs import run

from minidistill.driver import loop  # noqa: F401, which imports all that a run uses
from minidistill.envs.sokoban.env import SokobanEnv
from minidistill.envs.sokoban.levels import LevelMaker
from minidistill.errors import EXIT_INTERRUPTED
from minidistill.system.foreign import Interrupted
from minidistill.trainer import forward
from minidistill.trainer.trainer import Trainer


def test_a_start_does_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: Counter[tuple[Any, ...]] = Counter()

    def counted(what: Callable[..., tuple[Any, ...]], function: Callable[..., Any]) -> Any:
        def count(*args: Any, **kwargs: Any) -> Any:
            done[what(*args, **kwargs)] += 1
            return function(*args, **kwargs)

        return count

    def loaded(name: str) -> Callable[..., tuple[Any, ...]]:
        """A check of the names and shapes alone, on the meta device, reads no weights."""
        return lambda *args, **kwargs: (name, kwargs.get("device_map"))

    for name in ("AutoTokenizer", "AutoModelForCausalLM"):
        kind = getattr(transformers, name)
        monkeypatch.setattr(kind, "from_pretrained", counted(loaded(name), kind.from_pretrained))
    make = counted(lambda self, number: (self.recipe.split, number), LevelMaker.make)
    monkeypatch.setattr(LevelMaker, "make", make)
    new_environment = counted(lambda *args, **kwargs: ("environment",), SokobanEnv.__init__)
    monkeypatch.setattr(SokobanEnv, "__init__", new_environment)
    states = counted(lambda policy, prefix: ("prefix", *prefix), forward.prefix_states)
    for module in (m for name, m in list(sys.modules.items()) if name.startswith("minidistill")):
        if hasattr(module, "prefix_states"):
            monkeypatch.setattr(module, "prefix_states", states)

    def first_step(*args: Any, **kwargs: Any) -> None:
        step(*args, **kwargs)
        raise Interrupted

    step = Trainer.step
    monkeypatch.setattr(Trainer, "step", first_step)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # no levels of other runs
    assert run(tmp_path / "run") == EXIT_INTERRUPTED

    # the student's prefixes are computed again whenever its weights may change
    context = 40  # tokens of it, at least: the student's prefixes are shorter
    once = {key: n for key, n in done.items() if key[0] != "prefix" or len(key) > context}
    assert any(key[0] == "prefix" for key in once)
    assert set(once.values()) == {1}, once
    kinds = Counter(key[0] for key in once)
    assert kinds["AutoTokenizer"] == kinds["environment"] == 1
    assert ("AutoModelForCausalLM", None) in once
    assert kinds["train"] >= 16
    assert kinds["eval"] == 8
