"""The metrics of the jobs: one table of their names, and the one way to count them.

Ray exports them on the metrics port of every node, with `ray_` before the name and labels of its
own (SessionName, NodeAddress, WorkerId, ...) beside those of the table. Labels are few, and
so are their values: what a slide, a file or a host is called stays out.
"""

import atexit
import functools
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import ray
from ray.util import metrics

from carn.errors import CarnError
from carn.s3 import s3_client, s3_errors

# What Ray puts before every name.
EXPORT_PREFIX = "ray_"
# Seconds between two times that a gauge is told. Ray forgets one that it has not heard of for two
# of its reports, which it makes every 10 s.
GAUGE_EVERY_S = 5.0

Key = tuple[str, tuple[tuple[str, str], ...]]


@dataclass(frozen=True, kw_only=True)
class MetricSpec:
    """A metric.

    Attributes:
        name: as the jobs call it. A counter's ends with `_total`, after its unit where it has one.
        kind: a counter only grows, within one process; a gauge is how things stand.
        help: what it counts.
        labels: the names of its labels, and of each the values it may have; none listed for those
            that others decide (operations of S3, stages of a job, networks).
    """

    name: str
    kind: Literal["counter", "gauge"]
    help: str
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def exported_name(self) -> str:
        """As Prometheus has it."""
        return EXPORT_PREFIX + self.name


STATUSES = ("done", "skipped", "failed", "unfinished", "claimed", "conflict")

_TABLE = (
    # super_resolve.py, its driver
    MetricSpec(
        name="carn_sr_slides_total",
        kind="counter",
        help="Slides that reached their final state in this run.",
        labels={"status": STATUSES},
    ),
    MetricSpec(
        name="carn_sr_slides_left",
        kind="gauge",
        help="Slides of this run that have not reached their final state yet.",
    ),
    MetricSpec(
        name="carn_sr_input_bytes_total",
        kind="counter",
        help="Size of the input files of slides that were finished.",
    ),
    MetricSpec(
        name="carn_sr_output_bytes_total",
        kind="counter",
        help="Size of finished slides.",
    ),
    # super_resolve.py, its actors
    MetricSpec(
        name="carn_sr_blocks_total",
        kind="counter",
        help="Blocks that were begun, by what became of them: on storage, or failed.",
        labels={"outcome": ("stored", "failed")},
    ),
    MetricSpec(
        name="carn_sr_lr_pixels_total",
        kind="counter",
        help="LR pixels of blocks that are on storage.",
    ),
    MetricSpec(
        name="carn_sr_written_bytes_total",
        kind="counter",
        help="Encoded bytes of blocks that are on storage.",
    ),
    MetricSpec(
        name="carn_sr_stage_seconds_total",
        kind="counter",
        help="Seconds of blocks in each stage; encoding and uploading go on beside the rest.",
        labels={"stage": ("read", "infer", "encode", "upload", "wait")},
    ),
    MetricSpec(
        name="carn_sr_actor_seconds_total",
        kind="counter",
        help="Seconds of the actors' own threads: working, waiting for blocks, or for the last "
        "blocks to be on storage.",
        labels={
            "role": ("reader", "upscaler"),
            "state": ("working", "waiting", "writing"),
        },
    ),
    # build_bcsr.py
    MetricSpec(
        name="carn_bcsr_tiles_total",
        kind="counter",
        help="Tiles by what became of them; those that an earlier build measured count too.",
        labels={"outcome": ("measured", "failed", "written")},
    ),
    MetricSpec(
        name="carn_bcsr_written_bytes_total",
        kind="counter",
        help="Bytes of the shards that were written.",
    ),
    # every stage that jobs/ray_stage.py runs
    MetricSpec(
        name="carn_stage_units_total",
        kind="counter",
        help="Units of work that are done, by stage.",
        labels={"stage": ()},
    ),
    MetricSpec(
        name="carn_stage_units_left",
        kind="gauge",
        help="Units of work that are not done yet, by stage.",
        labels={"stage": ()},
    ),
    # train.py and tune.py, the first worker of each run
    MetricSpec(
        name="carn_train_samples_total",
        kind="counter",
        help="Patches trained on, by all workers of a run together.",
        labels={"model": (), "scale": ()},
    ),
    MetricSpec(
        name="carn_train_steps_done",
        kind="gauge",
        help="Updates that the run has made, those before it was continued included.",
        labels={"model": (), "scale": ()},
    ),
    MetricSpec(
        name="carn_train_loss",
        kind="gauge",
        help="Mean loss of the updates since the last line of metrics.csv.",
        labels={"model": (), "scale": ()},
    ),
    MetricSpec(
        name="carn_train_validation_psnr_db",
        kind="gauge",
        help="PSNR of the last validation.",
        labels={"model": (), "scale": ()},
    ),
    # object storage, all processes of build_bcsr.py and super_resolve.py
    MetricSpec(
        name="carn_s3_requests_total",
        kind="counter",
        help="Requests sent to object storage, repeated ones included.",
        labels={"operation": ()},
    ),
    MetricSpec(
        name="carn_s3_sent_bytes_total",
        kind="counter",
        help="Bytes of the bodies of those requests.",
    ),
    MetricSpec(
        name="carn_s3_received_bytes_total",
        kind="counter",
        help="Bytes of the bodies of the answers, as their headers announce them.",
    ),
)
METRICS = {spec.name: spec for spec in _TABLE}


