"""Outlines of tumour: read from XML and JSON, and tiles drawn from them."""

import json
import logging
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
import shapely.affinity
from hypothesis import given, settings
from hypothesis import strategies as st

from carn.bcsr.annotations import (
    Annotation,
    draw_in_annotation,
    read_annotation,
    read_asap_xml,
    read_ncrf_json,
)
from carn.bcsr.coordinates import POSITION_SCHEMA
from carn.errors import CoordinateError, MissingObjectError
from carn.slides.tissue import TissueMask

REAL_META = Path(__file__).parents[2].parent / "shared" / "data" / "meta"
needs_real_annotations = pytest.mark.skipif(
    not REAL_META.is_dir(), reason="the public CAMELYON16 annotations are not beside the repository"
)

Points = list[tuple[float, float]]
SQUARE: Points = [(0, 0), (100, 0), (100, 100), (0, 100)]
INNER: Points = [(20, 20), (40, 20), (40, 40), (20, 40)]
NOTHING = shapely.union_all([])


def element(group: str | None, points: Points, *, kind: str = "Polygon", name: str = "A") -> str:
    coordinates = "".join(
        f'<Coordinate Order="{order}" X="{x}" Y="{y}" />' for order, (x, y) in enumerate(points)
    )
    part = "" if group is None else f'PartOfGroup="{group}"'
    return (
        f'<Annotation Name="{name}" Type="{kind}" {part} Color="#F4FA58">'
        f"<Coordinates>{coordinates}</Coordinates></Annotation>"
    )


def document(*elements: str) -> str:
    return (
        '<?xml version="1.0"?>\n<ASAP_Annotations><Annotations>'
        + "".join(elements)
        + '</Annotations><AnnotationGroups><Group Name="_0" PartOfGroup="None" Color="#00ff00" />'
        "</AnnotationGroups></ASAP_Annotations>"
    )


