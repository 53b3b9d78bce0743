"""One run of super_resolve.py: what there is to do, and the doing of it."""

import dataclasses
import json
import logging
import time
from collections import Counter, deque
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import ray

from carn import storage, uploads
from carn.errors import CheckpointError, StorageError
from carn.models.checkpoint import Checkpoint, checkpoint_hash, load_model, read_checkpoint
from carn.models.shipped import shipped_for
from carn.report.sr_records import LrSummary, SlideSummary, Status
from carn.slides.provenance import read_provenance
from carn.upscaling.engine import reference_engine
from carn.upscaling.inputs import SlideInput
from carn.upscaling.outbox import (
    SlideClaims,
    judge,
    last_speed,
    sweep_abandoned,
    sweep_stale,
)
from carn.upscaling.suitability import TrainingRange, with_range
from carn.upscaling.task import SlidePlan, SlideTask
from carn.upscaling.telling import tell, told_by
from carn.version import code_version
from jobs.metrics import meters, watch_s3
from jobs.ray_stage import StageRunner, duration, start_ray
from jobs.sr_config import SuperResolveJob, parse_deadline
from jobs.sr_pipeline import Crew, crew_for, make_board, run_blocks
from jobs.sr_stages import Finishing, in_thread, inspect_unit
from jobs.sr_tally import Tally

logger = logging.getLogger("super_resolve")

# Input bytes that a wave of slides holds for each actor, by device: about an hour's work of a CPU
# actor, minutes of a GPU's. A wave's slides are claimed together; a second run does other ones.
WAVE_BYTES = {"cpu": 100e6, "cuda": 4e9}
MAX_WAVE = 512
# Times that a slide is done again because its parts were found changed at the end.
MAX_ROUNDS = 3
# Seconds after the deadline that blocks at hand may take: an actor that waits for ever, for its
# node or a mount, must not hold the morning up.
GRACE_S = 900.0
# Seconds between two looks at storage that is down, each of which tries for some seconds itself.
PROBE_S = 5.0
# Seconds after an outage for which failures over storage are taken for its doing.
ECHO_S = 120.0
# Seconds to wait for the board's answer; it may be lost with its node.
BOARD_S = 10.0
LOST = "blocks were lost: their workers died, or Ray gave them up; see its logs"


def check_checkpoint(job: SuperResolveJob) -> tuple[Checkpoint, int]:
    """The checkpoint, tried once here, and the LR px of context that it wants.

    Better now than in a hundred actors.

    Raises:
        CheckpointError: there is none, it is damaged, made for another scale, or does not adapt to
            what `--lr-like` says.
        ValueError: `--lr-like` names no condition.
    """
    checkpoint = read_checkpoint(job.checkpoint or shipped_for(job.scale))
    if job.scale not in (None, checkpoint.scale):
        raise CheckpointError(
            f"{checkpoint.uri} super-resolves x{checkpoint.scale}; --scale {job.scale} was asked "
            "for"
        )
    model = load_model(checkpoint)
    told = told_by(job.lr_like, scale=checkpoint.scale)
    tell(model, told, network=checkpoint.uri)
    return checkpoint, reference_engine(model).halo_px


def make_task(
    job: SuperResolveJob, item: SlideInput, *, checkpoint: Checkpoint, halo_px: int, output: str
) -> SlideTask:
    """What is to be made of an input."""
    trained = TrainingRange.of(checkpoint)
    given = with_range(job.input, trained)
    if item.mpp_um is not None:
        given = dataclasses.replace(given, mpp=item.mpp_um)
    return SlideTask(
        name=item.name,
        uri=item.uri,
        identity=item.identity,
        is_image=item.is_image,
        checkpoint=checkpoint.uri,
        checkpoint_hash=checkpoint_hash(checkpoint),
        model=checkpoint.model_name,
        scale=checkpoint.scale,
        halo_px=halo_px,
        input=given,
        pixels=job.pixels,
        precision=job.engine.precision,
        format=job.format,
        output=output,
        block_px=job.run.block_px,
        code_version=code_version(),
        self_ensemble=job.engine.self_ensemble,
        told=told_by(job.lr_like, scale=checkpoint.scale),
        trained=trained,
    )


