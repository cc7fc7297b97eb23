"""The configuration of a run from a model, a context, and little else."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import tomli

from minidistill.baking.context import FLAG as CONTEXT
from minidistill.baking.context import name_of, read_context
from minidistill.baking.defaults import Defaults, defaults
from minidistill.baking.document import document
from minidistill.baking.flags import naming_flags
from minidistill.baking.prompts import FLAG as PROMPTS
from minidistill.baking.prompts import prompts_args
from minidistill.config import LoadedConfig
from minidistill.config.load import load_layers
from minidistill.config.overrides import Override, from_mapping, parse
from minidistill.driver.prepare import prompt_builder
from minidistill.envs.registry import load_environment
from minidistill.errors import UserError
from minidistill.models.hub import load_tokenizer
from minidistill.evaluation.intervals import MIN_TASKS
from minidistill.placement.machine import Machine
from minidistill.reporting.run_path import choose_path

DEFAULT = "bake's default"
"""Where a setting is from that neither an argument nor an override gives."""
MODEL, STEPS, OUT = "--model", "--steps", "--out"
_HELD_OUT_OF = 4
"""A file of prompts gives up to this part of them for the figures, if they are enough."""
_ROOM = 512
"""Tokens of `seq_len` for the prompt and the template, beside the context and the completion."""

_TITLE = """\
Written by `minidistill bake`. Edit it and run it again, from the same directory:
  minidistill run {file} --output_dir runs/another
  minidistill config {file}    # every setting; docs/configuration.md explains them

