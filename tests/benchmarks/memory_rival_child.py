"""The rivals of `memory_rivals.py`: the yardstick's stage, trained by what a user would pick to offload it.

Run as `python -m tests.benchmarks.memory_rival_child NAME`, in any environment that has the rival and transformers:
imports nothing from the project but the yardstick, whose requests it answers. Both rivals keep AdamW's state in 32 bit,
as they come: neither has an 8-bit optimizer for state that it offloads.

Shapes: B sequences, T positions, D model width.
"""

from __future__ import annotations

import importlib
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.benchmarks.memory_plain import (
    BETAS,
    EPSILON,
    LEARNING_RATE,
    Microbatch,
    Plain,
    serve,
)


class Fsdp(Plain):
    """FSDP2 with `CPUOffloadPolicy`, one rank over gloo: every layer is a group that comes and goes."""

    def _prepare(self, optimizer: str) -> None:
        from torch.distributed import init_process_group
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

        store: Any = vars(torch.distributed)["HashStore"]  # torch's stubs do not have it
        init_process_group("gloo", store=store(), rank=0, world_size=1)
        mesh = init_device_mesh("cpu", (1,))
        self._body = _Body(self.layers, super().through)
        for module in (*self.layers, self._body):  # the whole last: a layer that is its own root never lets go
            fully_shard(module, mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))
        super()._prepare("adamw32")

    def through(self, hidden_BTD: Tensor) -> Tensor:
        outputs_BTD: Tensor = self._body(hidden_BTD)
        return outputs_BTD

    def state(self) -> dict[str, int]:
        """Leave it to the RSS: what is the device's and what the host's is not to be told apart here."""
        return {"state": 0, "device": 0, "host": 0}


class DeepSpeed(Plain):
    """DeepSpeed ZeRO-3 on its CPU accelerator, with parameters and optimizer state offloaded to `where`."""

    where = "cpu"

    def _prepare(self, optimizer: str) -> None:
        os.environ |= {
            "DS_ACCELERATOR": "cpu",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
        }
        self._deepspeed = importlib.import_module("deepspeed")
        self._engine: Any = None

    def train(self, microbatches: Sequence[Microbatch]) -> list[tuple[Tensor, Tensor]]:
        if self._engine is None:
            self._start(len(microbatches))
        return [self._there_and_back(*microbatch) for microbatch in microbatches]

    def _there_and_back(self, inputs_BTD: Tensor, gradient_BTD: Tensor) -> tuple[Tensor, Tensor]:
        entered_BTD = inputs_BTD.requires_grad_()
        outputs_BTD = self._engine(entered_BTD)
        # it takes a loss and divides it by the microbatches of a step
        self._engine.backward((outputs_BTD * gradient_BTD).sum() * self._engine.gradient_accumulation_steps())
        self._engine.step()
        assert entered_BTD.grad is not None
        return outputs_BTD.detach(), entered_BTD.grad

    def state(self) -> dict[str, int]:
        return {"state": 0, "device": 0, "host": 0}

    def _start(self, microbatches: int) -> None:
        adamw = {"lr": LEARNING_RATE, "betas": BETAS, "eps": EPSILON}
        self._engine, *_ = self._deepspeed.initialize(
            model=_Body(self.layers, self.through),
            model_parameters=self.groups(),
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": microbatches,
                "optimizer": {"type": "AdamW", "params": adamw},
                "zero_optimization": {
                    "stage": 3,
                    "offload_param": self._offload(),
                    "offload_optimizer": self._offload(),
                    **self._granularity(),
                },
                "bf16": {"enabled": False},
                "fp16": {"enabled": False},
            },
        )

    def _offload(self) -> dict[str, Any]:
        return {"device": self.where}

    def _granularity(self) -> dict[str, int]:
        """Return how many weights may be gathered or updated at once: as they come, all of a model of this size."""
        layer = sum(parameter.numel() for parameter in self.layers[0].parameters())
        return {
            "stage3_max_live_parameters": 2 * layer,
            "stage3_max_reuse_distance": 2 * layer,
            "stage3_prefetch_bucket_size": layer,
            "sub_group_size": layer,
        }


class DeepSpeedNvme(DeepSpeed):
    """The same with its state on NVMe."""

    where = "nvme"

    def _offload(self) -> dict[str, Any]:
        folder = tempfile.mkdtemp(prefix="handcar-deepspeed-")
        return {"device": "nvme", "nvme_path": folder, "buffer_count": 16}


class _Body(nn.Module):
    """A module whose forward pass is the yardstick's."""

    def __init__(self, layers: nn.ModuleList, through: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layers = layers
        self._through = through

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        return self._through(hidden_BTD)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


RIVALS: dict[str, type[Plain]] = {
    "plain": Plain,
    "fsdp2": Fsdp,
    "deepspeed": DeepSpeed,
    "deepspeed_nvme": DeepSpeedNvme,
}


if __name__ == "__main__":
    serve(RIVALS[sys.argv[1]]())