def written(folder: Path, content: str | bytes, name: str = "slide.xml") -> str:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def left_out(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


# --------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("group", ["_0", "_1", "Tumor", "metastases"])
@pytest.mark.parametrize("excluded", ["_2", "Exclusion", "normal"])
def test_asap_groups_say_what_is_tumour(tmp_path: Path, group: str, excluded: str) -> None:
    far = [(x + 1000.5, y) for x, y in SQUARE]
    uri = written(
        tmp_path, document(element(group, SQUARE), element(excluded, INNER), element(group, far))
    )
    annotation = read_asap_xml(uri)
    assert annotation.tumor.area == pytest.approx(20_000)
    assert annotation.tumor.bounds == (0, 0, 1100.5, 100)
    assert annotation.excluded.equals(shapely.Polygon(INNER))


def test_asap_points_follow_their_order_and_overlaps_count_once(tmp_path: Path) -> None:
    shuffled = document(element("Tumor", SQUARE))
    for old, new in (("1", "x"), ("2", "1"), ("x", "2")):
        shuffled = shuffled.replace(f'Order="{old}"', f'Order="{new}"')
    crossed = read_asap_xml(written(tmp_path, shuffled))
    assert crossed.tumor.area == pytest.approx(5_000)  # a bow-tie
    both = document(element("_0", SQUARE), element("_1", [(x + 50, y) for x, y in SQUARE]))
    assert read_asap_xml(written(tmp_path, both)).tumor.area == pytest.approx(15_000)


def test_asap_tenth_point_follows_the_ninth(tmp_path: Path) -> None:
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    circle = [(100 + 50 * float(np.cos(a)), 100 + 50 * float(np.sin(a))) for a in angles]
    annotation = read_asap_xml(written(tmp_path, document(element("_0", circle))))
    assert annotation.tumor.equals(shapely.Polygon(circle))


def test_outline_that_crosses_itself_keeps_what_it_encloses(tmp_path: Path) -> None:
    twice_round = [*SQUARE, (0, 0), (60, 20), (60, 60), (20, 60)]
    annotation = read_asap_xml(written(tmp_path, document(element("Tumor", twice_round))))
    assert annotation.tumor.is_valid
    assert annotation.tumor.contains(shapely.Point(30, 30))
    assert annotation.tumor.area == pytest.approx(10_000)


def test_annotations_without_area_are_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uri = written(
        tmp_path,
        document(
            element(None, [(1, 1)], kind="Dot", name="dot"),
            element("Tumor", [(1, 1), (2, 2)], name="pair"),
            element("Tumor", [(1, 1), (2, 2), (3, 3)], name="line"),
            element("Tumor", SQUARE, kind="Spline"),
        ),
    )
    with caplog.at_level(logging.WARNING):
        annotation = read_asap_xml(uri)
    assert annotation.tumor.equals(shapely.Polygon(SQUARE))
    messages = left_out(caplog)
    assert all(
        name in message for name, message in zip(("dot", "pair", "line"), messages, strict=True)
    )
    assert all(uri in message for message in messages)


def test_unknown_group_is_an_error_unless_it_is_named(tmp_path: Path) -> None:
    uri = written(tmp_path, document(element("Stroma", SQUARE, name="A 7")))
    with pytest.raises(CoordinateError, match=r"'A 7'.*'Stroma'.*Tumor.*Exclusion") as caught:
        read_asap_xml(uri)
    assert uri in str(caught.value)
    assert read_asap_xml(uri, tumor_groups=["Stroma"]).tumor.area == 10_000
    assert read_asap_xml(uri, excluded_groups=["Stroma"]).tumor.is_empty
    with pytest.raises(CoordinateError, match="'None'"):
        read_asap_xml(written(tmp_path, document(element(None, SQUARE))))


BOMB = (
    '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">]>'
    "<ASAP_Annotations><Annotations>&b;</Annotations></ASAP_Annotations>"
)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("<ASAP_Annotations><Annotations>", "malformed XML"),
        ('<?xml version="1.0" encoding="no-such"?><ASAP_Annotations/>', "malformed XML"),
        ("<annotations/>", "ASAP_Annotations"),
        (BOMB, "document type"),
        (BOMB.encode("utf-16"), "document type"),
        ('<!DOCTYPE x SYSTEM "file:///etc/passwd"><ASAP_Annotations/>', "document type"),
        (document(element("_0", SQUARE)).replace('X="100"', 'X="a"'), "'A'.*numbers"),
        (document(element("_0", SQUARE)).replace('X="100"', ""), "'A'.*numbers"),
        (document(element("_0", SQUARE)).replace('X="100"', 'X="inf"'), "'A'.*finite"),
    ],
)
def test_malformed_xml_names_the_file(tmp_path: Path, content: str | bytes, fault: str) -> None:
    uri = written(tmp_path, content)
    with pytest.raises(CoordinateError, match=fault) as caught:
        read_asap_xml(uri)
    assert str(caught.value).startswith(uri)


def test_ncrf_json_positive_is_tumour_and_negative_excluded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = {
        "positive": [
            {"name": "Annotation 0", "vertices": SQUARE},
            {"name": "pair", "vertices": [[1, 1], [2, 2]]},
        ],
        "negative": [{"name": "Annotation 1", "vertices": INNER}],
    }
    annotation = read_ncrf_json(written(tmp_path, json.dumps(content), "slide.json"))
    assert annotation.tumor.equals(shapely.Polygon(SQUARE))
    assert annotation.excluded.equals(shapely.Polygon(INNER))
    assert len(left_out(caplog)) == 1
    assert "'pair'" in left_out(caplog)[0]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ('{"positive": [', "malformed JSON"),
        ("[" * 100_000, "malformed JSON"),
        ('{"positive": []}', "negative"),
        ("[]", "NCRF"),
        ('{"positive": [1], "negative": []}', "vertices"),
        ('{"positive": [{"name": "p"}], "negative": []}', "vertices"),
        ('{"positive": [{"name": "p", "vertices": [[1, 2, 3]]}], "negative": []}', "'p'.*pairs"),
        ('{"positive": [{"name": "p", "vertices": [[1, 2], [3]]}], "negative": []}', "'p'.*pairs"),
        ('{"positive": [{"name": "p", "vertices": [[1, NaN]]}], "negative": []}', "'p'.*finite"),
    ],
)
def test_malformed_json_names_the_file(tmp_path: Path, content: str, fault: str) -> None:
    uri = written(tmp_path, content, "slide.json")
    with pytest.raises(CoordinateError, match=fault) as caught:
        read_ncrf_json(uri)
    assert str(caught.value).startswith(uri)


