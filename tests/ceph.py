"""A real S3 server of this machine's own: Ceph's gateway before one store in memory.

    python -m tests.ceph pytest -m s3

runs a command whose environment names the server, and stops the server after it. Ceph comes from
Debian's packages ceph-mon, ceph-osd, ceph-common and radosgw; where they are not installed, the
command runs all the same, and its tests use moto.
"""

import http.client
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.jobs.cluster_lab import free_ports

PROGRAMS = ("ceph", "ceph-authtool", "ceph-mon", "ceph-osd", "monmaptool", "radosgw")
STORE_BYTES = 6 << 30
PATIENCE_S = 90.0
# One of each and no second copy: a store for tests. The objects of one bucket may be any number.
# Source: https://docs.ceph.com/en/pacific/rados/configuration/
SETTINGS = """
[global]
fsid = {fsid}
mon host = v2:127.0.0.1:{mon_port}
public addr = 127.0.0.1
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
keyring = {folder}/keyring
log file = {folder}/$name.log
run dir = {folder}
admin socket = {folder}/$name.sock
osd objectstore = memstore
memstore device bytes = {store_bytes}
osd crush chooseleaf type = 0
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pg autoscale mode = off
mon allow pool size one = true
mon warn on pool no redundancy = false
mon pg warn min per osd = 0
mon data avail warn = 1
mon data avail crit = 1
[mon.a]
mon data = {folder}/mon
[osd.0]
osd data = {folder}/osd
[client.rgw]
rgw data = {folder}/rgw
rgw frontends = beast endpoint=127.0.0.1:{port}
rgw dns name = 127.0.0.1
rgw bucket default quota max objects = -1
rgw enable usage log = false
"""


def missing() -> list[str]:
    """The programs of Ceph that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


@contextmanager
def run_ceph() -> Iterator[dict[str, str]]:
    """Start the server; gives the environment variables by which tests find it."""
    with ExitStack() as stack:
        # Sockets lie below it, and their paths must stay short.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ceph-")))
        yield _start(folder, stack)


def _start(folder: Path, stack: ExitStack) -> dict[str, str]:
    settings = folder / "ceph.conf"
    port, mon_port = free_ports(2)
    fsid, osd = str(uuid.uuid4()), str(uuid.uuid4())
    for name in ("mon", "osd", "rgw"):
        (folder / name).mkdir()
    settings.write_text(
        SETTINGS.format(
            fsid=fsid, folder=folder, port=port, mon_port=mon_port, store_bytes=STORE_BYTES
        )
    )

    def call(*arguments: str, timeout_s: float = PATIENCE_S) -> str:
        done = subprocess.run(
            arguments,
            env=os.environ | {"CEPH_CONF": str(settings)},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(arguments)}: {done.stderr[-2000:]}")
        return done.stdout

    def serve(*arguments: str) -> subprocess.Popen[bytes]:
        log = stack.enter_context((folder / f"{arguments[0]}.out").open("wb"))
        process = subprocess.Popen(
            [*arguments, "-c", str(settings), "-f"], stdout=log, stderr=subprocess.STDOUT
        )
        stack.callback(_end, process)
        return process

    keyring = str(folder / "keyring")
    names = ("mon.", "client.admin", "client.rgw", "osd.0")
    for number, name in enumerate(names):
        rights = [part for what in ("mon", "osd", "mgr") for part in ("--cap", what, "allow *")]
        new = ("--create-keyring",) if number == 0 else ()
        call("ceph-authtool", *new, keyring, "--gen-key", "-n", name, *rights)
    shutil.copy(keyring, folder / "osd" / "keyring")
    shutil.copy(keyring, folder / "rgw" / "keyring")
    monmap = str(folder / "monmap")
    call(
        *("monmaptool", "--create", "--fsid", fsid),
        *("--addv", "a", f"[v2:127.0.0.1:{mon_port}]", monmap),
    )
    call("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap, "--keyring", keyring)
    monitor = serve("ceph-mon", "-i", "a")
    _wait(monitor, lambda: call("ceph", "--connect-timeout", "2", "mon", "stat", timeout_s=10))
    call("ceph", "osd", "new", osd)
    call("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
    serve("ceph-osd", "-i", "0")
    call("ceph", "osd", "crush", "add", "osd.0", "1.0", "root=default", "host=here")
    gateway = serve("radosgw", "-n", "client.rgw")
    _wait(gateway, lambda: _answers(port))
    everything = _user(call, "tests")
    reader = _user(call, "reader", "--op-mask=read")
    return {
        "CARN_TEST_S3_ENDPOINT": f"http://127.0.0.1:{port}",
        "CARN_TEST_S3_READER": ":".join(reader),
        "AWS_ACCESS_KEY_ID": everything[0],
        "AWS_SECRET_ACCESS_KEY": everything[1],
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def _user(call: Callable[..., str], name: str, *options: str) -> tuple[str, str]:
    """The key and the secret of a new user."""
    key, secret = f"carn-{name}", secrets.token_hex(20)
    call(
        *("radosgw-admin", "-n", "client.rgw", "user", "create", f"--uid={name}"),
        *(f"--display-name={name}", f"--access-key={key}", f"--secret-key={secret}", *options),
    )
    return key, secret


def _answers(port: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/")
        connection.getresponse().read()
    finally:
        connection.close()


def _wait(process: subprocess.Popen[bytes], ask: Callable[[], object]) -> None:
    """Ask until there is an answer."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            ask()
        except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{process.args} does not answer: {error}") from error
            time.sleep(0.3)
        else:
            return


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def main(command: list[str]) -> int:
    """Run a command with the server's settings; returns its exit status."""
    if absent := missing():
        sys.stderr.write(
            f"No Ceph here ({', '.join(absent)}): object storage is moto's. For the real one: "
            "apt-get install --no-install-recommends ceph-mon ceph-osd ceph-common radosgw\n"
        )
        return subprocess.run(command, check=False).returncode
    with run_ceph() as settings:
        sys.stderr.write(f"Ceph's gateway at {settings['CARN_TEST_S3_ENDPOINT']}\n")
        return subprocess.run(command, env=os.environ | settings, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
