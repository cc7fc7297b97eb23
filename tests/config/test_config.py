"""Configuration files, their order, provenance, and errors with file, line, key and fix."""

import json
from pathlib import Path

import pytest

from minidistill.config import LoadedConfig, load_config
from minidistill.config.schema_tree import kinds, properties, walk
from minidistill.errors import UserError

BASE = """\
[orchestrator.teacher_model]
context = "Think."

[[orchestrator.env]]
id = "sokoban-env"
"""


def write(folder: Path, text: str, name: str = "a.toml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def load(folder: Path, text: str, *argv: str) -> LoadedConfig:
    return load_config([write(folder, text), *argv])


def refusal(folder: Path, text: str, *argv: str) -> UserError:
    with pytest.raises(UserError) as caught:
        load(folder, text, *argv)
    assert caught.value.exit_code == 2
    return caught.value


HYBRID = """\
[trainer.loss]
adv_tau = 0.5        # Weight for task reward
teacher_tau = 0.5    # Weight for teacher log prob term
student_tau = 0.5    # Weight for student log prob term (entropy)

[orchestrator.teacher_model]
context = "Think step by step before answering.\\n\\n"

[[orchestrator.env]]
id = "sokoban-env"
args = { max_w = 6 }
"""


def test_defaults_of_the_public_experiment(tmp_path: Path) -> None:
    config = load(tmp_path, BASE).config
    loss = config.trainer.loss
    assert (loss.adv_tau, loss.teacher_tau, loss.student_tau) == (0.5, 0.5, 0.5)
    assert config.trainer.model.lora.rank == 16
    assert config.orchestrator.teacher_model.eval_baseline is False
    assert config.orchestrator.env[0].name == "sokoban-env"
    assert config.wandb is config.orchestrator.eval is None
    assert config.trainer.model.ac == config.trainer.micro_batch_tokens == "auto"
    assert config.inference.gpu_memory_utilization == "auto"


def test_later_files_override_earlier_ones_and_flags_override_files(tmp_path: Path) -> None:
    first = write(tmp_path, BASE + "[trainer.optim]\nlr = 1e-3\nweight_decay = 0.1\n", "a.toml")
    second = write(tmp_path, "[trainer.optim]\nlr = 2e-3\nbetas1 = 0.8\n", "b.toml")
    argv = ["--trainer.optim.betas1", "0.5", first, "@", second, "--trainer.optim.betas1=0.6"]
    loaded = load_config(argv)
    optim = loaded.config.trainer.optim
    assert (optim.lr, optim.weight_decay, optim.betas1) == (2e-3, 0.1, 0.6)
    assert loaded.files == (Path(first), Path(second))
    assert loaded.provenance["trainer.optim.lr"] == f"{second}:2"
    assert loaded.provenance["trainer.optim.weight_decay"] == f"{first}:8"
    assert loaded.provenance["trainer.optim.betas1"] == "--trainer.optim.betas1"
    assert loaded.provenance["trainer.optim.betas2"] == "default"


def test_lists_are_replaced_and_not_merged(tmp_path: Path) -> None:
    two = BASE + '[orchestrator.env.args]\nmax_w = 5\n[[orchestrator.env]]\nid = "other"\n'
    first = write(tmp_path, two, "a.toml")
    second = write(tmp_path, '[[orchestrator.env]]\nid = "third"\n', "b.toml")
    loaded = load_config([first, second])
    assert [(env.id, env.args) for env in loaded.config.orchestrator.env] == [("third", {})]
    assert loaded.provenance["orchestrator.env.0.id"] == f"{second}:2"
    assert loaded.provenance["orchestrator.env.0.args"] == "default"
    assert not [key for key in loaded.provenance if ".env.1" in key]


def test_every_setting_has_provenance(tmp_path: Path) -> None:
    tables = "--wandb", "--tensorboard", "--trackio", "--early_stopping", "--orchestrator.eval"
    loaded = load(tmp_path, HYBRID, *tables)
    assert '"max_w": 6' in json.dumps(loaded.resolved())
    for path, node in walk():
        if not properties(node) and "*" not in path and path[:2] != ("orchestrator", "eval"):
            key = ".".join(map(str, path))
            assert key in loaded.provenance or key.startswith("trainer.model.ac."), key
    assert loaded.provenance["orchestrator.env.0.args.max_w"].endswith("a.toml:11")


def test_text_loads_again_to_the_same_configuration(tmp_path: Path) -> None:
    context = write(tmp_path, 'Say "yes"\tthen\n\\stop\n\n', "context.txt")
    argv = ["--orchestrator.teacher_model.context_file", context, "--wandb", "--no-wandb"]
    loaded = load(tmp_path, HYBRID, *argv, "--trainer.optim.lr", "1e-05", "--orchestrator.eval")
    assert loaded.config.wandb is None
    again = load(tmp_path, loaded.text)
    assert again.config == loaded.config
    assert again.text == loaded.text


def test_optional_settings_default_to_none() -> None:
    # `text` omits settings that are None, so loading it gives their default
    for path, node in walk():
        if "null" in kinds(node):
            assert node.get("default", 0) is None, path


def test_context_file_is_relative_to_its_toml_file(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "context.txt").write_bytes(b"Think hard.\r\n\n")
    text = BASE.replace('context = "Think."', 'context_file = "context.txt"')
    path = write(tmp_path / "sub", text)
    loaded = load_config([path])
    assert loaded.config.orchestrator.teacher_model.context == "Think hard.\n\n"
    assert loaded.config.orchestrator.teacher_model.context_file is None
    assert loaded.provenance["orchestrator.teacher_model.context"] == f"{path}:2"
    flag = load_config([path, "--orchestrator.teacher_model.context", "Now."])
    assert flag.config.orchestrator.teacher_model.context == "Now."


def test_a_context_file_flag_overrides_a_context_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "From here.", "context.txt")
    monkeypatch.chdir(tmp_path)
    loaded = load(tmp_path, BASE, "--orchestrator.teacher_model.context-file", "context.txt")
    assert loaded.config.orchestrator.teacher_model.context == "From here."
    assert loaded.provenance["orchestrator.teacher_model.context"].startswith("--orch")


