"""What the tests share: drawn slides, an object store, the real samples beside the repository."""

import itertools
import logging
import math
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import imagecodecs
import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, settings

from tests.faulty_s3 import Faults, run_proxy

settings.register_profile(
    "carn",
    deadline=None,
    derandomize=True,
    # Fixtures that only name a folder or a server hold nothing that one example leaves to the next.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("carn")

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"
JFIF = b"\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00"


# Those of an object store that may be a real one.
S3_FIXTURES = {"s3_endpoint", "ray_here_s3"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of object storage."""
    for item in items:
        if isinstance(item, pytest.Function) and S3_FIXTURES & set(item.fixturenames):
            item.add_marker(pytest.mark.s3)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real samples."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the real samples (../shared/data) are not beside the repository")
    return SHARED_DATA


# -------------------------------------------------------------------------------- drawn slides


def draw(width: int, height: int, *, seed: int = 0) -> np.ndarray:
    """(height, width, 3) uint8: smooth colour that tells each place from any other, and grain."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    phase = rng.uniform(0, 2 * np.pi, 3)
    colour = np.stack(
        [
            150 + 90 * np.sin(x / 37 + phase[0]),
            120 + 90 * np.sin(y / 29 + phase[1]),
            140 + 90 * np.sin((x + y) / 53 + phase[2]),
        ],
        axis=-1,
    )
    return np.clip(colour + rng.normal(0, 6, colour.shape), 0, 255).astype(np.uint8)


def halved(pixels: np.ndarray) -> np.ndarray:
    """Every second pixel, odd sides rounded down as scanners do."""
    height, width = pixels.shape[0] // 2 * 2, pixels.shape[1] // 2 * 2
    return np.ascontiguousarray(pixels[:height:2, :width:2])


def encode_tiles(
    pixels: np.ndarray, *, tile_px: int, is_rgb: bool, subsampling: str, has_jfif: bool
) -> Iterator[bytes]:
    """JPEG tiles, row by row, border tiles filled up with their edge."""
    height, width = pixels.shape[:2]
    across, down = math.ceil(width / tile_px), math.ceil(height / tile_px)
    padding = ((0, down * tile_px - height), (0, across * tile_px - width), (0, 0))
    padded = np.pad(pixels, padding, mode="edge")
    for row, column in itertools.product(range(down), range(across)):
        y, x = row * tile_px, column * tile_px
        tile = np.ascontiguousarray(padded[y : y + tile_px, x : x + tile_px])
        stream = imagecodecs.jpeg8_encode(
            tile,
            level=90,
            colorspace="rgb",
            outcolorspace="rgb" if is_rgb else "ycbcr",
            subsampling=subsampling,
        )
        if has_jfif and stream[2:4] != JFIF[:2]:
            stream = stream[:2] + JFIF + stream[2:]
        yield stream


@pytest.fixture
def write_slide(tmp_path: Path) -> Callable[..., Path]:
    """Write a drawn slide; returns its path.

    Arguments: name, pixels (or extent and seed), num_levels, tile_px, is_rgb (photometric RGB, as
    Aperio), subsampling ("420" or "444"), has_jfif (every tile carries its own JFIF marker),
    is_bigtiff, is_padded (levels padded to whole tiles, as CAMELYON16), absent ((level, number) of
    tiles left out), compression ("jpeg", or another of tifffile's for pixels without loss), and
    what `tifffile` calls resolution, resolutionunit, description, iccprofile, software.
    """

    def write(
        name: str = "slide.tif",
        *,
        pixels: np.ndarray | None = None,
        extent: tuple[int, int] = (700, 500),
        seed: int = 0,
        num_levels: int = 3,
        tile_px: int = 128,
        is_rgb: bool = False,
        subsampling: str = "420",
        has_jfif: bool = False,
        is_bigtiff: bool = False,
        is_padded: bool = False,
        absent: tuple[tuple[int, int], ...] = (),
        compression: str = "jpeg",
        **options: Any,
    ) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        level = draw(*extent, seed=seed) if pixels is None else pixels
        factors = (2, 2) if subsampling == "420" and not is_rgb else (1, 1)
        with tifffile.TiffWriter(path, bigtiff=is_bigtiff) as writer:
            for number in range(num_levels):
                shape = level.shape
                if is_padded:
                    sides = [math.ceil(side / tile_px) * tile_px for side in shape[:2]]
                    shape = (*sides, 3)
                form: dict[str, Any] = {
                    "tile": (tile_px, tile_px),
                    "photometric": "rgb",
                    "compression": compression,
                    "subfiletype": 0 if number == 0 else 1,
                    "metadata": None,
                    "software": False,
                }
                form |= options if number == 0 else {}
                if compression == "jpeg":
                    tiles = list(
                        encode_tiles(
                            level,
                            tile_px=tile_px,
                            is_rgb=is_rgb,
                            subsampling=subsampling,
                            has_jfif=has_jfif,
                        )
                    )
                    for absent_level, index in absent:
                        if absent_level == number:
                            tiles[index] = b""
                    form |= {
                        "shape": shape,
                        "dtype": np.uint8,
                        "compressionargs": {"outcolorspace": "rgb" if is_rgb else "ycbcr"},
                        "subsampling": factors,
                    }
                    writer.write(iter(tiles), **form)
                else:
                    writer.write(level, **form)
                level = halved(level)
        return path

    return write


# ------------------------------------------------------------------------------- object storage


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """A real S3-compatible server when CARN_TEST_S3_ENDPOINT names one, else moto over HTTP."""
    chosen = os.environ.get("CARN_TEST_S3_ENDPOINT")
    if chosen:
        yield chosen
        return
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    mend_moto()
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def mend_moto() -> None:
    """Give moto two traits of S3 that it lacks."""
    from moto.s3.exceptions import NoSuchUpload
    from moto.s3.models import S3Backend
    from moto.s3.responses import S3Response

    put_object, upload_part, lock = S3Response.put_object, S3Backend.upload_part, threading.Lock()

    def put_in_one_step(response: S3Response) -> Any:
        # moto looks whether something is there, and writes then.
        with lock:
            return put_object(response)

    def upload_part_of_known(backend: S3Backend, bucket: str, upload: str, *rest: Any) -> Any:
        # moto answers 500.
        if upload not in backend.get_bucket(bucket).multiparts:
            raise NoSuchUpload(upload_id=upload)
        return upload_part(backend, bucket, upload, *rest)

    S3Response.put_object = put_in_one_step
    S3Backend.upload_part = upload_part_of_known


def point_at(
    monkeypatch: pytest.MonkeyPatch, endpoint: str, *, with_credentials: bool = True
) -> None:
    """Make the AWS settings of this test those of one server, whatever the machine's are."""
    for name in ("AWS_PROFILE", "AWS_REGION", "AWS_NO_SIGN_REQUEST", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        if not with_credentials:
            monkeypatch.delenv(name, raising=False)
        elif "CARN_TEST_S3_ENDPOINT" not in os.environ:
            monkeypatch.setenv(name, "testing")


@dataclass(frozen=True)
class Bucket:
    """A bucket of the test's own. `uri` names something in it, `put` and `get` go round carn."""

    name: str
    client: Any

    def uri(self, key: str = "") -> str:
        return f"s3://{self.name}/{key}" if key else f"s3://{self.name}"

    def put(self, key: str, content: bytes | Path) -> str:
        body = content.read_bytes() if isinstance(content, Path) else content
        self.client.put_object(Bucket=self.name, Key=key, Body=body)
        return self.uri(key)

    def get(self, key: str) -> bytes:
        return self.client.get_object(Bucket=self.name, Key=key)["Body"].read()

    def list_keys(self) -> list[str]:
        found = self.client.list_objects_v2(Bucket=self.name)
        return [item["Key"] for item in found.get("Contents", [])]


@pytest.fixture
def s3(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """A fresh bucket on an object store that the environment names."""
    point_at(monkeypatch, s3_endpoint)
    client = boto3.client("s3", endpoint_url=s3_endpoint)
    bucket = Bucket(name=f"carn-{uuid.uuid4().hex[:12]}", client=client)
    client.create_bucket(Bucket=bucket.name)
    yield bucket
    for key in bucket.list_keys():
        client.delete_object(Bucket=bucket.name, Key=key)
    client.delete_bucket(Bucket=bucket.name)
    client.close()


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder, or an empty bucket."""
    if request.param == "local":
        return str(tmp_path)
    return str(request.getfixturevalue("s3").uri())


@dataclass(frozen=True)
class FaultyS3:
    """An object store behind a proxy that does `faults` wrong. `bucket` itself goes round it."""

    endpoint: str
    bucket: Bucket
    faults: Faults


@pytest.fixture
def faulty_s3(s3: Bucket, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyS3]:
    """A fresh bucket on an object store that the environment names and that fails on demand."""
    with run_proxy(s3_endpoint) as (endpoint, faults):
        point_at(monkeypatch, endpoint)
        yield FaultyS3(endpoint=endpoint, bucket=s3, faults=faults)


@dataclass
class StubS3:
    """An object store that serves what it is told to, counts, and misbehaves on demand.

    Attributes:
        objects: content by "bucket/key"; anything with `len` and slicing.
        etags: the tags of objects whose tag is not "stub".
        refuse_all: answer 403 to everything.
        num_cuts: how many more GET bodies stop half way, with the connection closed.
        delay_s: how long a GET takes at least.
        requests: (method, path, headers) of each request.
        body_bytes: sum of the bodies sent in answer to GET.
        most_at_once: the most GETs that were under way together.
    """

    endpoint: str
    objects: dict[str, Any] = field(default_factory=dict)
    etags: dict[str, str] = field(default_factory=dict)
    refuse_all: bool = False
    num_cuts: int = 0
    delay_s: float = 0.0
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    body_bytes: int = 0
    most_at_once: int = 0
    at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    is_over: threading.Event = field(default_factory=threading.Event)

    def count(self, method: str) -> int:
        return sum(request[0] == method for request in self.requests)


class _StubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    stub: StubS3

    def do_HEAD(self) -> None:
        self._answer(has_body=False)

    def do_GET(self) -> None:
        stub = self.stub
        with stub.lock:
            stub.at_once += 1
            stub.most_at_once = max(stub.most_at_once, stub.at_once)
        self._answer(has_body=True)
        with stub.lock:
            stub.at_once -= 1

    def _answer(self, *, has_body: bool) -> None:
        stub = self.stub
        name = self.path.split("?")[0].lstrip("/")
        with stub.lock:
            stub.requests.append((self.command, self.path, dict(self.headers)))
        if has_body:
            stub.is_over.wait(stub.delay_s)
        if stub.refuse_all:
            self._error(403, "AccessDenied", has_body=has_body)
            return
        if name not in stub.objects:
            self._error(404, "NoSuchKey", has_body=has_body)
            return
        content = stub.objects[name]
        start, end = 0, len(content)
        asked = self.headers.get("Range")
        if asked:
            first, last = asked.removeprefix("bytes=").split("-")
            start, end = int(first), min(int(last) + 1, end)
        self.send_response(206 if asked else 200)
        self.send_header("ETag", f'"{stub.etags.get(name, "stub")}"')
        self.send_header("Content-Length", str(end - start))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        self.end_headers()
        if not has_body:
            return
        with stub.lock:
            is_cut = stub.num_cuts > 0
            stub.num_cuts -= is_cut
        body = bytes(content[start : start + (end - start) // 2 if is_cut else end])
        with stub.lock:
            stub.body_bytes += len(body)
        self.wfile.write(body)
        self.close_connection = is_cut or self.close_connection

    def _error(self, status: int, code: str, *, has_body: bool) -> None:
        body = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body) if has_body else 0))
        self.end_headers()
        if has_body:
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def stub_s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[StubS3]:
    """A counting, misbehaving object store over HTTP that the environment names."""
    handler = type("Handler", (_StubHandler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # a client that hung up or was killed
    stub = StubS3(endpoint=f"http://127.0.0.1:{server.server_port}")
    handler.stub = stub
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    point_at(monkeypatch, stub.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    yield stub
    stub.is_over.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries of a request follow each other at once."""

    class Clock:
        time = staticmethod(time.time)
        sleep = staticmethod(lambda _seconds: None)

    monkeypatch.setattr("botocore.endpoint.time", Clock)
