"""How large a cluster a night needs: more work never needs less, and what is scarce binds."""

import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from carn import capacity
from carn.capacity import Plan, Prices, Question, cli, plan

ROOT = Path(__file__).parents[1]
BENCHMARKS = (ROOT / "benchmarks" / "README.md").read_text()


def questions() -> st.SearchStrategy[Question]:
    """Every kind of night that somebody may ask about."""
    sides = st.integers(500, 150_000)
    return st.builds(
        Question,
        slides=st.integers(1, 20_000),
        hours=st.floats(0.5, 72),
        slide_px=st.tuples(sides, sides),
        tissue_share=st.floats(0.01, 1),
        flat_share=st.floats(0, 1),
        scale=st.sampled_from([2, 4, 8]),
        gpu=st.sampled_from(["h200", "h100"]),
        cpu_only=st.booleans(),
        gpus_per_node=st.integers(1, 8),
        cores_per_node=st.integers(1, 192),
        network_gbit=st.floats(1, 400),
        utilization=st.floats(0.2, 1),
        block_px=st.sampled_from([1024, 2048, 4096, 8192]),
        input_tile_px=st.sampled_from([240, 256, 512]),
    )


def changed(question: Question, **changes: Any) -> Question:
    return dataclasses.replace(question, **changes)


# ------------------------------------------------------------------------------ more and less


@given(questions(), st.integers(1, 5000))
def test_more_slides_never_need_fewer_nodes(question: Question, more: int) -> None:
    before, after = plan(question), plan(changed(question, slides=question.slides + more))
    assert after.nodes >= before.nodes
    assert after.jobs >= before.jobs
    for name in before.totals:
        assert after.totals[name] >= before.totals[name]


@given(questions(), st.floats(1, 4))
def test_more_time_never_needs_more_nodes(question: Question, factor: float) -> None:
    assert plan(changed(question, hours=question.hours * factor)).nodes <= plan(question).nodes


@given(questions(), st.floats(1, 10))
def test_a_faster_engine_never_needs_more_nodes(question: Question, factor: float) -> None:
    before = plan(question)
    faster = plan(changed(question, engine_mpx_per_s=before.rates["engine"].value * factor))
    assert faster.nodes <= before.nodes
    assert faster.rates["engine"].kind == "given"


@given(questions(), st.floats(0, 1))
def test_more_tissue_never_needs_fewer_gpus(question: Question, more: float) -> None:
    share = question.tissue_share + more * (1 - question.tissue_share)
    question = changed(question, cpu_only=False)
    before, after = plan(question), plan(changed(question, tissue_share=share))
    assert after.nodes_by_resource["gpu"] >= before.nodes_by_resource["gpu"] - 1e-9


@given(questions(), st.integers(1, 8))
def test_larger_nodes_are_never_more(question: Question, factor: int) -> None:
    larger = changed(
        question,
        cores_per_node=question.cores_per_node * factor,
        gpus_per_node=question.gpus_per_node * factor,
        network_gbit=question.network_gbit * factor,
    )
    assert plan(larger).nodes <= plan(question).nodes


@given(questions())
def test_the_nodes_suffice_and_one_less_would_not(question: Question) -> None:
    answer = plan(question)
    work_s = question.hours * 3600 * question.utilization
    px = question.slides * answer.slide.lr_mpx
    assert answer.nodes * answer.lr_mpx_per_s_per_node * work_s >= px * (1 - 1e-6)
    if answer.nodes > 1:
        assert (answer.nodes - 1) * answer.lr_mpx_per_s_per_node * work_s < px * (1 + 1e-6)
    assert answer.nodes_by_resource[answer.binding] == max(answer.nodes_by_resource.values())
    assert answer.hours_needed <= question.hours + 13 / 3600 + 1e-6


@given(questions())
def test_every_pixel_is_of_one_kind_and_parts_fit(question: Question) -> None:
    slide = plan(question).slide
    width, height = slide.extent_px
    assert slide.lr_mpx == pytest.approx(width * height / 1e6)
    assert slide.inferred_mpx + slide.enlarged_mpx <= slide.lr_mpx * (1 + 1e-9)
    assert slide.num_blocks <= capacity.MAX_BLOCKS
    assert slide.num_parts <= capacity.MAX_PARTS
    assert slide.num_blocks * slide.block_px**2 >= width * height * question.scale**2
    assert slide.read_factor > 1