def test_content_not_name_says_which_format_it_is(tmp_path: Path) -> None:
    xml = "\ufeff\n" + document(element("_0", SQUARE)).split("\n")[1]
    assert read_annotation(written(tmp_path, xml, "a.json")).tumor.area == 10_000
    content = json.dumps({"positive": [{"vertices": INNER}], "negative": []})
    assert read_annotation(written(tmp_path, f"  {content}", "a.xml")).tumor.area == 400
    for neither in ("", "x,y\n1,2\n"):
        with pytest.raises(CoordinateError, match="neither"):
            read_annotation(written(tmp_path, neither, "a.csv"))
    with pytest.raises(MissingObjectError):
        read_annotation(str(tmp_path / "none.xml"))


def test_annotation_travels_between_processes() -> None:
    annotation = Annotation(tumor=shapely.Polygon(SQUARE), excluded=NOTHING)
    shapely.prepare(annotation.tumor)
    assert pickle.loads(pickle.dumps(annotation)) == annotation


# --------------------------------------------------------------------------------------- drawing


def tissue(width: int = 1000, height: int = 800, *, downsample: float = 10.0) -> TissueMask:
    shape = (int(np.ceil(height / downsample)), int(np.ceil(width / downsample)))
    return TissueMask(
        mask=np.ones(shape, dtype=bool), downsample=downsample, extent=(width, height)
    )


