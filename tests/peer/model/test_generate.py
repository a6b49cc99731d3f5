"""Sampling from an exported model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from peer.model.generate import sample
from protocol.architecture import preset
from protocol.errors import ModelError

AUTO_MODEL: Any = AutoModelForCausalLM  # untyped
FAST_TOKENIZER: Any = PreTrainedTokenizerFast


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of bytes with random weights, as an export would leave it."""
    folder = tmp_path_factory.mktemp("exported")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    FAST_TOKENIZER(tokenizer_object=tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    config = AutoConfig.for_model(**{**preset("tiny"), "vocab_size": 256, "max_position_embeddings": 32})
    AUTO_MODEL.from_config(config).save_pretrained(folder)
    return folder


def test_sample_continues_the_prompt_and_follows_the_seed(exported: Path) -> None:
    """Oracle: the prompt itself, and equal text for equal seeds only; the global generator is left alone."""
    before = torch.get_rng_state()
    texts = [sample(exported, "def f(", max_new_tokens=12, seed=seed) for seed in (1, 1, 2)]
    assert all(text.startswith("def f(") and len(text) > 6 for text in texts)
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.get_rng_state(), before)


def test_sample_stops_at_the_models_context(exported: Path) -> None:
    """Oracle: 32 positions, each at most one character."""
    assert len(sample(exported, "abcd", max_new_tokens=1000, seed=0)) <= 32


@pytest.mark.parametrize("prompt", ["", "x" * 32])
def test_prompt_without_room_is_refused(exported: Path, prompt: str) -> None:
    """Oracle: ModelError."""
    with pytest.raises(ModelError, match="prompt"):
        sample(exported, prompt, max_new_tokens=4, seed=0)


def test_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    """Oracle: ModelError that names the folder."""
    with pytest.raises(ModelError, match=str(tmp_path)):
        sample(tmp_path, "x", max_new_tokens=4, seed=0)