# -------------------------------------------------------------------------------- what binds


AMPLE: dict[str, Any] = {"cores_per_node": 100_000, "network_gbit": 1e6, "gpus_per_node": 1000}


@pytest.mark.parametrize(
    ("scarce", "binding", "stage"),
    [
        ({"gpus_per_node": 1}, "gpu", "infer"),
        ({"cores_per_node": 1, "tissue_share": 0.1, "flat_share": 0.0}, "cores", "enlarge"),
        ({"cores_per_node": 1, "cpu_only": True, "tissue_share": 1.0}, "cores", "infer"),
        ({"network_gbit": 0.01, "input_bytes_per_px": 5.0}, "network in", "read"),
        ({"network_gbit": 0.01, "tissue_bytes_per_px": 5.0}, "network out", "upload"),
        # x8 writes 64 px for each of the input.
        ({"cores_per_node": 1, "scale": 8, "flat_share": 1.0}, "cores", "consistency"),
    ],
)
def test_what_is_scarce_binds(scarce: dict[str, Any], binding: str, stage: str) -> None:
    answer = plan(Question(slides=100, **(AMPLE | scarce)))
    assert (answer.binding, answer.binding_stage) == (binding, stage)


def test_cores_of_a_gpu_are_those_that_neither_waits_for() -> None:
    balanced = plan(Question(slides=1000))
    cores = math.ceil(sum(balanced.cores_per_gpu.values()))
    assert plan(Question(slides=1000, cores_per_node=cores)).binding == "gpu"
    assert plan(Question(slides=1000, cores_per_node=cores - 1)).binding == "cores"


def test_one_driver_feeds_so_many_nodes() -> None:
    few = plan(Question(slides=1000, hours=8))
    assert few.jobs == 1
    many = plan(Question(slides=10_000, hours=8, slide_px=(40_000, 40_000), block_px=1024))
    assert many.jobs_by_limit["driver"] == max(many.jobs_by_limit.values())
    assert many.jobs == math.ceil(many.jobs_by_limit["driver"]) > 1


# ------------------------------------------------------------------- units, and what was recorded


def test_units_of_a_night_that_can_be_reckoned_by_hand() -> None:
    answer = plan(
        Question(
            slides=360,
            hours=1,
            utilization=1.0,
            slide_px=(4096, 4096),
            tissue_share=1.0,
            engine_mpx_per_s=16.777216,  # a slide a second
            cores_per_node=1000,
            network_gbit=1000,
            input_bytes_per_px=1.0,
            tissue_bytes_per_px=0.5,
        )
    )
    assert answer.slide.num_blocks == 4
    assert answer.slide.gpu_s == pytest.approx(1.0)
    assert answer.nodes_by_resource["gpu"] == pytest.approx(0.1)
    assert answer.nodes == 1
    assert answer.hours_needed == pytest.approx((360 + 13) / 3600)
    # 8192 x 8192 px of half a byte.
    assert answer.slide.stored_bytes == pytest.approx(2**25)
    assert answer.totals["stored_bytes"] == pytest.approx(360 * 2**25)
    # Blocks of 2048 LR px from tiles of 256 touch ten tiles a side instead of eight.
    assert answer.slide.read_factor == pytest.approx((10 / 8) ** 2)
    assert answer.slide.in_bytes == pytest.approx(2**24 * (10 / 8) ** 2, rel=0.15)
    assert answer.in_gbit_per_s == pytest.approx(answer.slide.in_bytes * 8 / 1e9)
    # Each block is a part of 8 MB.
    assert answer.slide.num_parts == 5


@pytest.mark.parametrize("changes", [{}, {"engine_mpx_per_s": 20.0}, {"cpu_only": True}])
def test_a_self_ensemble_is_eight_times_the_inference_and_nothing_else(
    changes: dict[str, Any],
) -> None:
    question = Question(slides=1000, **changes)
    before, after = plan(question), plan(changed(question, self_ensemble=True))
    assert after.slide.gpu_s == pytest.approx(8 * before.slide.gpu_s)
    stages = dict(before.slide.core_s)
    if "infer" in stages:
        stages["infer"] *= 8
    assert after.slide.core_s == pytest.approx(stages)
    assert after.slide.out_bytes == before.slide.out_bytes
    assert after.rates["engine"].kind == before.rates["engine"].kind
    assert "self-ensemble" in capacity.table(after)
    assert "self-ensemble" not in capacity.table(before)