class Meters:
    """Counts in Ray's metrics. What is counted before Ray is there is counted once it is.

    Gauges stand as they were set for as long as the process lives.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._made: dict[str, Any] = {}
        self._kept: dict[Key, float] = {}
        self._gauges: dict[Key, float] = {}
        self._teller: threading.Thread | None = None
        self._is_over = threading.Event()

    def add(self, name: str, value: float = 1, **labels: str) -> None:
        """Add to a counter of the table; 0 adds nothing.

        Raises:
            ValueError: there is no such counter, or its labels are others.
        """
        self._note(_checked(name, "counter", labels), value, labels)

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge of the table.

        Raises:
            ValueError: there is no such gauge, or its labels are others.
        """
        self._note(_checked(name, "gauge", labels), value, labels)

    def _note(self, spec: MetricSpec, value: float, labels: dict[str, str]) -> None:
        key: Key = (spec.name, tuple(sorted(labels.items())))
        with self._lock:
            before = self._kept.get(key, 0.0) if spec.kind == "counter" else 0.0
            self._kept[key] = before + value
            if not ray.is_initialized():
                return
            kept, self._kept = self._kept, {}
            for (kept_name, kept_labels), total in kept.items():
                metric = self._metric(METRICS[kept_name])
                if METRICS[kept_name].kind == "gauge":
                    metric.set(total, tags=dict(kept_labels))
                    self._gauges[kept_name, kept_labels] = total
                    self._begin_telling()
                elif total > 0:  # Ray's counters take nothing else
                    metric.inc(total, tags=dict(kept_labels))

    def _begin_telling(self) -> None:
        if self._teller is None:
            self._teller = threading.Thread(target=self._tell, daemon=True, name="gauges")
            self._teller.start()
            # Nobody must call Ray while the interpreter goes down.
            atexit.register(self.close)

    def _tell(self) -> None:
        while not self._is_over.wait(GAUGE_EVERY_S):
            with self._lock:
                if ray.is_initialized():
                    for (name, labels), value in self._gauges.items():
                        self._metric(METRICS[name]).set(value, tags=dict(labels))

    def close(self) -> None:
        """Tell of the gauges no more."""
        self._is_over.set()
        if self._teller is not None:
            self._teller.join()

    def _metric(self, spec: MetricSpec) -> Any:
        if spec.name not in self._made:
            make = metrics.Counter if spec.kind == "counter" else metrics.Gauge
            self._made[spec.name] = make(spec.name, spec.help, tuple(spec.labels))
        return self._made[spec.name]


def _checked(name: str, kind: str, labels: Mapping[str, str]) -> MetricSpec:
    spec = METRICS.get(name)
    if spec is None or spec.kind != kind:
        raise ValueError(f"{name!r} is no {kind} of the table of metrics; add it there")
    if labels.keys() != spec.labels.keys():
        raise ValueError(f"{name} has the labels {sorted(spec.labels)}, not {sorted(labels)}")
    for label, value in labels.items():
        if spec.labels[label] and value not in spec.labels[label]:
            raise ValueError(f"{name}: {label}={value!r} must be one of {spec.labels[label]}")
    return spec


@functools.cache
def meters() -> Meters:
    """This process's meters."""
    return Meters()


# ------------------------------------------------------------------------------- object storage


def watch_s3(*uris: str) -> None:
    """Count this process's requests to object storage from now on, if any of the URIs lies there.

    May be called again; texts that hold URIs do as well.
    """
    if not any("s3://" in uri for uri in uris):
        return
    try:
        with s3_errors(uris[0]):
            events = s3_client().meta.events
    except CarnError:
        return  # whoever reads or writes meets the same, and says so
    events.register("before-send.s3", _count_request, unique_id="carn-requests")
    events.register("response-received.s3", _count_answer, unique_id="carn-answers")


def _count_request(*, request: Any, event_name: str, **_: Any) -> None:
    meters().add("carn_s3_requests_total", operation=event_name.rpartition(".")[2])
    meters().add("carn_s3_sent_bytes_total", _length(request.headers))


def _count_answer(*, parsed_response: Mapping[str, Any] | None, event_name: str, **_: Any) -> None:
    # The answer to a HEAD announces the object's length, and has no body.
    if parsed_response is not None and not event_name.endswith(".HeadObject"):
        headers = parsed_response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
        meters().add("carn_s3_received_bytes_total", _length(headers))


def _length(headers: Mapping[str, Any]) -> float:
    value = headers.get("Content-Length") or headers.get("content-length") or 0
    return float(value.decode() if isinstance(value, bytes) else value)


# ------------------------------------------------------------------------------------ training


class TrainingMeters:
    """Counts the events of `carn.training.loop.train`, which only its first worker tells."""

    def __init__(self, *, model: str, scale: int, batch_size: int) -> None:
        """Nothing is counted before the first event."""
        self._labels = {"model": model, "scale": str(scale)}
        self._batch_size = batch_size
        self._step = 0

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Count an event."""
        step, kind = int(event["step"]), event["kind"]
        if kind == "step":
            samples = (step - self._step) * self._batch_size
            meters().add("carn_train_samples_total", samples, **self._labels)
            meters().set("carn_train_loss", float(event["loss"]), **self._labels)
        elif kind == "validation":
            psnr = float(event["validation_psnr"])
            meters().set("carn_train_validation_psnr_db", psnr, **self._labels)
        # The first event says where a run goes on.
        self._step = step
        meters().set("carn_train_steps_done", step, **self._labels)
