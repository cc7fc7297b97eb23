"""The generated reference is current and complete; shipped and public configurations load."""

import json
from pathlib import Path

import jsonschema
import pytest
import tomli
from support.paths import ROOT

from minidistill.config import docs, load_config
from minidistill.config.schema_tree import properties, walk

CONFIGS = sorted((ROOT / "configs").glob("*.toml"))
OVERLAYS = sorted((ROOT / "configs" / "overlays").glob("*.toml"))


def test_the_reference_is_current() -> None:
    assert docs.main(["--check"]) == 0, "run python -m minidistill.config.docs"


def test_check_fails_on_a_stale_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docs, "DOCS", tmp_path)
    assert docs.main(["--check"]) == 1
    assert docs.main([]) == 0
    assert docs.main(["--check"]) == 0
    (tmp_path / "configuration.md").write_text("old")
    assert docs.main(["--check"]) == 1


def test_every_key_is_documented() -> None:
    text = docs.markdown()
    for path, node in walk():
        if not properties(node):
            assert node.get("description"), path
            assert f"| `{path[-1]}` |" in text


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configurations_load_and_match_the_schema(path: Path) -> None:
    load_config([str(path)])
    jsonschema.validate(tomli.loads(path.read_text()), json.loads(docs.json_schema()))


@pytest.mark.parametrize("path", OVERLAYS, ids=lambda path: path.name)
def test_shipped_overlays_load_over_every_configuration(path: Path) -> None:
    """Each overlay changes each configuration, except for `pure` on those that are already pure."""
    unchanged = [
        (path.name, base.name)
        for base in CONFIGS
        if load_config([str(base), "@", str(path)]).config == load_config([str(base)]).config
    ]
    pure = ("agent.toml", "frozen-lake.toml", "own-prompts.toml", "self-prompts.toml")
    assert unchanged == ([(path.name, name) for name in pure] if path.name == "pure.toml" else [])


def test_there_are_shipped_configurations() -> None:
    assert CONFIGS
    assert OVERLAYS


@pytest.mark.parametrize(
    "text",
    [
        'seed = "3"',
        "nope = 1",
        '[orchestrator]\nenv = [{ id = "x" }]\nteacher_model = {}',
        '[orchestrator]\nenv = []\nteacher_model = { context = "x" }',
    ],
)
def test_the_schema_refuses_what_the_loader_refuses(text: str) -> None:
    schema = json.loads(docs.json_schema())
    data = tomli.loads('[orchestrator]\nenv = [{ id = "x" }]\nteacher_model = { context = "x" }')
    jsonschema.validate(data, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**data, **tomli.loads(text)}, schema)


# The snippets and launch lines of the public experiment's page, with values for its `...`
BASE = """\
[orchestrator.eval]
[[orchestrator.env]]
id = "sokoban-env"
"""
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
PURE = """\
[trainer.loss]
adv_tau = 0.0
teacher_tau = 1.0
student_tau = 0.5

[orchestrator.buffer]
skip_verification = true

[orchestrator.teacher_model]
context = "..."
"""
STEPS = '''\
[orchestrator.teacher_model]
context = """Before providing your solution, follow these steps:
1. Analyze the current state carefully
2. Consider all possible actions
3. Evaluate the consequences of each action
4. Choose the optimal path

Now solve this puzzle:

"""
'''
PERSONA = '''\
[orchestrator.teacher_model]
context = """You are a world-class puzzle solver with decades of experience.
You never make mistakes and always find the optimal solution.
Approach this methodically:

"""
'''
BASELINE = """\
[orchestrator.teacher_model]
context = "Think step by step..."
eval_baseline = true  # Enable baseline eval
"""
FOUR_GPUS = (
    "--inference_gpu_ids 0,1 --teacher_gpu_ids 2 --trainer_gpu_ids 3 --inference.parallel.dp 2"
)
EIGHT_GPUS = (
    "--inference_gpu_ids 0 1 --teacher_gpu_ids 2 3 --trainer_gpu_ids 4 5 6 7 "
    "--inference.parallel.tp 2 --teacher_inference.parallel.tp 2"
)


@pytest.mark.parametrize("snippet", [HYBRID, PURE, STEPS, PERSONA, BASELINE])
@pytest.mark.parametrize("launch", [FOUR_GPUS, EIGHT_GPUS])
def test_public_snippets_and_launch_lines_load(tmp_path: Path, snippet: str, launch: str) -> None:
    base, experiment = tmp_path / "base.toml", tmp_path / "rl.toml"
    base.write_text(BASE)
    experiment.write_text(snippet)
    config = load_config(["@", str(base), "@", str(experiment), *launch.split()]).config
    ids = (config.inference_gpu_ids, config.teacher_gpu_ids, config.trainer_gpu_ids)
    if launch == FOUR_GPUS:
        assert ids == ([0, 1], [2], [3])
        assert config.inference.parallel.dp == 2
    else:
        assert ids == ([0, 1], [2, 3], [4, 5, 6, 7])
        assert config.inference.parallel.tp == config.teacher_inference.parallel.tp == 2
    expected = tomli.loads(snippet)["orchestrator"]["teacher_model"]["context"]
    assert config.orchestrator.teacher_model.context == expected
