"""The yardstick: one process, plain PyTorch, transformers' own model. Imports nothing from the project.

Trains the same sequences in the same order as the swarm, with the same clipping rule (per group of
parameters) and the same AdamW. Run as

    python tests/e2e/plain_loop.py SPEC.json...

and it prints one line of JSON per SPEC: `losses` (nats per target token, one per round), `seconds` and
`clip_scales` of the rounds, and `heldout_loss` if that was asked for.

SPEC holds: model_dir, tokens (path), token_bytes, sequence_length, microbatches (rounds -> microbatches ->
window numbers; no rounds: only the held-out loss), learning_rates (one per round), weight_decay, beta1, beta2,
eps, clip_groups (list of {names, threshold}), threads, optional heldout ({tokens, windows}), optional delayed (take
the step of each round after the next round's gradients, as who averages meanwhile does).
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM


def main(spec_paths: list[str]) -> None:
    for path in spec_paths:
        print(json.dumps(train(json.loads(Path(path).read_text(encoding="utf-8")))), flush=True)


def train(spec: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(spec.get("threads", 1))
    model = AutoModelForCausalLM.from_pretrained(spec["model_dir"], dtype=torch.float32)
    model.train()
    named = dict(model.named_parameters())
    check_groups(spec["clip_groups"], named)
    optimizer = make_optimizer(model, spec)
    tokens = read_tokens(spec["tokens"], spec["token_bytes"])
    losses, seconds, clip_scales = [], [], []
    delay = int(spec.get("delayed", False))
    waiting: list[list[Tensor | None]] = []
    rates = iter(spec["learning_rates"])

    def step() -> None:
        gradients, learning_rate = waiting.pop(0), next(rates)
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        for settings in optimizer.param_groups:
            settings["lr"] = learning_rate
        optimizer.step()
        optimizer.zero_grad()

    for microbatches in spec["microbatches"]:
        started = time.perf_counter()
        loss_sum, target_tokens = 0.0, 0
        for windows in microbatches:
            inputs, labels = batch(tokens, windows, spec["sequence_length"])
            loss = summed_loss(model, inputs, labels)
            torch.autograd.backward(loss)
            loss_sum += loss.item()
            target_tokens += labels.numel()
        clip_scales.append(
            [
                clip([named[name] for name in group["names"]], threshold=group["threshold"], divisor=target_tokens)
                for group in spec["clip_groups"]
            ]
        )
        waiting.append([parameter.grad for parameter in model.parameters()])
        optimizer.zero_grad()
        if len(waiting) > delay:
            step()
        losses.append(loss_sum / target_tokens)
        seconds.append(time.perf_counter() - started)
    while waiting:
        step()
    result: dict[str, Any] = {"losses": losses, "seconds": seconds, "clip_scales": clip_scales}
    if "heldout" in spec:
        result["heldout_loss"] = held_out_loss(model, spec)
    return result


def make_optimizer(model: nn.Module, spec: dict[str, Any]) -> torch.optim.Optimizer:
    """Return torch's AdamW; norms and biases are not decayed."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": spec["weight_decay"]}, {"params": vectors, "weight_decay": 0.0}],
        lr=1.0,  # set before every step
        betas=(spec["beta1"], spec["beta2"]),
        eps=spec["eps"],
    )


def check_groups(groups: list[dict[str, Any]], named: dict[str, nn.Parameter]) -> None:
    """Every parameter is clipped exactly once, or its gradient would stay a sum."""
    names = [name for group in groups for name in group["names"]]
    if groups and sorted(names) != sorted(named):
        raise SystemExit("the clip groups do not hold every parameter of the model once")


def read_tokens(path: str, token_bytes: int) -> numpy.ndarray:
    return numpy.fromfile(path, dtype={2: "<u2", 4: "<u4"}[token_bytes])


def batch(tokens: numpy.ndarray, windows: list[int], length: int) -> tuple[Tensor, Tensor]:
    """Return inputs and labels (B, T); window w holds tokens [w * T, w * T + T]."""
    rows = numpy.stack([tokens[window * length : window * length + length + 1] for window in windows]).astype("int64")
    return torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(rows[:, 1:].copy())


def summed_loss(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    logits = model(input_ids=inputs, use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")


def clip(parameters: list[nn.Parameter], *, threshold: float, divisor: int) -> float:
    """Turn summed gradients into means and clip their joint norm; return the factor that clipping took."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = math.sqrt(sum(float((gradient.double() ** 2).sum()) for gradient in gradients)) / divisor
    scale = min(1.0, threshold / norm)
    for gradient in gradients:
        gradient.mul_(scale / divisor)
    return scale


@torch.no_grad()
def held_out_loss(model: nn.Module, spec: dict[str, Any]) -> float:
    model.eval()
    tokens = read_tokens(spec["heldout"]["tokens"], spec["token_bytes"])
    total, count = 0.0, 0
    for window in spec["heldout"]["windows"]:
        inputs, labels = batch(tokens, [window], spec["sequence_length"])
        total, count = total + summed_loss(model, inputs, labels).item(), count + labels.numel()
    return total / count


if __name__ == "__main__":
    main(sys.argv[1:])