class Night:
    """One run: what there is to do, what became of it."""

    def __init__(
        self, job: SuperResolveJob, *, checkpoint: Checkpoint, halo_px: int, output: str
    ) -> None:
        """Nothing is looked at yet.

        Args:
            job: what was asked for.
            checkpoint, halo_px: of `check_checkpoint`.
            output: folder or prefix of the slides, normalized.
        """
        self.job = job
        self.checkpoint = checkpoint
        self.halo_px = halo_px
        self.output = output
        self.tally = Tally(job, checkpoint=checkpoint, output=output)
        self.stopped: str | None = None
        self.is_broken = False
        self.todo: list[SlideTask] = []
        self.begun: set[str] = set()
        self.num_shown = 0
        # Why a slide is to be done again.
        self.why_again: dict[str, str] = {}
        self.crew: Crew | None = None
        self._finishing: Finishing | None = None
        self._deadline: datetime | None = None
        # When storage came back from an outage, on the monotonic clock.
        self._back_since: float | None = None

    # ------------------------------------------------------------------------------ beforehand

    def judge(self, inputs: Sequence[SlideInput]) -> None:
        """Part what is to be done from what is done, in the way, or beyond help."""
        tasks = {}
        inputs = [item for item in inputs if not self._is_own_output(item.uri)]
        places = {item.uri for item in inputs}
        for item in inputs:
            slide = SlideSummary(
                name=item.name,
                uri=item.uri,
                status="unfinished",
                scale=self.checkpoint.scale,
            )
            # Two inputs that want one name have a row each.
            key = item.name if item.name not in self.tally.slides else f"{item.name} ({item.uri})"
            self.tally.slides[key] = slide
            if item.problem is not None:
                self.tally.end(key, status="failed", reason=item.problem)
            else:
                tasks[key] = make_task(
                    self.job,
                    item,
                    checkpoint=self.checkpoint,
                    halo_px=self.halo_px,
                    output=self.output,
                )
                self.tally.sizes[key] = item.size_bytes
        for key, task in list(tasks.items()):
            if task.output_uri in places:
                taken = f"its result would take the place of {task.output_uri}, which is an input"
                self.tally.end(key, status="failed", reason=f"{taken}; choose another --output")
                del tasks[key]
        verdicts = judge(list(tasks.values()), overwrite=self.job.run.overwrite)
        for (key, task), (status, reason) in zip(tasks.items(), verdicts, strict=True):
            if status == "todo":
                self.todo.append(task)
            else:
                self.tally.end(key, status=status, reason=reason, output_uri=task.output_uri)
        counts = Counter(slide.status for slide in self.tally.slides.values())
        logger.info(
            "%s slides: %s to do, %s done before, %s that cannot be done",
            *(
                f"{number:,}"
                for number in (
                    len(self.tally.slides),
                    len(self.todo),
                    counts["skipped"],
                    counts["failed"] + counts["conflict"],
                )
            ),
        )

    def _is_own_output(self, uri: str) -> bool:
        """Whether what was found is a result of an earlier run, below the output."""
        if not uri.startswith(self.output + "/") or read_provenance(uri) is None:
            return False
        logger.warning("%s is a result of this job, and left out of its input", uri)
        return True

    def forecast(self) -> str:
        """What would be done, in words; opens the slides that are to be done."""
        lines = [f"{len(self.todo):,} slides to do, {self.tally.count('skipped'):,} done before"]
        total = 0
        if self.todo:
            start_ray()
            looked = StageRunner(progress_s=self.job.run.progress_s)
            units = [{"task": task.to_json(), "is_forecast": True} for task in self.todo]
            rows = {}
            for table in looked.run("inspecting", inspect_unit, units):
                rows.update({row["name"]: row for row in table.to_pylist()})
            for task in self.todo:
                row = rows.get(task.name) or {"reason": "was not looked at: its worker was lost"}
                if row["reason"]:
                    lines.append(f"  {task.name}: cannot be done: {row['reason']}")
                    continue
                width, height = json.loads(row["plan"])
                total += width * height
                lines.append(
                    f"  {task.name}: {width:,} x {height:,} px -> {width * task.scale:,} x "
                    f"{height * task.scale:,} px"
                )
        for slide in self.tally.slides.values():
            if slide.status in ("failed", "conflict"):
                lines.append(f"  {slide.name}: {slide.status}: {slide.reason}")
        lines.append(f"together {total / 1e6:,.1f} LR megapixels, {self._time_for(total)}")
        return "\n".join(lines)

    def _time_for(self, num_lr_px: int) -> str:
        speed = last_speed(self.output)
        if speed is None:
            return "and no run here has yet been long enough to tell how long they take"
        return f"about {duration(num_lr_px / 1e6 / speed)} at the last run's {speed:.2f} a second"

    # ------------------------------------------------------------------------------ the work

    def begin(self) -> None:
        """Make sure that the work can begin.

        Raises:
            CarnError: the output cannot be written, or the cluster is not there.
        """
        if not self.todo:
            return
        # A place that cannot be written is better known now than after the first block.
        self._check_output()
        storage.check_creates(storage.join(self.output, "_state"))
        if self.job.format.container == "tiff":
            uploads.check_parts(storage.join(self.output, "_state"))
        logger.info("starting Ray, or connecting to it")
        start_ray()
        watch_s3(self.output, *(task.uri for task in self.todo))
        meters().set("carn_sr_slides_left", len(self.todo))
        self.crew = crew_for(self.job.cluster, self.job.engine)

    def _check_output(self) -> None:
        """Write a little to the output.

        Raises:
            StorageError: it cannot be written.
        """
        storage.write_bytes(
            storage.join(self.output, "_state", "begun"), self.tally.run_id.encode()
        )

    def _outlasts_outage(self) -> bool:
        """Wait for the output to be writable again; end the run in good order if it stays down.

        Asked after a slide has failed over storage: if that is down for good, every other one would
        fail the same way, each after minutes of trying.

        Returns:
            Whether it was down and is back, now or lately: what failed meanwhile is worth another
            attempt.
        """
        began, was_down = time.monotonic(), False
        while True:
            try:
                self._check_output()
            except StorageError as error:
                patience_s = self.job.run.outage_minutes * 60
                if self._must_stop() or time.monotonic() - began >= patience_s:
                    self.is_broken = True
                    self.stopped = self.stopped or str(error)
                    logger.error("the run ends early: %s", error)
                    return False
                logger.warning("waiting for the output to come back: %s", error)
                was_down = True
                time.sleep(PROBE_S)
            else:
                now = time.monotonic()
                if was_down:
                    self._back_since = now
                # Others that failed in the same outage are heard of after it.
                return self._back_since is not None and now - self._back_since < ECHO_S

    def work(self) -> None:
        """Do what there is to do, wave by wave, until it is done or the deadline has come."""
        lease_s = self.job.run.lease_minutes * 60
        with SlideClaims(self.output, owner=self.tally.run_id, lease_s=lease_s) as claims:
            try:
                days = self.job.run.abandon_days
                sweep_abandoned(self.output, claims, days=days, tasks=self.todo)
            except StorageError as error:  # keys that may not list uploads are good for the rest
                logger.warning("not all abandoned work was looked for: %s", error)
            if self.crew is None:
                logger.info("nothing to do")
                return
            crew = self.crew
            runner = StageRunner(progress_s=self.job.run.progress_s)
            deadline = self.job.run.deadline
            if deadline is not None:
                self._deadline = parse_deadline(deadline, now=self.tally.started)
            queue = deque(self.todo)
            self.todo = []
            self.tally.begin([task.name for task in queue])
            attempts: Counter[str] = Counter()
            while queue and not self._must_stop():
                wave = self._next_wave(queue, claims, crew)
                if not wave and self._is_at_limit():
                    break
                plans, again = self._inspect(wave, runner)
                for task in (*again, *self._make(plans, crew, claims)):
                    attempts[task.name] += 1
                    if attempts[task.name] < MAX_ROUNDS:
                        self.tally.retries[task.name] += 1
                        queue.append(task)
                    else:
                        reason = f"{self.why_again[task.name]}, {MAX_ROUNDS} times"
                        self.tally.end(task.name, status="failed", reason=reason)
                for task in wave:
                    try:
                        claims.release(task.name)
                    except StorageError as error:
                        logger.warning("%s is claimed until its lease ends: %s", task.name, error)
            why = self.stopped or f"left for later (--limit {self.job.run.limit})"
            for task in queue:
                self.tally.set(task.name, reason=f"not begun: {why}")

    def _is_overdue(self) -> bool:
        """Whether the deadline is so long past that nothing is waited for any more."""
        if self._deadline is None or self.stopped not in (None, "deadline"):
            return False
        late = datetime.now().astimezone() - self._deadline
        if late.total_seconds() <= GRACE_S:
            return False
        self.stopped = "deadline"
        return True

    def _must_stop(self) -> bool:
        if self._deadline is not None and datetime.now().astimezone() >= self._deadline:
            self.stopped = "deadline"
        return self.stopped is not None

    def _next_wave(
        self, queue: deque[SlideTask], claims: SlideClaims, crew: Crew
    ) -> list[SlideTask]:
        """The next slides that no other run works on, enough to keep every actor busy."""
        wave: list[SlideTask] = []
        size = 0
        wanted = WAVE_BYTES[crew.device] * crew.max_actors
        while queue and size < wanted and len(wave) < MAX_WAVE and self.stopped is None:
            task = self._next_task(queue)
            if task is None:
                break
            try:
                if not self._claim(task, claims):
                    continue
            except StorageError as error:
                if self._outlasts_outage():
                    queue.append(task)
                    continue
                self.tally.end(task.name, status="failed", reason=str(error))
                logger.warning("%s failed: %s", task.name, error)
                continue
            self.begun.add(task.name)
            wave.append(task)
            size += self.tally.sizes.get(task.name, 0)
        return wave

    def _next_task(self, queue: deque[SlideTask]) -> SlideTask | None:
        """The next slide that may be begun; at the limit, of those that were begun before."""
        if not self._is_at_limit():
            return queue.popleft()
        for task in queue:
            if task.name in self.begun:
                queue.remove(task)
                return task
        return None

    def _claim(self, task: SlideTask, claims: SlideClaims) -> bool:
        """Whether a slide is this run's to do."""
        if not claims.take(task.name):
            reason = f"is done by another: {claims.holder(task.name)}"
            self.tally.end(task.name, status="claimed", reason=reason)
            return False
        # It may have been finished since the run began.
        ((status, why),) = judge([task], overwrite=self.job.run.overwrite)
        if status != "todo":
            self.tally.end(task.name, status=status, reason=why, output_uri=task.output_uri)
            claims.release(task.name)
            return False
        sweep_stale(task)
        return True

    def _is_at_limit(self) -> bool:
        limit = self.job.run.limit
        return limit is not None and len(self.begun) >= limit

    def _inspect(
        self, wave: Sequence[SlideTask], runner: StageRunner
    ) -> tuple[list[SlidePlan], list[SlideTask]]:
        """The plans of a wave's slides, and the slides to be looked at again after an outage."""
        units = [{"task": task.to_json(), "is_forecast": False} for task in wave]
        plans: dict[str, SlidePlan] = {}
        down: set[str] = set()
        for table in in_thread(runner.run("inspecting", inspect_unit, units)):
            if self._is_overdue():
                break
            for row in table.to_pylist() if table is not None else ():
                if row["is_storage"] and self._outlasts_outage():
                    self.why_again[row["name"]] = row["reason"]
                    down.add(row["name"])
                elif row["reason"]:
                    self.tally.end(row["name"], status="failed", reason=row["reason"])
                    logger.warning("%s failed: %s", row["name"], row["reason"])
                else:
                    plans[row["name"]] = SlidePlan.from_json(row["plan"])
        for task in wave:
            if task.name in (*plans, *down) or self.tally.slides[task.name].reason is not None:
                continue
            if self._is_overdue():
                self.tally.end(
                    task.name, status="unfinished", reason="not begun: stopped (deadline)"
                )
            else:
                self.tally.end(task.name, status="failed", reason=LOST)
        found = [plans[task.name] for task in wave if task.name in plans]
        for plan in found:
            self.tally.set(
                plan.task.name,
                lr_extent=plan.lr_extent,
                mpp_in=plan.mpp,
                mpp_out=plan.spec.mpp,
                scale=plan.task.scale,
                num_blocks=plan.num_blocks,
                num_blocks_resumed=len(plan.done),
                lr=LrSummary(compression=plan.compression, notes=plan.notes),
                warnings=plan.warnings,
            )
            self._warn(plan.task.name, (*plan.notes, *plan.warnings))
        return found, [task for task in wave if task.name in down]

    def _make(self, plans: Sequence[SlidePlan], crew: Crew, claims: SlideClaims) -> list[SlideTask]:
        """All blocks of some slides, each slide finished as its last one arrives.

        Returns:
            Tasks whose parts turned out stale, to be done again.
        """
        self._finishing = self._finishing or Finishing()
        wave = _Wave(plans, claims, self._finishing)
        started = time.monotonic()
        for slide, plan in enumerate(plans):
            num_left = len(wave.left[slide])
            self.tally.show.begin(plan.task.name, num_blocks=plan.num_blocks, num_left=num_left)
        for slide in range(len(plans)):
            if not wave.left[slide]:
                self._begin_finishing(wave, slide)
        results = run_blocks(
            plans, wave.blocks, board=wave.board, engine=self.job.engine, crew=crew
        )
        try:
            for result in in_thread(results):
                self._collect(wave)
                if self._must_stop():
                    wave.board.stop.remote()
                    if self._is_overdue():
                        logger.warning("blocks at hand did not end in time; they are left")
                        break
                if result is not None:
                    self._take(wave, *result)
            while not wave.finishing.is_idle and not self._is_overdue():
                self._collect(wave, timeout_s=1.0)
        except BaseException:
            wave.board.stop.remote()  # whoever is at work need not begin another block
            raise
        finally:
            self.tally.wave(time.monotonic() - started, num_actors=len(wave.actors))
        self._leave(wave)
        return wave.stale

    def _leave(self, wave: "_Wave") -> None:
        """Note what is left undone of a wave."""
        for slide in wave.finishing.drop():
            reason = "stopped (deadline) while it was finished; the next run does that again"
            self.tally.end(wave.plans[slide].task.name, status="unfinished", reason=reason)
        for slide, plan in enumerate(wave.plans):
            if wave.left[slide] and slide not in wave.failed:
                status: Status = "unfinished" if self.stopped else "failed"
                reason = f"stopped ({self.stopped})" if self.stopped else LOST
                kept = plan.num_blocks - len(wave.left[slide])
                reason += f"; {kept} of {plan.num_blocks} blocks are kept, and the next run goes "
                self.tally.retries[plan.task.name] += wave.retries(slide)
                self.tally.end(plan.task.name, status=status, reason=reason + "on from there")

    def _take(self, wave: "_Wave", slide: int, block: int, facts: dict[str, Any]) -> None:
        """What became of a block."""
        plan = wave.plans[slide]
        if "verdict" in facts:  # it was not begun
            return
        if "reason" in facts:
            if slide not in wave.failed:
                wave.failed.add(slide)
                wave.board.cancel.remote(slide)
                if facts.get("is_stale"):
                    logger.warning("%s; what is missing is made again", facts["reason"])
                    self._again(wave, plan, facts["reason"])
                    return
                if facts.get("is_storage") and self._outlasts_outage():
                    self._again(wave, plan, facts["reason"])
                    return
                self.tally.retries[plan.task.name] += wave.retries(slide)
                self.tally.end(plan.task.name, status="failed", reason=facts["reason"])
                logger.warning("%s failed: %s", plan.task.name, facts["reason"])
            return
        wave.actors.add(facts.get("actor", ""))
        left = wave.left[slide]
        left.discard(block)
        began = facts.get("began", time.time())
        wave.begun.setdefault(plan.task.name, time.monotonic() - max(0.0, time.time() - began))
        self.tally.block(plan.task.name, facts, num_left=len(left), num_blocks=plan.num_blocks)
        if not left and slide not in wave.failed:
            self._begin_finishing(wave, slide)

    def _again(self, wave: "_Wave", plan: SlidePlan, reason: str) -> None:
        """A slide is to be done again, for a reason that may be gone."""
        self.why_again[plan.task.name] = reason
        wave.stale.append(plan.task)

    def _begin_finishing(self, wave: "_Wave", slide: int) -> None:
        plan = wave.plans[slide]
        if not wave.claims.holds(plan.task.name):
            reason = "another run took it over, for this one did not renew its claim"
            self.tally.end(plan.task.name, status="claimed", reason=reason)
            return
        has_pictures = self.num_shown < self.job.run.num_pictures
        self.num_shown += has_pictures
        threshold_db = self.job.run.consistency_db
        wave.finishing.begin(slide, plan, threshold_db=threshold_db, has_pictures=has_pictures)

    def _collect(self, wave: "_Wave", *, timeout_s: float = 0.0) -> None:
        """Note what has been finished."""
        for slide, outcome in wave.finishing.collect(timeout_s=timeout_s):
            plan = wave.plans[slide]
            is_final = self._finished(wave, plan, outcome)
            if plan.task.name in wave.begun:
                seconds = time.monotonic() - wave.begun[plan.task.name]
                self.tally.set(plan.task.name, seconds=seconds)
            self.tally.retries[plan.task.name] += wave.retries(slide)
            if is_final:
                self.tally.end(plan.task.name)

    def _warn(self, name: str, warnings: Sequence[str]) -> None:
        """Say what was decided of a slide, and in what it is unlike what was trained on."""
        for warning in warnings:
            logger.warning("%s: %s", name, warning)

    def _finished(self, wave: "_Wave", plan: SlidePlan, outcome: dict[str, Any]) -> bool:
        """Note what became of a slide; whether that is final, or it has to be done again."""
        name = plan.task.name
        if "summary" in outcome:
            summary = SlideSummary.from_json(outcome["summary"])
            self.tally.slides[name] = summary
            self._warn(name, summary.warnings[len(plan.warnings) :])
            self.tally.pictures.update(outcome["pictures"])
            logger.info("%s is finished: %s", name, plan.task.output_uri)
            return True
        if "stale" in outcome:
            logger.warning("%s; what is missing is made again", outcome["stale"])
            self._again(wave, plan, outcome["stale"])
            return False
        if outcome.get("is_storage") and self._outlasts_outage():
            self._again(wave, plan, outcome["reason"])
            return False
        self.tally.set(name, status="failed", reason=outcome["reason"])
        logger.warning("%s failed: %s", name, outcome["reason"])
        return True


class _Wave:
    """Slides that are done together, and how far they are."""

    def __init__(
        self,
        plans: Sequence[SlidePlan],
        claims: SlideClaims,
        finishing: Finishing,
    ) -> None:
        self.plans = plans
        self.claims = claims
        self.board = make_board()
        self.left = [set(range(plan.num_blocks)) - set(plan.done) for plan in plans]
        self.blocks = [
            (slide, block) for slide, rest in enumerate(self.left) for block in sorted(rest)
        ]
        self.failed: set[int] = set()
        # When the first block of a slide was begun, on the monotonic clock.
        self.begun: dict[str, float] = {}
        self.stale: list[SlideTask] = []
        # That made blocks of them.
        self.actors: set[str] = set()
        self.finishing = finishing

    def retries(self, slide: int) -> int:
        """Times that a block of a slide was begun again; 0 where nobody knows any more."""
        try:
            return int(ray.get(self.board.retries.remote(slide), timeout=BOARD_S))
        except ray.exceptions.RayError:
            return 0
