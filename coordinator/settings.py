"""What the organiser can set for `coordinator run`, beside what the manifest fixes.

Owns: the knobs, their defaults and bounds. Must not know: how they are used. Flags win over `SWARM_*`
environment variables, those over the defaults.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from protocol.errors import ConfigError, SwarmError
from protocol.ids import PeerId
from protocol.signing import public_key_of

FLAGS = {
    "host_maddrs": "--host-maddr",
    "announce_maddrs": "--announce",
    "lost_after_s": "--lost-after",
    "watchers": "--watcher",
}

Access = Literal["open", "invite"]
Seconds = Annotated[float, Field(gt=0, le=86_400)]


def _peer_id(text: str) -> PeerId:
    try:
        public_key_of(PeerId(text))
    except SwarmError:
        raise ValueError(f"{text[:64]!r} is no peer id; make one: peer identity create") from None
    return PeerId(text)


def _listed(value: object) -> object:
    """From the environment several come as one text, with commas between them."""
    return tuple(each.strip() for each in value.split(",") if each.strip()) if isinstance(value, str) else value


_Listed = NoDecode, BeforeValidator(_listed)


class CoordinatorSettings(BaseSettings):
    """One coordinator's settings. Build it with `read_settings`, so that mistakes become a `ConfigError`."""

    model_config = SettingsConfigDict(env_prefix="SWARM_", frozen=True, extra="forbid")

    host_maddrs: Annotated[tuple[str, ...], *_Listed] = ()
    """Where to listen. Empty: the port of the last start on all interfaces, else any free one."""
    announce_maddrs: Annotated[tuple[str, ...], *_Listed] = ()
    """What others should dial, if it differs (port forwarding, DNS)."""
    http: str | None = None
    """`HOST:PORT` at which the status is served over HTTP; nowhere by default."""
    access: Access | None = None
    """Whom to let in: anybody, or who has an invite. None: as at the last start, at first anybody."""
    start_peers: Annotated[int, Field(ge=1, le=65_536)] = 1
    """The run begins when this many peers are ready (and every stage has one)."""
    stages_per_peer: Annotated[int, Field(ge=1, le=32)] = 1
    lost_after_s: Seconds = 10.0
    """A peer that is silent for this long is lost: nobody is sent to it, its stage may be given to others."""
    bury_factor: Annotated[float, Field(ge=1, le=100)] = 3.0
    """A lost peer whom nobody else misses may just have lost the way to us: it keeps its place this much longer."""
    move_after_s: Seconds = 5.0
    """How long a stage may stand empty, waiting for a joiner, before a peer of another stage is moved there."""
    admission_hours: Annotated[float, Field(gt=0, le=720)] = 24.0
    hold_hours: Annotated[float, Field(gt=0, le=2160)] = 24.0
    """How long what a peer has earned can be taken back before it is its own."""
    auto_rollback: bool = False
    """Go back to the last checkpoint before a jump of the held-out loss without being asked."""
    watchers: Annotated[tuple[Annotated[PeerId, AfterValidator(_peer_id)], ...], *_Listed] = ()
    """Keys of the organiser's own, whose word about others' work is the coordinator's (`peer watch`)."""
    tick_s: Annotated[float, Field(gt=0, le=60)] = 0.5


def read_settings(**flags: Any) -> CoordinatorSettings:
    """Combine flags (None: not given), environment and defaults, or raise `ConfigError` naming the bad one."""
    given = {name: value for name, value in flags.items() if value is not None and value != ()}
    try:
        return CoordinatorSettings(**given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = str(first["loc"][0]) if first["loc"] else "settings"
        flag = FLAGS.get(name, "--" + name.replace("_", "-"))
        problem = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{flag}: {problem}.", hint=f"It can also come from SWARM_{name.upper()}.") from None
