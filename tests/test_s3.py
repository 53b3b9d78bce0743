"""The connection to an object store: credentials, retries, and what its errors say."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from carn import s3 as s3_connection
from carn import storage
from carn.errors import AccessDeniedError, StorageError

REPOSITORY = Path(__file__).parents[1]


def authorizations(stub: Any) -> list[str | None]:
    return [headers.get("Authorization") for _, _, headers in stub.requests]


@pytest.mark.parametrize("how", ["no credentials", "AWS_NO_SIGN_REQUEST"])
def test_anonymous_access_sends_no_signature(
    stub_s3: Any, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    stub_s3.objects["b/k"] = b"public"
    if how == "no credentials":
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    else:
        monkeypatch.setenv("AWS_NO_SIGN_REQUEST", "true")
    assert storage.read_bytes("s3://b/k") == b"public"
    assert authorizations(stub_s3) == [None]


@pytest.mark.parametrize("is_said", [False, True])
def test_who_pays_is_said_where_it_is_asked_for(
    is_said: bool, stub_s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub_s3.objects["b/k"] = b"dear"
    if is_said:
        monkeypatch.setenv(s3_connection.REQUEST_PAYER, "requester")
    assert storage.read_bytes("s3://b/k") == b"dear"
    assert storage.stat("s3://b/k").size == 4
    said = {headers.get("x-amz-request-payer") for _, _, headers in stub_s3.requests}
    assert said == {"requester" if is_said else None}


def test_credentials_sign(stub_s3: Any) -> None:
    stub_s3.objects["b/k"] = b"private"
    assert storage.read_bytes("s3://b/k") == b"private"
    assert all("AWS4-HMAC-SHA256" in str(value) for value in authorizations(stub_s3))


def test_refused_credentials_say_what_to_check(stub_s3: Any) -> None:
    stub_s3.refuse_all = True
    calls: list[Callable[[str], Any]] = [
        storage.stat,
        storage.read_bytes,
        storage.open_source,
        storage.is_file,
        storage.list_objects,
    ]
    for call in calls:
        with pytest.raises(AccessDeniedError, match=r"s3://b/k: access denied.*AWS_ACCESS_KEY_ID"):
            call("s3://b/k")


@pytest.mark.parametrize("code", ["SecondLevelDomainForbidden", "VirtualHostDomainRequired"])
def test_a_store_of_virtual_hosts_is_named(code: str, faulty_s3: Any) -> None:
    faulty_s3.faults.add("refuse", times=100, status=403, code=code)
    with pytest.raises(StorageError, match=rf"\({code}\): set AWS_VIRTUAL_HOSTING=true"):
        storage.list_objects(faulty_s3.bucket.uri("x"))


@pytest.mark.parametrize(
    ("is_set", "url"),
    [("", "http://store.example:9000/lab/k"), ("TRUE", "http://lab.store.example:9000/k")],
)
def test_the_bucket_goes_into_the_hosts_name(
    is_set: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://store.example:9000")
    monkeypatch.setenv("AWS_VIRTUAL_HOSTING", is_set)
    client = s3_connection.s3_client()
    signed = client.generate_presigned_url("get_object", Params={"Bucket": "lab", "Key": "k"})
    assert signed.split("?")[0] == url


def test_expired_credentials_say_so(faulty_s3: Any) -> None:
    uri = faulty_s3.bucket.uri("x")
    faulty_s3.faults.add("refuse", times=100, status=400, code="ExpiredToken")
    calls: list[Callable[[str], Any]] = [
        storage.list_objects,
        storage.read_bytes,
        lambda uri: storage.write_bytes(uri, b"x"),
    ]
    for call in calls:
        with pytest.raises(AccessDeniedError, match=r"expired \(ExpiredToken\).*AWS_SESSION_TOKEN"):
            call(uri)
    with pytest.raises(StorageError, match="answered 400; expired credentials"):
        storage.stat(uri)
    # None is asked again: time makes it no better.
    assert max(faulty_s3.faults.counts.values()) == 1


@pytest.mark.skipif("CARN_TEST_S3_ENDPOINT" not in os.environ, reason="moto looks at no secret")
def test_a_wrong_secret_is_refused_by_a_real_store(
    s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    for call in (storage.stat, storage.list_objects):
        with pytest.raises(AccessDeniedError, match=r"access denied.*AWS_SECRET_ACCESS_KEY"):
            call(s3.uri("x"))


@pytest.mark.usefixtures("no_waiting")
def test_an_unreachable_store_is_named(stub_s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # the discard port: nobody there
    calls: list[Callable[[str], Any]] = [storage.stat, storage.read_bytes, storage.list_objects]
    for call in calls:
        with pytest.raises(StorageError, match=r"s3://b/k: .*127\.0\.0\.1:9.*AWS_ENDPOINT_URL"):
            call("s3://b/k")
    assert not stub_s3.requests


def test_a_body_that_breaks_off_is_asked_for_again(stub_s3: Any) -> None:
    content = bytes(range(256)) * 4000
    stub_s3.objects["b/k"] = content
    stub_s3.num_cuts = 2
    assert storage.read_bytes("s3://b/k") == content
    source = storage.open_source("s3://b/k")
    stub_s3.num_cuts = 3
    ranges = [(0, 100), (300_000, 20_000), (900_000, 50_000)]
    expected = [content[start : start + length] for start, length in ranges]
    assert source.read_ranges(ranges) == expected


def test_a_body_that_always_breaks_off_is_one_error(stub_s3: Any, tmp_path: Path) -> None:
    stub_s3.objects["b/k"] = bytes(100_000)
    stub_s3.num_cuts = 1000
    with pytest.raises(StorageError, match="s3://b/k"):
        storage.read_bytes("s3://b/k")
    assert stub_s3.count("GET") == s3_connection.GET_ATTEMPTS
    with pytest.raises(StorageError, match="s3://b/k"):
        storage.download("s3://b/k", tmp_path / "copy")
    assert list(tmp_path.iterdir()) == []


def test_download_survives_a_break_and_is_whole(stub_s3: Any, tmp_path: Path) -> None:
    content = bytes(range(256)) * 4000
    stub_s3.objects["b/k"] = content
    stub_s3.num_cuts = 1
    storage.download("s3://b/k", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_download_to_nowhere_is_a_storage_error(s3: Any, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no such"):
        storage.download(s3.put("k", b"x"), tmp_path / "no" / "copy")


def test_another_endpoint_takes_effect_at_once(
    stub_s3: Any, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub_s3.objects["b/k"] = b"x"
    assert storage.read_bytes("s3://b/k") == b"x"
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    with pytest.raises(StorageError):
        storage.read_bytes("s3://b/k")


def test_a_forked_process_reads_too(s3: Any) -> None:
    uri = s3.put("k", b"content")
    assert storage.read_bytes(uri) == b"content"
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if storage.read_bytes(uri) == b"content" else 1)
        except BaseException:
            os._exit(2)
    deadline = time.monotonic() + 20
    done, status = os.waitpid(child, os.WNOHANG)
    while not done and time.monotonic() < deadline:
        time.sleep(0.02)
        done, status = os.waitpid(child, os.WNOHANG)
    if not done:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert done
    assert status == 0


def test_a_profile_that_does_not_exist_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "no-such-profile")
    with pytest.raises(StorageError, match=r"no-such-profile.*check AWS_PROFILE"):
        storage.stat("s3://bucket/key")


def test_an_endpoint_that_is_no_url_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:9000")
    monkeypatch.setenv("AWS_NO_SIGN_REQUEST", "true")
    with pytest.raises(StorageError, match=r"localhost:9000.*check AWS_ENDPOINT_URL"):
        storage.stat("s3://bucket/key")


# -------------------------------------------------------------------------------------- retries


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize(
    "kind",
    [
        *("refuse", "refuse_after", "drop", "reset", "cut_upload", "cut_answer", "lose_answer"),
    ],
)
def test_requests_of_every_kind_outlive_faults(faulty_s3: Any, kind: Any) -> None:
    uri = faulty_s3.bucket.uri("a/b.bin")
    num_faults = s3_connection.GET_ATTEMPTS - 1
    for operation in ("PutObject", "HeadObject", "GetObject", "ListObjects", "DeleteObject"):
        faulty_s3.faults.add(kind, operation, times=num_faults)
    content = bytes(range(256)) * 400
    storage.write_bytes(uri, content)
    assert storage.stat(uri).size == len(content)
    assert storage.read_bytes(uri) == content
    assert [item.uri for item in storage.list_objects(faulty_s3.bucket.uri())] == [uri]
    storage.delete([uri])
    assert faulty_s3.bucket.list_keys() == []
    assert faulty_s3.faults.met == {kind: 5 * num_faults}


@pytest.mark.usefixtures("no_waiting")
def test_an_outage_under_many_requests_spends_nobodys_retries(faulty_s3: Any) -> None:
    uris = [faulty_s3.bucket.put(f"{number}", b"x") for number in range(16)]
    faulty_s3.faults.add("drop", times=16 * (s3_connection.REQUEST_ATTEMPTS + 1))
    with ThreadPoolExecutor(16) as pool:
        for uri, found in [(uri, pool.submit(storage.stat, uri)) for uri in uris]:
            with contextlib.suppress(StorageError):
                assert found.result().uri == uri
    # Each request after that may still be sent again as often as the first was.
    faulty_s3.faults.clear()
    for uri in uris:
        faulty_s3.faults.add("drop", times=s3_connection.REQUEST_ATTEMPTS - 1)
        assert storage.stat(uri).size == 1


@pytest.mark.usefixtures("no_waiting")
def test_what_is_no_matter_of_time_is_not_asked_again(faulty_s3: Any) -> None:
    faulty_s3.faults.add("refuse", times=100, status=400, code="InvalidRequest")
    with pytest.raises(StorageError, match="InvalidRequest"):
        storage.list_objects(faulty_s3.bucket.uri("x"))
    assert faulty_s3.faults.counts == {"ListObjects": 1}
    faulty_s3.faults.clear()
    faulty_s3.faults.add("refuse", times=100)
    with pytest.raises(StorageError, match="SlowDown"):
        storage.list_objects(faulty_s3.bucket.uri("x"))
    assert faulty_s3.faults.counts == {"ListObjects": s3_connection.REQUEST_ATTEMPTS}


def test_waits_grow_and_span_a_restart_of_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    class Clock:
        time = staticmethod(time.time)
        sleep = staticmethod(waits.append)

    monkeypatch.setattr("botocore.endpoint.time", Clock)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_NO_SIGN_REQUEST", "true")
    with pytest.raises(StorageError, match="cannot be reached"):
        storage.stat("s3://bucket/key")
    assert len(waits) == s3_connection.REQUEST_ATTEMPTS - 1
    assert 7 < sum(waits) < 16
    assert waits == sorted(waits)


def test_a_process_of_its_own_goes_through_the_faults_too(faulty_s3: Any) -> None:
    uri = faulty_s3.bucket.put("a", b"content")
    faulty_s3.faults.add("refuse", "GetObject", target=r"/a$", times=1)
    script = f"from carn import storage; print(storage.read_bytes({uri!r}).decode())"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=True)
    assert done.stdout.split() == [b"content"]
    assert faulty_s3.faults.counts == {"GetObject": 2}
