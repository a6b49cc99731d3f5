"""All errors that Handcar raises on purpose, in one tree.

    SwarmError                    code      exit
    |-- ConfigError               E-CFG     3    a file, flag or manifest is wrong; fix it and run again
    |   |-- InviteError           E-INV     3    the invite string is not one of ours, or was cut short
    |   |-- CorpusError           E-DATA    3    no text, too little text, or a token file that fails its hash
    |   |-- ModelError            E-MODEL   3    unsupported architecture or an impossible cut into stages
    |   `-- FinishedError         E-DONE    3    the run in this directory has ended
    |-- RefusedError              E-REF     4    the swarm does not want this peer (banned, not admitted, wrong key)
    |   `-- IncompatibleError     E-VER     4    the two sides speak different protocol versions
    |-- LocalFault                E-LOCAL   5    this machine cannot take part
    |   |-- ClockError            E-CLOCK   5    the clock is more than 3 s off
    |   |-- StorageError          E-DISK    5    unwritable directory, full disk, broken checkpoint
    |   `-- PortError             E-PORT    5    the address or port cannot be listened on
    |-- TransientError            E-NET     6    try again later
    |   |-- UnreachableError      E-NET-01  6    nobody answers at that address
    |   |-- DeadlineError         E-NET-02  6    no progress in time
    |   |-- BusyError             E-NET-03  6    the other side has no free slot (`retry_after_s`)
    |   `-- StrangerError         E-NET-04  6    the other side wants to see our pass first
    `-- PeerFault                 E-PEER    1    a remote peer broke the rules; scored, never fatal for us
        |-- WireError             E-WIRE    1    bytes that are not a message of this protocol
        `-- SignatureError        E-SIG     1    a signature or a signer that does not fit

A remote peer can cause nothing but `PeerFault` and `TransientError` in us. The command line prints
`code`, message and `hint` on one line and exits with `exit_code`; nobody else prints errors.
An exception outside this tree is a bug and exits with 1.
"""

from __future__ import annotations

from typing import ClassVar


class SwarmError(Exception):
    """Base of the tree. `str(error)` says what happened; `hint` says what to do."""

    code: ClassVar[str] = "E-SWARM"
    exit_code: ClassVar[int] = 1
    default_hint: ClassVar[str] = ""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = self.default_hint if hint is None else hint

    def one_line(self) -> str:
        """Return the line that a command prints to stderr before it exits with `exit_code`."""
        message = " ".join(str(self).split())
        return f"{self.code} {message}" + (f" {self.hint}" if self.hint else "")


class ConfigError(SwarmError):
    code = "E-CFG"
    exit_code = 3


class InviteError(ConfigError):
    code = "E-INV"
    default_hint = "Copy the whole invite again, from 'handcar1:' to its end."


class CorpusError(ConfigError):
    code = "E-DATA"


class ModelError(ConfigError):
    code = "E-MODEL"


class FinishedError(ConfigError):
    code = "E-DONE"


class RefusedError(SwarmError):
    code = "E-REF"
    exit_code = 4


class IncompatibleError(RefusedError):
    code = "E-VER"
    default_hint = "Install the version of Handcar that the run's organiser names."


class LocalFault(SwarmError):
    code = "E-LOCAL"
    exit_code = 5


class ClockError(LocalFault):
    code = "E-CLOCK"
    default_hint = "Set the clock (on Linux: 'timedatectl set-ntp true') and join again."


class StorageError(LocalFault):
    code = "E-DISK"


class PortError(LocalFault):
    code = "E-PORT"


class TransientError(SwarmError):
    code = "E-NET"
    exit_code = 6


class UnreachableError(TransientError):
    """Nobody answers. What the other side's own machine said about that, if anything, is in two flags.

    `is_certain`: nobody is there, which is more than silence. `is_deaf`: somebody is, but it serves nothing under
    that name: another protocol version, or not ready yet.
    """

    code = "E-NET-01"

    def __init__(
        self, message: str, *, hint: str | None = None, is_certain: bool = False, is_deaf: bool = False
    ) -> None:
        super().__init__(message, hint=hint)
        self.is_certain = is_certain
        self.is_deaf = is_deaf


class DeadlineError(TransientError):
    code = "E-NET-02"


class BusyError(TransientError):
    code = "E-NET-03"

    def __init__(self, message: str, *, retry_after_s: float, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.retry_after_s = retry_after_s


class StrangerError(TransientError):
    code = "E-NET-04"


class PeerFault(SwarmError):
    code = "E-PEER"


class WireError(PeerFault):
    code = "E-WIRE"


class SignatureError(PeerFault):
    code = "E-SIG"
