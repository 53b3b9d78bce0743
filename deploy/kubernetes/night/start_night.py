"""Start one night's RayJob as a copy of a suspended one, and stay until it has ended.

Runs in a pod of the schedule, with Python alone. A second pod of the same night finds the RayJob
there and waits for it. Nights that have ended stay as a record, until `kubectl delete rayjob`.

Exit status: 0 when the night succeeded, 1 when it failed, 2 when it could not be started or
watched (another pod goes on with it).
"""

import argparse
import json
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
POLL_S = 30.0
# Requests that fail in a row before the pod gives up: an API server that restarts is outlived.
MAX_FAILURES = 20
# Source: KubeRay, ray-operator/apis/ray/v1/rayjob_types.go, JobDeploymentStatus and JobStatus.
ENDED = ("Complete", "Failed", "ValidationFailed")


class RayJobs:
    """The RayJobs of this pod's namespace, by the API that its service account may use."""

    def __init__(self, url: str, *, account: Path = ACCOUNT) -> None:
        namespace = (account / "namespace").read_text().strip()
        self._url = f"{url}/apis/ray.io/v1/namespaces/{namespace}/rayjobs"
        self._account = account
        authority = account / "ca.crt"
        self._tls = (
            ssl.create_default_context(cafile=str(authority)) if url[:5] == "https" else None
        )

    def get(self, name: str) -> dict[str, Any]:
        """A RayJob as it is now."""
        return self._ask("GET", f"/{name}")

    def create(self, job: dict[str, Any]) -> bool:
        """Make a RayJob; false when there is one of its name."""
        try:
            self._ask("POST", "", job)
        except urllib.error.HTTPError as error:
            if error.code != 409:
                raise
            return False
        return True

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        # The token is exchanged now and then; the file has the one that holds.
        headers = {
            "Authorization": f"Bearer {(self._account / 'token').read_text().strip()}",
            "Content-Type": "application/json",
        }
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self._url + path, data=data, headers=headers, method=method
        )
        with urllib.request.urlopen(request, timeout=30, context=self._tls) as answer:
            found: dict[str, Any] = json.load(answer)
            return found


def night_of(pattern: dict[str, Any], name: str) -> dict[str, Any]:
    """The RayJob to create: the pattern's labels and specification, under another name, to run."""
    labels = dict(pattern["metadata"].get("labels", {}))
    specification = {key: value for key, value in pattern["spec"].items() if key != "suspend"}
    return {
        "apiVersion": pattern["apiVersion"],
        "kind": "RayJob",
        "metadata": {"name": name, "labels": labels},
        "spec": specification,
    }


def wait(jobs: RayJobs, name: str) -> bool:
    """Whether the night succeeded, once it has ended; says what changes meanwhile."""
    said, failures = "", 0
    while True:
        try:
            status = jobs.get(name).get("status", {})
            failures = 0
        except OSError as error:
            # One that was deleted by hand has ended, too.
            if isinstance(error, urllib.error.HTTPError) and error.code == 404:
                say(f"{name} was deleted")
                return False
            failures += 1
            if failures >= MAX_FAILURES:
                raise
            time.sleep(POLL_S)
            continue
        deployment, job = status.get("jobDeploymentStatus", ""), status.get("jobStatus", "")
        text = " ".join(filter(None, (deployment, job, status.get("message", ""))))
        if text != said:
            say(f"{name}: {text or 'created'}")
            said = text
        if deployment in ENDED:
            return bool(deployment == "Complete" and job == "SUCCEEDED")
        time.sleep(POLL_S)


def say(text: str) -> None:
    """A line of the pod's log."""
    sys.stdout.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Start the night, or find it, and wait; returns the process's exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pattern", required=True, help="suspended RayJob that is copied")
    parser.add_argument("--name", required=True, help="name of the copy")
    parser.add_argument(
        "--api", default="https://kubernetes.default.svc", help="address of the API"
    )
    wanted = parser.parse_args(arguments)
    try:
        jobs = RayJobs(wanted.api)
        is_new = jobs.create(night_of(jobs.get(wanted.pattern), wanted.name))
        say(f"{wanted.name} {'is begun' if is_new else 'was begun before; waiting for it'}")
        return 0 if wait(jobs, wanted.name) else 1
    except OSError as error:
        say(f"{wanted.name}: {error}")
        return 2


if __name__ == "__main__":
    sys.exit(main())
