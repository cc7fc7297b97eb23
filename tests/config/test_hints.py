"""Names that people bring from other trainers."""

from __future__ import annotations

import re

import pytest

from minidistill.config import hints, load_config
from minidistill.config import schema_tree as tree
from minidistill.errors import UserError

BROUGHT = {
    "learning_rate": "`trainer.optim.lr`",
    "trainer.learning_rate": "`trainer.optim.lr`",
    "gradient_accumulation_steps": "`orchestrator.batch_size`",
    "per_device_train_batch_size": "`orchestrator.batch_size`",
    "orchestrator.num_generations": "`orchestrator.rollouts_per_example`",
    "beta": "`trainer.loss.teacher_tau`",
    "trainer.loss.beta": "`trainer.loss.teacher_tau`",
    "trainer.optim.beta": "`trainer.optim.betas1`",
    "alpha": "`trainer.model.lora.alpha`",
    "lora_r": "`trainer.model.lora.rank`",
    "trainer.model.lora.r": "`trainer.model.lora.rank`",
    "lora_alpha": "`trainer.model.lora.alpha`",
    "load_in_4bit": "`model.quantization`",
    "model.load_in_4bit": "`model.quantization`",
    "trainer.model.lora.load_in_4bit": "`model.quantization`",
    "max_new_tokens": "`orchestrator.sampling.max_tokens`",
    "warmup_steps": "`trainer.scheduler.warmup_steps`",
    "num_train_epochs": "`max_steps`",
}


@pytest.mark.parametrize("key", BROUGHT)
def test_a_name_of_another_trainer_is_answered_with_the_right_key(
    minimal_config: str, key: str
) -> None:
    with pytest.raises(UserError) as caught:
        load_config([minimal_config, f"--{key}", "1"])
    assert BROUGHT[key] in caught.value.fix
    assert caught.value.what.startswith((f"{key} is not a setting", f"there is no {key}"))


def test_every_hint_names_settings_that_exist() -> None:
    keys = {".".join(map(str, path)) for path, _ in tree.walk()}
    texts = [*hints._NAMES.values(), *hints._KEYS.values()]
    named = {name.strip("[]") for text in texts for name in re.findall("`([^`]+)`", text)}
    assert len(named) > 25
    tables = {key.rpartition(".")[0] for key in keys}
    assert named - keys - tables == {"reward"}  # an argument of an environment


def test_no_hint_shadows_a_setting() -> None:
    """A key that exists is never refused, but its name in a wrong table may be a typing error."""
    names = {str(path[-1]) for path, _ in tree.walk()}
    assert names & set(hints._NAMES) == {"alpha"}
