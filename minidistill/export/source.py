"""What RUN, ADAPTER or MODEL names: trained weights, their base, and the settings of their run.

A run is its directory, an adapter a PEFT folder, a model a folder or a hub's id.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from minidistill.baking.context import read_exactly
from minidistill.config import Config, load_config
from minidistill.config.adapter import SETTINGS as ADAPTER_SETTINGS
from minidistill.config.adapter import TENSORS, adapter_folder
from minidistill.errors import EXIT_ENVIRONMENT, UserError
from minidistill.models.registry import BUILT_IN, resolve
from minidistill.reporting.run_directory import RESOLVED, SCOREBOARD
from minidistill.system.files import read_json, read_text, shown_path
from minidistill.system.run_folders import SETTINGS, no_run, runs_near
from minidistill.trainer.checkpoint_files import DamageError, check_files, number

logger = logging.getLogger(__name__)

WEIGHTS = "model.safetensors*"
NO_ENVIRONMENT = "none"
"""The environment of a configuration that is no run's. None can be loaded under this name."""


@dataclass(frozen=True, slots=True)
class Source:
    """Trained weights: a run's latest ones, an adapter, or a model."""

    run: Path
    """The folder that was named."""
    config: Config
    """Of the run. That of an adapter or a model has the base, its template and a context only."""
    weights: Path
    """A PEFT folder, or a model: the path of its folder, or its id on the hub."""
    is_adapter: bool
    board: Mapping[str, Any] = field(default_factory=dict)
    """The scoreboard; empty if the run has not finished."""
    checkpoint: int | None = None
    """The step that the weights are of, if the run has not finished."""
    kind: Literal["run", "adapter", "model"] = "run"
    knows_base: bool = True
    """Whether the model before training is known. If not, `base` is the model itself."""

    @property
    def base(self) -> str:
        return self.config.model.name

    @property
    def base_is_local(self) -> bool:
        """Whether the base is a folder of this machine, or in the package, and not on the hub."""
        return self.base in BUILT_IN or Path(self.base).expanduser().is_dir()


# -- runs ------------------------------------------------------------------------------------------


def open_run(run: Path) -> Source:
    """Read a run. Raises UserError if there is none, or if it has saved no weights."""
    if not (run / SETTINGS).is_file():
        raise no_run(run, "give the output directory of a run; it contains config.toml")
    config = load_config([str(run / SETTINGS)], resume=True).config
    is_adapter = config.trainer.model.lora is not False
    board = run / SCOREBOARD
    found = read_json(board) if board.is_file() else {}
    step = None
    if is_adapter:
        weights, step = _adapter(run, finished=bool(found))
    else:
        weights = run / "model"
        if not any(weights.glob(WEIGHTS)):
            raise UserError(
                f"the run in {run} has not finished, so its model is not saved",
                where=str(run),
                fix=f"finish it: minidistill run {run / SETTINGS} --output_dir {run} --resume",
            )
    return Source(run, config, weights, is_adapter, found if isinstance(found, dict) else {}, step)


def _adapter(run: Path, *, finished: bool) -> tuple[Path, int | None]:
    """The folder of a run's adapter. If it has not finished, that of its newest checkpoint that is
    not damaged, and the checkpoint's step: what an extended run wrote at its first end is older."""
    root = run / "checkpoints"
    steps = {step: path for path in root.glob("step_*") if (step := number(path)) is not None}
    damage = []
    for step in () if finished else sorted(steps, reverse=True):
        try:
            check_files(steps[step])
        except DamageError as error:
            damage.append(f"checkpoint {steps[step].name} is damaged ({error})")
            continue
        for problem in damage:
            logger.warning(f"{problem}: using {steps[step].name}")
        return steps[step] / "adapter", step
    if damage and not (run / "adapter" / TENSORS).is_file():
        raise UserError(
            f"every checkpoint of the run in {run} is damaged: {damage[0]}",
            where=str(root),
            fix="restore one from a copy",
            exit_code=EXIT_ENVIRONMENT,
        )
    try:
        return adapter_folder(str(run)), None
    except UserError as error:
        if finished or steps or (run / "model").is_dir():
            error.where = str(run)
            raise
        raise UserError(
            f"the run in {run} has saved no checkpoint yet, so there are no weights",
            where=str(run),
            fix="wait until it has: ckpt.interval says after how many steps it saves one",
        ) from None


@contextlib.contextmanager
def reading(source: Source, done: str = "read") -> Iterator[None]:
    """Name the cause if a run's weights have gone: one that goes on removes old checkpoints."""
    try:
        yield
    except Exception as error:
        if source.kind != "run" or source.weights.is_dir():
            raise
        raise UserError(
            f"{shown_path(source.weights)} has been removed while it was {done}",
            where=str(source.run),
            fix="try again: the run goes on, and has saved later checkpoints",
            exit_code=EXIT_ENVIRONMENT,
        ) from error


