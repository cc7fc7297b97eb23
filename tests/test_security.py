"""What docs/security.md promises that no other file of tests shows."""

from __future__ import annotations

import contextlib
import getpass
import json
import multiprocessing
import os
import pickle
import re
import shutil
import socket
import stat
import tempfile
from multiprocessing import AuthenticationError, resource_sharer
from multiprocessing.connection import Client
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file
from support.paths import ROOT, SOKOBAN
from support.servers import engine_at
from support.tokenizers import byte_level

from minidistill.config import load_config
from minidistill.config.schema import SilenceConfig
from minidistill.engines.vllm.client import EngineProcess
from minidistill.engines.vllm.weights_buffer import SendBuffer
from minidistill.errors import UserError
from minidistill.models.hub import load_model_config, load_tokenizer
from minidistill.models.registry import BUILT_IN
from minidistill.models.weights import check_weights, load_weights
from minidistill.tasks.prompts import PromptBuilder
from minidistill.trainer.distributed.launcher import RankLauncher
from minidistill.types import Task

CODE = """
import pathlib
pathlib.Path({marker!r}).write_text("the model's code ran")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig): model_type = "own"
class Model(LlamaForCausalLM): config_class = Config
class Tokenizer(PreTrainedTokenizerFast): pass
"""


# -- a model's files ---------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the shipped model."""
    path = tmp_path / "model"
    shutil.copytree(BUILT_IN["tiny-sokoban"], path)
    return path


def configured(model: Path) -> Any:
    return load_config([SOKOBAN, "--model.name", str(model)]).config


def test_code_of_a_model_does_not_run_unless_it_is_asked_for(model: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    (model / "own.py").write_text(CODE.format(marker=str(marker)))
    settings = json.loads((model / "config.json").read_text())
    settings |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"},
    }
    (model / "config.json").write_text(json.dumps(settings))
    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    tokenizer |= {
        "tokenizer_class": "Tokenizer",
        "auto_map": {"AutoTokenizer": ["own.Tokenizer"] * 2},
    }
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    config = configured(model)
    for load in (load_model_config, load_tokenizer, check_weights):
        with pytest.raises(UserError):
            load(config)
    assert not marker.exists()


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.write_text, (self.marker, "the pickle ran")


@pytest.mark.parametrize("container", ["zip", "pickle"])
def test_a_pickle_in_a_models_weights_runs_nothing(
    container: str, model: Path, tmp_path: Path
) -> None:
    marker = tmp_path / "marker"
    weights: dict[str, Any] = dict(load_file(model / "model.safetensors"))
    weights["model.norm.weight"] = Bomb(marker)
    (model / "model.safetensors").unlink()
    if container == "zip":
        torch.save(weights, model / "pytorch_model.bin")
    else:
        (model / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(marker)))
    with pytest.raises(UserError):
        load_weights(configured(model), str(model))
    assert not marker.exists()
    pickle.loads(pickle.dumps(Bomb(marker)))  # it would have run
    assert marker.exists()


ESCAPES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ (lipsum | attr('__globals__')).os.popen('touch MARKER').read() }}",
    "{{ messages.append.__self__.__class__.__base__.__subclasses__() }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ messages.clear() }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.system('touch MARKER') }}",
)


@pytest.mark.parametrize("escape", ESCAPES)
def test_a_chat_template_reaches_nothing_outside(escape: str, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    source = escape.replace("MARKER", str(marker))
    template = source + "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    text = ""
    with contextlib.suppress(Exception):  # how it is refused is tested with the templates
        builder = PromptBuilder(byte_level(template, eos="</s>"), "Think.\n", "user")
        text = builder.build("e", Task("t", ({"role": "user", "content": "hello"},))).student_text
    assert not marker.exists()
    assert "root:" not in text
    assert "<class" not in text


# -- servers -----------------------------------------------------------------------------------


def test_a_redirect_of_a_server_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.host)
        return httpx.Response(307, headers={"location": "http://elsewhere/v1/models"})

    monkeypatch.setenv("VLLM_API_KEY", "secret-key")
    monkeypatch.setattr(httpx, "AsyncHTTPTransport", lambda **_: httpx.MockTransport(answer))
    with pytest.raises(UserError) as caught:
        engine_at("http://server:1", tmp_path).wait_until_ready()
    assert set(asked) == {"server"}
    assert "secret-key" not in str(caught.value)


# -- other users of the machine ----------------------------------------------------------------


