"""Kinds of adapters: what peft computes with a saved one, and training that starts from one."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.configs import MINIMAL
from support.lab import Lab, cpu_placement, make_lab
from support.paths import SOKOBAN
from support.plain_forward import completion_logprobs
from support.runs import board, records, run

from minidistill.config import LoadedConfig, load_config
from minidistill.driver import loop
from minidistill.driver.model_checks import check_model
from minidistill.errors import EXIT_FAILED, EXIT_OK, EXIT_USAGE, UserError
from minidistill.models.hub import load_tokenizer
from minidistill.models.registry import resolve
from minidistill.trainer import checkpoint
from minidistill.trainer.loading import load_policy
from minidistill.trainer.token_budget import TokenBudget
from minidistill.types import Role

Configure = Callable[..., LoadedConfig]
LORA = "--trainer.model.lora"
SMALL = (
    "--orchestrator.batch_size", "4", "--orchestrator.env.0.args.num_train_examples", "4",
    "--orchestrator.sampling.max_tokens", "6", f"{LORA}.rank", "4",
)  # fmt: skip
KINDS: dict[str, tuple[str, ...]] = {
    "rank-stabilized": (f"{LORA}.use_rslora",),
    "DoRA": (f"{LORA}.use_dora",),
    "ranks by layer": (f"{LORA}.rank_pattern", '{ q_proj = 2, "layers.1.mlp.down_proj" = 7 }'),
    "everything": (
        f"{LORA}.use_rslora", f"{LORA}.use_dora", f"{LORA}.rank_pattern.v_proj", "3",
        f"{LORA}.target_modules", "q_proj,v_proj",
    ),
}  # fmt: skip


def student_logprobs(lab: Lab) -> torch.Tensor:
    """Log-probs of the lab's completions with the trained adapter."""
    return logprobs(lab, lab.policy.student)


def logprobs(lab: Lab, model: Any) -> torch.Tensor:
    return torch.cat(
        [
            completion_logprobs(model, r.prompt.student_ids, r.completion.token_ids)
            for r in lab.rollouts
        ]
    )


@pytest.fixture(scope="module", params=KINDS)
def saved(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Lab, Path]:
    """An adapter after a step of training, and the folder that it is saved in."""
    lab = make_lab(load_config([SOKOBAN, *SMALL, *KINDS[request.param]]))
    lab.trainer.step(lab.rollouts, 1, lambda count: None)
    return lab, checkpoint.save_model(lab.policy, tmp_path_factory.mktemp("saved"))