def test_mpp_and_millimetres_are_pixels() -> None:
    assert capacity.extent_px(Question(slides=1, input_mpp=0.5, slide_mm=(20, 15))) == (
        40_000,
        30_000,
    )
    assert capacity.extent_px(Question(slides=1, input_mpp=0.25, slide_mm=(20, 15))) == (
        80_000,
        60_000,
    )


def test_prices_are_asked_for_and_multiplied() -> None:
    assert plan(Question(slides=100)).costs == {}
    prices = Prices(node_hour=3.0, thousand_puts=0.005, gb_month=0.02)
    answer = plan(Question(slides=100, hours=2, prices=prices))
    assert answer.costs["nodes"] == pytest.approx(answer.nodes * 6.0)
    assert answer.costs["PUT requests"] == pytest.approx(answer.totals["puts"] * 5e-6)
    assert answer.costs["storage, a month"] == pytest.approx(
        answer.totals["stored_bytes"] / 1e9 * 0.02
    )
    assert set(answer.costs) == {"nodes", "PUT requests", "storage, a month"}


def job_of_the_benchmark() -> Plan:
    """The run of benchmarks/super_resolve.py: 12 blocks of 1 LR megapixel on two cores."""
    return plan(
        Question(
            slides=1,
            cpu_only=True,
            cores_per_node=2,
            utilization=1.0,
            slide_px=(6 * 1024, 2 * 1024),
            tissue_share=1.0,
            block_px=2048,
            input_tile_px=512,
        )
    )


def test_the_recorded_job_is_predicted() -> None:
    (recorded,) = re.findall(
        r"\| job, from the first block's beginning to the commit \| ([\d.]+) \|", BENCHMARKS
    )
    predicted = job_of_the_benchmark().lr_mpx_per_s_per_node
    assert predicted == pytest.approx(float(recorded), rel=0.15)


def test_a_night_of_small_slides_is_predicted() -> None:
    ((before, after),) = re.findall(
        r"on two quiet cores: ([\d.]+) slides a\s+second before it and ([\d.]+) after", BENCHMARKS
    )
    assert capacity.SLIDE.value == pytest.approx(2 / ((float(before) + float(after)) / 2), rel=0.02)
    # Its network is so small that inferring takes no time.
    question = Question(
        slides=1000,
        cpu_only=True,
        cores_per_node=2,
        utilization=1.0,
        slide_px=(300, 300),
        tissue_share=1.0,
        input_tile_px=256,
        engine_mpx_per_s=50,
    )
    answer = plan(question)
    slides_per_s = answer.lr_mpx_per_s_per_node / answer.slide.lr_mpx
    assert slides_per_s == pytest.approx(float(after), rel=0.15)


def test_measured_rates_are_those_of_the_benchmarks() -> None:
    def figure(pattern: str) -> float:
        (found,) = re.findall(pattern, BENCHMARKS)
        return float(found.replace(",", ""))

    assert figure(r"\| engine \| ([\d.]+) \|") == capacity.ENGINE_TWO_CORES
    assert figure(r"\| direct \| (\d+) \|") * 1.048576 == pytest.approx(capacity.READ.value)
    assert figure(r"(\d+) Mpx a CPU-second") == capacity.ENCODE.value
    assert figure(r"some (\d+) s of imports and calibration") == capacity.START.value
    assert figure(r"\| 50,000 \| 625 \| 307 \| (\d+) \|") == capacity.ACTOR_MB["cpu"].value
    assert figure(r"\| 50,000 \| 625 \| 307 \| 773 \| (\d+) \|") == capacity.DAEMONS_MB.value
    assert figure(r"\| 8,192 \| 16 \| 306 \| (\d+) \|") == capacity.READER_MB.value


