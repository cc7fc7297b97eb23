"""Checkpoints: written aside, flushed, sealed with checksums, then renamed.

A damaged checkpoint is skipped. One in a format that this version cannot read stops the run,
because an older one in its place would silently repeat steps.

The folder is the run's, which has one owner. What is not named as a checkpoint is left alone.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from minidistill.errors import EXIT_ENVIRONMENT, EXIT_HEALTH, UserError
from minidistill.system.files import (
    flush,
    remove,
    remove_leftovers,
    temporary_name,
    write_atomic,
    writing,
)
from minidistill.trainer.checkpoint_files import (
    STATE,
    TENSORS,
    DamageError,
    Form,
    check_files,
    check_forms,
    check_sizes,
    flush_tree,
    is_changed,
    load_tensors,
    not_finite,
    number,
    other_number_format,
    read_forms,
    read_manifest,
    read_object,
    seal,
)
from minidistill.trainer.policy import Policy, Weights
from minidistill.trainer.trainer import Trainer

FORMAT = 1
"""The version of `state.json` and `state.safetensors`. Checkpoints of the first releases have the
same contents, but no number."""
Agrees = Callable[[dict[str, Any]], str | None]
"""Compares a checkpoint's facts with the files beside it: what disagrees, or None."""

logger = logging.getLogger(__name__)


# -- writing ---------------------------------------------------------------------------------------


def save_model(policy: Policy, path: Path) -> Path:
    """Save the trained weights in a format that other programs load. Returns the folder.

    It is `path/adapter` in PEFT's format, or `path/model` with the tokenizer in transformers'. It
    appears when it is complete. Raises UserError (exit code 3) if it cannot be written.
    """
    folder = path / ("adapter" if policy.lora else "model")
    with writing(folder), _replacing(folder) as aside:
        _write_model(policy, aside)
        flush_tree(aside)
    return folder


