"""A proxy in front of an object store that misbehaves on demand and counts.

It forwards requests as the client sent and signed them, so a server that verifies signatures takes
them. Processes that inherit the environment of a test (AWS_ENDPOINT_URL) go through it, too.
"""

import http.client
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

# What happens to a request:
#   refuse        an error answer (503 SlowDown unless told otherwise); the server sees nothing
#   error_in_200  a 200 answer with the error in its body; the server sees nothing
#   drop          the connection closes without an answer; the server sees nothing
#   reset         the connection is reset (RST); the server sees nothing
#   refuse_after  the server does it, and an error is answered (500 InternalError)
#   cut_upload    the connection closes half way through the request's body
#   cut_answer    the server does it, half of its answer arrives: of the body, or, where there is
#                 none, of the first line
#   lose_answer   the server does it, the connection closes without an answer
#   delay         the server does it, after a while
Kind = Literal[
    *("refuse", "refuse_after", "error_in_200", "drop", "reset", "cut_upload", "cut_answer"),
    *("lose_answer", "delay"),
]

# How each operation of S3 looks: method, whether it names an object, what its query has.
# The first that fits is it.
# Source: https://docs.aws.amazon.com/AmazonS3/latest/API/API_Operations_Amazon_Simple_Storage_Service.html
OPERATIONS: list[tuple[str, str, bool, set[str]]] = [
    ("CreateMultipartUpload", "POST", True, {"uploads"}),
    ("CompleteMultipartUpload", "POST", True, {"uploadId"}),
    ("UploadPart", "PUT", True, {"partNumber", "uploadId"}),
    ("AbortMultipartUpload", "DELETE", True, {"uploadId"}),
    ("ListParts", "GET", True, {"uploadId"}),
    ("ListMultipartUploads", "GET", False, {"uploads"}),
    ("ListObjects", "GET", False, set()),
    ("PutObject", "PUT", True, set()),
    ("GetObject", "GET", True, set()),
    ("HeadObject", "HEAD", True, set()),
    ("DeleteObject", "DELETE", True, set()),
]
_HOP_BY_HOP = {"connection", "transfer-encoding", "expect", "keep-alive", "content-length"}


def operation_of(method: str, target: str) -> str:
    """The S3 operation of a path-style request; "other" where it is none of the above."""
    parts = urlsplit(target)
    query = parse_qs(parts.query, keep_blank_values=True)
    has_key = "/" in parts.path.strip("/")
    for name, its_method, its_key, its_query in OPERATIONS:
        if (method, has_key) == (its_method, its_key) and its_query <= query.keys():
            return name
    return "other"


@dataclass
class Fault:
    """One rule: what happens to the next requests that fit."""

    kind: Kind
    operation: str
    target: re.Pattern[str]
    times: int
    status: int
    code: str
    delay_s: float


@dataclass
class Faults:
    """What a proxy is to do wrong, and what it has seen.

    Attributes:
        counts: requests that arrived, by operation ("UploadPart"), repetitions included.
        requests: (operation, path and query) of each, in order.
        met: how many requests each kind of fault has hit.
    """

    counts: Counter[str] = field(default_factory=Counter)
    requests: list[tuple[str, str]] = field(default_factory=list)
    met: Counter[str] = field(default_factory=Counter)
    rules: list[Fault] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    is_over: threading.Event = field(default_factory=threading.Event)

    def add(
        self,
        kind: Kind,
        operation: str = ".*",
        *,
        target: str = "",
        times: int = 1,
        status: int = 503,
        code: str = "SlowDown",
        delay_s: float = 0.0,
    ) -> None:
        """Do this to the next `times` requests.

        Args:
            kind: see above.
            operation: pattern of the whole name of an S3 operation ("UploadPart").
            target: pattern found anywhere in path and query ("partNumber=3&").
            times: how many requests; several rules take turns in the order they were added.
            status, code: of the answer of "refuse" and "error_in_200".
            delay_s: of "delay".
        """
        assert operation == ".*" or any(re.fullmatch(operation, row[0]) for row in OPERATIONS)
        rule = Fault(kind, operation, re.compile(target), times, status, code, delay_s)
        with self.lock:
            self.rules.append(rule)

    def clear(self) -> None:
        """Forget every rule and every count."""
        with self.lock:
            self.rules.clear()
            self.counts.clear()
            self.requests.clear()
            self.met.clear()

    def take(self, operation: str, target: str) -> Fault | None:
        """Note a request; returns what is to happen to it."""
        with self.lock:
            self.counts[operation] += 1
            self.requests.append((operation, target))
            for rule in self.rules:
                if (
                    rule.times > 0
                    and re.fullmatch(rule.operation, operation)
                    and rule.target.search(target)
                ):
                    rule.times -= 1
                    self.met[rule.kind] += 1
                    return rule
        return None


