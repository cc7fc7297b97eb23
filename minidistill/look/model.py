"""A model to look at: with the trained weights and the base's resident, as an engine."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from minidistill.config import Config
from minidistill.config.adapter import SETTINGS, with_initial_adapter
from minidistill.config.schema import InferenceConfig, LoraConfig, TeacherInferenceConfig
from minidistill.driver.build import SMALLER_MODEL
from minidistill.driver.prepare import prompt_builder
from minidistill.engines.embedded import EmbeddedEngine
from minidistill.errors import UserError, blamed_on
from minidistill.export.source import Source, reading
from minidistill.models.hub import load_tokenizer
from minidistill.models.weights import load_weights, refuse_adapters
from minidistill.placement.machine import Machine
from minidistill.placement.placement import Placement
from minidistill.placement.planner import load_models, plan
from minidistill.reporting.run_directory import RunDirectory
from minidistill.system.files import read_json
from minidistill.tasks.prompts import PromptBuilder
from minidistill.trainer.forward import PrefixCache
from minidistill.trainer.guards import explain_out_of_memory
from minidistill.trainer.loading import load_policy
from minidistill.trainer.policy import Policy, Weights


@dataclass(frozen=True, slots=True)
class Model:
    """The trained weights and the base, whose prompts and answers are those of the run."""

    source: Source
    config: Config
    tokenizer: Any
    builder: PromptBuilder
    placement: Placement
    policy: Policy
    engine: EmbeddedEngine


def load(source: Source, *, teacher: bool = False, longest: int | None = None) -> Model:
    """Load what a source names into this process, on one device.

    With `teacher` a teacher that is another model is loaded too. `longest` takes the place of
    `seq_len`. Raises UserError for weights that are damaged, or of another model than the base.
    """
    with reading(source), _readable(source):
        config = _settings(source, teacher=teacher)
        if longest is not None:
            config = config.model_copy(update={"seq_len": longest})
        tokenizer = load_tokenizer(config)
        builder = prompt_builder(config, tokenizer, _began(source))
        machine = Machine.local()
        config = config.model_copy(update={"trainer_gpu_ids": [0] if machine.gpus else None})
        placement = plan(config, load_models(config), machine).placement
        refuse_adapters(config)
        only = placement.teacher  # neither a copy of the base nor a teacher that is not asked for
        if config.separate_teacher is None:
            only = dataclasses.replace(only, scorer="engine")
        with explain_out_of_memory("loading the model", **SMALLER_MODEL):
            policy = load_policy(
                _trained(source, config),
                tokenizer,
                dataclasses.replace(placement, teacher=only),
                end_of_turn_ids=builder.end_of_turn_ids,
            )
            if not source.is_adapter:
                policy.starts_as_base = False
                policy.reference_models[Weights.BASE] = _base(source, config, policy)
    engine = EmbeddedEngine(policy, PrefixCache(policy, shares=False))
    return Model(source, config, tokenizer, builder, placement, policy, engine)


def _began(source: Source) -> datetime:
    """The present that templates show: that of the run's start."""
    if source.kind == "run" and (source.run / "env.json").is_file():
        return RunDirectory(source.run).began() or datetime.now()
    return datetime.now()


def _settings(source: Source, *, teacher: bool) -> Config:
    """The source's configuration for one process that samples and scores, and trains nothing."""
    config = source.config
    model = config.trainer.model.model_copy(update={"lora": _lora(source)})
    trainer = config.trainer.model_copy(update={"model": model, "shard": False, "world_size": None})
    own = TeacherInferenceConfig(model=config.teacher_inference.model)
    frozen = config.orchestrator.teacher_model.model_copy(update={"update": "frozen"})
    return config.model_copy(
        update={
            "trainer": trainer,
            "inference": InferenceConfig(engine="embedded"),
            "teacher_inference": own if teacher else TeacherInferenceConfig(),
            "inference_gpu_ids": None,
            "teacher_gpu_ids": None,
            "schedule": "sync",
            "orchestrator": config.orchestrator.model_copy(update={"teacher_model": frozen}),
        }
    )


def _lora(source: Source) -> LoraConfig | bool:
    """The adapter, with the shape that it was saved with."""
    if not source.is_adapter:
        return False
    config = source.config
    before = config.trainer.model.lora
    dtype = before.dtype if isinstance(before, LoraConfig) else "auto"
    lora = LoraConfig(init=str(source.weights), dtype=dtype)
    trained = config.trainer.model.model_copy(update={"lora": lora})
    update: dict[str, Any] = {"trainer": config.trainer.model_copy(update={"model": trained})}
    if source.kind == "adapter":  # --base may be the same model under another name
        named = read_json(source.weights / SETTINGS).get("base_model_name_or_path")
        update["model"] = config.model.model_copy(update={"name": named or source.base})
    shaped, _ = with_initial_adapter(config.model_copy(update=update))
    return shaped.trainer.model.lora


def _trained(source: Source, config: Config) -> Config:
    """The configuration with the trained weights in the model's place, or with their adapter."""
    if not source.is_adapter:
        model = config.model.model_copy(update={"name": str(source.weights)})
        return config.model_copy(update={"model": model})
    return config


def _base(source: Source, config: Config, policy: Policy) -> Any:
    """The model before training beside one whose every weight is trained."""
    if not source.knows_base or source.base == str(source.weights):
        return policy.model
    base = load_weights(
        config,
        source.base,
        dtype=policy.dtype,
        attn_implementation=policy.config._attn_implementation,
    )
    return base.to(policy.device).requires_grad_(False).eval()


@contextlib.contextmanager
def _readable(source: Source) -> Iterator[None]:
    """Name what the user has named in errors, in place of a run's settings."""
    where, fix = str(source.run), "give the model that it was trained on with --base"
    if source.kind == "run":
        fix = "use the model that the run trained on: model.name in its config.toml"
    try:
        with blamed_on("--base" if source.kind == "adapter" else where):
            yield
    except UserError as error:
        if error.where.startswith("trainer.model.lora.init"):
            error.where, error.fix = str(source.weights), fix
        raise
