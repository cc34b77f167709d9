"""Ceph on one machine, with its S3 gateway (RGW): a real object store, on loopback, its data in memory.

Run as a script it starts the daemons below a directory, writes what clients need into DIRECTORY/s3.json, and
ends them by their pids when the process that it was started for ends, however that happens.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path

PROGRAMS = ("monmaptool", "ceph-mon", "ceph-osd", "ceph", "radosgw", "radosgw-admin")
READY_FILE = "s3.json"
FAILED_FILE = "failed.txt"
USERS = ("owner", "stranger")
_LIBRARIES = Path("/usr/lib") / f"{os.uname().machine}-linux-gnu"
_START_SECONDS = 120.0
_COMMAND_SECONDS = 60.0
_OSD_PORTS = 16


def missing_programs() -> list[str]:
    """What has to be installed: Debian's packages radosgw, ceph-mon, ceph-osd and ceph-common."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


def main(directory: Path, owner: int) -> None:
    """Serves until the process `owner` ends."""
    owner_ended = os.pidfd_open(owner)
    cluster = Cluster(directory)
    # A terminated keeper ends its daemons as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        ready = json.dumps(cluster.start())
        part = directory / f".{READY_FILE}"
        part.write_text(ready)
        part.rename(directory / READY_FILE)
        select.select([owner_ended], [], [])
    except Exception as error:
        (directory / FAILED_FILE).write_text(f"{type(error).__name__}: {error}")
        raise
    finally:
        cluster.stop()
        shutil.rmtree(directory, ignore_errors=True)


class Cluster:
    """One monitor, one object store in memory and one gateway."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._configuration = directory / "ceph.conf"
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._mon_port, self._http_port, *_ = free_ports(2)
        self._osd_port = free_ports(1)[0]

    def start(self) -> dict[str, object]:
        """Starts everything; returns endpoint and users."""
        identity = str(uuid.uuid4())
        self._write_configuration(identity)
        monitor = ["--addv", "a", f"[v2:127.0.0.1:{self._mon_port}]"]
        map_file = str(self._directory / "monmap")
        self._run("monmaptool", "--create", "--clobber", "--fsid", identity, *monitor, map_file)
        self._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", map_file)
        self._daemon("ceph-mon", "-f", "-i", "a")
        store = str(uuid.uuid4())
        self._run("ceph", "osd", "new", store)
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", store)
        self._daemon("ceph-osd", "-f", "-i", "0")
        users = {name: self._create_user(name) for name in USERS}
        self._daemon("radosgw", "-f", "-n", "client.rgw")
        endpoint = f"http://127.0.0.1:{self._http_port}"
        wait_for(endpoint)
        return {"endpoint": endpoint, "users": users}

    def stop(self) -> None:
        for daemon in reversed(self._daemons):
            daemon.kill()
            daemon.wait(30)

    def _create_user(self, name: str) -> dict[str, str]:
        keys = {"access_key": f"KEY{secrets.token_hex(8)}".upper(), "secret_key": secrets.token_hex(20)}
        given = [f"--access-key={keys['access_key']}", f"--secret-key={keys['secret_key']}"]
        self._run("radosgw-admin", "user", "create", f"--uid={name}", f"--display-name={name}", *given)
        return keys

    def _daemon(self, *command: str) -> None:
        with open(self._directory / "log" / f"{command[0]}.out", "ab") as out:
            daemon = subprocess.Popen(command, stdout=out, stderr=out, env=self._environment())
        self._daemons.append(daemon)

    def _run(self, *command: str) -> None:
        done = subprocess.run(command, capture_output=True, env=self._environment(), timeout=_COMMAND_SECONDS)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command[:3])} failed: {done.stderr.decode()[-1000:]}")

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "CEPH_CONF": str(self._configuration)}

    def _write_configuration(self, identity: str) -> None:
        directory = self._directory
        for name in ("run", "log", "crash", "mon.a", "osd.0", "rgw"):
            (directory / name).mkdir(parents=True)
        self._configuration.write_text(
            f"""[global]
fsid = {identity}
mon host = [v2:127.0.0.1:{self._mon_port}]
public addr = 127.0.0.1
cluster addr = 127.0.0.1
auth cluster required = none
auth service required = none
auth client required = none
ms mon client mode = crc
ms bind msgr1 = false
ms bind port min = {self._osd_port}
ms bind port max = {self._osd_port + _OSD_PORTS}
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pgp num = 4
osd pool default pg autoscale mode = off
mon allow pool size one = true
mon max pg per osd = 1000
osd crush chooseleaf type = 0
run dir = {directory}/run
log file = {directory}/log/$name.log
admin socket = {directory}/run/$name.asok
crash dir = {directory}/crash
osd class dir = {_LIBRARIES}/rados-classes
erasure code dir = {_LIBRARIES}/ceph/erasure-code
plugin dir = {_LIBRARIES}/ceph
[mon]
mon data = {directory}/mon.$id
mon initial members = a
[osd]
osd data = {directory}/osd.$id
osd objectstore = memstore
memstore device bytes = 4294967296
[client.rgw]
rgw data = {directory}/rgw
# What is deleted gives its memory back at once, not after two hours.
rgw gc obj min wait = 1
rgw gc processor period = 1
rgw gc processor max time = 1
# Without the option each answer waits 40 ms for the client's delayed acknowledgement.
rgw frontends = beast endpoint=127.0.0.1:{self._http_port} tcp_nodelay=1
"""
        )


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def wait_for(endpoint: str, seconds: float = _START_SECONDS) -> None:
    """Returns once something answers HTTP there."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(endpoint, timeout=2):
                return
        except urllib.error.HTTPError:
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise TimeoutError(f"nothing answers at {endpoint} after {seconds:g} s: {error}") from error
            time.sleep(0.1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
