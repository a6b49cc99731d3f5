"""Let an exported model speak: what `peer sample` prints.

Owns: loading a Hugging Face directory and sampling from it. Must not know: stages, runs, the network; no
code that comes with a model is ever executed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from protocol.errors import ModelError

TEMPERATURE = 0.8
TOP_K = 50


def sample(model_dir: Path, prompt: str, *, max_new_tokens: int, seed: int) -> str:
    """Return `prompt` with its continuation; the same arguments give the same text on the same machine."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
        model: Any = AutoModelForCausalLM.from_pretrained(model_dir, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"{model_dir} does not hold an exported model: {error}") from error
    tokens = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    room = model.config.max_position_embeddings - tokens["input_ids"].shape[1]
    if tokens["input_ids"].shape[1] == 0 or room < 1:
        raise ModelError("the prompt is empty or fills the model's whole context.", hint="Give another prompt.")
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        output = model.generate(
            **tokens,
            do_sample=True,
            temperature=TEMPERATURE,
            top_k=TOP_K,
            max_new_tokens=min(max_new_tokens, room),
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,  # one row: never used
        )
    return str(tokenizer.decode(output[0], skip_special_tokens=True))
