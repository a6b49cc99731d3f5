"""Reading signed paths: who worked on a microbatch, and that each of them says so.

Owns: what makes the entries of a path one path, for who gets an answer and for who is shown that a number is done.
Must not know: which path was asked for, or what it earns. Pure.

An entry is vouched for by both ends of its hop: the peer in front of it commits to it (`behind`), and it names that
peer (`caller`). So nobody can put an entry of somebody else, made for another path, into one of its own.
"""

from __future__ import annotations

from protocol.errors import WireError
from protocol.hops import ENTRY_CONTEXT, Path, PathEntry, path_digest
from protocol.ids import PeerId
from protocol.signing import unseal


def read_path(path: Path, *, caller: PeerId | None = None) -> tuple[PathEntry, ...]:
    """Return the entries of a path, nearest peer first, if they are one path that `caller` has brought the input for.

    Without `caller` it begins with a feeder, which is its own. Raises `WireError` or `SignatureError`.
    """
    entries: list[PathEntry] = []
    for index, signed in enumerate(path):
        entry = unseal(signed, ENTRY_CONTEXT, PathEntry)
        if entry.peer != signed.signer or entry.behind != path_digest(path[index + 1 :]):
            raise WireError("a path that does not hang together")
        if entry.caller != (entries[-1].peer if entries else caller or entry.peer):
            raise WireError(f"a path in which {entry.peer} was called by another one than its entry says")
        if entries and _subject(entry) != _subject(entries[0]):
            raise WireError("a path of two tasks, or of two losses")
        following = entries[-1].stages[-1] + 1 if entries else entry.stages[0]
        if entry.stages != tuple(range(following, following + len(entry.stages))):
            raise WireError(f"a path that leaves out stage {following}")
        entries.append(entry)
    if not entries:
        raise WireError("a path without entries")
    return tuple(entries)


def _subject(entry: PathEntry) -> tuple[object, ...]:
    """What all entries of a path have in common: the microbatch, and what came out at its end."""
    return entry.run, entry.kind, entry.round, entry.number, entry.loss_sum, entry.target_tokens
