"""Checkpoints: written aside, flushed, sealed with checksums, renamed; damaged ones passed over."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from minidistill.errors import EXIT_ENVIRONMENT, UserError
from minidistill.files import write_atomic, writing
from minidistill.trainer.policy import Policy, Weights
from minidistill.trainer.trainer import Trainer

MANIFEST = "MANIFEST.json"


def save_model(policy: Policy, path: Path) -> Path:
    """What was trained, for others to load: `path/adapter` as plain PEFT, or `path/model` whole, in
    Hugging Face's layout with the tokenizer. Returns the folder."""
    folder = path / ("adapter" if policy.lora else "model")
    with writing(folder):
        if policy.lora:
            policy.model.save_pretrained(str(folder), selected_adapters=[Weights.STUDENT.value])
            (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card
        else:
            whole = {n: p.cpu() for n, p in policy.weights()} if policy.trunks else None
            policy.model.save_pretrained(str(folder), state_dict=whole)
            policy.tokenizer.save_pretrained(str(folder))
    return folder


def save(trainer: Trainer, root: Path, step: int, facts: dict[str, Any], keep: int) -> Path:
    """Write `root/step_000040` and point `root/latest` at it; older ones beyond `keep` go."""
    final = root / f"step_{step:06d}"
    aside = root / f".step_{step:06d}.tmp"
    with writing(final):
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        if trainer.policy.lora:  # a whole model would be there twice
            save_model(trainer.policy, aside)
        # under names of ours: peft and transformers may save others than they have in memory
        plain = {k: v.detach().contiguous() for k, v in trainer.state().items()}
        save_file(plain, aside / "state.safetensors")
        write_atomic(aside / "state.json", json.dumps({"step": step, **facts}, indent=2) + "\n")
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


def restore(trainer: Trainer, root: Path, warn: Callable[[str], None]) -> dict[str, Any] | None:
    """Load the newest whole checkpoint and return its facts; None where there is none at all.

    Damaged ones are named through `warn`. Raises UserError (exit code 3) if all are damaged.
    """
    found = _steps(root)
    for path in reversed(found):
        problem = damage(path)
        if problem is not None:
            warn(f"checkpoint {path.name} is damaged ({problem}): using the one before")
            continue
        trainer.load_state(load_file(path / "state.safetensors"))
        return json.loads((path / "state.json").read_text())
    if found:
        raise UserError(
            f"every checkpoint in {root} is damaged",
            where=str(root),
            fix="restore one from a copy, or start again with another --output_dir",
            exit_code=EXIT_ENVIRONMENT,
        )
    return None


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