def test_weights_in_shared_memory_have_no_name() -> None:
    before = set(os.listdir("/dev/shm"))
    buffer = SendBuffer(torch.float32, torch.device("cpu"))
    buffer.pack([("weight", torch.full((64, 1024), 14.0))])
    mine = {name for name in set(os.listdir("/dev/shm")) - before if str(os.getpid()) in name}
    assert mine == set()
    maps = Path("/proc/self/maps").read_text()
    assert re.search(rf"/dev/shm/torch_{os.getpid()}_\S* \(deleted\)", maps)


def test_handles_are_given_to_those_who_have_the_key() -> None:
    """A handle names a socket of this process, which only its user can reach; it asks for a key."""
    buffer = SendBuffer(torch.float32, torch.device("cpu"))
    buffer.pack([("weight", torch.ones(4))])
    handle = buffer.handles()["0"]
    listener: Any = resource_sharer._resource_sharer  # type: ignore[attr-defined]
    address = listener._address
    assert os.fsencode(address) in handle
    folder = Path(address).parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    with pytest.raises((AuthenticationError, EOFError, OSError)):
        Client(address, authkey=b"not the key")
    client = Client(address, authkey=multiprocessing.current_process().authkey)
    client.close()
    assert bytes(multiprocessing.current_process().authkey) not in handle


def test_ranks_meet_in_a_folder_of_their_users_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[int] = []

    class StoppedHere(Exception):
        pass

    def look(rank: int, size: int, device: torch.device, store: Path, *_: object) -> None:
        modes.append(stat.S_IMODE(store.parent.stat().st_mode))
        raise StoppedHere

    monkeypatch.setattr("minidistill.trainer.distributed.launcher.RankProcess", look)
    launcher = RankLauncher([torch.device("cpu")] * 2)
    config: Any = SimpleNamespace(silence=SilenceConfig())
    with pytest.raises(StoppedHere):
        launcher.start(config, config)
    launcher.close()
    assert modes == [0o700]


def test_processes_of_a_run_talk_over_sockets_without_a_name() -> None:
    """Calls are pickles, so nobody else may be able to connect."""
    sources = [
        path.read_text()
        for path in (ROOT / "minidistill").rglob("*.py")
        if "rank_group" not in path.name  # ranks: see the test before
    ]
    used = re.compile(r"\b(AF_UNIX|AF_INET6?|Listener\(|create_server|listen\()")
    assert not [found for text in sources for found in used.findall(text)]
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert ours.getsockname() in ("", b"")


# -- pickles -----------------------------------------------------------------------------------

UNPICKLING = re.compile(
    r"pickle\.loads?\(|Unpickler|torch\.load\(|ForkingPickler\.loads|\.recv\(\)"
)
OF_OUR_OWN_PROCESSES = {
    "doctor/ipc.py",
    "envs/isolated.py", "envs/worker.py", "envs/sokoban/worker.py", "envs/sokoban/workers.py",
    "engines/vllm/client.py", "engines/vllm/worker.py", "engines/vllm/weights_buffer.py",
}  # fmt: skip
"""They read from processes that the run started, over socket pairs."""


def test_pickles_are_read_from_processes_of_the_run_alone() -> None:
    package = ROOT / "minidistill"
    readers = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if UNPICKLING.search(path.read_text())
    }
    assert readers <= OF_OUR_OWN_PROCESSES


@pytest.mark.parametrize("mode", [0o755, 0o777])
def test_compiled_code_is_not_kept_where_others_can_write(
    mode: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[dict[str, str]] = []

    def look(command: list[str], *, env: dict[str, str], **_: Any) -> None:
        started.append(env)
        raise FileNotFoundError

    monkeypatch.setattr("minidistill.system.subprocesses.Popen", look)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    with tempfile.TemporaryDirectory() as temporary:  # a short path, which holds sockets
        monkeypatch.setattr("tempfile.tempdir", temporary)
        folder = Path(temporary) / f"torchinductor_{getpass.getuser()}"
        folder.mkdir()
        folder.chmod(mode)
        with pytest.raises(FileNotFoundError):
            EngineProcess({}, {})
        folder.rmdir()
        folder.symlink_to("/tmp")
        with pytest.raises(FileNotFoundError):
            EngineProcess({}, {})
    expected = None if mode == 0o777 else str(folder)
    assert [env.get("TORCHINDUCTOR_CACHE_DIR") for env in started] == [expected, None]
    assert all(Path(env["TMPDIR"]).parent == Path(temporary) for env in started)
