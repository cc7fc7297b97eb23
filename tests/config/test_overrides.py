"""Settings on the command line in all their forms, and TOML round trips."""

from typing import Any

import pytest
import tomli
from hypothesis import example, given
from hypothesis import strategies as st

from minidistill.config import load_config
from minidistill.config.overrides import parse
from minidistill.config.schema import AcConfig
from minidistill.config.schema_tree import child, properties, root
from minidistill.config.toml import inline, key_lines, to_toml
from minidistill.errors import UserError


def parse_one(*argv: str) -> Any:
    """The value of the one override in `argv`."""
    (override,) = parse(argv)[1]
    return override.value


@pytest.mark.parametrize(
    "argv", ["@ a.toml b.toml", "@a.toml @ b.toml", "a.toml --seed 1 @b.toml", "a.toml b.toml"]
)
def test_files_with_and_without_at(argv: str) -> None:
    assert parse(argv.split())[0] == ["a.toml", "b.toml"]


VALUES = [
    ("--seed 3", 3),
    ("--seed=3", 3),
    ("--seed -3", -3),
    ("--seed x", "x"),
    ("--seed 3.0", 3.0),
    ("--max-steps 7", 7),
    ("--trainer.loss.adv-tau 0", 0),
    ("--trainer.loss.adv_tau=1e-3", 1e-3),
    ("--trainer.loss.adv_tau -0.5", -0.5),
    ("--trainer.loss.kl_clip off", "off"),
    ("--trainer.loss.kl_clip 3.5", 3.5),
    ("--trainer.scheduler.decay_steps none", None),
    ("--model.name 123", "123"),
    ("--model.name true", "true"),
    ("--model.name=", ""),
    ("--model.name=a=b", "a=b"),
    ("--model.name=--x", "--x"),
    ("--inference_gpu_ids 0,1", [0, 1]),
    ("--inference-gpu-ids 0 1", [0, 1]),
    ("--inference_gpu_ids [0,1]", [0, 1]),
    ("--inference_gpu_ids=[0, 1]", [0, 1]),
    ("--inference_gpu_ids [0, 1]", [0, 1]),
    ("--inference_gpu_ids -1", [-1]),
    ("--inference_gpu_ids a", ["a"]),
    ("--wandb.tags a b", ["a", "b"]),
    ("--wandb.tags [1,b]", ["1", "b"]),
    ("--no-trainer.model.lora", False),
    ("--trainer.model.lora false", False),
    ("--trainer.model.lora.target_modules all-linear", "all-linear"),
    ("--trainer.model.lora.target_modules q_proj,v_proj", ["q_proj", "v_proj"]),
    ("--trainer.model.lora.target_modules q_proj v_proj", ["q_proj", "v_proj"]),
    ("--trainer.packing", True),
    ("--trainer.packing true", True),
    ("--trainer.packing=False", False),
    ("--trainer.shard auto", "auto"),
    ("--orchestrator.buffer.skip_verification", True),
    ("--orchestrator.buffer.skip-verification true", True),
    ("--orchestrator.buffer.skip_verification False", False),
    ("--orchestrator.buffer.skip_verification=false", False),
    ("--no-orchestrator.buffer.skip_verification", False),
    ("--orchestrator.buffer.no-skip-verification", False),
    ("--wandb", {}),
    ("--wandb true", {}),
    ("--wandb false", None),
    ("--no-wandb", None),
    ("--orchestrator.no-eval", None),
    ("--ckpt", {}),
    ("--ckpt.interval 5", 5),
    ("--orchestrator.env.0.args.max_w 6", 6),
    ("--orchestrator.env.0.args.mode hard", "hard"),
    ("--orchestrator.env.0.args.rate 0.5", 0.5),
    ("--orchestrator.env.0.args.walls", True),
    ("--no-orchestrator.env.0.args.walls", False),
    ("--orchestrator.env.0.args.sizes [1,2]", [1, 2]),
    ('--orchestrator.env.0.args {"a":1}', {"a": 1}),
    ("--orchestrator.env.0.args {a=1}", {"a": 1}),
    ('--orchestrator.env [{"id":"x"}]', [{"id": "x"}]),
    ('--orchestrator.env [{id="x"}]', [{"id": "x"}]),
]


@pytest.mark.parametrize(("argv", "value"), VALUES)
def test_values_of_flags(argv: str, value: object) -> None:
    tokens = argv.replace("[0, 1]", "[0,\x001]").split()
    if "=[" in argv:  # one token with a space in it, as from a quoted argument
        tokens = [argv]
    parsed = parse_one(*(token.replace("\x00", "") for token in tokens))
    assert parsed == value
    assert type(parsed) is type(value)


def test_an_override_has_its_path_and_its_flag() -> None:
    (override,) = parse(["--orchestrator.env.0.args.max-w", "6"])[1]
    assert override.path == ("orchestrator", "env", 0, "args", "max_w")
    assert override.flag == "--orchestrator.env.0.args.max-w"


def test_lists_end_at_files_and_flags() -> None:
    assert parse(["--wandb.tags", "x", "y", "a.toml"])[0] == ["a.toml"]
    line = "--wandb --inference_gpu_ids 0 1 a.toml --wandb.tags x y @ b.toml --wandb.offline c.toml"
    files, overrides = parse(line.split())
    assert files == ["a.toml", "b.toml", "c.toml"]
    assert [override.value for override in overrides] == [{}, [0, 1], ["x", "y"], True]


