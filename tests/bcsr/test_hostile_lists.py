"""Lists, annotations and datasets from outside: read, or one error; within bounds."""

import json
import time
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from carn.bcsr import annotations, coordinates, dataset
from carn.bcsr.annotations import read_annotation
from carn.bcsr.codec import decode, encode
from carn.bcsr.coordinates import MAX_COORDINATE_PX, read_csv, read_ncrf_list, resolve_slides
from carn.bcsr.dataset import open_dataset
from carn.errors import CoordinateError, DatasetError, StorageError, UriError
from carn.slides.image import MAX_IMAGE_PX
from tests.fuzzing import examples, only_own_errors

CELLS = st.sampled_from(
    (
        *("a", "1", "-1", "", " ", "x", "tumor", "1e5", "nan", '"', '""', "a/../b", "s3://", "é"),
        *("\0", "\ufeff", "9" * 18, "-" + "9" * 18, str(2**63 - 1), str(-(2**63)), "'", "\t"),
    )
)
LINES = st.lists(st.lists(CELLS, max_size=6).map(",".join), max_size=6)
ENDS = st.sampled_from(("\n", "\r\n", "\r"))


# ---------------------------------------------------------------------------------------- lists


@examples(60)
@given(
    head=st.sampled_from(("", "slide,x,y,label", "uri,x,y,label", "x,y,label,uri,more", '"')),
    lines=LINES,
    end=ENDS,
    noise=st.binary(max_size=8),
)
def test_any_list_is_positions_or_one_error(
    tmp_path: Path, head: str, lines: list[str], end: str, noise: bytes
) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(end.join([head, *lines] if head else lines).encode() + noise)
    for read in (
        lambda: read_csv(str(path), anchor="centre", tile_px=1024),
        lambda: read_ncrf_list(str(path), label="tumor", tile_px=1024),
    ):
        with only_own_errors():
            found = read()
            x = found["x_l0"].to_numpy()
            assert np.abs(x).max() <= MAX_COORDINATE_PX + 512
            resolve_slides(found, ["/a.tif", "s3://b/a/../b"])


@pytest.mark.parametrize("value", [str(2**63 - 1), str(-(2**63)), str(MAX_COORDINATE_PX + 1)])
def test_coordinates_that_would_overflow_are_refused(tmp_path: Path, value: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text(f"slide,1,2\nslide,{value},2\n")
    with pytest.raises(CoordinateError, match="line 2: x is "):
        read_ncrf_list(str(path), label="tumor", tile_px=1024)


def test_a_header_that_is_no_csv_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"slide,x\ry,label\n1,2,3\n")
    with pytest.raises(CoordinateError, match="line 1"):
        read_csv(str(tmp_path / "a.csv"), anchor="corner", tile_px=8)


def test_a_header_of_too_many_columns_is_one_short_error(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("slide,x,y,label" + ",x" * 5000 + "\n")
    with pytest.raises(CoordinateError, match="names 5004 columns, over 1000"):
        read_csv(str(tmp_path / "a.csv"), anchor="corner", tile_px=8)


def test_what_a_list_holds_does_not_fill_the_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(f"slide,{'x' * 100_000},2\n")
    with pytest.raises(CoordinateError, match="line 1: x is 'xxx") as caught:
        read_ncrf_list(str(tmp_path / "a.txt"), label="tumor", tile_px=8)
    assert len(str(caught.value)) < 500


def test_names_that_lead_elsewhere_are_no_slides() -> None:
    table = coordinates.POSITION_SCHEMA.empty_table()
    for name in ("../../etc/passwd", "/etc/passwd", "a/../slide.tif", "..", "."):
        row = {"slide": name, "x_l0": 1, "y_l0": 1, "label": "tumor"}
        listed = table.from_pylist([row], schema=coordinates.POSITION_SCHEMA)
        found, missing = resolve_slides(listed, ["/data/slide.tif"])
        assert found.num_rows == 0
        assert missing == [name]
    row = {"slide": "a/\n", "x_l0": 1, "y_l0": 1, "label": "tumor"}
    with pytest.raises(UriError):
        resolve_slides(
            table.from_pylist([row], schema=coordinates.POSITION_SCHEMA), ["/data/slide.tif"]
        )


def test_lists_and_annotations_that_are_too_large_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "a.csv")
    Path(path).write_bytes(bytes(100))
    monkeypatch.setattr(coordinates, "MAX_LIST_BYTES", 99)
    monkeypatch.setattr(annotations, "MAX_ANNOTATION_BYTES", 99)
    with pytest.raises(StorageError, match="at most 99"):
        read_csv(path, anchor="corner", tile_px=8)
    with pytest.raises(StorageError, match="at most 99"):
        read_ncrf_list(path, label="tumor", tile_px=8)
    for read in (read_annotation, annotations.read_asap_xml, annotations.read_ncrf_json):
        with pytest.raises(StorageError, match="at most 99"):
            read(path)