def draw(
    annotation: Annotation | None, where: TissueMask, *, tile_px: int = 64, **options: Any
) -> dict[str, np.ndarray[Any, Any]]:
    """Tile centres (n, 2) by label."""
    options = {"slide": "s", "points_per_label": 25, "seed": 0, **options}
    table = draw_in_annotation(annotation, tissue=where, tile_px=tile_px, **options)
    assert table.schema == POSITION_SCHEMA
    assert set(table["slide"].to_pylist()) <= {options["slide"]}
    corners = np.stack([table["x_l0"].to_numpy(), table["y_l0"].to_numpy()], axis=1)
    labels = np.array(table["label"].to_pylist(), dtype=object)
    assert set(labels) <= {"tumor", "normal"}
    return {label: corners[labels == label] + tile_px // 2 for label in ("tumor", "normal")}


@given(
    seed=st.integers(0, 1000),
    tile_px=st.integers(1, 90),
    downsample=st.sampled_from([1.0, 7.3, 32.0]),
    corners=st.lists(
        st.tuples(st.integers(-50, 350), st.integers(-50, 350)), min_size=3, max_size=7
    ),
)
@settings(deadline=None, derandomize=True, max_examples=50)
def test_centres_lie_where_their_label_says(
    seed: int, tile_px: int, downsample: float, corners: Points
) -> None:
    tumor = shapely.make_valid(shapely.Polygon(corners), method="structure", keep_collapsed=False)
    excluded = shapely.box(100, 100, 160, 220)
    where = tissue(300, 200, downsample=downsample)
    where.mask[: where.mask.shape[0] // 2] = False
    annotation = Annotation(tumor=tumor, excluded=excluded)
    centres = draw(annotation, where, tile_px=tile_px, seed=seed)
    for found in centres.values():
        assert len(found) <= 25
        assert len(np.unique(found, axis=0)) == len(found)
        assert ((found >= 0) & (found < (300, 200))).all()
    assert shapely.contains_xy(tumor.difference(excluded), centres["tumor"]).all()
    columns, rows = np.floor(centres["normal"] / downsample).astype(int).T
    assert where.mask[rows, columns].all()
    for x, y in centres["normal"] - tile_px // 2:
        assert not shapely.box(x, y, x + tile_px, y + tile_px).intersects(tumor)


def test_draw_depends_on_seed_and_slide_name_alone() -> None:
    annotation = Annotation(tumor=shapely.box(0, 0, 300, 300), excluded=NOTHING)
    one, again = draw(annotation, tissue()), draw(annotation, tissue())
    assert all((one[label] == again[label]).all() for label in one)
    for change in ({"seed": 1}, {"slide": "t"}):
        other = draw(annotation, tissue(), **change)
        assert all((one[label] != other[label]).any() for label in one)


def test_tumour_centres_are_uniform_by_area_and_free_of_exclusions() -> None:
    # A square with a hole, 2.5 times as large as the rest, which is thin and oblique.
    square = shapely.box(100, 100, 300, 300)
    sliver = shapely.Polygon([(400, 100), (410, 100), (910, 700), (900, 700)])
    excluded = shapely.box(100, 100, 200, 350)
    annotation = Annotation(tumor=shapely.union(square, sliver), excluded=excluded)
    found = draw(annotation, tissue(), points_per_label=2000)["tumor"]
    assert len(found) == 2000
    assert not shapely.contains_xy(excluded, found).any()
    area = (square - excluded).area
    in_square = shapely.contains_xy(square, found)
    assert in_square.mean() == pytest.approx(area / (area + sliver.area), abs=0.04)
    assert found[in_square].mean(axis=0) == pytest.approx((250, 200), abs=5)
    assert found[~in_square].mean(axis=0) == pytest.approx((655, 400), abs=30)


def test_tumour_centres_are_uniform_over_a_disc() -> None:
    disc = shapely.Point(10_000, 10_000).buffer(8000, quad_segs=3)
    annotation = Annotation(tumor=disc, excluded=NOTHING)
    found = draw(annotation, tissue(20_000, 20_000, downsample=100.0), points_per_label=6000)
    for ring in (0.25, 0.5, 0.75):
        inner = shapely.affinity.scale(disc, ring**0.5, ring**0.5)
        share = shapely.contains_xy(inner, found["tumor"]).mean()
        assert share == pytest.approx(ring, abs=0.025)  # 4 standard deviations


def test_tiny_lesion_in_a_wide_slide_gives_each_pixel_it_has() -> None:
    tiny = shapely.box(50_000.5, 40_000.5, 50_003.5, 40_002.5)
    annotation = Annotation(tumor=tiny, excluded=NOTHING)
    found = draw(annotation, tissue(100_000, 90_000, downsample=1000.0))["tumor"]
    assert sorted(map(tuple, found.tolist())) == [
        (x, y) for x in (50_001, 50_002, 50_003) for y in (40_001, 40_002)
    ]


def test_lesion_over_the_border_gives_centres_on_the_slide_only() -> None:
    annotation = Annotation(tumor=shapely.box(-500, 700, 500, 1500), excluded=NOTHING)
    found = draw(annotation, tissue(), points_per_label=200)["tumor"]
    assert len(found) == 200
    assert found.min(axis=0).tolist() >= [0, 0]
    assert found[:, 1].max() <= 799
    # Their tiles may hang over.
    assert (found[:, 1] + 32 > 800).any()


def test_normal_tiles_keep_off_tumour_and_off_what_it_surrounds() -> None:
    ring = shapely.box(200, 200, 700, 600) - shapely.box(300, 300, 600, 500)
    hole = shapely.box(300, 300, 600, 500)
    annotation = Annotation(tumor=ring, excluded=hole)
    found = draw(annotation, tissue(), points_per_label=500)["normal"]
    assert len(found) == 500
    inside = shapely.contains_xy(hole, found)
    # Tiles wholly within the hole do not touch the ring; those near its border do.
    assert 0 < inside.sum() < 250
    assert shapely.distance(shapely.points(found), ring).min() >= 32
    wide = draw(annotation, tissue(), points_per_label=500, tile_px=210)["normal"]
    assert not shapely.contains_xy(hole, wide).any()


def test_slide_without_tumour_is_normal_wherever_there_is_tissue() -> None:
    where = tissue()
    where.mask[:] = False
    where.mask[10:20, 30:50] = True
    centres = draw(None, where, points_per_label=200)
    assert len(centres["tumor"]) == 0
    pixels = centres["normal"] // 10
    assert len(np.unique(pixels, axis=0)) == 200  # each of the mask's pixels gave one
    assert pixels.min(axis=0).tolist() == [30, 10]
    assert pixels.max(axis=0).tolist() == [49, 19]


def test_centre_on_a_mask_px_that_starts_amid_a_pixel_is_on_tissue() -> None:
    where = tissue(300, 200, downsample=7.3)
    where.mask[:] = False
    where.mask[10:14, 3] = True  # x from 21.9 to 29.2
    found = draw(None, where, points_per_label=100)["normal"]
    assert len(found) == 100
    assert found.min(axis=0).tolist() == [22, 73]
    assert found.max(axis=0)[0] == 29


def test_few_pixels_of_tissue_give_more_than_one_centre_each() -> None:
    where = tissue(64, 32, downsample=32.0)
    assert len(draw(None, where, points_per_label=500)["normal"]) == 500


def test_nothing_possible_gives_an_empty_table() -> None:
    where = tissue()
    all_tumour = Annotation(tumor=shapely.box(-10, -10, 1010, 810), excluded=NOTHING)
    assert [len(found) for found in draw(all_tumour, where).values()] == [25, 0]
    where.mask[:] = False
    excluded = Annotation(tumor=all_tumour.tumor, excluded=all_tumour.tumor)
    assert [len(found) for found in draw(excluded, where).values()] == [0, 0]


@pytest.mark.parametrize("wrong", [{"tile_px": 0}, {"points_per_label": 0}, {"seed": -1}])
def test_numbers_without_meaning_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        draw(None, tissue(), **wrong)


# ------------------------------------------------------------------------------ real annotations


@needs_real_annotations
@pytest.mark.parametrize(
    ("archive", "member", "num_files"),
    [
        ("ncrf_jsons.tar.xz", "Tumor_1", 9),
        ("camelyon16_test_annotations_json.tar.xz", "test_0", 38),
    ],
)
def test_public_annotations_read_and_give_tiles(
    tmp_path: Path, archive: str, member: str, num_files: int
) -> None:
    with tarfile.open(REAL_META / archive) as tar:
        members = [item for item in tar.getmembers() if Path(item.name).name.startswith(member)]
        tar.extractall(tmp_path, members=members, filter="data")
    paths = sorted(tmp_path.rglob("*.json"))
    assert len(paths) >= num_files
    for path in paths:
        annotation = read_annotation(str(path))
        assert annotation.tumor.is_valid
        assert annotation.tumor.area > 0
    smallest = min((read_annotation(str(path)) for path in paths), key=lambda item: item.tumor.area)
    extent = (int(smallest.tumor.bounds[2]) + 5000, int(smallest.tumor.bounds[3]) + 5000)
    centres = draw(smallest, tissue(*extent, downsample=64.0), tile_px=1024)
    assert [len(found) for found in centres.values()] == [25, 25]
    assert shapely.contains_xy(smallest.tumor, centres["tumor"]).all()


def test_groups_of_ones_own_are_named_to_read_annotation(tmp_path: Path) -> None:
    path = tmp_path / "slide.xml"
    path.write_text(
        '<ASAP_Annotations><Annotations><Annotation Name="a" PartOfGroup="invasive" Type="Polygon">'
        '<Coordinates><Coordinate Order="0" X="0" Y="0"/><Coordinate Order="1" X="10" Y="0"/>'
        '<Coordinate Order="2" X="10" Y="10"/></Coordinates></Annotation></Annotations>'
        "</ASAP_Annotations>"
    )
    with pytest.raises(CoordinateError, match="unknown group 'invasive'"):
        read_annotation(str(path))
    assert read_annotation(str(path), tumor_groups=["invasive"]).tumor.area == pytest.approx(50)
    assert read_annotation(str(path), excluded_groups=["invasive"]).tumor.is_empty