def test_peft_loads_a_saved_adapter_and_computes_the_same(saved: tuple[Lab, Path]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    lab, folder = saved
    base = AutoModelForCausalLM.from_pretrained(resolve("tiny-sokoban"))
    ours, without = student_logprobs(lab), logprobs(lab, base)
    loaded = PeftModel.from_pretrained(base, folder).eval()
    torch.testing.assert_close(ours, logprobs(lab, loaded), rtol=1e-5, atol=1e-6)
    assert (ours - without).abs().max() > 1e-2


def test_the_base_runs_without_its_adapter(saved: tuple[Lab, Path]) -> None:
    """The adapter is on again afterwards, whatever happens, and all that is trained stays so."""
    from transformers import AutoModelForCausalLM

    policy, trained = saved[0].policy, [name for name, _ in saved[0].policy.parameters]
    base = logprobs(saved[0], AutoModelForCausalLM.from_pretrained(resolve("tiny-sokoban")))
    student = student_logprobs(saved[0])
    with policy.running_as(Role.BASE):
        with contextlib.suppress(ZeroDivisionError), policy.running_as(Role.TEACHER):
            torch.testing.assert_close(logprobs(saved[0], policy.causal), base)
            assert [name for name, _ in policy.parameters] == trained
            raise ZeroDivisionError
        torch.testing.assert_close(logprobs(saved[0], policy.causal), base)
    assert torch.equal(student_logprobs(saved[0]), student)


def test_training_starts_from_a_saved_adapter(
    saved: tuple[Lab, Path], configure: Configure
) -> None:
    """Its shape is taken from it, the student is what was saved, and the teacher the base."""
    lab, folder = saved
    loaded = configure(*SMALL, f"{LORA}.init", str(folder))
    ours, theirs = loaded.config.trainer.model.lora, lab.policy.model.peft_config["default"]
    assert ours
    assert (ours.rank, ours.alpha) == (theirs.r, theirs.lora_alpha)
    assert set(ours.target_modules) == theirs.target_modules
    assert (ours.use_rslora, ours.use_dora) == (theirs.use_rslora, theirs.use_dora)
    assert ours.rank_pattern == theirs.rank_pattern
    assert loaded.provenance["trainer.model.lora.alpha"] == str(folder / "adapter_config.json")
    again = make_lab(loaded, trained=False)
    assert torch.equal(logprobs(lab, again.policy.student), student_logprobs(lab))
    with again.policy.running_as(Role.TEACHER):
        base = logprobs(lab, again.policy.causal)
    with lab.policy.running_as(Role.TEACHER):
        assert torch.equal(base, logprobs(lab, lab.policy.causal))
    assert not again.policy.starts_as_base
    prompts = [r.prompt for r in lab.rollouts]
    check_model(again.policy, prompts, TokenBudget())  # no KL of 0 between the roles
    assert cpu_placement(loaded).adapter_dtype == "float32"


def test_a_moving_average_begins_at_the_saved_adapter(
    saved: tuple[Lab, Path], configure: Configure
) -> None:
    lab, folder = saved
    flags = ("--orchestrator.teacher_model.update", "ema", f"{LORA}.init", str(folder))
    again = make_lab(configure(*SMALL, *flags), trained=False)
    with again.policy.running_as(Role.TEACHER):
        assert torch.equal(logprobs(lab, again.policy.causal), student_logprobs(lab))


def test_a_run_that_starts_from_another_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The held-out KL before it is the other's after it; the baseline is that of its student."""
    first, second = tmp_path / "first", tmp_path / "second"
    assert run(first, "--max_steps", "2", "--trainer.scheduler.warmup_steps", "0") == EXIT_OK
    capsys.readouterr()
    assert run(second, "--max_steps", "1", f"{LORA}.init", str(first)) == EXIT_OK
    assert f"the adapter in {first / 'adapter'}" in capsys.readouterr().out
    before, after = board(first), board(second)
    assert after["heldout_kl_before"] == before["heldout_kl_after"]
    assert after["baseline_student"] == before["student"]
    assert after["baseline_teacher"] == before["baseline_teacher"]
    assert after["length_before"] == before["length_after"]
    assert run(second, "--max_steps", "1", f"{LORA}.init", str(first), "--resume") == EXIT_OK
    # a run that was cut off has the adapter of its latest checkpoint
    (first / "adapter").rename(first / "moved")
    loaded = load_config([SOKOBAN, f"{LORA}.init", str(first)])
    assert loaded.provenance["trainer.model.lora.alpha"].startswith(str(first / "checkpoints"))


def test_a_run_is_resumed_although_the_adapter_that_it_started_from_has_changed_or_gone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From its checkpoint, and exactly. Without one it would start from another adapter."""
    source, whole, path = tmp_path / "source", tmp_path / "whole", tmp_path / "path"
    baseless = ("--no-orchestrator.eval", "--no-orchestrator.teacher_model.eval_baseline")
    baseless += ("--trainer.scheduler.warmup_steps", "0", "--ckpt.interval", "1")
    assert run(source, "--max_steps", "1", f"{LORA}.use_rslora", *baseless) == EXIT_OK
    flags = ("--max_steps", "3", f"{LORA}.init", str(source), *baseless)
    assert run(whole, *flags) == EXIT_OK
    original = loop.train_step

    def breaks_at(last: int) -> Any:
        def train_step(session: Any, step: int) -> None:
            if step == last:
                raise RuntimeError("it broke")
            original(session, step)

        return train_step

    def resume(last: int) -> int:
        with monkeypatch.context() as patch:
            patch.setattr(loop, "train_step", breaks_at(last))
            return run(path, *flags, *(("--resume",) if path.exists() else ()))

    assert resume(1) == EXIT_FAILED
    assert resume(2) == EXIT_FAILED, "the adapter is there and as it was"
    file = source / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, file)
    assert resume(3) == EXIT_FAILED
    assert [record["step"] for record in records(path) if "teacher_kl" in record] == [1, 2]
    shutil.move(path / "checkpoints", tmp_path / "kept")
    capsys.readouterr()
    assert resume(0) == EXIT_USAGE
    assert "from an adapter that has changed since" in capsys.readouterr().err
    shutil.rmtree(source)
    assert resume(0) == EXIT_USAGE
    assert f"there is no adapter in {source}" in capsys.readouterr().err
    shutil.move(tmp_path / "kept", path / "checkpoints")
    assert resume(0) == EXIT_OK
    assert records(path) == records(whole)
    assert board(path) == board(whole)
    capsys.readouterr()
    assert run(path, *flags, "--resume") == EXIT_OK
    assert "is already finished: 3 steps" in capsys.readouterr().out
    assert run(path, *flags, f"{LORA}.rank", "5", "--resume") == EXIT_USAGE
    assert "trainer.model.lora.rank (was 16, now 5)" in capsys.readouterr().err


# -- what is refused ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new adapter of rank 16 on all linear layers."""
    folder = tmp_path_factory.mktemp("plain")
    loaded = load_config([SOKOBAN])
    placement = cpu_placement(loaded)
    policy = load_policy(loaded.config, load_tokenizer(loaded.config), placement)
    return checkpoint.save_model(policy, folder)


def copy_of(plain: Path, folder: Path, **settings: Any) -> Path:
    """A copy of the adapter with other settings."""
    folder.mkdir()
    written = json.loads((plain / "adapter_config.json").read_text()) | settings
    (folder / "adapter_config.json").write_text(json.dumps(written))
    (folder / "adapter_model.safetensors").write_bytes(
        (plain / "adapter_model.safetensors").read_bytes()
    )
    return folder


def refusal(folder: Path, *flags: str) -> UserError:
    with pytest.raises(UserError) as caught:
        load_config([SOKOBAN, f"{LORA}.init", str(folder), *flags])
    assert caught.value.exit_code == EXIT_USAGE
    assert caught.value.fix
    return caught.value


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save = ['lm_head']"),
    "biases": ({"bias": "all"}, "bias = 'all'"),
    "alphas by layer": ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern"),
    "an initialization that changes the base": ({"init_lora_weights": "pissa"}, "'pissa'"),
    "a setting of the future": ({"use_new_idea": {"depth": 3}}, "use_new_idea"),
    "another method": ({"peft_type": "IA3"}, "peft_type = 'IA3'"),
    "another model": ({"base_model_name_or_path": "org/other-1B"}, "the model org/other-1B"),
    "a pattern of layers": ({"target_modules": ".*proj"}, "regular expression"),
    "a rank that is none": ({"r": 0}, "cannot be used"),
    "an alpha that no number has": ({"lora_alpha": 10**400}, "cannot be used: OverflowError"),
    "no rank": ({"target_modules": None}, "cannot be used"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_adapter_that_cannot_be_trained_on(name: str, plain: Path, tmp_path: Path) -> None:
    settings, what = REFUSED[name]
    error = refusal(copy_of(plain, tmp_path / "changed", **settings))
    assert what in error.what


def test_settings_that_the_adapter_does_not_have(plain: Path) -> None:
    for flags, what in (
        ((f"{LORA}.rank", "8"), "rank = 8, but the adapter that the run starts from has 16"),
        ((f"{LORA}.target_modules", "q_proj"), "target_modules = ['q_proj']"),
        ((f"{LORA}.use_dora",), "use_dora = True"),
    ):
        assert what in refusal(plain, *flags).what
    same = (f"{LORA}.rank", "16", f"{LORA}.target_modules", "all-linear")
    lora = load_config([SOKOBAN, f"{LORA}.init", str(plain), *same])
    assert lora.config.trainer.model.lora.target_modules == "all-linear"  # type: ignore[union-attr]


def test_a_folder_without_an_adapter(tmp_path: Path) -> None:
    assert "there is no adapter in" in refusal(tmp_path).what
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    assert "pickled" in refusal(tmp_path).what
    full = tmp_path / "full"
    (full / "model").mkdir(parents=True)
    assert f'model.name = "{full / "model"}"' in refusal(full).fix


def test_tensors_that_are_not_the_adapters(
    plain: Path, tmp_path: Path, configure: Configure
) -> None:
    folder = copy_of(plain, tmp_path / "changed")
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in tensors if "q_proj.lora_A" in name)
    spare = "base_model.model.lm_head.lora_A.weight"
    for damaged, what in (
        ({n: t for n, t in tensors.items() if n != name}, f"the adapter lacks {name}"),
        (tensors | {spare: tensors[name].clone()}, f"no layer: {spare}"),
        (tensors | {name: tensors[name][:3].contiguous()}, "has the shape (3, 128)"),
        (tensors | {name: tensors[name] * float("nan")}, "not finite"),
    ):
        save_file(damaged, folder / "adapter_model.safetensors")
        loaded = configure(f"{LORA}.init", str(folder))
        with pytest.raises(UserError, match="adapter") as caught:
            load_policy(loaded.config, load_tokenizer(loaded.config), cpu_placement(loaded))
        assert what in caught.value.what
    (folder / "adapter_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match="cannot read the adapter"):
        load_policy(loaded.config, load_tokenizer(loaded.config), cpu_placement(loaded))


def test_a_rank_for_layers_that_have_no_adapter(configure: Configure) -> None:
    loaded = configure(f"{LORA}.rank_pattern.lm_head", "3")
    with pytest.raises(UserError, match="'lm_head', which no adapted layer matches"):
        load_policy(loaded.config, load_tokenizer(loaded.config), cpu_placement(loaded))


VLLM = ("--inference.engine", "vllm")
SERVERS = ("--inference.server_urls", "http://localhost:1")
NF4 = ("--model.quantization", "nf4")
DORA = (f"{LORA}.use_dora",)
CONTRADICTIONS = {
    "DoRA in vLLM": ((*DORA, *VLLM), "use_dora = true, but inference.engine serves"),
    "DoRA on a server": ((*DORA, *SERVERS), "use_dora = true, but inference.server_urls serves"),
    "4 bit in vLLM": ((*NF4, *VLLM), "inference.engine runs the model in vLLM"),
    "4 bit on a server": ((*NF4, *SERVERS), "inference.server_urls runs the model in vLLM"),
    "4 bit, trained whole": ((*NF4, "--no-trainer.model.lora"), "cannot be trained"),
    "4 bit in shards": ((*NF4, "--trainer.shard"), "cannot be sharded"),
    "a pattern that is none": ((f"{LORA}.rank_pattern", '{ "(" = 3 }'), "regular expression"),
    "a rank that is too large": ((f"{LORA}.rank_pattern.q_proj", "600"), "rank_pattern.q_proj"),
    "modules": ((f"{LORA}.modules_to_save", "lm_head"), "modules_to_save"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_what_cannot_be_combined_is_refused(name: str, tmp_path: Path) -> None:
    flags, what = CONTRADICTIONS[name]
    (tmp_path / "a.toml").write_text(MINIMAL)
    with pytest.raises(UserError) as caught:
        load_config([str(tmp_path / "a.toml"), *flags])
    assert what in caught.value.what
    assert caught.value.fix