# ---------------------------------------------------------------------------------- annotations

NUMBERS = st.sampled_from(
    (
        *(0, 1, -5, 700, 1e6, 1e300, 1e308, -1e308, 10**400, float("nan"), float("inf"), 0.1),
        *(None, "1", "x", True, [], {}),
    )
)
VERTICES = st.lists(st.lists(NUMBERS, min_size=2, max_size=2), max_size=8) | NUMBERS
OUTLINE = st.fixed_dictionaries({"vertices": VERTICES}, optional={"name": NUMBERS})
JSONS = st.fixed_dictionaries(
    {"positive": st.lists(OUTLINE, max_size=3)}, optional={"negative": st.lists(OUTLINE)}
) | st.recursive(NUMBERS, lambda inner: st.lists(inner, max_size=3), max_leaves=5)


@examples(50)
@given(document=JSONS, cut=st.integers(0, 12))
def test_any_json_is_an_annotation_or_one_error(tmp_path: Path, document: object, cut: int) -> None:
    path = tmp_path / "a.json"
    text = json.dumps(document)
    path.write_text(text[: len(text) - cut] if cut < 5 else text)
    with only_own_errors():
        read_annotation(str(path))


@examples(50)
@given(
    points=st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS), max_size=6),
    group=st.sampled_from(("Tumor", "_2", "", "x" * 500)),
    damage=st.sampled_from(("", "<", "&a;", "]]>", "\0", "<!DOCTYPE a>", "\x80", "<a>")),
    place=st.integers(0, 400),
)
def test_any_xml_is_an_annotation_or_one_error(
    tmp_path: Path, points: list[tuple[Any, ...]], group: str, damage: str, place: int
) -> None:
    inner = "".join(f'<Coordinate Order="{o}" X="{x}" Y="{y}"/>' for o, x, y in points)
    text = (
        f'<ASAP_Annotations><Annotations><Annotation Name="a" Type="Polygon" PartOfGroup="{group}">'
        f"<Coordinates>{inner}</Coordinates></Annotation></Annotations></ASAP_Annotations>"
    )
    path = tmp_path / "a.xml"
    path.write_bytes((text[:place] + damage + text[place:]).encode("latin-1"))
    with only_own_errors():
        read_annotation(str(path))


@pytest.mark.parametrize("depth", [1000, 100_000])
@pytest.mark.parametrize(("left", "right"), [("[", "]"), ('{"positive":', "}"), ("<a>", "</a>")])
def test_deep_nesting_is_one_error(tmp_path: Path, left: str, right: str, depth: int) -> None:
    (tmp_path / "a.json").write_text(left * depth + right * depth)
    with pytest.raises(CoordinateError):
        read_annotation(str(tmp_path / "a.json"))


@pytest.mark.parametrize("value", [1e300, -1e300, 10**400])
def test_coordinates_of_no_slide_are_refused(tmp_path: Path, value: float) -> None:
    outline = {"vertices": [[0, 0], [value, 0], [0, 5]]}
    (tmp_path / "a.json").write_text(json.dumps({"positive": [outline], "negative": []}))
    with pytest.raises(CoordinateError, match=r"of no slide|not x, y pairs"):
        read_annotation(str(tmp_path / "a.json"))


def strokes(count: int) -> list[list[int]]:
    """An outline to and fro, every stroke of which crosses all those before."""
    rng = np.random.default_rng(1)
    return rng.integers(0, 10_000, (count, 2)).tolist()  # type: ignore[no-any-return]


def comb(count: int, *, is_upright: bool) -> list[list[int]]:
    """Teeth side by side; two combs across each other meet in count**2 * 4 places."""
    points = [[0, -1]] + [
        [x * 3 + corner, 0 if corner in (0, 2) else 3 * count]
        for x in range(count)
        for corner in (0, 1)
    ]
    points.append([3 * count, -1])
    return [point[::-1] for point in points] if is_upright else points


@pytest.mark.parametrize(
    "outlines",
    [
        [strokes(6000)],
        [comb(3000, is_upright=True), comb(3000, is_upright=False)],
        [[[0, 0], [9, 0], [9, 9], [0, 9]]] * 1500,
    ],
    ids=["strokes", "combs", "copies"],
)
def test_outlines_that_cross_each_other_everywhere_are_refused(
    tmp_path: Path, outlines: list[Any]
) -> None:
    entries = [{"vertices": outline} for outline in outlines]
    (tmp_path / "a.json").write_text(json.dumps({"positive": entries, "negative": []}))
    started = time.monotonic()
    with pytest.raises(CoordinateError, match="cross each other in more than"):
        read_annotation(str(tmp_path / "a.json"))
    assert time.monotonic() - started < 20


