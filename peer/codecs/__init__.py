"""Codecs by name: how tensors become bytes on the wire and in the update log.

A new codec is a class with the members of `Codec` and one line in `_CODECS`; no caller changes.
"""

from __future__ import annotations

from peer.codecs.blocks import Fp16Codec, Int4Codec, Int8Codec
from peer.codecs.codec import Buffer, Codec
from peer.codecs.plain import Bf16Codec, Fp32Codec
from peer.codecs.sparse import SparseCodec
from peer.codecs.turned import TurnedInt4Codec
from protocol.errors import ConfigError

__all__ = ["Buffer", "Codec", "codec", "codec_names"]

_CODECS: dict[str, Codec] = {
    made.name: made
    for made in (
        Fp32Codec(),
        Fp16Codec(),
        Bf16Codec(),
        Int8Codec(),
        Int4Codec(),
        TurnedInt4Codec(),
        SparseCodec(),
    )
}


def codec(name: str) -> Codec:
    """Return the codec called `name`, or raise `ConfigError` that lists the known ones."""
    try:
        return _CODECS[name]
    except KeyError:
        raise ConfigError(f"unknown codec '{name}'", hint=f"Known codecs: {', '.join(codec_names())}.") from None


def codec_names() -> tuple[str, ...]:
    """The names that a manifest may use."""
    return tuple(_CODECS)
