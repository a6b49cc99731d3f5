"""The yardstick of `memory.py`: the same stage in plain PyTorch, in a process that is told what to do.

transformers' own decoder layers, `torch.utils.checkpoint` around each, gradients that add up over the microbatches,
`bitsandbytes.optim.AdamW8bit` (which keeps norms in 32 bit). Imports nothing from the project. What measures is here
too: ours (`memory_child.py`) and the rivals (`memory_rival_child.py`) answer the same requests, by the same clocks.

A request is one line of JSON on stdin, `{"do": NAME, ...}`; so is its answer on stdout:

    build   see `Plain.build`                                  -> {"parameters"}
    step    {"microbatches", "batch", "length", "number"}      -> {"wall_s", "cpu_s", "stalled_s"}
            with "save": path, also writes outputs and gradients there
    live    like step                                          -> {"bytes"}: see `LiveBytes`
    memory  {}                                                 -> {"rss", "peak_rss", "state", "device", "host"}: bytes
    io      {}                                                 -> {"read", "written"}: bytes at the disk, so far
    save    {"path"}: writes the weights                       -> {}

Shapes: B sequences, T positions, D model width.
"""

from __future__ import annotations

import json
import os
import sys
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

Answer = dict[str, Any]
Microbatch = tuple[Tensor, Tensor]
"""Hidden states (B, T, D) and the gradient of what the stage makes of them."""

REQUESTS = ("build", "step", "live", "memory", "io", "save")

LEARNING_RATE = 1e-4
BETAS = (0.9, 0.95)
EPSILON = 1e-8
WEIGHT_DECAY = 0.1
GRADIENT_SCALE = 1e-3  # of the gradients that are made up: about what a loss per token gives


