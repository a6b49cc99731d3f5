"""Where one stage's first state comes from.

Owns: the choice between following live members, what lies on our own disk (if the state lives on NVMe), the
coordinator's newest checkpoint, and the run's initial weights, and that whatever was restored is served to others as a
snapshot. Must not know: charters beyond the fact that one exists. `sync.py` does the fetching, `own_disk.py` knows
which own state still counts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import structlog

from peer.averaging.history import History
from peer.averaging.own_disk import OwnDisk
from peer.averaging.sync import OUR_FAULTS, Place, StageSync
from peer.engine.span import SpanEngine
from peer.engine.stage_engine import StageEngine
from peer.pipeline.compute import ComputeThread, Priority
from protocol.control import Snapshot, StateFile
from protocol.errors import PeerFault, TransientError, UnreachableError, WireError
from protocol.ids import Digest, Lineage, PeerId, RoundId, StageId, Version
from protocol.transport.blobs import Blobs, MissingBlobError

log = structlog.get_logger()

NEWEST = "checkpoint/newest/checkpoint.json"
MAX_RECORD_BYTES = 4 << 20
NO_LINEAGE = Lineage(bytes(32))


class Restorer:
    """Brings one stage to its first state."""

    def __init__(
        self,
        stage: StageId,
        *,
        sync: StageSync,
        own_disk: OwnDisk,
        history: History,
        engine: SpanEngine,
        compute: ComputeThread,
        blobs: Blobs,
        coordinator: PeerId,
    ) -> None:
        self._stage = stage
        self._sync = sync
        self._own_disk = own_disk
        self._history = history
        self._engine = engine
        self._compute = compute
        self._blobs = blobs
        self._coordinator = coordinator

    async def from_members(self, members: Iterable[PeerId]) -> Place:
        """Follow the stage's members. Raises `UnreachableError` if none can be followed."""
        with self._pausing():
            return await self._sync.from_members(members)

    async def from_scratch(self, *, allow_initial: bool) -> Place:
        """Start from our own NVMe, else from the newest checkpoint, else from the initial weights if that is allowed.

        Raises `UnreachableError` if there is nothing to start from yet, `TransientError` if the coordinator is away.
        """
        if self._engine.pause() is not None:
            raise UnreachableError("this machine needs a pause before it can load a state.")
        with self._pausing():
            return await self._from_scratch(allow_initial)

    async def is_outdated(self, version: Version) -> bool:
        """Tell whether the newest checkpoint is ahead of a state: no charter will ever name that state."""
        try:
            snapshot = await newest_checkpoint(self._blobs, self._coordinator, self._stage)
        except (TransientError, PeerFault) as error:
            log.debug("checkpoint.unanswered", error=error.one_line())
            return False
        return snapshot is not None and snapshot.version > version

    async def state_digest(self) -> Digest:
        """Hash the stage's present state."""
        return await self._sync.state_digest()

    @property
    def changes(self) -> int:
        """Return how often the stage's state has begun to change: a place is where it stands while this is the same."""
        return self._stage_engine.changes

    # -- private --------------------------------------------------------------------------------------

    @property
    def _stage_engine(self) -> StageEngine:
        return self._engine.engines[self._stage]

    async def _from_scratch(self, allow_initial: bool) -> Place:
        snapshot = await newest_checkpoint(self._blobs, self._coordinator, self._stage)
        # What was followed half-way is newer than any initial weights. What was on our own disk may be none of the
        # stage's, and what is left of an attempt to load it is nobody's: hence this is asked before.
        is_ahead = self._stage_engine.version != 0 and self._sync.own_standing() is None
        if self._stage in self._engine.resumed:  # this peer keeps its state on a drive of its own
            least = Version(0) if snapshot is None else snapshot.version
            own = await self._own_disk.go_on(least=least)
            if own is not None:
                return own
        if snapshot is not None:
            return await self._sync.from_checkpoint(snapshot, source=self._coordinator, folder=folder_of(snapshot))
        if not allow_initial or is_ahead:
            raise UnreachableError(f"there is no checkpoint of stage {self._stage} to start from yet.")
        await self._sync.start_over()
        await self._keep_initial()
        return Place(charter=None, commits=(), round=RoundId(0), version=Version(0), lineage=NO_LINEAGE)

    @contextmanager
    def _pausing(self) -> Iterator[None]:
        """Let the session wait where this machine needs a pause: it ends with its next beat."""
        try:
            yield
        except OUR_FAULTS as error:
            if not self._engine.note_fault(error):
                raise
            log.warning("restore.paused", stage=self._stage, reason=str(error)[:200])
            raise UnreachableError("this machine needs a pause before it can load a state.") from None

    async def _keep_initial(self) -> None:
        """Serve the initial state as a snapshot, so that a late joiner finds the start of the log."""
        await self._compute.run(
            lambda: self._history.save_snapshot(
                lambda files: self._engine.write_state(self._stage, files),
                round_id=RoundId(0),
                version=Version(0),
                lineage=NO_LINEAGE,
            ),
            priority=Priority.CONTROL,
        )


async def newest_checkpoint(blobs: Blobs, coordinator: PeerId, stage: StageId) -> Snapshot | None:
    """Ask the coordinator which checkpoint of a stage is the newest; None if it has none.

    Raises `UnreachableError` if it does not answer: initial weights would then be a guess.
    """
    try:
        data = await blobs.fetch(coordinator, NEWEST, max_bytes=MAX_RECORD_BYTES)
    except MissingBlobError as error:
        log.debug("checkpoint.none", error=error.one_line())
        return None
    return _read_record(data, stage)


def folder_of(checkpoint: Snapshot) -> str:
    """Return the blob folder under which the coordinator serves a checkpoint."""
    return f"checkpoint/{checkpoint.round}"


def _read_record(data: bytes, stage: StageId) -> Snapshot:
    """Read one stage's entry of a `checkpoint.json`, or raise `WireError`."""
    try:
        record = json.loads(data)
        entry = next(one for one in record["stages"] if one["stage"] == stage)
        return Snapshot(
            stage=stage,
            round=RoundId(record["round"]),
            version=Version(entry["version"]),
            lineage=Lineage(bytes.fromhex(entry["lineage"])),
            files=tuple(
                StateFile(
                    part=_part(file["name"]), num_bytes=file["bytes"], digest=Digest(bytes.fromhex(file["sha256"]))
                )
                for file in entry["files"]
            ),
        )
    except (ValueError, KeyError, TypeError, StopIteration) as error:
        raise WireError(f"the coordinator's checkpoint record cannot be read: {error!r:.200}") from None


def _part(file_name: str) -> str:
    """Return `weights` of `stage-3.weights.safetensors`."""
    pieces = file_name.split(".")
    if len(pieces) != 3:
        raise PeerFault(f"checkpoint file {file_name!r:.80} has an unexpected name")
    return pieces[1]