def test_limits_are_those_of_the_program() -> None:
    from carn import uploads
    from carn.models import build_model
    from carn.models.carn import CarnConfig
    from carn.models.turns import NUM_TURNS
    from carn.slides import slide_output, tiff_output

    assert capacity.NUM_TURNS == NUM_TURNS
    assert tiff_output.MAX_BLOCKS == capacity.MAX_BLOCKS
    assert (uploads.MAX_PARTS, uploads.MIN_PART_BYTES) == (
        capacity.MAX_PARTS,
        capacity.MIN_PART_BYTES,
    )
    spec = slide_output.OutputSpec(
        uri="x",
        work_uri="y",
        extent=(80_000, 60_000),
        block_px=4096,
        mpp=(0.25, 0.25),
        provenance={},
        format=slide_output.SlideFormat(),
    )
    assert slide_output.num_block_levels(spec) == capacity.NUM_BLOCK_LEVELS
    # Channels do not change how far it sees, and few are built sooner.
    carn = build_model("carn", scale=2, config=CarnConfig(channels=8, reduction=2))
    assert carn.receptive_radius_px == capacity.HALO_PX
    # Of modules that import Ray, what they say is enough.
    for path, text in (
        ("jobs/sr_stages.py", f"MAX_FINISHING = {capacity.MAX_FINISHING}\n"),
        ("jobs/sr_pipeline.py", "per_task = cluster.blocks_per_task or (4 if is_cuda else 2)"),
        ("carn/upscaling/work.py", f"num_writers: int = {capacity.NUM_WRITERS})"),
    ):
        assert text in (ROOT / path).read_text()
    assert capacity.BLOCKS_PER_TASK == {"gpu": 4, "cpu": 2}


def test_rooflines_are_marked_as_predictions() -> None:
    for gpu in ("h200", "h100"):
        answer = plan(Question(slides=1000, gpu=gpu, cores_per_node=500))
        assert answer.is_predicted
        assert answer.rates["engine"].kind == "predicted"
        assert "PREDICTED" in capacity.table(answer)
    given_rate = plan(Question(slides=1000, engine_mpx_per_s=50.0, cores_per_node=500))
    assert not given_rate.is_predicted
    on_cores = plan(Question(slides=1000, cpu_only=True))
    assert on_cores.rates["engine"].kind == "measured"
    assert plan(Question(slides=1000, cpu_only=True, scale=4)).is_predicted


# -------------------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"slides": 0}, "slides"),
        ({"hours": math.nan}, "hours"),
        ({"tissue_share": 1.5}, "tissue_share"),
        ({"utilization": 0.0}, "utilization"),
        ({"slide_px": (0, 5)}, "slide_px"),
        ({"engine_mpx_per_s": -1.0}, "engine_mpx_per_s"),
        ({"model": "edsr"}, "--engine-mpx-per-s"),
        ({"gpu": "other"}, "--engine-mpx-per-s"),
    ],
)
def test_impossible_questions_say_what_is_wrong(changes: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Question(**({"slides": 1} | changes))
    with pytest.raises(ValueError, match="node_hour"):
        Prices(node_hour=-1)


def test_the_command_says_it_in_words_and_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--slides", "3000", "--input-mpp", "0.5", "--gpu", "h200", "--hours", "8"]
    assert cli(arguments) == 0
    said = capsys.readouterr().out
    for word in ("nodes", "binds", "cores a GPU keeps busy", "requests", "predicted", "of 10,000"):
        assert word in said
    assert cli([*arguments, "--json", "--node-hour", "4"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["nodes"] >= 1
    assert found["question"]["slides"] == 3000
    assert found["costs"]["nodes"] == pytest.approx(found["nodes"] * 32)
    with pytest.raises(SystemExit) as ended:
        cli(["--slides", "0"])
    assert ended.value.code == 2
    assert "slides=0" in capsys.readouterr().err


def test_examples_of_the_documentation_are_what_it_prints(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = (ROOT / "docs" / "scaling.md").read_text()
    found = re.findall(
        r"^    \$ python -m carn\.capacity (.*)\n((?:    .*\n|\n)+)", text, re.MULTILINE
    )
    assert len(found) >= 2
    for command, output in found:
        assert cli(command.split()) == 0
        printed = capsys.readouterr().out
        shown = "\n".join(line.removeprefix("    ") for line in output.splitlines()).strip()
        assert printed.strip().startswith(shown), command


def test_it_is_a_module_that_needs_neither_torch_nor_ray() -> None:
    code = "import sys, carn.capacity; print({'torch', 'ray', 'numpy'} & sys.modules.keys())"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert found.stdout.strip() == "set()"