class Trainer(ABC):
    """One side of a comparison: a stage in training, and what it takes. Each has a `build` of its own."""

    width: int

    @abstractmethod
    def train(self, microbatches: Sequence[Microbatch]) -> list[tuple[Tensor, Tensor]]:
        """Take one optimizer step on them; return the outputs and the gradients by the inputs."""

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """Return the weights by Hugging Face name."""

    @abstractmethod
    def state(self) -> dict[str, int]:
        """Return the bytes that are held between steps: all of them, and those on the device and in host memory."""

    def stalled_s(self) -> float:
        """Return how long computing has waited for copies."""
        return 0.0

    def step(self, *, save: str | None = None, **which: int) -> Answer:
        microbatches = make_microbatches(self.width, **which)
        stalled_s, cpu_s, wall_s = self.stalled_s(), time.process_time(), time.perf_counter()
        results = self.train(microbatches)
        wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
        if save is not None:
            tensors = {f"output.{i}": output for i, (output, _) in enumerate(results)}
            tensors |= {f"gradient.{i}": gradient for i, (_, gradient) in enumerate(results)}
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, save)
        return {"wall_s": wall_s, "cpu_s": cpu_s, "stalled_s": self.stalled_s() - stalled_s}

    def live(self, **which: int) -> Answer:
        with LiveBytes() as live:
            self.train(make_microbatches(self.width, **which))
        return {"bytes": live.peak}

    def memory(self) -> Answer:
        return {"rss": _status_bytes("VmRSS"), "peak_rss": _status_bytes("VmHWM"), **self.state()}

    def io(self) -> Answer:
        """Return what the kernel has counted for this process at the disk: the page cache does not count."""
        lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
        counted = {name: int(value) for name, value in (line.split(": ") for line in lines)}
        return {"read": counted["read_bytes"], "written": counted["write_bytes"]}

    def save(self, path: str) -> Answer:
        save_file({name: tensor.contiguous() for name, tensor in self.weights().items()}, path)
        return {}


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that are made inside it and still there; `peak` is the most there were at once.

    Sees what PyTorch is asked for, whoever asks: activations, gradients, temporaries. Does not see what one operation
    allocates for itself (bitsandbytes' step does). Each storage counts once.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {storage._cdata for storage in _storages((args, kwargs))}
        results = func(*args, **kwargs)
        for storage in _storages(results):
            if storage._cdata not in given and storage._cdata not in self._alive:
                self._watch(storage)
        return results

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, num_bytes = storage._cdata, storage.nbytes()

        def gone(reference: weakref.ref[torch.UntypedStorage]) -> None:
            del self._alive[key]
            self.now -= num_bytes

        self._alive[key] = weakref.ref(storage, gone)
        self.now += num_bytes
        self.peak = max(self.peak, self.now)


class Plain(Trainer):
    """The yardstick itself."""

    def build(
        self,
        *,
        config: dict[str, Any],
        first_layer: int,
        num_layers: int,
        threads: int,
        weights: str | None = None,
        optimizer: str = "adamw8bit",
        recompute: bool = True,
    ) -> Answer:
        """Make layers `first_layer` to `first_layer + num_layers` of the model; `weights` is a safetensors file."""
        torch.set_num_threads(threads)
        llama = LlamaConfig(**config)
        llama._attn_implementation = "sdpa"
        self.width = llama.hidden_size
        self.first_layer, self.recompute = first_layer, recompute
        self.layers = nn.ModuleList(LlamaDecoderLayer(llama, index) for index in range(num_layers))
        self.rotary = LlamaRotaryEmbedding(llama)
        if weights is not None:
            self._load(load_file(weights))
        self._prepare(optimizer)
        return {"parameters": sum(parameter.numel() for parameter in self.layers.parameters())}

    def train(self, microbatches: Sequence[Microbatch]) -> list[tuple[Tensor, Tensor]]:
        results = [self._there_and_back(*microbatch) for microbatch in microbatches]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return results

    def weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self._named()}

    def state(self) -> dict[str, int]:
        held = [*self.layers.parameters(), *tree_leaves(dict(self.optimizer.state))]
        total = sum(storage.nbytes() for storage in _storages(held))
        return {"state": total, "device": total, "host": 0}

    def through(self, hidden_BTD: Tensor) -> Tensor:
        """Pass hidden states through the layers."""
        positions = torch.arange(hidden_BTD.shape[1])[None]
        fixed = {
            "attention_mask": None,
            "position_ids": positions,
            "position_embeddings": self.rotary(hidden_BTD, positions),
            "use_cache": False,
        }
        for layer in self.layers:
            if self.recompute:
                hidden_BTD = checkpoint(layer, hidden_BTD, use_reentrant=False, **fixed)
            else:
                hidden_BTD = layer(hidden_BTD, **fixed)
        return hidden_BTD

    def groups(self) -> list[dict[str, Any]]:
        """Return the parameters as optimizers want them: matrices, which are decayed, and norms, which are not."""
        parameters = list(self.layers.parameters())
        return [
            {"params": [parameter for parameter in parameters if parameter.dim() > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [parameter for parameter in parameters if parameter.dim() == 1], "weight_decay": 0.0},
        ]

    def _prepare(self, optimizer: str) -> None:
        settings: dict[str, Any] = {"lr": LEARNING_RATE, "betas": BETAS, "eps": EPSILON}
        if optimizer == "adamw8bit":
            import bitsandbytes

            untyped: Any = bitsandbytes.optim
            self.optimizer: torch.optim.Optimizer = untyped.AdamW8bit(self.groups(), **settings)
        else:
            self.optimizer = torch.optim.AdamW(self.groups(), fused=True, **settings)

    def _there_and_back(self, inputs_BTD: Tensor, gradient_BTD: Tensor) -> tuple[Tensor, Tensor]:
        entered_BTD = inputs_BTD.requires_grad_()
        outputs_BTD = self.through(entered_BTD)
        torch.autograd.backward([outputs_BTD], [gradient_BTD])
        assert entered_BTD.grad is not None
        return outputs_BTD.detach(), entered_BTD.grad

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        for index, layer in enumerate(self.layers):
            for name, parameter in layer.named_parameters():
                yield f"model.layers.{self.first_layer + index}.{name}", parameter

    @torch.no_grad()
    def _load(self, tensors: dict[str, Tensor]) -> None:
        for name, parameter in self._named():
            parameter.copy_(tensors[name])


def make_microbatches(width: int, *, microbatches: int, batch: int, length: int, number: int) -> list[Microbatch]:
    """Make up what the neighbours would send for step `number`: the same for every side."""
    generator = torch.Generator().manual_seed(number)
    shape = (batch, length, width)
    return [
        (torch.randn(shape, generator=generator), torch.randn(shape, generator=generator) * GRADIENT_SCALE)
        for _ in range(microbatches)
    ]


def serve(trainer: Trainer, *more: str) -> None:
    """Answer requests until there are no more; `more` names those that only this side knows."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # some libraries greet on stdout
    actions = {name: getattr(trainer, name) for name in (*REQUESTS, *more)}
    for line in sys.stdin:
        request = json.loads(line)
        answer = actions[request.pop("do")](**request)
        print(json.dumps(answer), file=answers, flush=True)


def _storages(values: Any) -> list[torch.UntypedStorage]:
    """Return the distinct storages of the tensors in a nest of lists and dictionaries."""
    tensors = [value for value in tree_leaves(values) if isinstance(value, Tensor)]
    return list({tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}.values())


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(f"/proc/self/status has no {name}")


if __name__ == "__main__":
    serve(Plain())
