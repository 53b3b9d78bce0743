"""A Ray cluster of several nodes on one machine, whose nodes can be killed or cut off.

Nodes share the machine's loopback device, each with an address of its own, or (`Network`) have
network namespaces of their own on a bridge, as far apart as containers are.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.jobs.lab import ROOT
from tests.jobs.train_lab import environment_of, kill_tree


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


class Network:
    """Hosts of their own on a bridge of this machine; needs root and iproute2."""

    def __init__(self) -> None:
        """Make the bridge."""
        tag = os.getpid() % 10_000
        self._bridge = f"carn{tag}"
        self._subnet = f"10.{tag % 100 + 100}.{tag // 100}"
        self._hosts: list[str] = []
        _ip("link", "add", self._bridge, "type", "bridge")
        try:
            _ip("addr", "add", f"{self._subnet}.1/24", "dev", self._bridge)
            _ip("link", "set", self._bridge, "up")
        except BaseException:
            self.stop()
            raise

    @staticmethod
    def why_not() -> str | None:
        """What this machine lacks for it."""
        if shutil.which("ip") is None or os.geteuid():
            return "network namespaces take root and iproute2"
        try:
            _ip("netns", "add", "carn-try")
        except subprocess.CalledProcessError as error:
            return f"no network namespaces here: {error.stderr.decode().strip()}"
        _ip("netns", "del", "carn-try")
        return None

    def add_host(self) -> tuple[str, list[str]]:
        """The address of a new host, and what to put before a command to run it there."""
        name = f"{self._bridge}h{len(self._hosts)}"
        address = f"{self._subnet}.{10 + len(self._hosts)}"
        _ip("netns", "add", name)
        self._hosts.append(name)
        _ip("link", "add", name, "type", "veth", "peer", "name", "e0", "netns", name)
        _ip("link", "set", name, "master", self._bridge, "up")
        _ip("-n", name, "addr", "add", f"{address}/24", "dev", "e0")
        for device in ("e0", "lo"):
            _ip("-n", name, "link", "set", device, "up")
        return address, ["ip", "netns", "exec", name]

    def cut(self, host: int) -> None:
        """Nothing reaches a host any more, nor leaves it; its processes go on."""
        _ip("link", "set", self._hosts[host], "down")

    def stop(self) -> None:
        """Remove all of it."""
        for name in self._hosts:
            _ip("netns", "del", name)
        _ip("link", "del", self._bridge)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


class Cluster:
    """A Ray cluster, a `ray start --block` per node.

    Attributes:
        environment: of drivers that run beside it.
        before: what to put before a driver's command, so that it runs at the head.
        dashboard: of clients that submit to it.
        head: the node that the others belong to.
        workers: nodes that tests may lose.
    """

    def __init__(self, folder: Path, *, num_cpus: int, network: Network | None = None) -> None:
        """Start the head.

        Args:
            folder: of the nodes' logs.
            num_cpus: of the head.
            network: where each node is a host of its own; None for loopback addresses.
        """
        self._folder = folder
        self._network = network
        self.workers: list[subprocess.Popen[bytes]] = []
        self._nodes: list[subprocess.Popen[bytes]] = []
        gcs, dashboard, client = free_ports(3)
        host, self.before = network.add_host() if network else ("127.0.0.1", [])
        self._gcs = f"{host}:{gcs}"
        # Sockets lie below it, and their paths must stay short.
        self._temp_dir = Path(tempfile.gettempdir()) / f"carn-{gcs}"
        self.environment = {
            "RAY_ADDRESS": self._gcs,
            "PYTHONPATH": str(ROOT),
            # `python` of an entry point is looked up at the head.
            "PATH": f"{Path(sys.executable).parent}:{environment_of()['PATH']}",
        }
        self.dashboard = {"RAY_ADDRESS": f"http://{host}:{dashboard}"}
        self.head = self._start(
            self.before,
            *("--head", f"--node-ip-address={host}", f"--port={gcs}", f"--num-cpus={num_cpus}"),
            *("--include-dashboard=true", f"--dashboard-port={dashboard}"),
            *(f"--ray-client-server-port={client}", f"--temp-dir={self._temp_dir}"),
        )
        self._wait_for_nodes()

    def add_node(self, *, num_cpus: int) -> subprocess.Popen[bytes]:
        """Start another node, and wait until it is there."""
        if self._network is None:
            address, before = f"127.0.0.{len(self._nodes) + 1}", []
        else:
            address, before = self._network.add_host()
        node = self._start(
            before,
            *(f"--address={self._gcs}", f"--node-ip-address={address}", f"--num-cpus={num_cpus}"),
        )
        self._wait_for_nodes()
        return node

    def cut(self, node: subprocess.Popen[bytes]) -> None:
        """Cut a node of a network off from the others."""
        assert self._network is not None
        self._network.cut(self._nodes.index(node))

    def _start(self, before: list[str], *arguments: str) -> subprocess.Popen[bytes]:
        (agent,) = free_ports(1)
        with (self._folder / f"node-{len(self._nodes)}.log").open("wb") as log:
            node = subprocess.Popen(
                [
                    *before,
                    *(str(Path(sys.executable).with_name("ray")), "start", "--block", *arguments),
                    *(f"--dashboard-agent-listen-port={agent}", "--disable-usage-stats"),
                    # Any free ones: several nodes share this machine.
                    *("--min-worker-port=0", "--max-worker-port=0"),
                ],
                env=environment_of(self.environment),
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self._nodes.append(node)
        return node

    def _wait_for_nodes(self) -> None:
        from ray._raylet import GcsClient

        deadline = time.monotonic() + 60
        while True:
            assert all(node.poll() is None for node in self._nodes), self._logs()
            try:
                nodes = GcsClient(address=self._gcs).get_all_node_info(timeout=5).values()
                if sum(node.state == 0 for node in nodes) == len(self._nodes):
                    return
            except Exception as error:  # not there yet
                last: object = error
            else:
                last = nodes
            assert time.monotonic() < deadline, f"{last}\n{self._logs()}"
            time.sleep(0.5)

    def _logs(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self._folder.glob("node-*.log")))

    def stop(self) -> None:
        """Kill what is left of it; `ray stop` would end other clusters of this machine, too."""
        for node in reversed(self._nodes):
            kill_tree(node)
        if self._network is not None:
            self._network.stop()
        shutil.rmtree(self._temp_dir, ignore_errors=True)