def test_a_chat_template_is_a_file_relative_to_its_toml_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sub").mkdir()
    text = "{% for m in messages %}{{ m['content'] }}{% endfor %}\n"
    write(tmp_path / "sub", text, "mine.jinja")
    path = write(tmp_path / "sub", BASE + '[model]\nchat_template = "mine.jinja"')
    loaded = load_config([path])
    assert loaded.config.model.chat_template == text
    assert loaded.provenance["model.chat_template"] == f"{path}:7"
    # the run's own configuration needs no other file
    assert load(tmp_path, loaded.text).config == loaded.config
    write(tmp_path, text * 2, "mine.jinja")
    monkeypatch.chdir(tmp_path)
    flag = load_config([path, "--model.chat_template", "mine.jinja"])
    assert flag.config.model.chat_template == text * 2
    assert flag.provenance["model.chat_template"] == "--model.chat_template"


def test_a_chat_template_that_is_no_template(tmp_path: Path) -> None:
    setting = BASE + '[model]\nchat_template = "mine.jinja"'
    assert "cannot read" in refusal(tmp_path, setting).what
    write(tmp_path, "You are helpful.", "mine.jinja")
    error = refusal(tmp_path, setting)
    assert "holds no Jinja template" in error.what
    assert error.where.endswith("a.toml:7, model.chat_template")


LOSS = BASE + "[trainer.loss]\n"  # its keys are on line 7
ORCH = "[orchestrator]\n{}\n" + BASE  # its keys are on line 2

