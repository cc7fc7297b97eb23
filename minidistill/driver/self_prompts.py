"""Sampling the prompts of `self-prompts` with the run's model, before its tasks are needed.

The model is loaded once for that, and the embedded engine samples, whatever samples in the run.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import logging
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from minidistill.config import Config
from minidistill.config.orchestrator import EnvConfig
from minidistill.driver.base_engine import base_engine
from minidistill.engines.base import Engine
from minidistill.envs.protocol import Environment
from minidistill.envs.registry import load_environments
from minidistill.envs.self_prompts import ID, Choice, Settings
from minidistill.errors import UserError
from minidistill.models.identity import model_identity
from minidistill.models.weights import check_weights
from minidistill.placement.placement import Placement
from minidistill.seeding import stable_seed
from minidistill.system.files import cache_folder, shown_path, write_atomic, writing
from minidistill.tasks.chat_template import ChatTemplate
from minidistill.tasks.measuring import no_progress
from minidistill.tasks.prompts import PromptBuilder
from minidistill.tasks.user_turn import UserTurn
from minidistill.trainer.guards import explain_out_of_memory
from minidistill.types import Advance, Phase, Request, Role, SamplingParams

logger = logging.getLogger(__name__)
MOST = 4
"""Texts that are sampled for each prompt that is wanted, at most."""
ROUND = 512
"""Texts sampled at a time."""
FORMAT = 1
"""Of what decides a file's name. Another number samples again."""


class SelfPrompts:
    """Writes the files of a run's `self-prompts`, and loads the environments over them."""

    def __init__(
        self,
        config: Config,
        tokenizer: Any,
        builder: PromptBuilder,
        placement: Placement,
        phase: Phase = no_progress,
    ) -> None:
        self.config, self.tokenizer, self.builder = config, tokenizer, builder
        self.placement, self.phase = placement, phase

    def environments(self, envs: Sequence[EnvConfig], where: str) -> dict[str, Environment]:
        """Those among the configured `envs` that are `self-prompts`, by name, with their tasks.

        Raises UserError if the settings cannot be used, or if too few prompts come out.
        """
        written = [env for env in self.with_files(envs, where) if env.id == ID]
        return load_environments(written, where)

    def with_files(self, envs: Sequence[EnvConfig], where: str) -> list[EnvConfig]:
        """The configured `envs`, with its file as `path` in the args of each `self-prompts`."""
        return [
            env.model_copy(update={"args": {**env.args, "path": str(self.file(env, place))}})
            if env.id == ID
            else env
            for place, env in ((f"{where}.{i}", env) for i, env in enumerate(envs))
        ]

    def file(self, env: EnvConfig, where: str) -> Path:
        """The file with the prompts of `env`, which is written if it is not there.

        It is `path` of the args, or else in the user's cache, under a name that the model, the
        template and the settings decide.
        """
        settings = Settings.of(env.args)
        context = self._context(env, where) if settings.about_context else ""
        turns = _turns(settings, context, self.builder.student)
        path = _path(self.config, env, settings, turns)
        if path.is_file():
            logger.info(f"{env.name} takes its prompts from {shown_path(path)}")
            return path
        longest = max(len(turn.opening_ids) for turn in turns) + settings.max_tokens
        if longest > self.placement.max_length:
            raise UserError(
                f"{ID}: what opens a user's turn and max_tokens make {longest} tokens, more than a "
                f"sequence of {self.placement.max_length}",
                where=f"{where}.args.max_tokens",
                fix="lower max_tokens in its args, or raise seq_len",
            )
        check_weights(self.config)
        prompts = _Prompts(settings, turns, context, where)
        with self.phase(f"write prompts of {env.name}", settings.count, "prompts") as advance:
            self._sample(prompts, advance)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # for engines that start after this
        prompts.write(path, env.name)
        return path

    def _context(self, env: EnvConfig, where: str) -> str:
        """What the prompts are about with `topics = "context"`.

        Raises UserError if it is empty, or if there are several.
        """
        teacher = self.config.orchestrator.teacher_model
        several = env.contexts or (teacher.contexts if env.context is None else None)
        context = (teacher.context if env.context is None else env.context).strip()
        if several or not context:
            raise UserError(
                f'{ID}: topics = "context", and there '
                + (f"are {len(several)} contexts" if several else "is no context"),
                where=f"{where}.args.topics",
                fix="use a list of texts as topics, or set orchestrator.teacher_model.context",
            )
        return context

    @explain_out_of_memory(
        "writing prompts with the model",
        where="model.name",
        fix="lower max_tokens in the args of self-prompts, or write the file on a larger machine "
        "with `minidistill env prompts` and name it as path in the args",
    )
    def _sample(self, prompts: _Prompts, advance: Advance) -> None:
        """Load the model as it is before any training, and sample with it."""
        turns = prompts.turns
        ends = {turn.end_id for turn in turns} | {turns[0].template.end_of_turn}
        known = [end for end in ends if end is not None]
        engine = base_engine(self.config, self.tokenizer, self.placement, known)
        prompts.sample(engine, advance)


