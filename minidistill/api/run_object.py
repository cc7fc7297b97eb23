"""A run in Python: its directory, read as typed results."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minidistill.config import Config, load_config
from minidistill.errors import UserError
from minidistill.system.run_folders import SETTINGS, no_run
from minidistill.system.threads import before_torch

if TYPE_CHECKING:
    import pandas

    from minidistill.reporting.results import HeldOutSample, LoggedRollout, Scoreboard, Status


class Run:
    """A run's directory. Everything is read when it is asked for, also while the run goes on."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        """Raises UserError if there is no run."""
        self.directory = Path(directory).expanduser().absolute()
        if not (self.directory / SETTINGS).is_file():
            raise no_run(
                Path(directory), "give the output directory of a run; it contains config.toml"
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
        return load_config([str(self.directory / SETTINGS)], resume=True).config

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
        from minidistill.reporting.run_directory import RunDirectory, damaged

        board = self.scoreboard
        known = RunDirectory(self.directory).read("baseline.json") if board is None else board.raw
        rows = (known or {}).get("completions") or []
        keys = ("before", "teacher", "after")
        try:
            return [HeldOutSample(row["prompt"], *(row.get(key) for key in keys)) for row in rows]
        except (AttributeError, KeyError, TypeError) as error:
            name = "baseline.json" if board is None else "scoreboard.json"
            raise damaged(self.directory / name, repr(error)) from error

    def rollouts(self, step: int | None = None) -> list[LoggedRollout]:
        """The completions that a step was trained on, by default the last. Raises UserError if
        there are none."""
        from minidistill.look.rollouts import read_rollouts
        from minidistill.reporting.records import rollout_names
        from minidistill.reporting.results import LoggedRollout
        from minidistill.reporting.run_directory import damaged

        found = read_rollouts(self.directory, step)
        try:
            return [LoggedRollout.of(r.step, r.row, r.kl, r.gaps) for r in found]
        except (KeyError, TypeError) as error:
            raise damaged(self.directory / rollout_names(found[0].step)[0], repr(error)) from error

    def chat(self, question: str) -> dict[str, str]:
        """The answers of the base, of the base in context if it is one text, and of the student.

        They are sampled with the run's settings. The model is loaded for each question.
        """
        before_torch()
        from minidistill.export.source import open_source
        from minidistill.look.chat import Chat
        from minidistill.look.model import load
        from minidistill.look.views import BASE, BASE_IN_CONTEXT, STUDENT, find_contexts
        from minidistill.types import Context, SamplingParams

        source = open_source(str(self.directory))
        contexts = find_contexts(source.config)
        views = [BASE, *([BASE_IN_CONTEXT] if contexts else []), STUDENT]
        sampling = source.config.orchestrator.sampling
        params = SamplingParams(sampling.max_tokens, sampling.temperature)
        talk = Chat(load(source), views, contexts[0] if contexts else Context(""), params)
        answers = talk.ask(question)
        return {view.name: answer.text for view, answer in zip(views, answers, strict=True)}

    @property
    def adapter(self) -> Path | None:
        """The folder of the latest adapter, as PEFT reads it; None before the first checkpoint, and
        for a run that trains every weight. Raises UserError if what the run has saved cannot be
        read."""
        before_torch()
        from minidistill.export.source import open_run
        from minidistill.trainer.checkpoint_files import number

        if self.config.trainer.model.lora is False:
            return None
        checkpoints = map(number, self.directory.glob("checkpoints/step_*"))
        begun = self.scoreboard is not None or any(step is not None for step in checkpoints)
        try:
            return open_run(self.directory).weights
        except UserError:
            if begun:
                raise
            return None  # nothing is saved yet

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
        before_torch()
        from minidistill.export.command import Options, export

        folder = Path(to).expanduser()
        export(self.directory, Options(folder, merge, base, with_context, gguf, None, vllm))
        return folder

    def __repr__(self) -> str:
        verdict = self.verdict
        return f"Run({str(self.directory)!r}, {self.status}{f', {verdict!r}' if verdict else ''})"

    def _repr_html_(self) -> str:
        from minidistill.reporting.html import summary_html

        return summary_html(self.directory)
