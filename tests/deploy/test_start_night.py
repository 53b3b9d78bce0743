"""The night's pod, against an API server over HTTP."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from deploy.kubernetes.night import start_night
from tests.deploy.manifests import resources
from tests.deploy.test_kubernetes import check_ray

PATH = "/apis/ray.io/v1/namespaces/carn/rayjobs"


class Api:
    """RayJobs by name; `course` is what becomes of one that was made, a status at each look."""

    def __init__(self) -> None:
        self.jobs = {"carn-night": resources("RayJob")["carn-night"]}
        self.course: list[dict[str, str]] = []
        self.num_failures = 0
        self.tokens: set[str] = set()
        self.url = ""

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        if self.num_failures:
            self.num_failures -= 1
            return 500, {}
        if method == "POST" and path == PATH:
            job = json.loads(body)
            name = job["metadata"]["name"]
            if name in self.jobs:
                return 409, {}
            self.jobs[name] = job
            return 201, job
        name = path.removeprefix(f"{PATH}/")
        if name not in self.jobs:
            return 404, {}
        job = dict(self.jobs[name])
        if name != "carn-night" and self.course:
            job["status"] = self.course.pop(0) if len(self.course) > 1 else self.course[0]
        return 200, job


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    found = Api()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            self._answer()

        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            found.tokens.add(self.headers["Authorization"])
            code, content = found.answer(self.command, self.path, body)
            self.send_response(code)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    (tmp_path / "namespace").write_text("carn")
    (tmp_path / "token").write_text("secret\n")
    monkeypatch.setattr(start_night, "POLL_S", 0.0)
    monkeypatch.setattr(start_night.RayJobs.__init__, "__kwdefaults__", {"account": tmp_path})
    found.url = f"http://127.0.0.1:{server.server_port}"
    yield found
    server.shutdown()
    server.server_close()
    thread.join()


def run(api: Api, name: str = "carn-night-1-run") -> int:
    return start_night.main(["--pattern", "carn-night", "--name", name, "--api", api.url])


RUNNING = {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}
DONE = {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}
FAILED = {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "message": "exit code 1"}


def test_a_night_is_a_copy_that_runs(api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    api.course = [{}, RUNNING, RUNNING, DONE]
    assert run(api) == 0
    made = api.jobs["carn-night-1-run"]
    check_ray(made)
    assert "suspend" not in made["spec"]
    pattern = api.jobs["carn-night"]["spec"]
    assert made["spec"] == {key: pattern[key] for key in pattern if key != "suspend"}
    assert api.tokens == {"Bearer secret"}
    said = capsys.readouterr().out
    assert said.count("Running RUNNING") == 1
    assert "secret" not in said


@pytest.mark.parametrize(
    "end",
    [
        FAILED,
        {"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"},
        {"jobDeploymentStatus": "ValidationFailed"},
    ],
)
def test_a_night_that_fails_says_so(api: Api, end: dict[str, str]) -> None:
    api.course = [RUNNING, end]
    assert run(api) == 1


def test_a_second_pod_waits_for_the_first_ones_night(
    api: Api, capsys: pytest.CaptureFixture[str]
) -> None:
    api.course = [DONE]
    assert run(api) == 0
    api.course = [RUNNING, DONE]
    assert run(api) == 0
    assert "was begun before" in capsys.readouterr().out
    assert len(api.jobs) == 2


def test_an_api_server_that_restarts_is_outlived(api: Api) -> None:
    api.course = [DONE]
    jobs = start_night.RayJobs(api.url)
    api.jobs["x"] = api.jobs["carn-night"]
    api.num_failures = start_night.MAX_FAILURES - 1
    assert start_night.wait(jobs, "x")


def test_one_that_stays_away_is_another_pods_matter(api: Api) -> None:
    api.num_failures = 10_000
    assert run(api) == 2


def test_a_pattern_that_is_not_there_begins_nothing(api: Api) -> None:
    del api.jobs["carn-night"]
    assert run(api) == 2


def test_a_night_that_was_deleted_has_ended(api: Api) -> None:
    assert not start_night.wait(start_night.RayJobs(api.url), "gone")