def _write_model(policy: Policy, folder: Path) -> None:
    if policy.lora:
        policy.model.save_pretrained(str(folder), selected_adapters=[Weights.STUDENT.value])
        (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card
    else:
        gathered = {n: p.cpu() for n, p in policy.weights()} if policy.sharded else None
        policy.model.save_pretrained(str(folder), state_dict=gathered)
        policy.tokenizer.save_pretrained(str(folder))


def save(
    trainer: Trainer,
    root: Path,
    step: int,
    facts: dict[str, Any],
    keep: int,
    best: int | None = None,
) -> Path:
    """Write `root/step_000040` and point `root/latest` at it. Keep the last `keep` checkpoints, and
    that of the step `best` besides.

    Raises UserError: exit code 4 for weights that are not finite, which would take the place of
    good ones; exit code 3 if it cannot be written. Nothing has changed then.
    """
    final = root / f"step_{step:06d}"
    # under the names in memory: peft and transformers may rename tensors when saving
    plain = {k: v.detach().contiguous() for k, v in trainer.state().items()}
    _check_finite(plain, step)
    with writing(final, needed=sum(tensor.nbytes for tensor in plain.values())):
        root.mkdir(parents=True, exist_ok=True)
        _clear(root)
        with _replacing(final) as aside:
            if trainer.policy.lora:  # a full model would be stored twice
                adapter = aside / "adapter"
                adapter.mkdir()
                _write_model(trainer.policy, adapter)
            save_file(plain, aside / TENSORS)
            state = {"format": FORMAT, "step": step, **facts}
            (aside / STATE).write_text(json.dumps(state, indent=2) + "\n")
            seal(aside, len(plain))
    _make_latest(root, step, keep, best)
    return final


def complete(root: Path, step: int, keep: int, best: int | None = None) -> None:
    """Finish a `save` that was killed when its checkpoint was there: `latest`, and the old ones.

    The checkpoint of `step` was restored. If there is a newer one, which is damaged, nothing is
    removed. Raises UserError (exit code 3) if `latest` cannot be written.
    """
    paths = _steps(root)
    if paths and number(paths[-1]) == step:
        _make_latest(root, step, keep, best)


def _make_latest(root: Path, step: int, keep: int, best: int | None) -> None:
    write_atomic(root / "latest", f"step_{step:06d}\n")
    _remove_old(root, step, keep, best)


def _check_finite(tensors: dict[str, Tensor], step: int) -> None:
    if (name := not_finite(tensors)) is not None:
        raise UserError(
            f"after step {step} {name} has values that are not finite",
            where="training",
            fix='lower trainer.optim.lr, or use model.dtype = "float32"; '
            "--resume continues from the last checkpoint",
            exit_code=EXIT_HEALTH,
        )


@contextmanager
def _replacing(final: Path) -> Iterator[Path]:
    """A new folder to fill, which takes the place of `final` after the body.

    A folder that is there is kept until then, under a name from which `_recover` restores it.
    """
    aside, old = temporary_name(final), _old(final)
    _recover(final)
    try:
        aside.mkdir(parents=True)
        yield aside
        if os.path.lexists(final):
            remove(old)
            os.rename(final, old)
        os.rename(aside, final)
    except BaseException:
        remove(aside)
        if os.path.lexists(old) and not os.path.lexists(final):
            os.rename(old, final)
        raise
    flush(final.parent)
    remove(old)


def _old(final: Path) -> Path:
    """Where a folder is while another takes its place."""
    return final.with_name(f".{final.name}.old")


def _recover(final: Path) -> None:
    """Finish or undo a replacement of `final` that was killed."""
    if not os.path.lexists(_old(final)):
        return
    if os.path.lexists(final):
        remove(_old(final))
    else:
        os.rename(_old(final), final)


_REPLACED = re.compile(r"\.(step_[0-9]{6,})\.old")
# the last as versions before this one named them
_UNFINISHED = re.compile(r"\.step_[0-9]{6,}\.(removed|tmp)")


def _clear(root: Path) -> None:
    """Finish or undo what a writer that was killed had begun."""
    remove_leftovers(root)
    for path in list(root.iterdir()) if root.is_dir() else []:
        if match := _REPLACED.fullmatch(path.name):
            _recover(root / match[1])
        elif _UNFINISHED.fullmatch(path.name):
            remove(path)


def _remove_old(root: Path, step: int, keep: int, best: int | None) -> None:
    """Remove the checkpoints before the last `keep` good ones, of which one is the `step`'s. That
    of `best` stays, and does not count.

    Newer ones have been refused by `restore`. The run repeats their steps, so they are removed too.
    """
    good = 1
    for path in reversed(_steps(root)):
        if (found := number(path)) in (step, best):
            continue
        if found is not None and found < step and good < keep:
            with suppress(DamageError):
                check_sizes(path)
                good += 1
            continue
        # first renamed: half of a checkpoint would look like a damaged one
        removed = path.with_name(f".{path.name}.removed")
        try:
            remove(removed)
            os.rename(path, removed)
        except OSError as error:
            logger.warning(f"cannot remove the old checkpoint {path}: {error.strerror or error}")
        else:
            remove(removed)


# -- restoring -------------------------------------------------------------------------------------


def any_saved(root: Path) -> bool:
    """Whether there are checkpoints, of which `restore` takes one or refuses all."""
    return bool(_steps(root))


def restore(
    trainer: Trainer, root: Path, agrees: Agrees = lambda facts: None
) -> dict[str, Any] | None:
    """Load the newest undamaged checkpoint and return its facts; None if there is no checkpoint.

    One that lacks tensors of this trainer, or whose facts do not agree with the run's other files,
    counts as damaged. Logs a warning for each damaged one. Raises UserError (exit code 3) if all
    are damaged, or if a newer one than the result has an unknown format. Nothing is loaded then.
    """
    with writing(root):
        _clear(root)
    paths = _steps(root)
    problems = []
    for path in reversed(paths):
        _check_format(path)
        try:
            facts, tensors = _read(trainer, path, agrees)
        except DamageError as damage:
            problems.append(f"{path.name}: {damage}")
            if path != paths[0]:
                logger.warning(
                    f"checkpoint {path.name} is damaged ({damage}): using the one before"
                )
            continue
        trainer.load_state(tensors)
        return facts
    if problems:
        raise UserError(
            f"every checkpoint in {root} is damaged ({'; '.join(problems)})",
            where=str(root),
            fix="restore what is named from a copy, or start again with another --output_dir",
            exit_code=EXIT_ENVIRONMENT,
        )
    return None


def check_saved(root: Path, step: int, fix: str) -> None:
    """Raise UserError (exit code 3) with `fix` unless the checkpoint of a step is there in full.

    Reads little of it.
    """
    with _of_step(root, step, fix) as path:
        check_sizes(path)


def restore_step(trainer: Trainer, root: Path, step: int, fix: str) -> None:
    """Load the checkpoint of a step. Raises UserError (exit code 3) with `fix` if it is damaged.

    Nothing is loaded then.
    """
    with _of_step(root, step, fix) as path:
        _, tensors = _read(trainer, path, lambda facts: None)
    trainer.load_state(tensors)


@contextmanager
def _of_step(root: Path, step: int, fix: str) -> Iterator[Path]:
    """The checkpoint of a step. Damage that is found in it becomes a UserError."""
    path = root / f"step_{step:06d}"
    try:
        if not path.is_dir():
            raise DamageError("it is not there")
        yield path
    except DamageError as damage:
        raise UserError(
            f"the best checkpoint, {path.name}, cannot be used: {damage}",
            where=str(path),
            fix=fix,
            exit_code=EXIT_ENVIRONMENT,
        ) from None


def _read(trainer: Trainer, path: Path, agrees: Agrees) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The facts and the tensors of a checkpoint. Raises DamageError."""
    check_files(path)
    facts = read_object(path, STATE)
    if type(facts.get("step")) is not int or facts["step"] != number(path):
        raise DamageError(f"{STATE} is of step {facts.get('step')!r:.80}")
    if (problem := agrees(facts)) is not None:
        raise DamageError(problem)
    found, expected = read_forms(path), _expected(trainer)
    if other_number_format(found, expected):
        raise UserError(
            f"the weights in checkpoint {path.name} have another number format than this run's",
            where="model.dtype, trainer.model.lora.dtype",
            fix="resume on the kind of device that the run was started on",
            exit_code=EXIT_ENVIRONMENT,
        )
    check_forms(found, expected, read_manifest(path)[2])
    return facts, load_tensors(path)


def _expected(trainer: Trainer) -> dict[str, Form]:
    """The weights that a checkpoint of this trainer has, without the optimizer's moments."""
    tensors = {f"policy/{name}": tensor for name, tensor in trainer.policy.state().items()}
    tensors |= {f"optimizer/master/{n}": t for n, t in trainer.optimizer.masters.items()}
    return {name: Form.of(tensor) for name, tensor in tensors.items()}


def _check_format(path: Path) -> None:
    """Raise UserError for a checkpoint in a format that this version does not know.

    Call it before checking for damage, because another format may have other files. One whose
    manifest says that the number was another one is damaged.
    """
    try:
        found = read_object(path, STATE).get("format", 0)
    except DamageError:
        return
    if found not in range(FORMAT + 1) and not is_changed(path, STATE):
        raise UserError(
            f"checkpoint {path.name} has format {found}; this version of minidistill reads "
            f"formats up to {FORMAT}",
            where=str(path / STATE),
            fix="resume with the version of minidistill that wrote it, or a newer one",
            exit_code=EXIT_ENVIRONMENT,
        )


def _steps(root: Path) -> list[Path]:
    """The checkpoints in a folder, the newest last."""
    found = {n: path for path in root.glob("step_*") if (n := number(path)) is not None}
    return [found[step] for step in sorted(found)]
