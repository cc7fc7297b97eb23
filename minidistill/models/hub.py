"""Tokenizers and configurations of models, from a folder, the hub or the package."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from typing import Any

from minidistill.config import Config
from minidistill.errors import UserError
from minidistill.models.registry import KNOWN, resolve


def load_tokenizer(config: Config) -> Any:
    """The model's tokenizer. Raises UserError where there is none to load."""
    with readable_errors(config.model.name):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(
            resolve(config.model.name), **hub_arguments(config, config.model.name)
        )


def load_model_config(config: Config, name: str | None = None) -> Any:
    """The configuration of the student's model, or of `name`, without weights."""
    name = name or config.model.name
    with readable_errors(name):
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(resolve(name), **hub_arguments(config, name))


def hub_arguments(config: Config, name: str) -> dict[str, Any]:
    revision = config.model.revision if name == config.model.name else None
    return {
        "revision": revision or "main",
        "trust_remote_code": config.model.trust_remote_code,
    }


@contextlib.contextmanager
def readable_errors(name: str, key: str = "model.name") -> Iterator[None]:
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it reports every retry
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"cannot load the model {name!r}: {str(error).strip().splitlines()[0]}",
            where=key,
            fix="name a built-in model (tiny-sokoban), a local folder in Hugging Face layout, "
            "or a hub id that this machine can reach",
        ) from error


def check_same_tokens(config: Config, tokenizer: Any) -> None:
    """Raise UserError where the teacher is another model that reads other tokens."""
    name = config.separate_teacher
    if name is None:
        return
    with readable_errors(name, "teacher_inference.model.name"):
        from transformers import AutoTokenizer

        theirs = AutoTokenizer.from_pretrained(resolve(name), **hub_arguments(config, name))
    if theirs.get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"{name} has another vocabulary than {config.model.name}",
            where="teacher_inference.model.name",
            fix="take a teacher with the student's tokenizer: it scores the student's own tokens",
        )


def find_model_config(config: Config, name: str | None = None) -> Any:
    """The configuration of `name`, by default the student's model, without its weights.

    Looked for on this machine, then among those that ship with the package, then on the hub.
    Raises UserError where it is nowhere.
    """
    name = name or config.model.name
    model = config.model.model_copy(update={"name": name})
    if name not in KNOWN:
        return load_model_config(config.model_copy(update={"model": model}))
    from transformers import AutoConfig

    try:
        revision = config.model.revision or "main"
        return AutoConfig.from_pretrained(name, revision=revision, local_files_only=True)
    except OSError:
        facts = json.loads(KNOWN[name].read_text())
        return AutoConfig.for_model(facts.pop("model_type"), **facts)
