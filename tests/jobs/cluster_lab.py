"""A Ray cluster of several nodes on loopback addresses, whose nodes can be killed."""

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


class Cluster:
    """A Ray cluster on loopback addresses, a `ray start --block` per node.

    Attributes:
        environment: of drivers that run beside it.
        dashboard: of clients that submit to it.
        workers: nodes that tests may lose.
    """

    def __init__(self, folder: Path, *, num_cpus: int) -> None:
        """Start the head."""
        self._folder = folder
        self.workers: list[subprocess.Popen[bytes]] = []
        self._nodes: list[subprocess.Popen[bytes]] = []
        gcs, dashboard, client = free_ports(3)
        self._gcs = f"127.0.0.1:{gcs}"
        # Sockets lie below it, and their paths must stay short.
        self._temp_dir = Path(tempfile.gettempdir()) / f"carn-{gcs}"
        self.environment = {
            "RAY_ADDRESS": self._gcs,
            "PYTHONPATH": str(ROOT),
            # `python` of an entry point is looked up at the head.
            "PATH": f"{Path(sys.executable).parent}:{environment_of()['PATH']}",
        }
        self.dashboard = {"RAY_ADDRESS": f"http://127.0.0.1:{dashboard}"}
        self._start(
            *("--head", "--node-ip-address=127.0.0.1", f"--port={gcs}", f"--num-cpus={num_cpus}"),
            *("--include-dashboard=true", f"--dashboard-port={dashboard}"),
            *(f"--ray-client-server-port={client}", f"--temp-dir={self._temp_dir}"),
        )
        self._wait_for_nodes()

    def add_node(self, *, num_cpus: int) -> subprocess.Popen[bytes]:
        """Start another node, and wait until it is there."""
        address = f"127.0.0.{len(self._nodes) + 1}"
        node = self._start(
            *(f"--address={self._gcs}", f"--node-ip-address={address}", f"--num-cpus={num_cpus}")
        )
        self._wait_for_nodes()
        return node

    def _start(self, *arguments: str) -> subprocess.Popen[bytes]:
        (agent,) = free_ports(1)
        with (self._folder / f"node-{len(self._nodes)}.log").open("wb") as log:
            node = subprocess.Popen(
                [
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
        shutil.rmtree(self._temp_dir, ignore_errors=True)
