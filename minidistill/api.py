"""What Python uses: `from minidistill import bake, run, load_config, Run`."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeAlias, cast

import tomli

from minidistill.config import Config, LoadedConfig
from minidistill.config.load import load_layers
from minidistill.config.overrides import Override, from_mapping
from minidistill.error_output import as_user_error
from minidistill.errors import EXIT_FAILED, EXIT_OK, UserError
from minidistill.system.foreign import ctrl_c, is_interrupt, was_interrupted
from minidistill.system.threads import settle_threads

if TYPE_CHECKING:
    import pandas

    from minidistill.reporting.results import HeldOutSample, LoggedRollout, Scoreboard, Status
    from minidistill.reporting.terminal.base import Display

Layer: TypeAlias = str | os.PathLike[str] | Mapping[str, Any]
"""A TOML file, the name of a configuration of the package, or settings as nested dicts."""
Configuration: TypeAlias = Layer | Sequence[Layer] | LoadedConfig
"""Layers, of which a later one beats an earlier one, or what `load_config` has returned."""


def load_config(config: Configuration, *, resume: bool = False, **settings: Any) -> LoadedConfig:
    """The validated configuration of files and settings, with the place where each is from.

    `settings` beat `config`. Their names are those of the command line: `max_steps=20`, a table as
    a dict, or dotted names in `**{"trainer.loss.adv_tau": 0.2}`; dotted names are also the keys of
    dicts in `config`. Paths in dicts are relative to the current directory, paths in a file to the
    file. With `resume` an adapter that the run started from may have gone.

    Raises UserError with the place of each error.
    """
    if isinstance(config, LoadedConfig):
        if not settings:
            return config
        layers: list[Layer] = [tomli.loads(config.text)]
    elif isinstance(config, str | os.PathLike | Mapping):
        layers = [config]
    else:
        layers = list(config)
    sources: list[str | list[Override]] = [
        from_mapping(layer) if isinstance(layer, Mapping) else os.fspath(layer) for layer in layers
    ]
    loaded = load_layers([*sources, from_mapping(settings)], resume=resume)
    # the run's directory has the name of its first file
    files = config.files if isinstance(config, LoadedConfig) else loaded.files
    return dataclasses.replace(loaded, files=files)


def run(
    config: Configuration, *, resume: bool = False, quiet: bool = False, **settings: Any
) -> Run:
    """Train, as `minidistill run` does, and return the finished run.

    `config` and `settings` are those of `load_config`. `resume` continues the run in `output_dir`,
    or the newest of this configuration. `quiet` shows the run's directory, warnings and the
    scoreboard only. On Ctrl-C the run stops after its step, is saved, and KeyboardInterrupt is
    raised: `resume` continues it. A second Ctrl-C stops at once; then `resume` continues from the
    last checkpoint.

    Raises UserError for errors that the user can fix; its `exit_code` is that of the command.
    """
    return _run(load_config(config, resume=resume, **settings), resume=resume, quiet=quiet)


def bake(
    model: str,
    context: str | os.PathLike[str],
    prompts: str | os.PathLike[str] | None = None,
    steps: int | None = None,
    out: str | os.PathLike[str] | None = None,
    *,
    resume: bool = False,
    quiet: bool = False,
    **settings: Any,
) -> Run:
    """Bake a context into an adapter of a model, as `minidistill bake` does.

    `context` is the text, or a file with it; `prompts` is a file of prompts, and without one the
    model writes them itself. `steps` is `max_steps`, `out` the run's directory. `resume`, `quiet`
    and `settings` are those of `run`.
    """
    _before_torch()
    from minidistill.baking import bake_configuration

    plan = bake_configuration(
        model,
        Path(context) if isinstance(context, os.PathLike) else context,
        None if prompts is None else Path(prompts),
        steps,
        None if out is None else Path(out),
        settings,
        resume=resume,
    )
    return _run(plan.loaded, resume=resume, quiet=quiet)


def _before_torch() -> None:
    settle_threads()  # before torch loads OpenMP
    # interpreted kernels have to be asked for before transformers imports triton
    import minidistill_kernels  # noqa: F401


def _run(loaded: LoadedConfig, *, resume: bool, quiet: bool) -> Run:
    _before_torch()
    from minidistill.driver import loop
    from minidistill.trainer.distributed.rank_group import launched_by_torchrun

    if launched_by_torchrun() is not None:
        raise UserError(
            "a run that torchrun starts cannot be started in Python",
            fix="torchrun … -m minidistill run FILES…",
        )
    directories: list[Path] = []
    try:
        with ctrl_c():
            code = loop.run(
                loaded,
                resume=resume,
                display=_quiet_display() if quiet else None,
                claimed=directories.append,
            )
    except BaseException as error:
        if is_interrupt(error) or was_interrupted():
            raise _interrupted(directories) from error
        if isinstance(error, SystemExit):  # of an environment's code: it would end the notebook
            raise RuntimeError(f"something called sys.exit({error.code!r})") from error
        problem = as_user_error(error)
        if problem is error or problem.exit_code == EXIT_FAILED:  # nothing is known about it
            raise
        raise problem from error
    if code != EXIT_OK:
        raise _interrupted(directories)
    return Run(directories[-1])


def _quiet_display() -> Display:
    from minidistill.reporting.terminal.output import Output
    from minidistill.reporting.terminal.quiet import QuietDisplay
    from minidistill.system.symbols import wants_ascii

    output = cast(TextIO, Output(sys.stdout))
    return QuietDisplay(output, in_ascii=wants_ascii(output))


def _interrupted(directories: Sequence[Path]) -> KeyboardInterrupt:
    place = f" in {directories[-1]}" if directories else ""
    return KeyboardInterrupt(f"the run{place} was stopped; resume=True continues it")


class Run:
    """A run's directory. Everything is read when it is asked for, also while the run goes on."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        """Raises UserError if there is no run."""
        self.directory = Path(directory).expanduser().absolute()
        if not (self.directory / "config.toml").is_file():
            raise UserError(
                f"{directory} is not a run directory",
                where=str(directory),
                fix="give the output directory of a run; it contains config.toml",
            )

    @property
    def status(self) -> Status:
        """`running`, `finished`, `stopped` (saved, to be resumed) or `crashed`."""
        from minidistill.reporting.results import read_status

        steps = [row["step"] for row in self.metrics]
        return read_status(self.directory, self.scoreboard, max(steps, default=None))

    @property
    def config(self) -> Config:
        """The settings of the run, defaults included."""
        return load_config(self.directory / "config.toml", resume=True).config

    @property
    def context(self) -> str | None:
        """What the teacher reads. None if it is not one text: contexts of rows or environments."""
        return self.config.orchestrator.teacher_model.context or None

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The metrics of each step in order, `step` among them. Step 0 is before training.

        Of two values for one step the later one counts. None stands for NaN and infinity.
        """
        from minidistill.reporting.records import Records

        rows: dict[int, dict[str, Any]] = {}
        for record in Records(self.directory).all():
            rows.setdefault(record["step"], {}).update(record)
        return [rows[step] for step in sorted(rows)]

    def to_pandas(self) -> pandas.DataFrame:
        """`metrics` as a data frame with the steps as its index. It needs the package pandas."""
        import pandas

        frame = pandas.DataFrame(self.metrics)
        return frame.set_index("step") if len(frame) else frame

    @property
    def scoreboard(self) -> Scoreboard | None:
        """What the run has reached; None until it ends. Raises UserError if it is damaged."""
        from minidistill.reporting.results import Scoreboard
        from minidistill.reporting.run_directory import RunDirectory

        board = RunDirectory(self.directory).read("scoreboard.json")
        return None if board is None else Scoreboard.of(board)

    @property
    def verdict(self) -> str | None:
        """The sentence that leads the scoreboard; None until the run ends."""
        board = self.scoreboard
        return None if board is None else board.verdict

    @property
    def samples(self) -> list[HeldOutSample]:
        """Completions for held-out prompts: before, in context, and after training; those that are
        there yet."""
        from minidistill.reporting.results import HeldOutSample
        from minidistill.reporting.run_directory import RunDirectory

        board = self.scoreboard
        known = RunDirectory(self.directory).read("baseline.json") if board is None else board.raw
        rows = (known or {}).get("completions") or []
        keys = ("before", "teacher", "after")
        return [HeldOutSample(row["prompt"], *(row.get(key) for key in keys)) for row in rows]

    def rollouts(self, step: int) -> list[LoggedRollout]:
        """The completions that a step was trained on. Raises UserError if there are none."""
        from minidistill.reporting.results import read_rollouts

        return read_rollouts(self.directory, step)

    @property
    def adapter(self) -> Path | None:
        """The folder of the latest adapter, as PEFT reads it; None before the first checkpoint, and
        for a run that trains every weight."""
        from minidistill.config.adapter import adapter_folder

        try:
            return adapter_folder(str(self.directory))
        except UserError:
            return None

    @property
    def report(self) -> Path:
        """The HTML report, which is written if the run has none yet."""
        path = self.directory / "report.html"
        if not path.is_file():
            from minidistill.reporting.html import write_report

            write_report(self.directory)
        return path

    def export(
        self,
        to: str | os.PathLike[str],
        *,
        merge: bool = False,
        base: str | None = None,
        with_context: bool = False,
        gguf: bool = False,
        vllm: bool = True,
    ) -> Path:
        """Write the adapter, or with `merge` the whole model, to a folder for other programs.

        The options are those of `minidistill export`; `vllm=False` does not load it in vLLM.
        Returns the folder. Raises UserError.
        """
        _before_torch()
        from minidistill.export.command import Options, export

        export(self.directory, Options(Path(to), merge, base, with_context, gguf, None, vllm))
        return Path(to)

    def __repr__(self) -> str:
        verdict = self.verdict
        return f"Run({str(self.directory)!r}, {self.status}{f', {verdict!r}' if verdict else ''})"

    def _repr_html_(self) -> str:
        from minidistill.reporting.html import summary_html

        return summary_html(self.directory)
