"""Checkpoints: written aside, flushed, sealed with checksums, then renamed.

A damaged checkpoint is skipped. One in a format that this version cannot read stops the run,
because an older one in its place would silently repeat steps.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from minidistill.errors import EXIT_ENVIRONMENT, UserError
from minidistill.files import write_atomic, writing
from minidistill.trainer.policy import Policy, Weights
from minidistill.trainer.trainer import Trainer

MANIFEST = "MANIFEST.json"
FORMAT = 1
"""The version of `state.json` and `state.safetensors`. Checkpoints of the first releases have the
same contents, but no number."""

logger = logging.getLogger(__name__)


def save_model(policy: Policy, path: Path) -> Path:
    """Save the trained weights in a format that other programs load. Returns the folder.

    It is `path/adapter` in PEFT's format, or `path/model` with the tokenizer in transformers'.
    """
    folder = path / ("adapter" if policy.lora else "model")
    with writing(folder):
        if policy.lora:
            policy.model.save_pretrained(str(folder), selected_adapters=[Weights.STUDENT.value])
            (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card
        else:
            gathered = {n: p.cpu() for n, p in policy.weights()} if policy.sharded else None
            policy.model.save_pretrained(str(folder), state_dict=gathered)
            policy.tokenizer.save_pretrained(str(folder))
    return folder


def save(trainer: Trainer, root: Path, step: int, facts: dict[str, Any], keep: int) -> Path:
    """Write `root/step_000040` and point `root/latest` at it. Keep the last `keep` checkpoints."""
    final = root / f"step_{step:06d}"
    aside = root / f".step_{step:06d}.tmp"
    with writing(final):
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        if trainer.policy.lora:  # a full model would be stored twice
            save_model(trainer.policy, aside)
        # under the names in memory: peft and transformers may rename tensors when saving
        plain = {k: v.detach().contiguous() for k, v in trainer.state().items()}
        save_file(plain, aside / "state.safetensors")
        state = {"format": FORMAT, "step": step, **facts}
        write_atomic(aside / "state.json", json.dumps(state, indent=2) + "\n")
        files = sorted(p for p in aside.rglob("*") if p.is_file())
        sums = {str(p.relative_to(aside)): _sha256(p) for p in files}
        for file in files:
            _flush(file)
        write_atomic(aside / MANIFEST, json.dumps({"sha256": sums}, indent=2) + "\n")
        shutil.rmtree(final, ignore_errors=True)
        os.replace(aside, final)
        _flush(root)
        write_atomic(root / "latest", final.name + "\n")
        for old in _steps(root)[:-keep]:
            shutil.rmtree(old)
    return final


def any_saved(root: Path) -> bool:
    """Whether there are checkpoints, of which `restore` takes one or refuses all."""
    return bool(_steps(root))


def restore(trainer: Trainer, root: Path) -> dict[str, Any] | None:
    """Load the newest undamaged checkpoint and return its facts; None if there is no checkpoint.

    Logs a warning for each damaged one. Raises UserError (exit code 3) if all are damaged, or if a
    newer one than the result has an unknown format.
    """
    paths = _steps(root)
    for path in reversed(paths):
        _check_format(path)
        problem = damage(path)
        if problem is not None:
            logger.warning(f"checkpoint {path.name} is damaged ({problem}): using the one before")
            continue
        trainer.load_state(load_file(path / "state.safetensors"))
        return json.loads((path / "state.json").read_text())
    if paths:
        raise UserError(
            f"every checkpoint in {root} is damaged",
            where=str(root),
            fix="restore one from a copy, or start again with another --output_dir",
            exit_code=EXIT_ENVIRONMENT,
        )
    return None


def _check_format(path: Path) -> None:
    """Raise UserError for a checkpoint in a format that this version does not know.

    Call it before checking for damage, because another format may have other files.
    """
    try:
        number = json.loads((path / "state.json").read_text()).get("format", 0)
    except (OSError, ValueError, AttributeError):
        return  # damaged
    if number not in range(FORMAT + 1):
        raise UserError(
            f"checkpoint {path.name} has format {number}; this version of minidistill reads "
            f"formats up to {FORMAT}",
            where=str(path / "state.json"),
            fix="resume with the version of minidistill that wrote it, or a newer one",
            exit_code=EXIT_ENVIRONMENT,
        )


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        sums = json.loads((path / MANIFEST).read_text())["sha256"]
        for name, expected in sums.items():
            if _sha256(path / name) != expected:
                return f"{name} has another checksum"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError) as error:
        return f"{MANIFEST}: {error}"
    return None


def _steps(root: Path) -> list[Path]:
    return sorted(p for p in root.glob("step_*") if p.is_dir())


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
