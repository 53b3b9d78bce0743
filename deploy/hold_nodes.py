"""Ask a growing cluster for nodes and wait for them; ask for none to let them go when idle.

Jobs look at the nodes that are there when they begin: to train on GPUs there has to be one. The
request stays until the next call, whatever job made it.

Exit status: 0 when the nodes are there, 1 when they did not come in time.

Examples:
  ray job submit -- python /opt/carn/deploy/hold_nodes.py --gpus 2
  ray job submit -- python /opt/carn/deploy/hold_nodes.py --cpus 64
  ray job submit -- python /opt/carn/deploy/hold_nodes.py --none
"""

import argparse
import logging
import sys
import time
from collections.abc import Sequence

import ray
from ray.autoscaler.sdk import request_resources

logger = logging.getLogger("hold_nodes")

POLL_S = 5.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Hold or let go; returns the process's exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpus", type=int, default=0, help="GPUs to hold")
    parser.add_argument("--cpus", type=int, default=0, help="CPUs to hold, over all nodes")
    parser.add_argument("--none", action="store_true", help="let all nodes go")
    parser.add_argument("--wait-minutes", type=float, default=20.0, help="longest wait for them")
    wanted = parser.parse_args(arguments)
    if min(wanted.gpus, wanted.cpus) < 0:
        parser.error("--gpus and --cpus must not be negative")
    if wanted.none == bool(wanted.gpus or wanted.cpus):
        parser.error("say either what to hold, with --gpus or --cpus, or --none")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    ray.init(log_to_driver=False, logging_level=logging.WARNING)
    request_resources(num_cpus=wanted.cpus, bundles=[{"GPU": 1}] * wanted.gpus)
    if wanted.none:
        logger.info("no nodes are held; they go when they are idle")
        return 0
    return 0 if _wait(wanted.gpus, wanted.cpus, seconds=60 * wanted.wait_minutes) else 1


def _wait(gpus: int, cpus: int, *, seconds: float) -> bool:
    """Whether the cluster comes to have so much in so long."""
    until = time.monotonic() + seconds
    while True:
        found = ray.cluster_resources()
        text = f"{found.get('GPU', 0):g} of {gpus} GPUs, {found.get('CPU', 0):g} of {cpus} CPUs"
        if found.get("GPU", 0) >= gpus and found.get("CPU", 0) >= cpus:
            logger.info("there are %s", text)
            return True
        if time.monotonic() > until:
            logger.error("after %g minutes there are only %s", seconds / 60, text)
            return False
        logger.info("waiting: %s", text)
        time.sleep(POLL_S)


if __name__ == "__main__":
    sys.exit(main())
