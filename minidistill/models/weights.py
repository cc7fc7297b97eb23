"""Loading a model's weights exactly: whatever its files lack or have too much is an error.

transformers gives random values to weights that are missing, and ignores those that it does not
know. Neither is ever what somebody wants to train.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import zipfile
from collections.abc import Collection, Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from minidistill.config import Config
from minidistill.errors import UserError, UserErrors, blamed_on
from minidistill.models.auto import model_class
from minidistill.models.folder import AGAIN, used_index
from minidistill.models.hub import hub_arguments, load_model_config, readable_errors
from minidistill.models.registry import resolve

SHOWN = 3  # names of weights in a message
_POINTER = b"version https://git-lfs"
_BUFFERS = re.compile(
    r"(.*\.)?((attn|attention|self_attn|self_attention)\.bias|masked_bias|causal_mask|scale_attn"
    r"|position_ids|inv_freq|original_inv_freq|cos_cached|sin_cached)"
)
"""Masks, positions and rotary tables. Older versions of transformers saved them with the weights,
and models compute them."""


def refuse_adapters(config: Config) -> None:
    """Raise UserError if the student's model or a separate teacher's is an adapter."""
    for key, name in _models(config).items():
        _refuse_adapter(config, name, key)


def check_weights(config: Config) -> None:
    """Check the files of the student's model and of a separate teacher's, whatever loads them.

    Names and shapes are compared and no tensor is read. The weights of a quantized model are
    checked when they are loaded: some formats need a GPU. Raises UserError for damaged files, and
    for weights that are missing, unknown or of another shape.
    """
    for key, name in _models(config).items():
        model_config = load_model_config(config, name)
        if getattr(model_config, "quantization_config", None) is None:
            load_weights(config, name, key, dtype="auto", device_map="meta")


def _models(config: Config) -> dict[str, str]:
    """The run's models, by the settings that name them."""
    models = {"model.name": config.model.name}
    if config.separate_teacher is not None:
        models["teacher_inference.model.name"] = config.separate_teacher
    return models


def load_weights(config: Config, name: str, key: str = "model.name", **arguments: Any) -> Any:
    """transformers' language model `name`, which the configuration's `key` sets.

    `arguments` are those of `from_pretrained`. Raises UserError as `check_weights` does.
    """
    from safetensors import SafetensorError
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    with blamed_on(key):
        kind = model_class(load_model_config(config, name))
    damaged = (SafetensorError, UnpicklingError, EOFError)
    with readable_errors(name, key), _without_table():
        try:
            loaded: Any = kind.from_pretrained(
                resolve(name),
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # else their names are only logged
                **arguments,
                **hub_arguments(config, name),
            )
        except (*damaged, OSError, ValueError, RuntimeError) as error:
            if (damage := _damage(Path(resolve(name)))) is not None:
                what, fix = damage
                raise UserError(what, key, fix) from error
            if isinstance(error, damaged):
                raise ValueError(f"damaged weights: {error}") from error
            raise
    model, report = loaded
    report["unexpected_keys"] = _without_buffers(report["unexpected_keys"], model)
    problems = _problems(name, key, type(model).__name__, report)
    if problems:
        raise UserErrors(problems) if len(problems) > 1 else problems[0]
    return model


def _without_buffers(unexpected: Collection[str], model: Any) -> list[str]:
    """The names that are not of `_BUFFERS`. The bias of a layer with a weight is none of them."""
    weights = tuple(name for name, _ in model.named_parameters() if name.endswith(".weight"))

    def is_buffer(name: str) -> bool:
        weight = f"{name.rpartition('.')[0]}.weight"
        return bool(_BUFFERS.fullmatch(name)) and not any(w.endswith(weight) for w in weights)

    return [name for name in unexpected if not is_buffer(name)]


@contextlib.contextmanager
def _without_table() -> Iterator[None]:
    """Without the table that transformers logs of what `_problems` reports."""
    logger = logging.getLogger("transformers.modeling_utils")
    # not by its level, which transformers reads too
    logger.addFilter(_is_no_table)
    try:
        yield
    finally:
        logger.removeFilter(_is_no_table)


def _is_no_table(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage()


def _problems(name: str, key: str, architecture: str, report: dict[str, Any]) -> list[UserError]:
    """What transformers' report of loading says that is not as it has to be."""
    checks = {
        "missing_keys": (
            f"lacks {{}} of {architecture}, which would start at random values",
            "use a complete checkpoint of the model",
        ),
        "unexpected_keys": (
            f"has {{}} that {architecture} does not have, which would be ignored",
            "use the config.json that belongs to these weights",
        ),
        "mismatched_keys": (
            f"has {{}} of other shapes than {architecture} with its config.json",
            "use the config.json that belongs to these weights",
        ),
    }
    return [
        UserError(f"the model {name!r} {text.format(_named(report[kind]))}", key, fix)
        for kind, (text, fix) in checks.items()
        if report[kind]
    ]


def _named(weights: Collection[Any]) -> str:
    """The number of weights, and the first names: `2 weights (a, b)`."""
    names = sorted(
        w if isinstance(w, str) else f"{w[0]}: {tuple(w[1])}, not {tuple(w[2])}" for w in weights
    )
    more = ", …" if len(names) > SHOWN else ""
    plural = "" if len(names) == 1 else "s"
    return f"{len(names)} weight{plural} ({', '.join(names[:SHOWN])}{more})"


def _refuse_adapter(config: Config, name: str, key: str) -> None:
    """Raise UserError if `name` is an adapter, or a model beside an adapter.

    Of the latter transformers loads both and vLLM the model alone.
    """
    with readable_errors(name, key):
        from transformers.utils import find_adapter_config_file

        revision = hub_arguments(config, name)["revision"]
        path = find_adapter_config_file(resolve(name), revision=revision)
        if path is None:
            return
        base = json.loads(Path(path).read_bytes()).get("base_model_name_or_path")
    try:
        load_model_config(config, name)
        holds_model = True
    except UserError:
        holds_model = False
    is_student = key == "model.name"
    if holds_model:
        what = f"{name!r} holds a model and an adapter (adapter_config.json)"
        fix = "move the adapter's files into a folder of their own"
        if is_student:
            fix += "; trainer.model.lora.init with its name starts the training from the adapter"
    else:
        what = f"{name!r} is an adapter of {base!r}, not a model"
        fix = f"set {key} to the base model"
        if is_student:
            fix += f' and trainer.model.lora.init = "{name}" to start from the adapter'
        else:
            fix += ", or to a folder with the adapter merged into it"
    raise UserError(what, where=key, fix=fix)


def _damage(folder: Path) -> tuple[str, str] | None:
    """What is wrong with the files of a local model and how to fix it; None if nothing is seen."""
    if (index := used_index(folder)) is not None:
        named = set(json.loads(index.read_bytes())["weight_map"].values())
        if absent := sorted(file for file in named if not (folder / file).is_file()):
            return f"{index} names files that are not there: {', '.join(absent[:SHOWN])}", AGAIN
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        with open(path, "rb") as file:
            beginning = file.read(len(_POINTER))
        if beginning == _POINTER:
            return f"{path} is a pointer of Git LFS, not weights", f"run git lfs pull in {folder}"
        why = _damage_of_file(path, beginning)
        if why:
            return f"{path} is damaged: {why}", AGAIN
    return None


def _damage_of_file(path: Path, beginning: bytes) -> str:
    from safetensors import SafetensorError, safe_open

    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            return str(error)
    elif beginning.startswith(b"PK") and not zipfile.is_zipfile(path):
        return "its end is missing"
    return ""