REFUSED = [  # file, line, key and value in `what`, part of `fix`
    (LOSS + 'adv_tau = "0.5"', 7, 'trainer.loss.adv_tau = "0.5"', "a number ≥ 0"),
    (LOSS + "adv_tau = -1.0", 7, "trainer.loss.adv_tau = -1.0", "a number ≥ 0"),
    (LOSS + "adv_tau = inf", 7, "trainer.loss.adv_tau = inf", "a number ≥ 0"),
    (LOSS + "adv_tau = nan", 7, "trainer.loss.adv_tau = nan", "a number ≥ 0"),
    (LOSS + "adv_tau = true", 7, "trainer.loss.adv_tau = true", "a number ≥ 0"),
    (LOSS + "kl_clip = 0", 7, "trainer.loss.kl_clip = 0", '"auto", "off" or a number > 0'),
    (LOSS + "advtau = 1", 7, "no trainer.loss.advtau = 1", "`trainer.loss.adv_tau`"),
    (LOSS + 'type = "default"', 7, "trainer.loss.type", "drop it"),
    (LOSS + "kl_tau = 0", 7, "trainer.loss.kl_tau", "teacher_tau"),
    (BASE + "[model]\nenable_thinking = false", 7, "model.enable_thinking", "chat_template_kwargs"),
    ("max_steps = 3.0\n" + BASE, 1, "max_steps = 3.0", "an integer ≥ 1"),
    ('seed = "3"\n' + BASE, 1, 'seed = "3"', "an integer ≥ 0"),
    (BASE + "[loss]\nadv_tau = 1", 6, "there is no loss", "`trainer.loss`"),
    (BASE + "[trainer.lora]\nrank = 1", 6, "there is no trainer.lora", "`trainer.model.lora`"),
    (BASE + "[trainer]\nmax_steps = 5", 7, "trainer.max_steps = 5", "use `max_steps`"),
    (BASE + '[trainer.model]\nimpl = "custom"', 7, 'impl = "custom"', '"auto" or "hf"'),
    (BASE + '[trainer.model]\nname = "x"', 7, "trainer.model.name", "use `model.name`"),
    (BASE + '[trainer.optim]\ntype = "muon"', 7, 'trainer.optim.type = "muon"', '"adamw"'),
    (BASE + "[trainer.model.lora]\nrank = 513", 7, "lora.rank = 513", "≥ 1 and ≤ 512"),
    (BASE + "[slurm]\nnodes = 2", 6, "slurm", "torchrun starts it on several"),
    (BASE + "[orchestrator.sampling]\ntop_p = 0.9", 7, "sampling.top_p", "full distribution"),
    (BASE + "[orchestrator.buffer]\neasy_threshold = 1.0", 7, "easy_threshold", "drop it"),
    (ORCH.format("seq_len = 5"), 2, "orchestrator.seq_len", "use `seq_len`"),
    (ORCH.format("batch_size = 30"), 2, "batch_size = 30 is not a multiple", "28 or 32"),
    (ORCH.format("batch_size = 2"), 2, "not a multiple", "to 4"),
    (ORCH.format("rollouts_per_example = 0"), 2, "= 0 is not allowed", "an integer ≥ 1"),
    (LOSS + "adv_tau = 0.0\nteacher_tau = 0.0", 8, "nothing to learn from", "teacher_tau"),
    (BASE + "[orchestrator.buffer]\nskip_verification = true", 7, "no reward", "adv_tau = 0"),
    (BASE.replace("Think.", " \\n\\t"), 2, "context is empty", "context_file"),
    (BASE.replace('context = "Think."', ""), 1, "context is empty", "context_file"),
    (
        BASE.replace("context =", "eval_baseline = true\ncontext ="),
        2,
        "needs",
        "--orchestrator.eval",
    ),
    (BASE.replace("[[", "[").replace("]]", "]"), 4, "orchestrator.env", "[[orchestrator.env]]"),
    (BASE.replace("id =", "name ="), 4, "orchestrator.env.0.id is required", "set"),
    (BASE + '[[orchestrator.env]]\nid = "sokoban-env"', 6, "2 entries", "`name`"),
    ("inference_gpu_ids = [0, 0]\n" + BASE, 1, "names GPU 0 twice", "once"),
    ("inference_gpu_ids = [-1]\n" + BASE, 1, "inference_gpu_ids.0 = -1", "an integer ≥ 0"),
    ("inference_gpu_ids = []\n" + BASE, 1, "inference_gpu_ids = []", "non-empty"),
    ("teacher_gpu_ids = [0]\ntrainer_gpu_ids = [0, 1]\n" + BASE, 2, "GPU 0 is in", "same ones"),
    ("seq_len = 512\n" + BASE, 1, "no room for a prompt", "max_tokens below"),
    (BASE + "[trainer.scheduler]\nmin_lr = 1.0", 7, "lr = auto, which is 0.0005", "at most"),
    (BASE + "[inference.parallel]\ntp = 0", 7, "inference.parallel.tp = 0", "≥ 1"),
    (BASE + "[inference.parallel]\ndp = -2", 7, "inference.parallel.dp = -2", "≥ 1"),
]


@pytest.mark.parametrize(("text", "line", "what", "fix"), REFUSED)
def test_refusals_have_what_where_and_fix(
    tmp_path: Path, text: str, line: int, what: str, fix: str
) -> None:
    error = refusal(tmp_path, text)
    assert f"a.toml:{line}," in error.where
    assert what in error.what
    assert fix in error.fix


def test_several_problems_are_reported_at_once(tmp_path: Path) -> None:
    error = refusal(tmp_path, 'seed = "x"\nmax_steps = 0\nnope = 1\n' + BASE)
    lines = [problem.where.split(":")[-1] for problem in error.problems]
    assert lines == ["2, max_steps", "1, seed", "3, nope"]
    assert str(error).count("fix:") == 3


