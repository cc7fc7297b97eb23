"""`python -m bench.peers` without TRL: what is compared, refused and summed up."""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from support.paths import ROOT

from bench import peers
from bench.peers_venv import TRL, trl_python
from bench.workload import Case
from minidistill.errors import EXIT_ENVIRONMENT, UserError

FIRST = {"loss": 1.25, "grad_norm": 0.5, "seconds": 9.0, "peak_bytes": 1 << 30}
# A side of the comparison: answers its first step, then one line for each command
SIDE = """
import json, sys
first, steps = json.loads(sys.argv[1]), json.loads(sys.argv[2])
print("some library's greeting")
print(json.dumps(first), flush=True)
for seconds, line in zip(steps, sys.stdin):
    assert line == "step\\n"
    times = {"seconds": seconds, "cpu_seconds": seconds / 2, "sample": 1.0, "train": 2.0}
    print(json.dumps(first | times), flush=True)
sys.exit("nothing is left to answer")
"""


def side(folder: Path, name: str, steps: list[float], **changes: Any) -> peers.Peer:
    command = [sys.executable, "-c", SIDE, json.dumps(FIRST | changes), json.dumps(steps)]
    return peers.Peer(name, command, 1, folder / f"{name}.log")


def test_equal_losses_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    peers.check_same(FIRST, FIRST | {"loss": 1.25 * (1 + 2e-5)})
    printed = capsys.readouterr().out
    assert "1.25 " in printed
    assert "1.250025" in printed


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("factor", [1.002, 0.998, 2.0, float("nan"), float("inf")])
def test_no_time_is_reported_if_the_losses_differ(name: str, factor: float) -> None:
    with pytest.raises(SystemExit, match=f"another {name}"):
        peers.check_same(FIRST, FIRST | {name: FIRST[name] * factor})
    with pytest.raises(SystemExit, match=f"another {name}"):
        peers.check_same(FIRST | {name: FIRST[name] * factor}, FIRST)


def test_medians_of_the_rounds(tmp_path: Path) -> None:
    ours = side(tmp_path, "minidistill", [2.0, 4.0, 3.0])
    theirs = side(tmp_path, "TRL", [20.0, 20.0, 24.0], peak_bytes=4 << 30)
    try:
        for _ in range(3):
            ours.step()
            theirs.step()
    finally:
        ours.close()
        theirs.close()
    result = peers.summary(ours, theirs)
    assert result["minidistill"]["seconds"] == 3.0
    assert result["TRL"]["seconds"] == 20.0
    assert result["times_as_fast"] == 8.0  # of 10, 5 and 8
    assert result["share_of_memory"] == 0.25
    assert result["times_as_fast_by_cpu_seconds"] == 8.0
    assert result["minidistill"]["runs"]["cpu_seconds"] == [1.0, 2.0, 1.5]


def test_a_side_that_ends_is_an_error_with_its_words(tmp_path: Path) -> None:
    peer = side(tmp_path, "TRL", [])
    try:
        with pytest.raises(SystemExit, match="TRL ended with an error:\nnothing is left"):
            peer.step()
    finally:
        peer.close()


def test_our_side_and_the_peers_share_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our real process, and instead of TRL's one that answers with what ours wrote for it."""
    other = tmp_path / "peer.py"
    other.write_text(
        "import json, sys\n"
        "from pathlib import Path\n"
        "folder = Path(sys.argv[2])\n"
        "first = json.loads((folder / 'first_step.json').read_text())['rollouts']\n"
        "assert len(first) == json.loads((folder / 'trl.json').read_text())['batch']\n"
        "assert {len(r['completion_ids']) for r in first} == {5}\n"
        "assert len(first[0]['teacher_ids']) > len(first[0]['student_ids']) + 50\n"
        "assert (folder / 'adapter' / 'adapter_model.safetensors').exists()\n"
        "print(json.dumps({'loss': -1.0, 'grad_norm': 1.0, 'seconds': 1.0}), flush=True)\n"
        "sys.stdin.read()\n"
    )
    starter = tmp_path / "python"
    starter.write_text(f'#!/bin/sh\nexec {sys.executable} {other} "$@"\n')
    starter.chmod(0o755)
    monkeypatch.setattr(peers, "trl_python", lambda: starter)
    case = Case("tiny-sokoban", context=60, prompt=4, batch=2, completion=5)
    with pytest.raises(SystemExit, match="another loss"):
        peers.measure(case, "full_logits", 1, 1)


def test_the_environments_failure_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(UserError, match="was not installed") as error:
        trl_python()
    assert error.value.exit_code == EXIT_ENVIRONMENT


def test_the_extra_is_what_the_script_installs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["bench"] == [TRL]


@pytest.mark.parametrize("flags", [["--repeats", "0"], ["--case", "none"], ["--mode", "jsd"]])
def test_wrong_arguments_are_refused(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        peers.main(flags)
    assert flags[0] in capsys.readouterr().err


def test_a_batch_without_whole_groups_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert peers.main(["--model", "tiny", "--case", "groups_of_8", "--batch", "12"]) == 2
    assert "--group" in capsys.readouterr().err
