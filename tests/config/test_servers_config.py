"""Settings that external servers cannot be combined with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minidistill.errors import EXIT_USAGE, UserError

STUDENT = ("--inference.server_urls", '["http://localhost:8000"]')
TEACHER = ("--teacher_inference.server_urls", '["http://localhost:8001"]')


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        ((*STUDENT, "--inference.parallel.tp", "2"), "inference.parallel is for an engine"),
        (
            (*STUDENT, "--inference.gpu_memory_utilization", "0.5"),
            "inference.gpu_memory_utilization is for an engine",
        ),
        (
            (*TEACHER, "--teacher_inference.gpu_memory_utilization", "0.5"),
            "teacher_inference.gpu_memory_utilization is for an engine",
        ),
        ((*STUDENT, "--inference_gpu_ids", "0"), "inference_gpu_ids is for an engine"),
        ((*TEACHER, "--teacher_gpu_ids", "0"), "teacher_gpu_ids is for an engine"),
        ((*STUDENT, "--inference.engine", "embedded"), "samples in the trainer"),
        ((*STUDENT, "--no-trainer.model.lora"), "trains every weight"),
        ((*STUDENT, "--no-teacher_inference.share"), "an engine of its own"),
        ((*TEACHER, "--trainer.loss.estimator", "full"), "needs more from the teacher"),
        ((*TEACHER, "--trainer.loss.estimator", "top_k"), "needs more from the teacher"),
        ((*TEACHER, "--orchestrator.sampling.temperature", "0.7"), "only at temperature 1"),
        (
            (*TEACHER, "--no-trainer.model.lora", "--orchestrator.teacher_model.update", "live"),
            "changes every weight of the teacher",
        ),
        ((*TEACHER, "--teacher_inference.share"), "share = true"),
    ],
)
def test_refusals(configure: Callable[..., Any], flags: tuple[str, ...], what: str) -> None:
    with pytest.raises(UserError) as caught:
        configure(*flags)
    assert caught.value.exit_code == EXIT_USAGE
    assert what in str(caught.value)


def test_servers_for_both_roles_and_the_async_schedule_are_allowed(
    configure: Callable[..., Any],
) -> None:
    config = configure(*STUDENT, *TEACHER, "--schedule", "async").config
    assert config.inference.server_urls == ["http://localhost:8000"]
    assert config.teacher_inference.server_urls == ["http://localhost:8001"]


@pytest.mark.parametrize(
    "url", ["http://me:hidden@gpu:8000", "http://gpu:8000/v1?key=hidden", "https://hidden@gpu"]
)
def test_a_url_with_a_secret_is_refused_and_not_shown(
    configure: Callable[..., Any], tmp_path: Path, url: str
) -> None:
    file = tmp_path / "urls.toml"
    file.write_text(f'[inference]\nserver_urls = ["http://gpu:8000", "{url}"]\n')
    for flags in (("--inference.server_urls", f'["{url}"]'), ("@", str(file))):
        with pytest.raises(UserError, match="server_urls") as caught:
            configure(*flags)
        assert caught.value.exit_code == EXIT_USAGE
        assert "hidden" not in str(caught.value)
        assert "without user, password and query" in caught.value.fix


@pytest.mark.parametrize(
    "host",
    [
        *("gpu:99999", "gpu:-1", "gpu:x", "gpu:0", ":8000", "[::1", "a..b", "a" * 70 + ".net"),
        *("gpu\x00", "gpu\x1b[2J"),
    ],
)
def test_an_address_that_no_connection_can_be_made_to(
    configure: Callable[..., Any], host: str
) -> None:
    with pytest.raises(UserError, match=r"server_urls") as caught:
        configure("--inference.server_urls", json.dumps([f"http://{host}"]))
    assert caught.value.exit_code == EXIT_USAGE


@pytest.mark.parametrize("host", ["[::1]:8000", "127.0.0.1", "gpu-7.local:1/v1", "bücher.de"])
def test_other_addresses(configure: Callable[..., Any], host: str) -> None:
    loaded = configure("--inference.server_urls", json.dumps([f"https://{host}"]))
    assert loaded.config.inference.server_urls == [f"https://{host}"]
