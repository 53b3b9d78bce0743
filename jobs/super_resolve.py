"""Super-resolve whole slides: slides + checkpoint -> pyramidal slides of `scale` times the px.

Made to run every night over the same inbox: what was done before is skipped, a bad slide is
reported and ends nothing, a run that was stopped or killed is continued by the next one. A slide is
committed whole or not at all. Output: <name>.tif (or .ome.zarr) for each slide, with <name>.json
and <name>.consistency.png beside it, and runs/<id>/ with summary.json, failures.csv, slides.jsonl,
report.html.

Exit status: 0 when nothing failed, 1 when a slide or the report did, 2 when the job could not
begin, 130 when it was stopped by hand.

Examples:
  python jobs/super_resolve.py --slides inbox/ --checkpoint runs/carn-x2 --output sr/
  python jobs/super_resolve.py --slides 's3://lab/2026-*/*.svs' --checkpoint s3://lab/runs/carn-x2 \
      --output s3://lab/sr --deadline 06:00
  ray job submit --working-dir . -- python jobs/super_resolve.py --slides s3://lab/incoming \
      --checkpoint s3://lab/runs/carn-x2 --output s3://lab/sr --gpus-per-actor 0.5
"""

import json
import logging
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

# `python jobs/super_resolve.py` puts jobs/ on the path, not the folder that holds carn/ and jobs/.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro

from carn import storage
from carn.errors import CarnError
from carn.log_lines import start_logging
from carn.s3 import REQUEST_PAYER
from carn.upscaling.inputs import find_inputs
from jobs.sr_config import SuperResolveJob
from jobs.sr_night import Night, check_checkpoint
from jobs.sr_tally import slide_logger
from jobs.stopping import stopped_by_sigterm

logger = logging.getLogger("super_resolve")


def main(job: SuperResolveJob) -> int:
    """Super-resolve; returns the process's exit status."""
    _begin_log(job.run.log_format)
    if job.run.request_payer:
        os.environ[REQUEST_PAYER] = "requester"
    checkpoint, halo_px = check_checkpoint(job)
    inputs = find_inputs(job.slides, job.images)
    output = storage.normalize(job.output).rstrip("/")
    night = Night(job, checkpoint=checkpoint, halo_px=halo_px, output=output)
    night.judge(inputs)
    if job.run.dry_run:
        print(night.forecast(), flush=True)
        return 0
    try:
        night.begin()
        night.work()
    except KeyboardInterrupt:
        night.stopped = "interrupted"
    except Exception as error:
        if night.crew is None:
            raise  # it could not begin
        # Storage or Ray gave out under it: what was done counts, and is told.
        logger.error("the run ends early: %s", error, exc_info=not isinstance(error, CarnError))
        night.stopped = str(error) if isinstance(error, CarnError) else repr(error)
        night.is_broken = True
    print(night.tally.conclude(night.stopped), flush=True)
    if night.stopped == "interrupted":
        return 130
    is_bad = bool(night.tally.count("failed", "conflict")) and job.run.on_bad_slide == "fail"
    return 1 if is_bad or night.is_broken or not night.tally.is_reported else 0


def _begin_log(form: Literal["text", "json"]) -> None:
    start_logging()
    logging.getLogger("botocore").setLevel(logging.WARNING)  # it would say where keys come from
    slide_logger.setLevel(logging.INFO)
    # People read of a slide in the words of the other loggers.
    slide_logger.propagate = form == "json"
    if form == "json":
        for handler in logging.getLogger().handlers:
            handler.setFormatter(JsonLines())


class JsonLines(logging.Formatter):
    """Each record as one JSON object on one line; those of slides are that already."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record, without its end."""
        if record.name == slide_logger.name:
            return record.getMessage()
        content = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            content["exception"] = self.formatException(record.exc_info)
        return json.dumps(content)


def cli() -> int:
    """Parse the command line, run, and turn expected errors into one line each."""
    try:
        job = tyro.cli(SuperResolveJob, description=__doc__, config=(tyro.conf.OmitArgPrefixes,))
    except ValueError as error:
        print(f"super_resolve: {error}", file=sys.stderr)
        return 2
    try:
        with stopped_by_sigterm():
            return main(job)
    except (CarnError, ValueError) as error:
        print(f"super_resolve: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("super_resolve: stopped; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(cli())