def test_a_long_outline_that_goes_round_once_is_read(tmp_path: Path) -> None:
    turn = np.linspace(0, 2 * np.pi, 50_000, endpoint=False)
    points = 40_000 + 30_000 * np.stack([np.cos(turn), np.sin(turn)], axis=1)
    document = {"positive": [{"vertices": points.tolist()}], "negative": []}
    (tmp_path / "a.json").write_text(json.dumps(document))
    found = read_annotation(str(tmp_path / "a.json"))
    assert found.tumor.area == pytest.approx(np.pi * 30_000**2, rel=1e-4)


def test_a_group_or_root_of_any_length_does_not_fill_the_error(tmp_path: Path) -> None:
    for text in (
        f"<{'a' * 100_000}/>",
        f'<ASAP_Annotations><Annotations><Annotation PartOfGroup="{"g" * 100_000}"/>'
        "</Annotations></ASAP_Annotations>",
    ):
        (tmp_path / "a.xml").write_text(text)
        with pytest.raises(CoordinateError) as caught:
            read_annotation(str(tmp_path / "a.xml"))
        assert len(str(caught.value)) < 1000


# -------------------------------------------------------------------------------------- datasets


@pytest.mark.parametrize("encoding", ["jxl", "png"])
def test_a_tile_that_claims_another_extent_is_not_decoded(encoding: Any) -> None:
    bomb = np.zeros((2000, 2000, 3), np.uint8)
    content = encode(bomb, encoding)
    assert len(content) < bomb.nbytes / 100
    with pytest.raises(ValueError, match=r"damaged .* tile"), only_own_errors():
        decode(content, encoding, extent=(40, 48))
    small = np.zeros((48, 40, 3), np.uint8)
    with pytest.raises(ValueError, match="damaged"):
        decode(encode(small, encoding), encoding, extent=(48, 40))
    with pytest.raises(ValueError, match="at most"):
        decode(content, encoding, extent=(MAX_IMAGE_PX, 2))
    with pytest.raises(ValueError, match="0 x 5"):
        decode(content, encoding, extent=(0, 5))


@pytest.mark.parametrize("shape", [(48, 40), (48, 40, 4)])
def test_a_tile_of_other_channels_is_not_decoded(shape: tuple[int, ...]) -> None:
    for name, function in (("png", imagecodecs.png_encode), ("jxl", imagecodecs.jpegxl_encode)):
        with pytest.raises(ValueError, match="damaged"):
            decode(function(np.zeros(shape, np.uint8)), name, extent=(40, 48))


MANIFEST = {
    "format": "bcsr",
    "format_version": 1,
    "splits": {"train": 1, "validation": 0, "test": 0},
    "shards": [{"name": "train-00000-0123456789ab.parquet", "split": "train", "num_tiles": 1}],
}


def write_manifest(folder: Path, content: object) -> str:
    (folder / "manifest.json").write_text(json.dumps(content))
    return str(folder)


def test_a_whole_manifest_is_read(tmp_path: Path) -> None:
    assert open_dataset(write_manifest(tmp_path, MANIFEST)).num_tiles("train") == 1


@pytest.mark.parametrize(
    "name", ["../../secret.parquet", "/etc/a.parquet", "a/b.parquet", "a\nb.parquet", "x", 5, None]
)
def test_a_shards_name_does_not_lead_out_of_the_dataset(tmp_path: Path, name: object) -> None:
    shard = {"name": name, "split": "train", "num_tiles": 1}
    uri = write_manifest(tmp_path, MANIFEST | {"shards": [shard]})
    with pytest.raises(DatasetError, match="does not name its shards"):
        open_dataset(uri)


@pytest.mark.parametrize(
    "change",
    [
        {"shards": [{"name": "a.parquet", "split": "other", "num_tiles": 1}]},
        {"shards": [{"name": "a.parquet", "split": "train", "num_tiles": -1}]},
        {"shards": [{"name": "a.parquet", "split": "train"}]},
        {"shards": ["a.parquet"]},
        {"shards": None},
        {"splits": {"train": 1}},
        {"splits": {"train": "x", "validation": 0, "test": 0}},
    ],
    ids=str,
)
def test_manifests_of_another_structure_are_one_error(tmp_path: Path, change: Any) -> None:
    with pytest.raises(DatasetError, match="does not name its shards"):
        open_dataset(write_manifest(tmp_path, MANIFEST | change))


def test_manifests_that_are_nested_or_too_large_are_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(DatasetError, match="is not the manifest"):
        open_dataset(str(tmp_path))
    monkeypatch.setattr(dataset, "MAX_MANIFEST_BYTES", 10)
    with pytest.raises(StorageError, match="at most 10"):
        open_dataset(str(tmp_path))
