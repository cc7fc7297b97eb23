"""The weights, settings and results of a run that is exported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minidistill.config import Config, load_config
from minidistill.config.adapter import adapter_folder
from minidistill.errors import UserError
from minidistill.models.registry import BUILT_IN
from minidistill.system.files import read_json

SETTINGS = "config.toml"
WEIGHTS = "model.safetensors*"


@dataclass(frozen=True, slots=True)
class Source:
    """A run, and the folder of its latest trained weights."""

    run: Path
    config: Config
    weights: Path
    is_adapter: bool
    board: Mapping[str, Any]
    """The scoreboard; empty if the run has not finished."""

    @property
    def base(self) -> str:
        return self.config.model.name

    @property
    def base_is_local(self) -> bool:
        """Whether the base is a folder of this machine, or in the package, and not on the hub."""
        return self.base in BUILT_IN or Path(self.base).expanduser().is_dir()


def open_run(run: Path) -> Source:
    """Read a run. Raises UserError if there is none, or if it has saved no weights."""
    if not (run / SETTINGS).is_file():
        raise UserError(
            f"{run} is not a run directory",
            where=str(run),
            fix="give the output directory of a run; it contains config.toml",
        )
    config = load_config([str(run / SETTINGS)], resume=True).config
    is_adapter = config.trainer.model.lora is not False
    if is_adapter:
        weights = _adapter(run)
    else:
        weights = run / "model"
        if not any(weights.glob(WEIGHTS)):
            raise UserError(
                f"the run in {run} has not finished, so its model is not saved",
                where=str(run),
                fix=f"finish it: minidistill run {run / SETTINGS} --output_dir {run} --resume",
            )
    board = run / "scoreboard.json"
    found = read_json(board) if board.is_file() else {}
    return Source(run, config, weights, is_adapter, found if isinstance(found, dict) else {})


def _adapter(run: Path) -> Path:
    try:
        return adapter_folder(str(run))
    except UserError as error:
        error.where = str(run)
        raise