def _turns(settings: Settings, context: str, template: ChatTemplate) -> list[UserTurn]:
    """The user's turns to sample, one for each topic."""
    about = [f"The user asks something about {topic}." for topic in settings.topics]
    return [UserTurn.of(template, system) for system in about or [context]]


def _path(config: Config, env: EnvConfig, settings: Settings, turns: Sequence[UserTurn]) -> Path:
    """The file of the prompts, named by all that they depend on if the user has not named it."""
    if (given := env.args.get("path")) is not None:
        return Path(given).expanduser()
    sampling = dataclasses.asdict(settings)
    if settings.at_least == settings.count:  # the default: a name that older versions gave too
        del sampling["at_least"]
    facts = {
        "format": FORMAT,
        "model": model_identity(config),
        "weights": [config.model.dtype, config.model.quantization],
        "turns": [[turn.opening, turn.ending, turn.opening_ids] for turn in turns],
        "settings": sampling,
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    model = re.sub(r"[^\w.-]+", "-", Path(config.model.name).name)[:60]
    return cache_folder(ID) / f"{model}-{digest[:16]}.jsonl"


class _Prompts:
    """The prompts of one environment: sampled, chosen and written."""

    def __init__(
        self, settings: Settings, turns: Sequence[UserTurn], context: str, where: str
    ) -> None:
        """`context` is the one that the model reads when it writes them, if it does."""
        self.settings, self.turns, self.where = settings, turns, where
        lines = {line for turn in turns for line in turn.lines}
        self.choice = Choice(lines, context)
        self.topics: list[str] = []
        """Of the prompts that are kept."""
        self.sampled = 0

    def sample(self, engine: Engine, advance: Advance) -> None:
        """Sample until there are `count`, or until that takes too many texts.

        Raises UserError if there are fewer than `at_least` then.
        """
        settings, kept = self.settings, self.choice.kept
        limit = MOST * settings.count + len(self.turns)
        while len(kept) < settings.count and self.sampled < limit:
            missing = settings.count - len(kept)
            size = min(math.ceil(1.25 * missing) + 4, ROUND, limit - self.sampled)
            numbers = range(self.sampled, self.sampled + size)
            requests = [
                Request(self._turn(i).opening_ids, stable_seed(settings.seed, ID, i))
                for i in numbers
            ]
            params = SamplingParams(settings.max_tokens, settings.temperature)
            completions = engine.generate(requests, params, Role.STUDENT)
            for number, completion in zip(numbers, completions, strict=True):
                self.sampled += 1
                ended = completion.stop == "eos"
                text, ended = self._turn(number).read(completion.token_ids, ended)
                control = self._turn(number).template.control_tokens_in(text)
                if self.choice.take(text, ended=ended, control_tokens=control):
                    topics = settings.topics
                    self.topics.append(topics[number % len(topics)] if topics else "")
                    advance(1)
                if len(kept) == settings.count:
                    return
        if len(kept) < settings.at_least:
            raise UserError(
                f"the model wrote {len(kept)} usable prompts, and {settings.at_least} are wanted: "
                f"of {self.sampled} sampled texts it left out {self.choice.summary()}",
                where=self.where,
                fix="lower count in its args; or raise max_tokens if texts do not end, "
                "temperature or the number of topics if they repeat each other; or use a model "
                "that was tuned on conversations",
            )

    def write(self, path: Path, name: str) -> None:
        rows = [
            {"prompt": text, **({"topic": topic} if topic else {})}
            for text, topic in zip(self.choice.kept, self.topics, strict=True)
        ]
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        wanted = self.settings.count
        fewer = f" ({wanted} are wanted, but it repeats itself)" if len(rows) < wanted else ""
        left_out = f" ({self.choice.summary()})" if self.choice.dropped else ""
        logger.info(
            f"{name}: the model wrote {len(rows)} prompts to {shown_path(path)}{fewer}, and "
            f"{self.sampled - len(rows)} of {self.sampled} texts are left out{left_out}"
        )

    def _turn(self, number: int) -> UserTurn:
        return self.turns[number % len(self.turns)]
