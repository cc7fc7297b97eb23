"""The configuration of a run from a model, a context, and little else."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import tomli

from minidistill.baking.context import FLAG as CONTEXT
from minidistill.baking.context import name_of, read_context
from minidistill.baking.document import commented
from minidistill.baking.flags import naming_flags
from minidistill.baking.prompts import FLAG as PROMPTS
from minidistill.baking.settings import DEFAULT, OUT, PLACEMENT, TEXT, Defaults, Given, override
from minidistill.config import LoadedConfig
from minidistill.config.load import load_layers
from minidistill.config.overrides import Override, from_mapping, parse
from minidistill.envs.registry import load_environment
from minidistill.errors import UserError
from minidistill.evaluation.intervals import MIN_TASKS
from minidistill.placement.machine import Machine
from minidistill.reporting.run_path import choose_path

HELD_OUT_OF = 4
"""One in so many prompts of a file is held out, if that makes enough of them."""
ROOM = 512
"""Tokens of `seq_len` for the prompt and the template, beside the context and the completion."""
_TITLE = """\
Written by `minidistill bake`. Edit it and run it again, from the same directory:
  minidistill run {file} --output_dir runs/another
  minidistill config {file}    # every setting, and where it comes from

"""


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
    given = Given(model, text, prompts, steps, out)
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
    document = commented(data, _TITLE.format(file=shlex.quote(str(directory / "config.toml"))))
    plan = dataclasses.replace(loaded, config=config, provenance=provenance, text=document)
    return BakePlan(plan, directory)


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


def _load(given: Given, settings: list[Override], resume: bool) -> LoadedConfig:
    """The configuration, whose defaults fit the machine, the prompts and the model."""
    chosen = Defaults.of(Machine.local().gpus)
    layer = given.overrides(chosen)
    loaded = load_layers([layer, settings], resume=resume)
    for key, flag in given.flags().items():
        if (other := loaded.provenance.get(key, flag)) != flag:
            raise UserError(f"{flag} and {other} both set {key}", flag, "keep one of the two")
    if not loaded.config.trainer.model.lora:  # the rate is one for an adapter
        layer.append(override("trainer.optim.lr", "auto"))
    layer += _of_prompts(given, loaded, chosen)
    layer += _of_model(given, loaded)
    return load_layers([layer, settings], resume=resume)


def _of_prompts(given: Given, loaded: LoadedConfig, chosen: Defaults) -> list[Override]:
    """A file with enough prompts gives some of them for the figures."""
    env = loaded.config.orchestrator.env[0]
    if given.prompts is None or env.id != "jsonl":
        return []
    environment = load_environment(env.id, env.args, PROMPTS)
    held_out = min(chosen.held_out, (len(environment.train) + len(environment.eval)) // HELD_OUT_OF)
    if held_out < MIN_TASKS:
        return []
    return [
        override("orchestrator.env.0.args", {"num_eval_examples": held_out}, PROMPTS),
        override("orchestrator.eval.env", None),  # those of training
    ]


def _of_model(given: Given, loaded: LoadedConfig) -> list[Override]:
    """What the chat template and the length of the context ask for."""
    from minidistill.driver.prepare import prompt_builder  # torch and transformers take seconds
    from minidistill.models.hub import load_tokenizer

    found: list[Override] = []
    config = loaded.config
    tokenizer = load_tokenizer(config)
    if "enable_thinking" in str(tokenizer.chat_template):  # thoughts would fill the completion
        found.append(override("model.chat_template_kwargs", {"enable_thinking": False}))
    builder = prompt_builder(config, tokenizer, datetime.now())
    placement = config.orchestrator.teacher_model.context_placement
    if loaded.provenance[PLACEMENT] == DEFAULT:
        try:
            _ = builder.default_system
        except UserError:  # the template drops system messages
            placement = "user"
            found.append(override(PLACEMENT, placement))
    if placement == "user":  # the prompt follows it
        found.append(override(TEXT, f"{given.context}\n\n", CONTEXT))
    needed = len(builder.encode(given.context)) + ROOM + config.orchestrator.sampling.max_tokens
    if needed > config.seq_len and loaded.provenance["seq_len"] == "default":
        found.append(override("seq_len", -(-needed // 256) * 256))
    return found
