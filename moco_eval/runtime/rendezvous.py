"""How the processes of one machine meet without a socket that others can reach.

torchrun's stores listen on every network interface, ask nobody who they are, and the launcher unpickles what stands in
them. So the launcher's is kept in its memory here, and the workers' is a file in a folder that only its owner opens.
What they then open, gloo's and NCCL's sockets, stays on the loopback interface.
"""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from moco_eval.errors import RunFailed

FOLDER = "MOCO_EVAL_MEETING"  # the folder of the workers' store, in their environment
IN_MEMORY = "in-memory"
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
ON_LOOPBACK = {
    "GLOO_SOCKET_IFNAME": LOOPBACK,
    "TORCH_GLOO_LAZY_INIT": "0",  # every connection stands before `require_own_peers` looks
    "NCCL_SOCKET_IFNAME": f"={LOOPBACK}",
    "NCCL_RAS_ENABLE": "0",  # NCCL's status service, which any local user may ask
}
ESTABLISHED, LISTENING = "01", "0A"  # states in /proc/net/tcp
IPV4_IN_IPV6 = "0000000000000000FFFF0000"


@contextlib.contextmanager
def private_meeting() -> Iterator[None]:
    """Within, processes that this one starts meet in a new folder, open to its owner only, and on loopback."""
    with tempfile.TemporaryDirectory(prefix="moco-eval-") as folder:  # 0700, by a name that nobody foresees
        before = {name: os.environ.get(name) for name in (FOLDER, *ON_LOOPBACK)}
        os.environ |= {FOLDER: folder, **ON_LOOPBACK}
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                os.environ |= {} if value is None else {name: value}


def keep_in_memory() -> None:
    """Have torch's elastic launcher know `IN_MEMORY`, a rendezvous of one launcher with itself."""
    from torch.distributed.elastic.rendezvous import rendezvous_handler_registry

    rendezvous_handler_registry.register(IN_MEMORY, _in_memory)


def _in_memory(parameters: Any) -> Any:
    """torchrun's own rendezvous, with a store that no other process has."""
    from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
    from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler

    class InMemory(C10dRendezvousBackend):
        name = IN_MEMORY  # the launcher compares it with what was asked for

    store = dist.HashStore()
    return create_handler(store, InMemory(store, parameters.run_id), parameters)


def join(device: torch.device, timeout: timedelta) -> None:
    """Join the process group: of the launch on this machine, or of torchrun, by the address that it gives.

    Args:
        device: this process's. A GPU's collectives are NCCL's, bound to it: unbound, they guess from the rank.
    Raises:
        RunFailed: another user's process is connected to a socket of this one.
    """
    how: dict[str, Any] = {"backend": "nccl", "device_id": device} if device.type == "cuda" else {"backend": "gloo"}
    folder = os.environ.get(FOLDER)
    if not folder:
        dist.init_process_group(**how, timeout=timeout)
        return
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # each has its own file: no addresses of dead workers
    store = dist.FileStore(str(Path(folder) / start), ranks)
    dist.init_process_group(**how, store=store, rank=rank, world_size=ranks, timeout=timeout)
    try:
        require_own_peers()
    except RunFailed:
        dist.destroy_process_group()
        raise


def require_own_peers() -> None:
    """Whatever is connected to a socket on which this process listens must be of the same user.

    gloo asks nobody who they are: who is the first to connect is taken for another rank.

    Raises:
        RunFailed: another user's process is connected.
    """
    sockets, own = tcp_sockets(), _own_inodes()
    ours = {each.local for each in sockets if each.state == LISTENING and each.inode in own}
    for each in sockets:
        if each.state == ESTABLISHED and each.remote in ours and each.uid != os.geteuid():
            raise RunFailed(
                f"a process of user {each.uid} of this machine has connected to one of this run (process {os.getpid()})"
                " and was not let in; run the same command to go on"
            )


class TcpSocket(NamedTuple):
    """A line of /proc/net/tcp or tcp6; addresses as they stand there, `0100007F:1F90` for port 8080 of 127.0.0.1."""

    local: str
    remote: str
    state: str
    uid: int
    inode: str


def tcp_sockets() -> list[TcpSocket]:
    """Every TCP socket of this network namespace; none where the system does not list them."""
    sockets = []
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        for line in table.read_text().splitlines()[1:] if table.is_file() else []:
            _, local, remote, state, _, _, _, uid, _, inode, *_ = line.split()
            local, remote = (address.removeprefix(IPV4_IN_IPV6) for address in (local, remote))
            sockets.append(TcpSocket(local, remote, state, int(uid), inode))
    return sockets


def _own_inodes() -> set[str]:
    """The inodes of this process's sockets."""
    inodes = set()
    for descriptor in Path("/proc/self/fd").iterdir() if Path("/proc/self/fd").is_dir() else []:
        with contextlib.suppress(OSError):  # the one that lists the folder has gone
            inodes.add(str(descriptor.readlink()).removeprefix("socket:[").removesuffix("]"))
    return inodes
