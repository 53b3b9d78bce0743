"""The paper's lists are fetched whole or not at all, to a disk or an object store."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from carn import storage
from carn.bcsr import ncrf
from carn.bcsr.ncrf import fetch_lists
from carn.errors import CoordinateError, StorageError

TUMOR = b"Tumor_001,70000,134000\nTumor_001,70100,134100\n"
NORMAL = b"Normal_001,5000,6000\n"


class Publisher(BaseHTTPRequestHandler):
    """Serves `content`, of which it may keep back the end."""

    content: ClassVar[dict[str, bytes]] = {}
    kept_back: ClassVar[int] = 0
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        content = self.content.get(self.path)
        if content is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) - self.kept_back])

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    lists = {"/coords/tumor_train.txt": TUMOR, "/coords/normal_train.txt": NORMAL}
    monkeypatch.setattr(Publisher, "content", lists)
    monkeypatch.setattr(Publisher, "asked", [])
    monkeypatch.setattr(Publisher, "kept_back", 0)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with ThreadingHTTPServer(("127.0.0.1", 0), Publisher) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/coords"
        server.shutdown()


def test_both_lists_are_put_there_once(root: str, address: str) -> None:
    folder = storage.join(root, "lists")
    uris = fetch_lists(folder, address=address)
    assert [storage.read_bytes(uri) for uri in uris] == [TUMOR, NORMAL]
    assert [storage.name_of(uri) for uri in uris] == list(ncrf.LISTS)
    storage.write_bytes(uris[0], b"Tumor_002,1000,1000\n")  # somebody's own choice
    assert fetch_lists(folder, address=address) == uris
    assert storage.read_bytes(uris[0]) == b"Tumor_002,1000,1000\n"
    assert len(Publisher.asked) == 2


def test_a_list_that_breaks_off_is_not_kept(
    root: str, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Publisher, "kept_back", 5)
    with pytest.raises(StorageError, match=r"tumor_train\.txt: could not be fetched .*run this"):
        fetch_lists(root, address=address)
    assert not storage.list_objects(root)
    monkeypatch.setattr(Publisher, "kept_back", 0)
    assert len(fetch_lists(root, address=address)) == 2


def test_what_is_no_list_is_not_kept(root: str, address: str) -> None:
    Publisher.content["/coords/normal_train.txt"] = b"<html>Sign in</html>"
    with pytest.raises(CoordinateError, match=r"normal_train\.txt gave no list of coordinates"):
        fetch_lists(root, address=address)
    del Publisher.content["/coords/normal_train.txt"]
    with pytest.raises(StorageError, match="404"):
        fetch_lists(root, address=address)
    assert [storage.name_of(item.uri) for item in storage.list_objects(root)] == ["tumor_train.txt"]


def test_nobody_there(root: str) -> None:
    with pytest.raises(StorageError, match="could not be fetched"):
        fetch_lists(root, address="http://127.0.0.1:9/coords")


def test_on_the_command_line(
    root: str, address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ncrf.fetch_lists, "__kwdefaults__", {"address": address})
    assert ncrf.main(root) == 0
    assert len(storage.list_objects(root)) == 2
    assert ncrf.main("ftp://lab/lists") == 2
    assert "ncrf: 'ftp://lab/lists'" in capsys.readouterr().err
