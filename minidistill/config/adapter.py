"""The adapter that a run starts from: a PEFT folder or another run's directory.

Its shape becomes part of the configuration, so that the plan, the engines and the trainer agree.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from minidistill.config.schema import Config, LoraConfig
from minidistill.errors import UserError
from minidistill.system.files import read_json

KEY = "trainer.model.lora.init"
SETTINGS = "adapter_config.json"
TENSORS = "adapter_model.safetensors"

_TAKEN = {
    "r": "rank",
    "lora_alpha": "alpha",
    "target_modules": "target_modules",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
    "rank_pattern": "rank_pattern",
}
"""PEFT's names of what is taken from an adapter, and ours."""
_UNUSED = {
    "auto_mapping", "base_model_name_or_path", "bias", "eva_config", "exclude_modules",
    "fan_in_fan_out",
    "inference_mode", "init_lora_weights", "lora_dropout", "megatron_core", "peft_type",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip
"""PEFT's settings that change nothing once an adapter is trained, or that are checked elsewhere:
which layers have tensors is seen when they are loaded."""
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Initializations that leave the base's weights as they are."""


def adapter_folder(init: str) -> Path:
    """The PEFT folder that `init` names. Raises UserError if there is none."""
    path = Path(init).expanduser()
    if not os.path.exists(path):  # which is false too for names that no file can have
        raise UserError(f"there is no adapter in {path}", KEY, "check the path")
    latest = path / "checkpoints" / "latest"
    folders = [path, path / "adapter"]
    if latest.is_file():
        folders.append(latest.parent / latest.read_text(errors="replace").strip() / "adapter")
    for folder in folders:
        if (folder / TENSORS).is_file() and (folder / SETTINGS).is_file():
            return folder
        if (folder / "adapter_model.bin").is_file():
            raise UserError(
                f"the adapter in {folder} is pickled, and pickled files are not read",
                where=KEY,
                fix=f"save it as {TENSORS}: load it with peft and call save_pretrained",
            )
    if (path / "model").is_dir():
        raise UserError(
            f"the run in {path} trained every weight, so it has no adapter",
            where=KEY,
            fix=f'set model.name = "{path / "model"}" to start from its model',
        )
    raise UserError(
        f"there is no adapter in {path}",
        where=KEY,
        fix=f"name a folder with {SETTINGS} and {TENSORS}, or the directory of a run that has "
        "saved a checkpoint",
    )


def initial_adapter_digest(config: Config) -> str | None:
    """A hash of the tensors that the run starts from; None if it starts from a new adapter."""
    lora = config.trainer.model.lora
    if lora is False or lora.init is None:
        return None
    with open(adapter_folder(lora.init) / TENSORS, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def without_initial_adapter(config: Config) -> Config:
    """The configuration with a new adapter of the same shape."""
    lora = config.trainer.model.lora
    return config if lora is False else _with_lora(config, lora.model_copy(update={"init": None}))


def with_recorded_shape(config: Config, recorded: dict[str, Any]) -> Config:
    """The configuration with the shape that a resumed run has recorded, of settings that are not
    set. They are not set if the adapter that the run started from has gone."""
    lora = config.trainer.model.lora
    if lora is False or lora.init is None:
        return config
    before = recorded["trainer"]["model"]["lora"] or {}
    shape = {name: before[name] for name in _TAKEN.values() if name in before}
    return _with_lora(config, LoraConfig.model_validate({**shape, **_set(lora)}))


def _set(lora: LoraConfig) -> dict[str, Any]:
    return lora.model_dump(include=lora.model_fields_set)


def _with_lora(config: Config, lora: LoraConfig) -> Config:
    model = config.trainer.model.model_copy(update={"lora": lora})
    trainer = config.trainer.model_copy(update={"model": model})
    return config.model_copy(update={"trainer": trainer})


def with_initial_adapter(config: Config, resume: bool = False) -> tuple[Config, dict[str, str]]:
    """The configuration with the shape of the adapter that it starts from, and the place that each
    of these settings is from, by its dotted key.

    Raises UserError if there is no such adapter, if it is of another model, if it has a feature
    that is not supported, or if its shape is not what the user has set. With `resume` it may have
    gone: see `with_recorded_shape`.
    """
    lora = config.trainer.model.lora
    if lora is False or lora.init is None:
        return config, {}
    try:
        path = adapter_folder(lora.init) / SETTINGS
    except UserError:
        if resume:
            return config, {}
        raise
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise UserError(f"{path} is not the configuration of an adapter", where=KEY)
    _check_features(settings, path)
    _check_base(config, settings, path)
    shape = _shape(settings, path)
    for name, value in shape.items():
        if name in lora.model_fields_set and not _agree(getattr(lora, name), value):
            raise UserError(
                f"trainer.model.lora.{name} = {getattr(lora, name)!r}, but the adapter that the "
                f"run starts from has {value!r}",
                where=f"trainer.model.lora.{name}, {path}",
                fix=f"remove trainer.model.lora.{name}: it is taken from the adapter",
            )
    if lora.target_modules == "all-linear" and "target_modules" in lora.model_fields_set:
        del shape["target_modules"]  # whether these are all is seen when the adapter is loaded
    origins = {f"trainer.model.lora.{name}": str(path) for name in shape}
    taken = LoraConfig.model_validate({**lora.model_dump(), **shape})
    return _with_lora(config, taken), origins


def _check_features(settings: dict[str, Any], path: Path) -> None:
    """Refuse what would be lost if it were ignored, whatever future versions of PEFT call it."""
    unknown = {
        name: value
        for name, value in settings.items()
        if name not in _TAKEN and name not in _UNUSED and value
    }
    if settings.get("bias", "none") != "none":
        unknown["bias"] = settings["bias"]
    if settings.get("peft_type") != "LORA":
        unknown["peft_type"] = settings.get("peft_type")
    init = settings.get("init_lora_weights", True)
    if init not in _PLAIN_INITS:
        unknown["init_lora_weights"] = init
    if not unknown:
        return
    name, value = next(iter(unknown.items()))
    reasons = {
        "modules_to_save": "trained copies of whole modules would have to be kept for both roles, "
        "and vLLM cannot serve them",
        "init_lora_weights": "such an adapter changes the base's weights too: convert it to a "
        "plain one with peft's path_initial_model_for_weight_conversion",
    }
    raise UserError(
        f"the adapter has {name} = {value!r}, which cannot be trained on"
        + (f": {reasons[name]}" if name in reasons else ""),
        where=str(path),
        fix="start from a plain LoRA adapter, or merge this one into its base and use that as "
        "model.name",
    )


def _check_base(config: Config, settings: dict[str, Any], path: Path) -> None:
    """Refuse an adapter of another model. Folders of the same name count as the same model: the
    shapes of the tensors are compared when they are loaded."""
    base, name = settings.get("base_model_name_or_path"), config.model.name
    if not isinstance(base, str | None):
        raise UserError(
            f"base_model_name_or_path is {base!r}, which is no model's name",
            where=str(path),
            fix="use an adapter that peft has saved",
        )
    if base and _last_part(base) != _last_part(name):
        raise UserError(
            f"the adapter was trained on the model {base}, and this run trains {name}",
            where=f"{KEY}, {path}",
            fix=f'set model.name = "{base}"; if it is the same model under another name, correct '
            f"base_model_name_or_path in {SETTINGS}",
        )


def _last_part(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].replace("_", "-").lower()


def _shape(settings: dict[str, Any], path: Path) -> dict[str, Any]:
    """The adapter's shape under our names."""
    shape = {ours: settings[theirs] for theirs, ours in _TAKEN.items() if theirs in settings}
    try:
        shape["alpha"] = float(shape["alpha"])
        if shape["target_modules"] != "all-linear":
            if isinstance(shape["target_modules"], str):
                raise ValueError("target_modules is a regular expression, write a list of names")
            shape["target_modules"] = sorted(shape["target_modules"])
        shape["rank_pattern"] = shape.get("rank_pattern") or {}
        LoraConfig.model_validate(shape)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        what = str(error).splitlines()[0]
        raise UserError(
            f"the adapter's configuration cannot be used: {type(error).__name__}: {what}",
            where=str(path),
            fix="use an adapter that peft has saved",
        ) from None
    return shape


def _agree(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, list) and isinstance(theirs, list):
        return set(ours) == set(theirs)
    return ours in (theirs, "all-linear")
