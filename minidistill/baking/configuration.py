"""The configuration of a run from a model, a context, and little else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minidistill.config import LoadedConfig


@dataclass(frozen=True, slots=True)
class BakePlan:
    """A run that can be started: `minidistill.driver.loop.run(plan.loaded, resume=…)`."""

    loaded: LoadedConfig
    """Its `text` is a short TOML with comments that loads again, which the run writes to its
    directory as `config.toml` before it trains."""
    directory: Path
    """Of the run, which is also `output_dir` of the configuration. It is not made yet."""

    @property
    def text(self) -> str:
        return self.loaded.text


def bake_configuration(
    model: str,
    context: str | Path,
    prompts: str | Path | None = None,
    steps: int | None = None,
    out: str | Path | None = None,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    *,
    resume: bool = False,
) -> BakePlan:
    """The run that bakes `context` into `model`. Nothing is written, and torch is not loaded.

    `context` is the text, or the path of a file with it. `prompts` is a file of prompts; without
    one the model writes them itself. `steps` is `max_steps`, `out` the run's directory; without it
    a new one under `runs/` is chosen, or with `resume` the newest. `overrides` are any other
    settings: flags as on the command line (`["--trainer.optim.lr", "1e-4"]`), or values by their
    dotted names (`{"trainer.optim.lr": 1e-4}`).

    Raises UserError, which names the argument as `--context` and so on.
    """
    raise NotImplementedError
