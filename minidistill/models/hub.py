"""Loading tokenizers and model configurations from a folder, the hub or the package."""

from __future__ import annotations

import contextlib
import difflib
import json
import logging
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from minidistill.config import Config
from minidistill.errors import UserError
from minidistill.models.folder import check_folder
from minidistill.models.registry import BUILT_IN, SHIPPED_CONFIGS, resolve
from minidistill.system.foreign import describe, foreign_code

TEACHER_KEY = "teacher_inference.model.name"
"""The setting that names a separate teacher's model."""
MOST_MODULES = 10_000
"""Layers or experts of a model."""
_BAD_FILES = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What libraries raise for values that they do not expect. Memory that is used up is none."""
LARGEST = (1 << 63) - 1
"""The largest integer of a configuration."""
_OUTPUTS = {"output_attentions": False, "return_dict": True}
"""Settings that change what a model returns, each with the value that a model is used with."""
_COUNTED = ("layer", "layers", "blocks", "experts", "depth")
"""Ends of the settings that say how many modules are made."""


def load_tokenizer(config: Config) -> Any:
    """The tokenizer of the student's model, with the configuration's chat template if it has one.

    Raises UserError if it cannot be loaded.
    """
    tokenizer = _load_tokenizer(config, config.model.name, "model.name")
    if config.model.chat_template is not None:
        tokenizer.chat_template = config.model.chat_template
    return tokenizer


def load_teacher_tokenizer(config: Config, tokenizer: Any) -> Any:
    """The tokenizer of a separate teacher model, None without one.

    Raises UserError if it has another vocabulary than the student's `tokenizer`.
    """
    name = config.separate_teacher
    if name is None:
        return None
    teacher_tokenizer = _load_tokenizer(config, name, TEACHER_KEY)
    if teacher_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"{name} and {config.model.name} have different vocabularies",
            where=TEACHER_KEY,
            fix="use a teacher with the student's tokenizer: it scores the student's own tokens",
        )
    return teacher_tokenizer


def load_model_config(config: Config, name: str | None = None, *, shipped: bool = False) -> Any:
    """The configuration of the model `name`, by default the student's, without weights.

    `shipped` is for planning without a hub: where the package ships the configuration of `name`,
    use this machine's cached copy, or else the shipped one. Raises UserError if there is none.
    """
    name = name or config.model.name
    key = "model.name" if name == config.model.name else TEACHER_KEY
    with readable_errors(name, key):
        from transformers import AutoConfig

        arguments = hub_arguments(config, name)
        if not shipped or name not in SHIPPED_CONFIGS:
            return _read_config(resolve(name), arguments)
        try:
            return AutoConfig.from_pretrained(name, local_files_only=True, **arguments)
        except OSError:
            fields = json.loads(SHIPPED_CONFIGS[name].read_text())
            return AutoConfig.for_model(fields.pop("model_type"), **fields)


def _read_config(path: str, arguments: dict[str, Any]) -> Any:
    """A model's configuration. Any error in its file is a ValueError."""
    from transformers import AutoConfig, PretrainedConfig

    try:
        # before it is read: some configurations make a list with an item for each layer
        values, _ = PretrainedConfig.get_config_dict(path, **arguments)
        _check_values(values)
        if not isinstance(values.get("auto_map") or {}, Mapping):
            raise ValueError("its config.json: auto_map is no table")
        return AutoConfig.from_pretrained(path, **arguments)
    except (OSError, ValueError, KeyError):
        raise
    except Exception as error:
        raise ValueError(f"its config.json: {type(error).__name__}: {error}") from error


def _check_values(values: Mapping[str, Any]) -> None:
    """Raise ValueError for values that would fail later, or that making a model of would not end.

    They are numbers of modules, integers that no tensor holds, and what changes a model's outputs.
    """
    for name, value in values.items():
        if isinstance(value, Mapping):
            _check_values(value)
        elif isinstance(value, list):
            _check_values({f"{name}.{index}": item for index, item in enumerate(value)})
        elif isinstance(value, int) and value > MOST_MODULES and name.endswith(_COUNTED):
            raise ValueError(f"its config.json has more than {MOST_MODULES} {name}")
        elif isinstance(value, int) and abs(value) > LARGEST:
            raise ValueError(f"its config.json has a value of {name} that is too large")
        elif name in _OUTPUTS and value not in (None, _OUTPUTS[name]):
            raise ValueError(f"its config.json sets {name}, with which a model cannot be trained")


def hub_arguments(config: Config, name: str) -> dict[str, Any]:
    """Arguments of `from_pretrained` for a model; `model.revision` is the student's alone."""
    revision = config.model.revision if name == config.model.name else None
    return {
        "revision": revision or "main",
        "trust_remote_code": config.model.trust_remote_code,
    }


@contextlib.contextmanager
def readable_errors(name: str, key: str = "model.name") -> Iterator[None]:
    """Load from the model `name`, set by the configuration's `key`: errors become UserError.

    So does what is no Exception: a panic of the tokenizer's parser, `sys.exit` in the model's code.
    The files of a folder are checked before anything opens them.
    """
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it logs every retry
    failure = partial(_cannot_load, name, key)
    try:
        check_folder(name, key)
        with foreign_code(failure, ours=Exception):
            yield
    except _BAD_FILES as error:
        raise failure(error) from error


def _cannot_load(name: str, key: str, error: BaseException) -> UserError:
    reason = next(iter(str(error).strip().splitlines()), "")
    if not (reason and isinstance(error, OSError | ValueError | KeyError)):
        reason = describe(error)
    close = difflib.get_close_matches(name, BUILT_IN, 1, 0.7)
    nearest = f"did you mean {close[0]}? Or " if close else ""
    return UserError(
        f"cannot load the model {name!r}: {reason}",
        where=key,
        fix=f"{nearest}name a built-in model (tiny-sokoban, tiny-lake), a local folder in Hugging "
        "Face layout, or a hub id that this machine can reach",
    )


def _load_tokenizer(config: Config, name: str, key: str) -> Any:
    fix = "save the tokenizer with its chat template there too: tokenizer.save_pretrained"
    missing = UserError(f"the model {name!r} has no tokenizer", key, fix)
    try:
        # a damaged file ends in a bare Exception or a panic, code of the model's own in anything
        with readable_errors(name, key), foreign_code(partial(_cannot_load, name, key)):
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(resolve(name), **hub_arguments(config, name))
    except UserError as error:  # which does not say what a folder lacks
        folder = Path(resolve(name))
        if not folder.is_dir() or any(folder.glob("tokenizer*")):
            raise
        if not (folder / "config.json").is_file():
            fix = "name the folder that save_pretrained has written the model to"
            raise UserError(f"the folder {name!r} has no model", key, fix) from error
        raise missing from error
    # of many architectures transformers makes a tokenizer of special tokens alone
    special = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
    if not tokenizer.get_vocab().keys() - special:
        raise missing
    return tokenizer
