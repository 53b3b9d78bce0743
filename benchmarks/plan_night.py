"""How long the nightly job takes to know what there is to do, with very many inputs in a bucket.

The store is a process of its own that answers listings, a thousand names each, after a while as a
store far away does. Half of the inputs have been super-resolved in earlier nights; the job finds
out which (`find_inputs`, `Night.judge`: all it does before it starts Ray). The floor lists inbox
and results with boto3 alone, one after the other, and makes nothing of them.

What is predicted: a request for each slide would take minutes (100,000 at 16 a time, 50 ms each:
more than five), so none may be made; what is left beside the listings is tens of microseconds a
name, and of results, whose names are known, sixteen stretches are listed at a time.
plan_over_listing <= 1.5.

Prints a line of JSON.

Examples:
  python benchmarks/plan_night.py
  python benchmarks/plan_night.py --done-share 1
  python benchmarks/plan_night.py --num-inputs 1000000
"""

import json
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

# `python benchmarks/plan_night.py` puts benchmarks/ on the path, not the folder above it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro

PAGE = 1000
SLIDE_BYTES = 700_000_000


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """How much there is to list."""

    num_inputs: int = 100_000
    """Slides of the inbox."""
    done_share: float = 0.5
    """Of them, those that were super-resolved before; each has five objects."""
    request_ms: float = 50.0
    """How long the store takes to answer."""


def main(benchmark: Benchmark) -> None:
    """Measure, and print."""
    from carn.models import build_model
    from carn.models.checkpoint import write_checkpoint
    from carn.upscaling.inputs import find_inputs
    from carn.upscaling.outbox import key_of
    from jobs.sr_config import SuperResolveJob
    from jobs.sr_night import Night, check_checkpoint, make_task

    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(
            folder,
            model=build_model("bicubic", scale=2),
            model_name="bicubic",
            training=None,
            step=None,
            dataset=None,
            metrics={},
        )
        job = SuperResolveJob(slides=("s3://lab/in",), checkpoint=folder, output="s3://lab/sr")
        checkpoint, halo_px = check_checkpoint(job)
        names = [f"in/2026-{n % 12 + 1:02d}/Case_{n:07d}.svs" for n in range(benchmark.num_inputs)]
        with serve(names, delay_s=benchmark.request_ms / 1e3) as store:
            inputs = find_inputs(job.slides)
            num_done = round(len(inputs) * benchmark.done_share)
            results = []
            for item in inputs[:num_done]:
                task = make_task(
                    job, item, checkpoint=checkpoint, halo_px=halo_px, output="s3://lab/sr"
                )
                base = f"sr/{item.name}"
                results += [f"{base}.tif", f"{base}.json", f"{base}.consistency.png"]
                key = key_of(item.name)
                results.append(f"sr/_state/done/{key}@{task.digest}.{SLIDE_BYTES}")
                results.append(f"sr/_state/claims/{key}.000001.json")
            store.send(results)
            store.recv()
            started = time.perf_counter()
            inputs = find_inputs(job.slides)
            found_s = time.perf_counter() - started
            night = Night(job, checkpoint=checkpoint, halo_px=halo_px, output="s3://lab/sr")
            night.judge(inputs)
            seconds = time.perf_counter() - started
            assert len(night.todo) == len(inputs) - num_done, "some were judged wrongly"
            floor_s = list_alone(["in/", "sr/"])
    print(
        json.dumps(
            {
                "benchmark": "plan_night",
                "inputs": len(inputs),
                "objects": len(inputs) + len(results),
                "find_s": round(found_s, 2),
                "plan_s": round(seconds, 2),
                "listing_s": round(floor_s, 2),
                "plan_over_listing": round(seconds / floor_s, 2),
            }
        )
    )


def list_alone(prefixes: Sequence[str]) -> float:
    """Seconds that the listings take by themselves."""
    import boto3

    client = boto3.client("s3")
    started = time.perf_counter()
    for prefix in prefixes:
        for _ in client.get_paginator("list_objects_v2").paginate(Bucket="lab", Prefix=prefix):
            pass
    return time.perf_counter() - started


@contextmanager
def serve(names: Sequence[str], *, delay_s: float) -> Iterator[Connection]:
    """A store with these objects, and those that are sent to it; the environment names it."""
    ours, its = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=run_store, args=(its, names, delay_s), daemon=True
    )
    process.start()
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ours.recv()}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        yield ours
    finally:
        process.terminate()
        process.join()


def run_store(pipe: Connection, names: Sequence[str], delay_s: float) -> None:
    """Answer ListObjectsV2; and 404 to all else."""
    every = sorted(names)

    def page(query: dict[str, list[str]]) -> bytes:
        prefix = query["prefix"][0]
        after = query.get("continuation-token") or query.get("start-after") or [""]
        start = max(bisect_left(every, prefix), bisect_right(every, after[0]))
        end = bisect_left(every, prefix + chr(sys.maxunicode))
        return page_of(every[start : min(start + PAGE, end)], is_last=start + PAGE >= end)

    class Store(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            time.sleep(delay_s)
            body = page(parse_qs(urlsplit(self.path).query))
            self.send_response(200)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_HEAD(self) -> None:
            time.sleep(delay_s)
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Store)
    pipe.send(server.server_port)

    def add() -> None:
        nonlocal every
        every = sorted([*every, *pipe.recv()])
        pipe.send("ready")

    threading.Thread(target=add, daemon=True).start()
    server.serve_forever()


def page_of(keys: Sequence[str], *, is_last: bool) -> bytes:
    """A page of a listing."""
    rows = "".join(
        f"<Contents><Key>{key}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
        f'<ETag>"{hash(key) & 0xFFFFFFFF:032x}"</ETag><Size>{SLIDE_BYTES}</Size></Contents>'
        for key in keys
    )
    after = "" if is_last else f"<NextContinuationToken>{keys[-1]}</NextContinuationToken>"
    return (
        '<?xml version="1.0" encoding="UTF-8"?>'
        '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"<IsTruncated>{str(not is_last).lower()}</IsTruncated>{after}{rows}</ListBucketResult>"
    ).encode()


if __name__ == "__main__":
    main(tyro.cli(Benchmark, description=__doc__))
