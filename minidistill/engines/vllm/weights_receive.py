"""The receiving side of a weight sync, in vLLM's process. vLLM imports it by name.

`Receiver` is vLLM's worker extension (its methods become the worker's) and receives adapters.
`HandleEngine` is a backend of vLLM's native weight-transfer API and receives full weights.
"""

from __future__ import annotations

import resource
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

import minidistill.engines.vllm.cpu_lora  # noqa: F401 - replaces what vLLM does on a CPU
from minidistill.engines.vllm.cpu_repack import Repacker
from minidistill.engines.vllm.weights_buffer import Entry, open_buffer, views

BACKEND = "minidistill"
Handle = dict[str, bytes]


def _rank() -> int:
    """This worker's index in its engine."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _workers() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


class Receiver:
    """Methods added to vLLM's worker."""

    device: torch.device
    model_runner: Any
    vllm_config: Any

    def minidistill_load_adapter(
        self, slot: int, config: dict[str, Any], handle: Handle, entries: Sequence[Entry]
    ) -> int:
        """Replace the adapter in `slot`; returns the bytes read.

        vLLM's API reads a folder. This repeats what it does after reading.
        """
        # a copy: activation scales lora_b in place, and the sender overwrites the buffer
        buffer = open_buffer(handle, self.device, _rank()).to(self.device, copy=True)
        manager = self.model_runner.lora_manager
        adapters = manager._adapter_manager
        helper = PEFTHelper.from_dict(config)
        helper.validate_legal(manager.lora_config)
        mapper = getattr(adapters.model, "hf_to_vllm_mapper", None)
        adapter = LoRAModel.from_lora_tensors(
            lora_model_id=slot,
            tensors=views(buffer, entries),
            peft_helper=helper,
            device=str(self.device),
            dtype=manager.lora_config.lora_dtype,
            model_vocab_size=manager.vocab_size,
            weights_mapper=mapper.get_rename_mapper() if mapper is not None else None,
        )
        with set_current_vllm_config(self.vllm_config):
            adapters.remove_adapter(slot)
            adapters.add_adapter(adapter)
            adapters.activate_adapter(slot)
        return sum(e.count for e in entries) * buffer.element_size()

    def minidistill_peak_memory(self) -> int:
        """The most bytes this process has held: GPU memory, or resident memory on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_reserved(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass
class HandleInit(WeightTransferInitInfo):
    """Empty: no setup is needed before the first transfer."""


@dataclass
class HandleUpdate(WeightTransferUpdateInfo):
    """One chunk: a buffer's handle and its contents.

    If the chunk is the `only` one, the buffer is not overwritten before the update ends.
    """

    handle: Handle
    entries: list[Entry]
    only: bool


class HandleEngine(WeightTransferEngine[HandleInit, HandleUpdate]):
    """Full weights through the handles of `weights_buffer`."""

    init_info_cls = HandleInit
    update_info_cls = HandleUpdate
    _repacker: Repacker | None = None

    def init_transfer_engine(self, init_info: HandleInit) -> None:
        """No rendezvous: a handle comes with every chunk."""

    def start_weight_update(self) -> None:
        if self.device.type == "cpu" and _workers() == 1:
            self._repacker = Repacker.of(self.model)
            self._repacker.start()
        else:
            initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: HandleUpdate) -> None:
        # vLLM's reload assembles a layer once all its tensors have arrived, which may be chunks
        # later: copy, unless no other chunk will overwrite this one
        copies = self._repacker is None and not update_info.only
        shared = open_buffer(update_info.handle, self.device, _rank())
        buffer = shared.to(self.device, copy=copies)
        load: Any = self.model.load_weights
        load(iter(views(buffer, update_info.entries).items()))

    def finish_weight_update(self) -> None:
        if self._repacker is not None:
            self._repacker.finish()
            return
        finalize_layerwise_reload(self.model, self.model_config)
        head = getattr(self.model, "lm_head", None)
        if self.device.type == "cpu" and head is not None:
            # the reload skips a head tied to the embedding, which would keep its old packed copy
            head.quant_method.process_weights_after_loading(head)

    def shutdown(self) -> None:
        """Does nothing: no resources are held."""


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, HandleEngine)
