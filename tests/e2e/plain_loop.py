"""The yardstick: one process, plain PyTorch, transformers' own model. Imports nothing from the project.

Trains the same sequences in the same order as the swarm, with the same clipping rule (per group of
parameters) and the same AdamW, and prints the loss of every round as JSON. Run as

    python tests/e2e/plain_loop.py SPEC.json

SPEC holds: model_dir, tokens (path), token_bytes, sequence_length, microbatches (rounds -> microbatches ->
window numbers), learning_rates (one per round), weight_decay, beta1, beta2, eps, clip_groups (list of
{names, threshold}), threads, optional heldout ({tokens, windows}), optional seconds (report timing).
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy
import torch
from transformers import AutoModelForCausalLM


def main(spec_path: str) -> None:
    with open(spec_path, encoding="utf-8") as file:
        spec: dict[str, Any] = json.load(file)
    torch.set_num_threads(spec.get("threads", 1))
    model = AutoModelForCausalLM.from_pretrained(spec["model_dir"], dtype=torch.float32)
    model.train()
    named = dict(model.named_parameters())
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": spec["weight_decay"]}, {"params": vectors, "weight_decay": 0.0}],
        lr=1.0,
        betas=(spec["beta1"], spec["beta2"]),
        eps=spec["eps"],
    )
    tokens = numpy.fromfile(spec["tokens"], dtype={2: "<u2", 4: "<u4"}[spec["token_bytes"]])
    losses, seconds = [], []
    for microbatches, learning_rate in zip(spec["microbatches"], spec["learning_rates"], strict=True):
        started = time.perf_counter()
        loss_sum, target_tokens = 0.0, 0
        for windows in microbatches:
            inputs, labels = batch(tokens, windows, spec["sequence_length"])
            logits = model(input_ids=inputs, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
            loss.backward()
            loss_sum += loss.item()
            target_tokens += labels.numel()
        for group in spec["clip_groups"]:
            clip([named[name] for name in group["names"]], threshold=group["threshold"], divisor=target_tokens)
        for settings in optimizer.param_groups:
            settings["lr"] = learning_rate
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss_sum / target_tokens)
        seconds.append(time.perf_counter() - started)
    result = {"losses": losses, "seconds": seconds}
    if "heldout" in spec:
        result["heldout_loss"] = held_out_loss(model, spec)
    print(json.dumps(result))


def batch(tokens: numpy.ndarray, windows: list[int], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = numpy.stack([tokens[window * length : window * length + length + 1] for window in windows]).astype("int64")
    return torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(rows[:, 1:].copy())


def clip(parameters: list[torch.nn.Parameter], *, threshold: float, divisor: int) -> None:
    """Turn summed gradients into means and clip their joint norm."""
    norm = torch.sqrt(sum((parameter.grad.double() ** 2).sum() for parameter in parameters)).item() / divisor
    scale = min(1.0, threshold / norm) / divisor
    for parameter in parameters:
        parameter.grad.mul_(scale)


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, spec: dict[str, Any]) -> float:
    model.eval()
    tokens = numpy.fromfile(spec["heldout"]["tokens"], dtype={2: "<u2", 4: "<u4"}[spec["token_bytes"]])
    total, count = 0.0, 0
    for window in spec["heldout"]["windows"]:
        inputs, labels = batch(tokens, [window], spec["sequence_length"])
        logits = model(input_ids=inputs, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
        total, count = total + loss.item(), count + labels.numel()
    return total / count


if __name__ == "__main__":
    main(sys.argv[1])
