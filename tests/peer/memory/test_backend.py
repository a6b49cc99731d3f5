"""What a card's backend asks of CUDA besides copying.

The card is played, as its tests on a real one are elsewhere. Oracle: a book of what the runtime has pinned.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from peer.memory import backend
from peer.memory.backend import CudaBackend
from protocol.errors import LocalFault


class Runtime:
    """Keeps book of pinned memory, and takes no more of it than a test says."""

    def __init__(self) -> None:
        self.pinned: dict[int, int] = {}
        self.num_allowed = 3

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        if len(self.pinned) == self.num_allowed:
            return 2
        assert address not in self.pinned
        self.pinned[address] = num_bytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        return 0 if self.pinned.pop(address, None) else 713


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    made = Runtime()
    monkeypatch.setattr(backend, "_cuda_runtime", lambda: made)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    return made


def test_pinned_memory_is_given_back_on_closing(runtime: Runtime) -> None:
    """Also after a refusal half-way, and once only."""
    card: Any = CudaBackend(torch.device("cuda"))
    for size in (1, 5000, 8192):
        card.allocate_host(size)  # nobody keeps them but the backend
    assert sorted(runtime.pinned.values()) == [4096, 8192, 8192]
    with pytest.raises(LocalFault, match="cannot pin 10 bytes"):
        card.allocate_host(10)
    card.close()
    card.close()
    assert not runtime.pinned