"""
_COMMENTS = {
    "max_steps": "optimizer steps",
    "seq_len": "longest context + prompt + completion, in tokens",
    "trainer.model.lora": "The adapter: a higher rank holds more.",
    "trainer.optim": "Lower lr if the KL jumps, raise it if it hardly falls.",
    "trainer.loss": "Pure distillation: the teacher's signal alone, and no reward.",
    "orchestrator.batch_size": "completions in a step",
    "orchestrator.rollouts_per_example": "completions of each prompt",
    "orchestrator.sampling.max_tokens": "of a completion: long enough to show the behavior",
    "orchestrator.buffer.skip_verification": "no rewards in training",
    "orchestrator.teacher_model": "What the student should learn to do without reading it.",
    "orchestrator.env": "What it is trained on: {prompts}.",
    "orchestrator.eval": "Before and after training, on prompts that it is not trained on.",
    "orchestrator.eval.interval": "only before and after",
    "orchestrator.eval.env": "Questions that people ask; they ship with the package.",
}


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
    """The run that bakes `context` into `model`. Nothing is written.

    `context` is the text, or the path of a file with it. `prompts` is a file of prompts; without
    one the model writes them itself. `steps` is `max_steps`, `out` the run's directory; without it
    a new one under `runs/` is chosen, or with `resume` the newest. `overrides` are any other
    settings: flags as on the command line (`["--trainer.optim.lr", "1e-4"]`), or values by their
    dotted names (`{"trainer.optim.lr": 1e-4}`).

    Raises UserError, which names the argument as `--context` and so on.
    """
    text = read_context(context)
    given = _Given(model, text, prompts, steps, out)
    settings = _overrides(overrides)
    with naming_flags():
        loaded = _load(given, settings, resume)
        loaded = dataclasses.replace(loaded, files=(Path(f"{name_of(context, text)}.toml"),))
        directory = choose_path(loaded, resume)
    data = {"output_dir": str(directory), **tomli.loads(loaded.text)}
    config = loaded.config.model_copy(update={"output_dir": data["output_dir"]})
    provenance = loaded.provenance
    if provenance["output_dir"] == "default":
        provenance = provenance | {"output_dir": OUT}
    plan = dataclasses.replace(
        loaded, config=config, provenance=provenance, text=_text(data, directory, prompts)
    )
    return BakePlan(plan, directory)


@dataclass(frozen=True, slots=True)
class _Given:
    """The arguments."""

    model: str
    context: str
    prompts: str | Path | None
    steps: int | None
    out: str | Path | None

    def flags(self) -> dict[str, str]:
        """The arguments that are given, by the setting that each decides."""
        flags = {"model.name": MODEL, "orchestrator.teacher_model.context": CONTEXT}
        optional = (
            ("max_steps", STEPS, self.steps),
            ("output_dir", OUT, self.out),
            ("orchestrator.env.0.args.path", PROMPTS, self.prompts),
        )
        return flags | {key: flag for key, flag, value in optional if value is not None}


def _overrides(overrides: Sequence[str] | Mapping[str, Any]) -> list[Override]:
    if isinstance(overrides, Mapping):
        return from_mapping(overrides)
    files, settings = parse(overrides)
    if files:
        raise UserError(
            f"bake takes no file, and {files[0]!r} is given",
            fix="quote a context of several words; `minidistill run FILES…` runs configurations",
        )
    return settings


def _load(given: _Given, settings: list[Override], resume: bool) -> LoadedConfig:
    """The configuration, whose defaults fit the machine, the model and the prompts."""
    chosen = defaults(Machine.local().gpus)
    layer = _layer(given, chosen)
    loaded = load_layers([layer, settings], resume=resume)
    for key, flag in given.flags().items():
        if (other := loaded.provenance.get(key, flag)) != flag:
            raise UserError(
                f"{flag} and {other} both set {key}", where=flag, fix="keep one of the two"
            )
    layer += _of_prompts(given, loaded, chosen)
    layer += _of_model(loaded, chosen)
    return load_layers([layer, settings], resume=resume)


def _layer(given: _Given, chosen: Defaults) -> list[Override]:
    """What the arguments say, and what a bake is."""
    steps = chosen.steps if given.steps is None else given.steps
    env: dict[str, Any] = {
        "id": "self-prompts",
        "args": {"count": chosen.prompts, "max_tokens": chosen.prompt_tokens},
    }
    if given.prompts is not None:
        env = {"id": "jsonl", "args": prompts_args(given.prompts)}
    whole = [
        ("output_dir", None if given.out is None else str(given.out), OUT),
        ("max_steps", steps, DEFAULT if given.steps is None else STEPS),
        ("model.name", given.model, MODEL),
        ("trainer.model.lora.rank", chosen.rank, DEFAULT),
        ("trainer.optim.lr", chosen.lr, DEFAULT),
        ("trainer.scheduler.type", "cosine", DEFAULT),
        ("trainer.scheduler.warmup_steps", 5, DEFAULT),
        ("trainer.loss.adv_tau", 0.0, DEFAULT),
        ("trainer.loss.teacher_tau", 1.0, DEFAULT),
        ("trainer.loss.student_tau", 1.0, DEFAULT),
        ("orchestrator.batch_size", chosen.batch_size, DEFAULT),
        ("orchestrator.rollouts_per_example", 1, DEFAULT),
        ("orchestrator.sampling.max_tokens", chosen.max_tokens, DEFAULT),
        ("orchestrator.buffer.skip_verification", True, DEFAULT),
        ("orchestrator.teacher_model.context_placement", "system", DEFAULT),
        # an empty line, because the context may follow the template's own system message
        ("orchestrator.teacher_model.context", f"\n\n{given.context}", CONTEXT),
        ("orchestrator.env", [env], DEFAULT if given.prompts is None else PROMPTS),
        ("orchestrator.eval.interval", 0, DEFAULT),
        ("orchestrator.eval.num_examples", chosen.held_out, DEFAULT),
        ("orchestrator.eval.env", [{"id": "questions"}], DEFAULT),
    ]
    return [_override(key, value, flag) for key, value, flag in whole if value is not None]


def _override(key: str, value: Any, flag: str) -> Override:
    return Override(tuple(key.split(".")), value, flag)


def _of_prompts(given: _Given, loaded: LoadedConfig, chosen: Defaults) -> list[Override]:
    """A file with enough prompts gives some of them for the figures."""
    env = loaded.config.orchestrator.env[0]
    if given.prompts is None or env.id != "jsonl":
        return []
    environment = load_environment(env.id, env.args, PROMPTS)
    count = len(environment.train) + len(environment.eval)
    held_out = min(chosen.held_out, count // _HELD_OUT_OF)
    if held_out < MIN_TASKS or "num_eval_examples" in env.args:
        return []
    args = {**prompts_args(given.prompts), "num_eval_examples": held_out}
    return [_override("orchestrator.env", [{"id": "jsonl", "args": args}], PROMPTS)]


def _of_model(loaded: LoadedConfig, chosen: Defaults) -> list[Override]:
    """What the chat template and the length of the context ask for."""
    found, config = [], loaded.config
    builder = prompt_builder(config, load_tokenizer(config), datetime.now())
    teacher = config.orchestrator.teacher_model
    if loaded.provenance["orchestrator.teacher_model.context_placement"] == DEFAULT:
        try:
            _ = builder.default_system
        except UserError:  # the template drops system messages
            found = [
                _override("orchestrator.teacher_model.context_placement", "user", DEFAULT),
                _override(
                    "orchestrator.teacher_model.context", f"{teacher.context.strip()}\n\n", CONTEXT
                ),
            ]
    needed = len(builder.encode(teacher.context)) + _ROOM + config.orchestrator.sampling.max_tokens
    if needed > config.seq_len and loaded.provenance["seq_len"] == "default":
        found.append(_override("seq_len", -(-needed // 256) * 256, DEFAULT))
    return found


def _text(data: Mapping[str, Any], directory: Path, prompts: str | Path | None) -> str:
    by = "prompts that the model writes itself" if prompts is None else "your prompts"
    comments = {key: text.format(prompts=by) for key, text in _COMMENTS.items()}
    orchestrator = data["orchestrator"]
    last = {
        key: orchestrator[key] for key in ("teacher_model", "env", "eval") if key in orchestrator
    }
    first = {key: value for key, value in orchestrator.items() if key not in last}
    data = {**data, "orchestrator": {**first, **last}}
    return document(data, _TITLE.format(file=directory / "config.toml"), comments)