# -- runs, adapters and models ---------------------------------------------------------------------


def open_source(name: str, *, base: str | None = None, context: str | None = None) -> Source:
    """What `name` names: a run's directory, a PEFT folder, or a model.

    `base` is the model before training where no run says it, and `context` a file or a text that
    takes the place of the run's context. Raises UserError for what cannot be used.
    """
    path = Path(name).expanduser()
    if (path / SETTINGS).is_file() or (path / RESOLVED).is_file():
        if base is not None:
            raise UserError(
                f"{name} is a run, which says itself what its base is",
                where="--base",
                fix=f"leave out --base, or name the adapter: {path / 'adapter'}",
            )
        source = open_run(path)
    elif (path / ADAPTER_SETTINGS).is_file():
        source = _open_adapter(path, base)
    else:
        source = _open_model(name, path, base)
    if context is None:
        return source
    return replace(source, config=with_context(source.config, read_exactly(context)))


def with_context(config: Config, context: str) -> Config:
    """The configuration with this context for every prompt."""
    none = dict.fromkeys(("context", "contexts", "examples"))
    orchestrator = config.orchestrator
    teacher = orchestrator.teacher_model.model_copy(
        update={"context": context, "context_file": None, "contexts": None}
    )
    update = {
        "teacher_model": teacher,
        "env": [e.model_copy(update=none) for e in orchestrator.env],
    }
    return config.model_copy(update={"orchestrator": orchestrator.model_copy(update=update)})


def _open_adapter(path: Path, base: str | None) -> Source:
    folder = _with_error(path)
    settings = read_json(folder / ADAPTER_SETTINGS, fix="save the adapter again")
    named = settings.get("base_model_name_or_path") if isinstance(settings, dict) else None
    if base is None and not (isinstance(named, str) and named and "\0" not in named):
        raise UserError(
            f"the adapter in {path} does not say what model it is for",
            where=str(path / ADAPTER_SETTINGS),
            fix="give the model that it was trained on with --base",
        )
    if base is not None and isinstance(named, str) and _last(named) != _last(base):
        logger.warning(f"the adapter in {path} names {named} as its base, and --base is {base}")
    config = _bare(base or _place(str(named), folder), _template(path))
    if base is None and settings.get("revision"):
        model = config.model.model_copy(update={"revision": settings["revision"]})
        config = config.model_copy(update={"model": model})
    return Source(path, config, folder, is_adapter=True, kind="adapter")


def _place(named: str, folder: Path) -> str:
    """The base that an adapter's settings name: `export` writes a folder's path from there."""
    beside = os.path.realpath(folder / named)
    return beside if named.startswith(os.pardir) and os.path.isdir(beside) else named


def _with_error(path: Path) -> Path:
    try:
        return adapter_folder(str(path))
    except UserError as error:  # it blames the setting of a run
        raise UserError(
            error.what, str(path), f"name a folder with {ADAPTER_SETTINGS} and {TENSORS}"
        ) from None


def _open_model(name: str, path: Path, base: str | None) -> Source:
    runs = "" if name in BUILT_IN else runs_near(path)
    on_hub = _may_be_on_hub(name) and not (runs and path.parent != Path())
    if name not in BUILT_IN and not path.is_dir() and not on_hub:
        raise UserError(
            f"there is no run, adapter or model in {path}",
            where=name,
            fix=runs
            or "give a run's directory, a PEFT folder, a model's folder, a built-in model "
            f"({', '.join(BUILT_IN)}) or a hub's id",
        )
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(
            f"{path} holds no run, no adapter and no model",
            where=name,
            fix=runs or f"a run has {SETTINGS}, an adapter {ADAPTER_SETTINGS}, a model config.json",
        )
    model = str(path) if path.is_dir() else name
    config = _bare(base or model, _template(path) if base else None)
    kind: Literal["model"] = "model"
    return Source(Path(name), config, Path(model), False, kind=kind, knows_base=base is not None)


def _may_be_on_hub(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def _template(folder: Path) -> str | None:
    """The chat template in an exported folder, which is that of the training."""
    if (folder / "chat_template.jinja").is_file():
        return read_text(folder / "chat_template.jinja")
    settings = folder / "tokenizer_config.json"
    found = read_json(settings) if settings.is_file() else {}
    template = found.get("chat_template") if isinstance(found, dict) else None
    return template if isinstance(template, str) else None


def _bare(base: str, template: str | None) -> Config:
    """A configuration for a model, without a context and without an environment.

    A `template` that is the model's own is left out.
    """
    folder = Path(resolve(base)).expanduser()
    if folder.is_dir() and template == _template(folder):
        template = None
    model = {"name": base, **({} if template is None else {"chat_template": template})}
    return Config.model_validate(
        {
            "model": model,
            "orchestrator": {"teacher_model": {}, "env": [{"id": NO_ENVIRONMENT}]},
        }
    )


def _last(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].replace("_", "-").lower()