REFUSED = [
    (["--seed"], "needs a value", "an integer ≥ 0"),
    (["--seed", "--wandb"], "needs a value", "after ="),
    (["--model.name", "@", "a.toml"], "needs a value", "a non-empty string"),
    (["@"], "after @", "@ FILE.toml"),
    (["@", "--seed", "1"], "after @", "@ FILE.toml"),
    (["-x"], "unknown option -x", "--a.b.c"),
    (["--"], "unknown option --", "--a.b.c"),
    (["--no-seed"], "cannot be switched off", "--seed VALUE"),
    (["--no-trainer.optim"], "cannot be switched off", "--trainer.optim"),
    (["--no-wandb=true"], "cannot be switched off", "--wandb"),
    (["--orchestrator.env." + "9" * 5000 + ".id=x"], "there is no", "did you mean"),
    (["--no-such"], "there is no no_such", "takes"),
    (["--model.name=\udcff"], "not valid UTF-8", ""),
]


@pytest.mark.parametrize(("argv", "what", "fix"), REFUSED)
def test_refusals(argv: list[str], what: str, fix: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(argv)
    assert what in caught.value.what
    assert fix in caught.value.fix
    assert caught.value.exit_code == 2


text = st.text(st.characters(exclude_categories=("Cs",)))
scalars = text | st.integers() | st.floats(allow_nan=False) | st.booleans() | st.datetimes()
tables = st.recursive(
    scalars, lambda below: st.lists(below, max_size=3) | st.dictionaries(text, below, max_size=3)
)


@given(text)
def test_any_text_is_a_value_of_a_string_setting(value: str) -> None:
    assert parse_one(f"--orchestrator.teacher_model.context={value}") == value


@given(st.lists(st.integers(0, 64), min_size=1), st.sampled_from([",", " ", ", "]))
def test_lists_of_ids_round_trip(ids: list[int], separator: str) -> None:
    joined = separator.join(map(str, ids))
    assert parse_one(f"--trainer_gpu_ids={joined}") == ids
    assert parse_one("--trainer_gpu_ids", *joined.split()) == ids
    assert parse_one("--trainer_gpu_ids", f"[{joined.replace(' ', ',').replace(',,', ',')}]") == ids


@given(tables)
def test_environment_arguments_round_trip_through_toml(value: object) -> None:
    assert parse_one(f"--orchestrator.env.0.args.key={inline(value)}") == value


@given(text)
def test_any_text_is_a_value_of_an_environment_argument(value: str) -> None:
    parse_one(f"--orchestrator.env.0.args.key={value}")


LINES = '''\
# a comment = 1
top = 1 # [not.a.header]
"odd.key" = """
[still.a.string]
x = 1
""" # "

[a.b]
c.d = { e = 1, f = 2 }
list = [
  1, # ]
  "]",
  [2],
]
'raw' = \'\'\'
y = 2\'\'\'
  [[a.env]]
  id = 'x'
[a.env.args]
k = 1
[[ "a" . env ]]
id = 'y'
[[a.env.deep]]
z = 1
'''


def test_lines_of_keys() -> None:
    lines = key_lines(LINES)
    expected = {
        ("top",): 2,
        ("odd.key",): 3,
        ("a", "b"): 8,
        ("a", "b", "c", "d"): 9,
        ("a", "b", "list"): 10,
        ("a", "b", "raw"): 15,
        ("a", "env", 0): 17,
        ("a", "env", 0, "id"): 18,
        ("a", "env", 0, "args", "k"): 20,
        ("a", "env", 1, "id"): 22,
        ("a", "env", 1, "deep", 0, "z"): 24,
    }
    assert {path: lines.get(path) for path in expected} == expected
    assert not [path for path in lines if "still" in path or "y" in path or "not" in path]


@given(st.dictionaries(text, tables, max_size=4))
@example({"lines": "a\n\tb\\ \n", "tables": [{"long": "x" * 100}, {"a": {"b": []}}]})
@example({"carriage returns": "a\r\nb\r\n", "lines": "a\nb"})
@example({"table": {"x": "\r\n"}})
def test_toml_round_trips_and_every_key_has_its_line(data: dict) -> None:
    written = to_toml(data)
    assert tomli.loads(written) == data
    lines = key_lines(written)
    for key in data:
        if data[key] != {} and not isinstance(data[key], dict | list):
            assert written.split("\n")[lines[(key,)] - 1].startswith(to_toml({key: 0})[:-4])


def test_none_is_not_written() -> None:
    data = {"a": None, "b": {"c": None, "d": [{"e": None}]}}
    assert tomli.loads(to_toml(data)) == {"b": {"d": [{}]}}
    assert inline(data) == "{ b = { d = [{}] } }"


AC_FORMS = [
    ("", "auto"),
    ("--trainer.model.ac", AcConfig()),
    ("--trainer.model.ac true", AcConfig()),
    ("--trainer.model.ac auto", "auto"),
    ("--trainer.model.ac=auto", "auto"),
    ("--trainer.model.ac.freq 2", AcConfig(freq=2)),
    ("--trainer.model.ac {freq=3}", AcConfig(freq=3)),
    ("--no-trainer.model.ac", False),
    ("--trainer.model.ac false", False),
    ("--no-trainer.model.ac --trainer.model.ac.freq 2", AcConfig(freq=2)),
    ("--trainer.model.ac.freq 2 --no-trainer.model.ac", False),
]


@pytest.mark.parametrize(("argv", "expected"), AC_FORMS)
def test_a_table_that_may_also_be_off_or_automatic(
    argv: str, expected: Any, minimal_config: str
) -> None:
    config = load_config([minimal_config, *argv.split()]).config
    assert config.trainer.model.ac == expected


def test_the_schema_tree_has_optional_tables_and_list_items() -> None:
    env = child(properties(root())["orchestrator"], "env")
    assert env is not None
    assert child(child(env, 0) or {}, "id") is not None
    assert child(env, "id") is None