class _Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    faults: Faults
    upstream: str

    def _serve(self) -> None:
        fault = self.faults.take(operation_of(self.command, self.path), self.path)
        kind = fault.kind if fault else None
        size = int(self.headers.get("Content-Length") or 0)
        if kind == "cut_upload":
            self.rfile.read(size // 2)
            self.close_connection = True
            return
        body = self.rfile.read(size)
        if kind == "drop":
            self.close_connection = True
            return
        if kind == "reset":
            # Closed at once, with what lingers thrown away: the client gets a RST.
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.rfile.close()
            self.wfile.close()
            self.connection.close()
            raise ConnectionAbortedError("by order")
        if fault and kind in ("refuse", "error_in_200"):
            error = f"<Error><Code>{fault.code}</Code><Message>by order</Message></Error>"
            status = fault.status if kind == "refuse" else 200
            headers = [("Content-Type", "application/xml")]
            self.wfile.write(self._answer(status, "By order", headers, error.encode()))
            return
        if fault and kind == "delay":
            self.faults.is_over.wait(fault.delay_s)
        answer = self._forward(body)
        if kind == "lose_answer":
            self.close_connection = True
            return
        if kind == "refuse_after":
            text = b"<Error><Code>InternalError</Code><Message>by order</Message></Error>"
            answer = self._answer(500, "By order", [("Content-Type", "application/xml")], text)
        if kind == "cut_answer":
            head = answer.index(b"\r\n\r\n") + 4
            # Not half of the headers: http.client takes those that came for all.
            end = head + (len(answer) - head) // 2 if len(answer) > head else 10
            answer = answer[:end]
            self.close_connection = True
        self.wfile.write(answer)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve

    def _forward(self, body: bytes) -> bytes:
        connection = http.client.HTTPConnection(self.upstream, timeout=60)
        try:
            # The Host header stays that of the proxy: it is part of what the client signed.
            connection.putrequest(
                self.command, self.path, skip_host=True, skip_accept_encoding=True
            )
            for name, value in self.headers.items():
                if name.lower() not in _HOP_BY_HOP:
                    connection.putheader(name, value)
            if "Content-Length" in self.headers:
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            found = connection.getresponse()
            content = found.read()
            headers = [
                (name, value)
                for name, value in found.getheaders()
                if name.lower() not in _HOP_BY_HOP
            ]
            if self.command == "HEAD":
                headers.append(("Content-Length", found.headers.get("Content-Length", "0")))
            return self._answer(found.status, found.reason, headers, content)
        finally:
            connection.close()

    def _answer(
        self, status: int, reason: str, headers: list[tuple[str, str]], body: bytes
    ) -> bytes:
        lines = [f"HTTP/1.1 {status} {reason}", *(f"{name}: {value}" for name, value in headers)]
        if self.command != "HEAD" and status not in (204, 304):
            lines.append(f"Content-Length: {len(body)}")
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + body

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@contextmanager
def run_proxy(endpoint: str) -> Iterator[tuple[str, Faults]]:
    """A proxy in front of `endpoint` (http only): its own endpoint, and what it is to do wrong."""
    faults = Faults()
    upstream = urlsplit(endpoint).netloc
    handler = type("Handler", (_Proxy,), {"faults": faults, "upstream": upstream})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client hung up
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", faults
    finally:
        faults.is_over.set()
        server.shutdown()
        server.server_close()
        thread.join()