def test_missing_required_keys_are_named() -> None:
    with pytest.raises(UserError, match=r"orchestrator\.env is required"):
        load_config(["--seed", "1"])


GPUS = [
    ("--inference_gpu_ids 0,1,2 --inference.parallel.tp 2", "does not divide"),
    ("--inference_gpu_ids 0,1 --inference.parallel.dp 3", "needs dp 3 × tp 1 = 3 GPUs"),
    ("--teacher_gpu_ids 0 --teacher_inference.parallel.tp 2", "does not divide"),
]


@pytest.mark.parametrize(("flags", "what"), GPUS)
def test_parallelism_must_match_the_gpus(tmp_path: Path, flags: str, what: str) -> None:
    assert what in refusal(tmp_path, BASE, *flags.split()).what


def test_a_flag_may_append_one_entry_to_a_list(tmp_path: Path) -> None:
    environments = load(tmp_path, BASE, "--orchestrator.env.1.id", "b").config.orchestrator.env
    assert [env.name for env in environments] == ["sokoban-env", "b"]
    assert "no entry 2" in refusal(tmp_path, BASE, "--orchestrator.env.2.id", "b").what


def test_roles_may_share_the_same_gpus(tmp_path: Path) -> None:
    shared = "--inference_gpu_ids 0,1 --teacher_gpu_ids 1,0 --trainer_gpu_ids 0,1"
    assert load(tmp_path, BASE, *shared.split()).config.trainer_gpu_ids == [0, 1]


def test_unreadable_files(tmp_path: Path) -> None:
    error = refusal(tmp_path, "max_steps = 1\nseed = = 2\n")
    assert "a.toml:2, column 8" in error.where
    assert "cannot read" in refusal(tmp_path, BASE, "missing.toml").what
    assert "cannot read" in refusal(tmp_path, BASE, str(tmp_path)).what
    (tmp_path / "b.toml").write_bytes(b"a = 1\r\nb = '\xff'")
    error = refusal(tmp_path, BASE, str(tmp_path / "b.toml"))
    assert error.what.endswith("b.toml is not UTF-8 text: the byte 0xff")
    assert error.where.endswith("b.toml:2, column 6")
    assert "TOML" in refusal(tmp_path, f"seed = {'9' * 5000}").what
    both = BASE.replace("context =", 'context_file = "x"\ncontext =')
    assert "both context and context_file" in refusal(tmp_path, both).what
    missing = refusal(tmp_path, BASE.replace('context = "Think."', 'context_file = "x.txt"'))
    assert missing.where.endswith("a.toml:2, orchestrator.teacher_model.context_file")


@pytest.mark.parametrize(
    "text", ["seed = 1\nseed = 2", "[ckpt]\nkeep = 1\n[ckpt]\n", "ckpt = { keep = 1, keep = 2 }"]
)
def test_a_key_that_is_there_twice_is_refused(text: str, tmp_path: Path) -> None:
    error = refusal(tmp_path, text)
    assert error.what == "not valid TOML: a key or a table is there twice"
    assert error.fix == "keep one of the two"


def test_a_key_that_is_twice_in_a_flag_is_refused(tmp_path: Path) -> None:
    flag = '--orchestrator.env.0.args={"a": 1, "a": 2}'
    assert "the key 'a' is there twice" in refusal(tmp_path, BASE, flag).what


def test_files_are_read_as_text_editors_write_them(tmp_path: Path) -> None:
    """With a byte order mark and Windows' line ends, which are no part of the text."""
    (tmp_path / "persona.txt").write_bytes("\ufeffBe kind.\r\n\r\n".encode())
    text = BASE.replace('context = "Think."', 'context_file = "persona.txt"').replace("\n", "\r\n")
    (tmp_path / "bom.toml").write_bytes(("\ufeff" + text).encode())
    loaded = load_config([str(tmp_path / "bom.toml")])
    assert loaded.config.orchestrator.teacher_model.context == "Be kind.\n\n"


def test_a_run_with_a_long_context_can_be_read_again(tmp_path: Path) -> None:
    """Its context may have been a file of its own; in the run's file it is a text."""
    (tmp_path / "context.txt").write_text("Think. " * 100_000)
    file = tmp_path / "base.toml"
    file.write_text(BASE.replace('context = "Think."', 'context_file = "context.txt"'))
    loaded = load_config([str(file)])
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.toml").write_text(loaded.text)
    with pytest.raises(UserError, match="more than"):
        load_config([str(run / "config.toml")])
    (run / "config.resolved.json").write_text("{}")
    assert load_config([str(run / "config.toml")]).config == loaded.config
