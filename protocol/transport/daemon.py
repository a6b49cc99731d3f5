"""p2pd: hivemind's libp2p child process, started quietly, watched, and never left behind.

Owns: the child's options, its start with errors of ours, the repairs to hivemind's control connection, and
noticing that the child has died. Must not know: the DHT, records, streams. `node.py` owns the one instance.

What hivemind's `P2P` lacks and this adds:
* two p2pd share one TCP port without an error (both set SO_REUSEPORT), so the port is tried before the start;
* p2pd is in our process group, so Ctrl-C would kill it before we could say goodbye: it gets a session of its own;
* when p2pd dies nobody is told, and pending unary calls wait for ever: `wait_ended` tells, the calls fail;
* an answer that arrives in the moment its call is cancelled ends the task that reads all answers;
* an answer of more than 4 MiB leaves the caller waiting for ever: such an answer becomes an error;
* a call that the remote side cancels stays in a table for ever.

p2pd ends by itself as soon as its control connection closes, so a SIGKILL of our process ends it too
(measured: within 20 ms; within IDLE_TIMEOUT_S if we die before that connection is made).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import sys
from collections.abc import Awaitable, Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import structlog
from hivemind.p2p import P2P, P2PDaemonError, PeerID
from hivemind.p2p.p2p_daemon_bindings.control import DEFAULT_MAX_MSG_SIZE
from hivemind.utils.logging import use_hivemind_log_handler

from protocol.errors import InviteError, LocalFault, PortError, SwarmError, UnreachableError
from protocol.transport.addresses import encodable, host_and_port, is_loopback, require_peer, socket_family

log = structlog.get_logger()

START_TIMEOUT_S = 60.0  # hivemind's 15 s are not enough on a machine that is busy starting eight of them
START_ATTEMPTS = 2
IDLE_TIMEOUT_S = 15.0
DIAGNOSIS_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 2.0  # a healthy p2pd needs 0.02
PORT_WAIT_S = 2.0  # a predecessor that was killed a moment ago may still hold the port
MAX_UNARY_RESPONSE_BYTES = DEFAULT_MAX_MSG_SIZE - 4096  # leaves room for the envelope

# A session of its own, then p2pd in place of this interpreter: same pid, and no signal meant for our terminal.
_LAUNCHER = "import os, sys; os.setsid(); os.execv(sys.argv[1], sys.argv[1:])"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """How others reach this node. The defaults suit a machine that can be dialled directly."""

    force_reachability: Literal["public", "private"] | None = None
    use_auto_relay: bool = False
    trusted_relays: tuple[str, ...] = ()
    nat_port_map: bool | None = None
    """Ask the router for a port (UPnP, NAT-PMP); by default whenever we listen beyond loopback."""


class Daemon(P2P):  # type: ignore[misc]
    """hivemind's P2P object together with the p2pd process behind it."""

    def __init__(self) -> None:
        super().__init__()
        self._ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._watch_task: asyncio.Task[None] | None = None
        _newest.set(self)

    @classmethod
    async def launch(
        cls,
        key_path: Path,
        *,
        host_maddrs: tuple[str, ...],
        announce_maddrs: tuple[str, ...] = (),
        initial_peers: tuple[str, ...] = (),
        reach: Reach | None = None,
    ) -> Daemon:
        """Start p2pd.

        Raises `PortError`, `LocalFault`, `UnreachableError` (no initial peer answers) or `InviteError` (none of
        those who do is the one that was meant).
        """
        quiet_hivemind()
        await wait_ports_free(host_maddrs)
        options = _options(key_path, host_maddrs, announce_maddrs, initial_peers, reach or Reach())
        for attempts_left in reversed(range(START_ATTEMPTS)):
            try:
                return await cls._launch_once(options)
            except P2PDaemonError as error:
                if "failed to start in" not in str(error) or not attempts_left:
                    raise await cls._start_error(str(error), options) from None
            except OSError as error:
                raise LocalFault(f"p2pd cannot be started: {error}.") from error
        raise AssertionError("the last attempt either returns or raises")

    @classmethod
    async def _launch_once(cls, options: dict[str, Any]) -> Daemon:
        """Start p2pd, or leave nothing of it behind; hivemind keeps no hold of one that it failed to start."""
        _newest.set(None)
        try:
            daemon: Daemon = await cls.create(**options)
        except BaseException:
            if (failed := _newest.get()) is not None:
                await failed.stop(timeout_s=STOP_TIMEOUT_S)
            raise
        daemon._begin_watch()
        return daemon

    @classmethod
    async def _start_error(cls, text: str, options: dict[str, Any]) -> SwarmError:
        reason = text.removeprefix("Daemon failed to start: ")
        if "failed to listen" in reason or "address already in use" in reason:
            return PortError(f"p2pd cannot listen: {reason}.")
        initial = options["initial_peers"]
        if not initial or not ("bootstrap" in reason or "failed to start in" in reason):
            return LocalFault(f"p2pd did not start: {reason}.")
        if await cls._is_somebody_else(initial, options):
            return InviteError(
                f"another key than the invite names answers at {', '.join(initial)}.",
                hint="Ask the organiser for the invite that is valid now.",
            )
        return UnreachableError(f"no peer of that name answers at {', '.join(initial)}.")

    @classmethod
    async def _is_somebody_else(cls, initial: list[str], options: dict[str, Any]) -> bool:
        """Dial initial peers that did not answer again, to hear why: p2pd does not say when it starts."""
        try:
            daemon = await cls._launch_once({**options, "initial_peers": None})
        except (P2PDaemonError, OSError):
            return False
        try:
            async with asyncio.timeout(DIAGNOSIS_TIMEOUT_S):
                return any([await daemon._is_another(address) for address in initial])
        except TimeoutError:
            return False
        finally:
            await daemon.stop(timeout_s=STOP_TIMEOUT_S)

    async def _is_another(self, address: str) -> bool:
        """Tell whether somebody answers at an address who does not hold the key that it names."""
        way, peer_id = require_peer(address)
        try:
            await self._client.connect(PeerID.from_base58(peer_id), [encodable(way)])
        except (P2PDaemonError, OSError, EOFError) as error:
            return "peer id mismatch" in str(error)
        return False

    @property
    def pid(self) -> int:
        """Process id of the p2pd child."""
        return int(self._child.pid)

    @property
    def has_ended(self) -> bool:
        return self._ended.done()

    async def wait_ended(self) -> str:
        """Return why p2pd has ended, once it has (be it by `stop`)."""
        return await asyncio.shield(self._ended)

    async def stop(self, *, timeout_s: float) -> None:
        """End p2pd, by force if it does not listen, and remove its sockets."""
        self._end("stopped")
        if self._watch_task is not None:
            self._watch_task.cancel()
        self._terminate()
        if self._child is None:
            return
        try:
            async with asyncio.timeout(timeout_s):
                await self._child.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self._child.kill()
            await self._child.wait()

    def _begin_watch(self) -> None:
        control = self._client.control
        control._pending_calls = _WaitingCalls()
        control._handler_tasks = _RunningHandlers()
        self._watch_task = asyncio.create_task(self._watch(), name="p2pd.watch")

    async def _watch(self) -> None:
        """Wait for the end of the child or of one of the two tasks that talk with it."""
        control = self._client.control
        child = asyncio.create_task(self._child.wait(), name="p2pd.wait")
        try:
            await asyncio.wait({child, control._read_task, control._write_task}, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait({child}, timeout=0.5)  # the connection closes a moment before the exit is seen
            self._end(f"exit status {child.result()}" if child.done() else "control connection lost")
        finally:
            child.cancel()

    def _end(self, reason: str) -> None:
        """Fail everything that waits for an answer which cannot come any more."""
        if self._ended.done():
            return
        self._alive = False
        self._ended.set_result(reason)
        if self._client is None:
            return
        control = self._client.control
        for future in list(control._pending_calls.values()):
            if not future.done():
                future.set_exception(P2PDaemonError(f"p2pd has ended: {reason}"))
        for task in (control._read_task, control._write_task):
            if task.done() and not task.cancelled():
                task.exception()  # looked at, so that asyncio does not report it a second time

    async def _call_unary_protobuf_handler(self, peer_id: Any, handle_name: str, input: Any, output_type: Any) -> Any:
        if self._ended.done():
            raise P2PDaemonError(f"p2pd has ended: {self._ended.result()}")
        return await super()._call_unary_protobuf_handler(peer_id, handle_name, input, output_type)

    async def _add_protobuf_unary_handler(
        self,
        handle_name: str,
        handler: Callable[[Any, Any], Awaitable[Any]],
        input_protobuf_type: Any,
        balanced: bool = False,
    ) -> None:
        async def bounded(request: Any, context: Any) -> Any:
            response = await handler(request, context)
            if response.ByteSize() > MAX_UNARY_RESPONSE_BYTES:
                raise ValueError(f"the answer would take {response.ByteSize()} bytes")
            return response

        await super()._add_protobuf_unary_handler(handle_name, bounded, input_protobuf_type, balanced=balanced)
        log.debug("handler.added", name=handle_name)

    async def add_binary_stream_handler(self, name: str, handler: Any, balanced: bool = False) -> None:
        """Let `handler` serve streams called `name`; like hivemind's, and the log says what strangers can reach."""
        await super().add_binary_stream_handler(name, handler, balanced)
        log.debug("handler.added", name=name)

    def _terminate(self) -> None:
        super()._terminate()
        if hasattr(self, "_daemon_listen_maddr"):  # hivemind leaves it when p2pd was gone before we were
            with contextlib.suppress(FileNotFoundError):
                os.remove(self._daemon_listen_maddr["unix"])

    @staticmethod
    def _make_process_args(*args: Any, **kwargs: Any) -> list[str]:
        return [sys.executable, "-I", "-S", "-c", _LAUNCHER, *P2P._make_process_args(*args, **kwargs)]


_newest: ContextVar[Daemon | None] = ContextVar("newest", default=None)
"""The instance that `P2P.create` made last in this task: the only way to it when `create` raises."""


class _WaitingCalls(dict[Any, "asyncio.Future[bytes]"]):
    """hivemind's table of unary calls; one whose caller has given up counts as not there.

    hivemind asks `call_id in table` and then sets the result. Setting it on a future that was cancelled in the
    same turn of the loop raises in the task that reads all answers, and no call gets an answer ever after.
    """

    def __contains__(self, call_id: object) -> bool:
        future = self.get(call_id)
        return future is not None and not future.done()


class _RunningHandlers(dict[Any, "asyncio.Task[None]"]):
    """hivemind's table of running handlers, which forgets those that were cancelled too."""

    def __setitem__(self, call_id: Any, task: asyncio.Task[None]) -> None:
        super().__setitem__(call_id, task)
        task.add_done_callback(lambda _: self.pop(call_id, None))


def quiet_hivemind() -> None:
    """Send hivemind's and p2pd's talk to our own logging, errors only: strangers can cause the rest at will."""
    use_hivemind_log_handler("nowhere")
    logging.getLogger("hivemind").setLevel(logging.ERROR)
    os.environ.setdefault("GOLOG_LOG_LEVEL", "error")


async def wait_ports_free(host_maddrs: Iterable[str], *, wait_s: float = PORT_WAIT_S) -> None:
    """Return when every port is free to listen on, or raise `PortError` after `wait_s`."""
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + wait_s
    for address in host_maddrs:
        while (problem := _listen_problem(address)) is not None:
            if problem.errno != errno.EADDRINUSE or loop.time() >= deadline_s:
                raise PortError(f"cannot listen on {address}: {os.strerror(problem.errno or 0)}.") from problem
            await asyncio.sleep(0.05)


def _listen_problem(address: str) -> OSError | None:
    with socket.socket(socket_family(address), socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections in TIME_WAIT are no obstacle
        try:
            probe.bind(host_and_port(address))
            probe.listen(1)
        except OSError as error:
            return error
    return None


def _options(
    key_path: Path, host: tuple[str, ...], announce: tuple[str, ...], initial_peers: tuple[str, ...], reach: Reach
) -> dict[str, Any]:
    """Spell out the options of `P2P.create`. TCP only: we listen on no QUIC address."""
    is_local = all(is_loopback(address) for address in host)
    return {
        "identity_path": str(key_path),
        "initial_peers": list(initial_peers) or None,
        "host_maddrs": list(host),
        "announce_maddrs": list(announce) or None,
        "check_if_identity_free": False,  # starts a second p2pd, and is wrong right after a crash
        "startup_timeout": START_TIMEOUT_S,
        "idle_timeout": IDLE_TIMEOUT_S,
        "auto_nat": not is_local,
        "nat_port_map": not is_local if reach.nat_port_map is None else reach.nat_port_map,
        "force_reachability": reach.force_reachability,
        "use_auto_relay": reach.use_auto_relay,
        "trusted_relays": list(reach.trusted_relays) or None,
    }
