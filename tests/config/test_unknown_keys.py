"""Errors for unknown keys: settings of the public trainer, and misspelled ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.configs import MINIMAL

from minidistill import cli
from minidistill.config import load_config
from minidistill.errors import UserError

PUBLIC_TRAINER_KEYS = """
trainer.max_steps orchestrator.max_steps orchestrator.seq_len trainer.model.seq_len
trainer.model.name orchestrator.model.name inference.model.name trainer.loss.type
trainer.loss.ratio_type trainer.loss.kl_tau trainer.weight_broadcast weight_broadcast.type
orchestrator.client.base_url orchestrator.async_level max_async_level orchestrator.max_async_level
orchestrator.buffer.hard_fraction orchestrator.buffer.online_difficulty_filtering
orchestrator.sampling.top_p orchestrator.sampling.top_k orchestrator.sampling.repetition_penalty
orchestrator.teacher_model.model.name teacher_rollout_model.name orchestrator.max_concurrent
orchestrator.teacher_rollout_model orchestrator.oversampling_factor orchestrator.token_batch_size
trainer.model.experimental.x trainer.model.fsdp_cpu_offload trainer.model.compile
trainer.dist_timeout_seconds trainer.memory_profiler_path slurm.job_name deployment.type
trainer.model.lora.modules_to_save trainer.model.lora.bias
ckpt.keep_last ckpt.resume_step
"""


@pytest.mark.parametrize("key", PUBLIC_TRAINER_KEYS.split())
def test_keys_of_the_public_trainer_are_refused_with_a_fix(tmp_path: Path, key: str) -> None:
    head, _, leaf = key.rpartition(".")
    path = tmp_path / "b.toml"
    path.write_text(f"[{head}]\n{leaf} = 1\n" if head else f"{leaf} = 1\n")
    base = tmp_path / "a.toml"
    base.write_text(MINIMAL)
    for argv in ([str(base), str(path)], [str(base), f"--{key}", "1"]):
        with pytest.raises(UserError) as caught:
            load_config(argv)
        assert "is not a setting of minidistill" in caught.value.what
        assert caught.value.fix.startswith(("use ", "drop it", "run again"))
        assert caught.value.where.startswith((f"{path}:", f"--{key}"))


MISSPELLED = [
    ("loss.adv_tau", "trainer.loss.adv_tau"),
    ("lr", "trainer.optim.lr"),
    ("batch_size", "orchestrator.batch_size"),
    ("trainer.lora.rank", "trainer.model.lora.rank"),
    ("trainer.lr", "trainer.optim.lr"),
    ("max_step", "max_steps"),
    ("orchestrator.teacher_model.contxt", "orchestrator.teacher_model.context"),
    ("orchestrator.teacher.context", "orchestrator.teacher_model.context"),
    ("orchestrator.env.1.nam", "orchestrator.env.1.name"),
    ("orchestrater.batch_size", "orchestrator.batch_size"),
]


@pytest.mark.parametrize(("key", "suggestion"), MISSPELLED)
def test_a_misspelled_key_gets_a_suggestion(
    minimal_config: str, capsys: pytest.CaptureFixture[str], key: str, suggestion: str
) -> None:
    assert cli.main(["config", minimal_config, f"--{key}", "1"]) == 2
    assert f"fix: did you mean `{suggestion}`?" in capsys.readouterr().err


def test_an_unknown_key_without_a_similar_one_lists_the_keys_of_its_table(
    minimal_config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["config", minimal_config, "--orchestrator.sampling.zzz", "1"]) == 2
    assert "[orchestrator.sampling] takes: temperature, max_tokens" in capsys.readouterr().err
