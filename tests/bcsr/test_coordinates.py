"""Lists of positions: read, matched with slides, drawn, and checked for overlap."""

from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from carn.bcsr.coordinates import (
    POSITION_SCHEMA,
    draw_positions,
    ncrf_label,
    overlap_pairs,
    read_csv,
    read_ncrf_list,
    resolve_slides,
)
from carn.errors import CoordinateError, MissingObjectError

REAL_LISTS = Path(__file__).parents[2].parent / "shared" / "data" / "coords" / "ncrf"
needs_real_lists = pytest.mark.skipif(
    not REAL_LISTS.is_dir(), reason="the public NCRF lists are not beside the repository"
)


def positions(*rows: tuple[str, int, int, str]) -> pa.Table:
    columns = zip(*rows, strict=True) if rows else [[], [], [], []]
    return pa.table([list(column) for column in columns], schema=POSITION_SCHEMA)


def rows_of(table: pa.Table) -> list[tuple[object, ...]]:
    return [tuple(row.values()) for row in table.to_pylist()]


def written(folder: Path, content: str | bytes, name: str = "list.txt") -> str:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


# -------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_ncrf_list_holds_centres_and_the_label_of_the_list(tmp_path: Path, newline: str) -> None:
    uri = written(tmp_path, newline.join(["Tumor_001,2000,1000", "", "Normal_002,100, 5000 ", ""]))
    table = read_ncrf_list(uri, label="normal", tile_px=1024)
    assert table.schema == POSITION_SCHEMA
    assert rows_of(table) == [
        ("Tumor_001", 1488, 488, "normal"),
        ("Normal_002", -412, 4488, "normal"),
    ]


def test_odd_tile_has_its_centre_on_the_middle_pixel(tmp_path: Path) -> None:
    table = read_ncrf_list(written(tmp_path, "a,10,10"), label="normal", tile_px=5)
    assert rows_of(table) == [("a", 8, 8, "normal")]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("a,1,2\nb,3\n", r"line 2: 2 columns"),
        ("a,1,2\n\nb,3,4,5\n", r"line 3: 4 columns"),
        ("a,1,2\nb,3.5,4\n", r"line 2: x is '3.5'"),
        ("name,x,y\na,1,2\n", r"line 1: x is 'x'"),
        ("a,1,2\na,1,\n", r"line 2: y is ''"),
        ("a,1,99999999999999999999\n", r"line 1: y is '9+'"),
        ("a,1,2\n ,1,2\n", r"line 2: slide is empty"),
        (b"a,1,2\n\xff,1,2\n", r"line 2: .* not UTF-8"),
        ("", "lists no positions"),
        ("\n\n", "lists no positions"),
    ],
)
def test_malformed_list_names_file_and_line(
    tmp_path: Path, content: str | bytes, fault: str
) -> None:
    uri = written(tmp_path, content)
    with pytest.raises(CoordinateError, match=fault) as caught:
        read_ncrf_list(uri, label="tumor", tile_px=1024)
    assert uri in str(caught.value)


def test_fault_far_down_a_long_list_is_found(tmp_path: Path) -> None:
    # Beyond the first of the blocks that the reader splits a file into.
    lines = ["Tumor_001,10000,20000"] * 100_000
    lines[87_654] = "Tumor_001,10000,2000O"
    with pytest.raises(CoordinateError, match="line 87655: y is '2000O'"):
        read_ncrf_list(written(tmp_path, "\n".join(lines)), label="tumor", tile_px=1024)


def test_missing_list_and_empty_label(tmp_path: Path) -> None:
    with pytest.raises(MissingObjectError):
        read_ncrf_list(str(tmp_path / "none.txt"), label="tumor", tile_px=1024)
    with pytest.raises(ValueError, match="label"):
        read_ncrf_list(written(tmp_path, "a,1,2"), label="", tile_px=1024)


@pytest.mark.parametrize(("anchor", "corner"), [("corner", (100, 200)), ("centre", (68, 168))])
def test_csv_columns_in_any_order(tmp_path: Path, anchor: str, corner: tuple[int, int]) -> None:
    uri = written(tmp_path, "\ufeffnote, y,label,x,uri,note\nhi,200, tumor ,100,s3://b/a b.tif,\n")
    table = read_csv(uri, anchor=anchor, tile_px=64)  # type: ignore[arg-type]
    assert table.schema == POSITION_SCHEMA
    assert rows_of(table) == [("s3://b/a b.tif", *corner, "tumor")]


def test_csv_takes_slide_for_uri_and_uri_before_slide(tmp_path: Path) -> None:
    by_name = read_csv(
        written(tmp_path, "slide,x,y,label\r\na,1,2,stroma\r\n"), anchor="corner", tile_px=8
    )
    assert rows_of(by_name) == [("a", 1, 2, "stroma")]
    both = read_csv(
        written(tmp_path, "slide,uri,x,y,label\na,/b.tif,1,2,stroma\n"), anchor="corner", tile_px=8
    )
    assert rows_of(both) == [("/b.tif", 1, 2, "stroma")]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("slide,x,label\na,1,tumor\n", r"\['slide', 'x', 'label'\].*uri \(or slide\), x, y, label"),
        ("slide;x;y;label\na;1;2;tumor\n", r"commas"),
        ("slide,x,x,y,label\na,1,1,2,tumor\n", r"each once"),
        ("", r"names the columns \[\]"),
        ("slide,x,y,label\n", r"lists no positions"),
        ("slide,x,y,label\na,1,2,tumor\na,1,2,\n", r"line 3: label is empty"),
        ("slide,x,y,label\na,1,2,tumor\na,1.0,2,tumor\n", r"line 3: x is '1.0'"),
        ("slide,x,y,label\na,1,2\n", r"line 2: 3 columns"),
    ],
)
def test_malformed_csv_says_what_and_where(tmp_path: Path, content: str, fault: str) -> None:
    uri = written(tmp_path, content)
    with pytest.raises(CoordinateError, match=fault) as caught:
        read_csv(uri, anchor="corner", tile_px=8)
    assert uri in str(caught.value)


def test_another_spelling_of_anchor_is_refused(tmp_path: Path) -> None:
    uri = written(tmp_path, "slide,x,y,label\na,1,2,tumor\n")
    with pytest.raises(ValueError, match="center"):
        read_csv(uri, anchor="center", tile_px=8)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("uri", "label"),
    [
        ("s3://normal/coords/tumor_train.txt", "tumor"),
        ("/a/Normal_valid.txt", "normal"),
        ("TUMOR.txt", "tumor"),
        ("/tumor/all.txt", None),
        ("abnormal.txt", None),
    ],
)
def test_label_by_file_name(uri: str, label: str | None) -> None:
    assert ncrf_label(uri) == label


# ------------------------------------------------------------------------------------- resolving


def test_names_find_their_slides_and_missing_ones_are_listed_once() -> None:
    slides = ["s3://b/x/Tumor_001.tif", "s3://b/x/Tumor_002.tif", "/local/Case.1.svs"]
    table, missing = resolve_slides(
        positions(
            ("zz", 0, 0, "tumor"),
            ("Tumor_001", 1, 0, "tumor"),
            ("Tumor_002.tif", 2, 0, "tumor"),
            ("TUMOR_001", 3, 0, "tumor"),
            ("Case.1", 4, 0, "tumor"),
            ("s3://b/x/Tumor_001.tif", 5, 0, "tumor"),
            ("s3://elsewhere/Tumor_001.tif", 6, 0, "tumor"),
            ("file:///local/Case.1.svs", 7, 0, "tumor"),
            ("Case", 8, 0, "tumor"),
            ("zz", 9, 0, "normal"),
        ),
        slides,
    )
    assert table.column_names == ["slide", "x_l0", "y_l0", "label", "uri"]
    found = [(row["x_l0"], row["uri"], row["slide"]) for row in table.to_pylist()]
    assert found == [
        (1, slides[0], "Tumor_001"),
        (2, slides[1], "Tumor_002"),
        (3, slides[0], "Tumor_001"),
        (4, slides[2], "Case.1"),
        (5, slides[0], "Tumor_001"),
        (7, slides[2], "Case.1"),
    ]
    assert missing == ["Case", "s3://elsewhere/Tumor_001.tif", "zz"]


def test_shared_stem_is_an_error_only_where_asked_for() -> None:
    slides = ["/a/one.tif", "/b/one.tif", "/a/two.tif", "/a/three.tif", "/a/three.svs"]
    with pytest.raises(CoordinateError, match=r"'one'.*/a/one\.tif.*/b/one\.tif.*URI"):
        resolve_slides(positions(("one", 0, 0, "tumor")), slides)
    table, missing = resolve_slides(
        positions(
            ("two", 0, 0, "tumor"),
            ("/b/one.tif", 0, 0, "tumor"),
            ("/a/one.tif", 0, 0, "tumor"),
            ("three.svs", 0, 0, "tumor"),
        ),
        slides,
    )
    assert table["uri"].to_pylist() == ["/a/two.tif", "/b/one.tif", "/a/one.tif", "/a/three.svs"]
    assert table["slide"].to_pylist() == ["two", "/b/one.tif", "/a/one.tif", "/a/three.svs"]
    assert missing == []


def test_case_is_ignored_only_where_that_is_unambiguous() -> None:
    asked = positions(("A", 0, 0, "tumor"), ("b", 0, 0, "tumor"))
    table, missing = resolve_slides(asked, ["/s/a.tif", "/s/A.tif", "/s/B.tif"])
    assert table["uri"].to_pylist() == ["/s/A.tif", "/s/B.tif"]
    _, missing = resolve_slides(positions(("AA", 0, 0, "tumor")), ["/s/aA.tif", "/s/Aa.tif"])
    assert missing == ["AA"]


def test_repetitions_are_one_and_stay_where_they_first_stood() -> None:
    table, _ = resolve_slides(
        positions(
            ("b", 5, 5, "tumor"),
            ("a", 1, 1, "normal"),
            ("/s/b.tif", 5, 5, "tumor"),
            ("a", 0, 0, "tumor"),
            ("a", 1, 1, "normal"),
        ),
        ["/s/a.tif", "/s/b.tif"],
    )
    assert [row[:4] for row in rows_of(table)] == [
        ("b", 5, 5, "tumor"),
        ("a", 1, 1, "normal"),
        ("a", 0, 0, "tumor"),
    ]


def test_one_place_with_two_labels_is_an_error_naming_the_first() -> None:
    asked = positions(
        ("a", 0, 0, "tumor"),
        ("a", 7, 8, "normal"),
        ("a", 1, 1, "normal"),
        ("a", 1, 1, "tumor"),
        ("a", 7, 8, "tumor"),
    )
    with pytest.raises(CoordinateError, match=r"/s/a\.tif.*\(7, 8\).*'normal'.*'tumor'"):
        resolve_slides(asked, ["/s/a.tif"])


def test_nothing_asked_for_resolves_to_nothing() -> None:
    table, missing = resolve_slides(positions(), ["/s/a.tif"])
    assert (table.num_rows, table.column_names[-1], missing) == (0, "uri", [])


# --------------------------------------------------------------------------------------- drawing

DRAW: dict[str, Any] = {"seed": 3, "even_over_slides": False, "allow_overlap": True, "tile_px": 8}

tables = st.lists(
    st.tuples(
        st.sampled_from("abc"),
        st.integers(-20, 40),
        st.integers(-20, 40),
        st.sampled_from(["tumor", "normal", "stroma"]),
    ),
    unique_by=lambda row: row[:3],
    max_size=60,
)


@given(
    rows=tables,
    per_class=st.none() | st.integers(1, 12),
    seed=st.integers(0, 5),
    even=st.booleans(),
    overlap=st.booleans(),
    tile_px=st.integers(1, 9),
)
@settings(deadline=None, derandomize=True)
def test_draw_holds_its_promises_in_whatever_order_rows_come(
    rows: list[tuple[str, int, int, str]],
    per_class: int | None,
    seed: int,
    even: bool,
    overlap: bool,
    tile_px: int,
) -> None:
    options: dict[str, Any] = {
        "per_class": per_class,
        "seed": seed,
        "even_over_slides": even,
        "allow_overlap": overlap,
        "tile_px": tile_px,
    }
    drawn = rows_of(draw_positions(positions(*rows), **options))
    assert drawn == sorted(drawn, key=lambda row: (row[0], row[2], row[1], row[3]))
    assert len(set(drawn)) == len(drawn)
    assert set(drawn) <= set(rows)
    for label in ("tumor", "normal", "stroma"):
        available = sum(row[3] == label for row in rows)
        quota = available if per_class is None else min(per_class, available)
        num_drawn = sum(row[3] == label for row in drawn)
        assert num_drawn == quota if overlap else num_drawn <= quota
        if not overlap and num_drawn < quota:
            # Fewer only where each one left out is in the way of one drawn.
            left_out = [row for row in rows if row[3] == label and row not in drawn]
            assert all(any(overlaps(row, other, tile_px) for other in drawn) for row in left_out)
    if not overlap:
        assert not any(
            overlaps(one, other, tile_px) for i, one in enumerate(drawn) for other in drawn[:i]
        )
    assert rows_of(draw_positions(positions(*reversed(rows)), **options)) == drawn


def overlaps(one: tuple[object, ...], other: tuple[object, ...], tile_px: int) -> bool:
    (slide, x, y, _), (slide_2, x_2, y_2, _) = one, other
    return slide == slide_2 and abs(x - x_2) < tile_px and abs(y - y_2) < tile_px  # type: ignore[operator]


def grid(slide: str, label: str, num: int) -> list[tuple[str, int, int, str]]:
    return [(slide, 10 * i, 0, label) for i in range(num)]


def test_draw_of_a_label_depends_on_seed_but_not_on_other_labels() -> None:
    tumor = grid("a", "tumor", 200) + grid("b", "tumor", 100)
    normal = grid("c", "normal", 100)
    alone = draw_positions(positions(*tumor), per_class=20, **DRAW)
    beside = draw_positions(positions(*normal, *tumor), per_class=20, **DRAW)
    assert rows_of(alone) == [row for row in rows_of(beside) if row[3] == "tumor"]
    other_seed = draw_positions(positions(*tumor), per_class=20, **{**DRAW, "seed": 4})
    assert rows_of(alone) != rows_of(other_seed)
    as_normal = positions(*[(*row[:3], "normal") for row in tumor])
    assert [row[:3] for row in rows_of(draw_positions(as_normal, per_class=20, **DRAW))] != [
        row[:3] for row in rows_of(alone)
    ]


def test_draw_is_the_permutation_it_is_documented_to_be() -> None:
    rows = grid("a", "tumor", 50)
    order = np.random.default_rng([3, crc32(b"tumor")]).permutation(50)[:5]
    drawn = draw_positions(positions(*rows), per_class=5, **DRAW)
    assert drawn["x_l0"].to_pylist() == sorted(10 * index for index in order.tolist())


def test_even_draw_gives_slides_turns_until_they_are_empty() -> None:
    rows = grid("a", "tumor", 500) + grid("b", "tumor", 3) + grid("c", "tumor", 50)
    options = {**DRAW, "even_over_slides": True}
    drawn = draw_positions(positions(*rows), per_class=23, **options)["slide"].to_pylist()
    assert {slide: drawn.count(slide) for slide in "abc"} == {"a": 10, "b": 3, "c": 10}
    uneven = draw_positions(positions(*rows), per_class=23, **DRAW)["slide"].to_pylist()
    assert uneven.count("a") > 15
    # The slides of an unfinished round are chosen by seed, not by name.
    firsts = {
        draw_positions(positions(*rows), per_class=1, **{**options, "seed": seed})["slide"][
            0
        ].as_py()
        for seed in range(20)
    }
    assert firsts == {"a", "b", "c"}


def test_position_in_the_way_is_replaced_and_its_slide_keeps_its_turn() -> None:
    crowded = [("a", x, 0, "tumor") for x in range(40)]  # 5 tiles of 8 px fit at the very most
    rows = crowded + grid("b", "tumor", 20)
    options = {**DRAW, "even_over_slides": True, "allow_overlap": False}
    for seed in range(10):
        drawn = draw_positions(positions(*rows), per_class=6, **{**options, "seed": seed})
        assert drawn["slide"].to_pylist() == ["a"] * 3 + ["b"] * 3


def test_labels_do_not_overlap_each_other_either() -> None:
    rows = [("a", 0, 0, "tumor"), ("a", 7, 7, "normal"), ("a", 8, 0, "tumor")]
    drawn = draw_positions(positions(*rows), per_class=None, **{**DRAW, "allow_overlap": False})
    assert rows_of(drawn) == [("a", 7, 7, "normal")]
    touching = draw_positions(
        positions(rows[0], rows[2]), per_class=None, **{**DRAW, "allow_overlap": False}
    )
    assert touching.num_rows == 2


AROUND = [(dx, dy) for dx in (-7, 0, 7) for dy in (-7, 0, 7) if (dx, dy) != (0, 0)]


@pytest.mark.parametrize(("dx", "dy"), AROUND)
@pytest.mark.parametrize("corner", [(0, 0), (3, 5), (-1, -8)])
def test_overlap_is_seen_on_every_side(dx: int, dy: int, corner: tuple[int, int]) -> None:
    x, y = corner
    rows = [("a", x, y, "normal"), ("a", x + dx, y + dy, "tumor"), ("b", x, y, "tumor")]
    drawn = draw_positions(positions(*rows), per_class=None, **{**DRAW, "allow_overlap": False})
    assert rows_of(drawn) == [rows[0], rows[2]]
    i, j, share = overlap_pairs(
        np.array(["a", "a", "b"]), np.array([x, x + dx, x]), np.array([y, y + dy, y]), tile_px=8
    )
    assert (i.tolist(), j.tolist()) == ([0], [1])
    assert share.tolist() == [(8 - abs(dx)) * (8 - abs(dy)) / 64]


def test_draw_keeps_the_uri_of_each_row() -> None:
    table, _ = resolve_slides(
        positions(*grid("a", "tumor", 20), *grid("b", "tumor", 20)), ["/x/a.tif", "/x/b.tif"]
    )
    drawn = draw_positions(table, per_class=12, **DRAW)
    assert drawn.num_rows == 12
    assert all(row["uri"] == f"/x/{row['slide']}.tif" for row in drawn.to_pylist())


@pytest.mark.parametrize("wrong", [{"per_class": 0}, {"tile_px": 0}, {"seed": -1}])
def test_draw_refuses_numbers_without_meaning(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        draw_positions(positions(("a", 0, 0, "tumor")), **{"per_class": 1, **DRAW, **wrong})


# --------------------------------------------------------------------------------------- overlap


@given(
    tiles=st.lists(
        st.tuples(st.sampled_from(["a", "b"]), st.integers(-30, 30), st.integers(-30, 30)),
        max_size=40,
    ),
    tile_px=st.integers(1, 20),
    far=st.sampled_from([0, 10**15]),
)
@settings(deadline=None, derandomize=True)
def test_overlap_pairs_are_those_of_the_plain_double_loop(
    tiles: list[tuple[str, int, int]], tile_px: int, far: int
) -> None:
    expected = {}
    for i, one in enumerate(tiles):
        for j, other in enumerate(tiles[i + 1 :], start=i + 1):
            width, height = tile_px - abs(one[1] - other[1]), tile_px - abs(one[2] - other[2])
            if one[0] == other[0] and width > 0 and height > 0:
                expected[i, j] = width * height / tile_px**2
    slide = np.array([tile[0] for tile in tiles], dtype=object)
    x = np.array([tile[1] for tile in tiles], dtype=np.int64) + far
    y = np.array([tile[2] for tile in tiles], dtype=np.int64) + far
    first, second, share = overlap_pairs(slide, x, y, tile_px=tile_px)
    assert [str(part.dtype) for part in (first, second, share)] == ["int64", "int64", "float64"]
    assert list(zip(first.tolist(), second.tolist(), strict=True)) == sorted(expected)
    assert share.tolist() == pytest.approx([expected[pair] for pair in sorted(expected)])


def test_overlap_of_many_tiles_needs_no_square_of_them() -> None:
    # 200,000 tiles side by side and one repeated: their square would be 320 GB of indices.
    x, y = (axis.ravel() * 16 for axis in np.meshgrid(np.arange(500), np.arange(400)))
    x, y = np.append(x, x[7]), np.append(y, y[7])
    i, j, share = overlap_pairs(np.zeros(len(x), dtype=np.int64), x, y, tile_px=16)
    assert (i.tolist(), j.tolist(), share.tolist()) == ([7], [200_000], [1.0])


def test_overlap_refuses_arrays_of_different_lengths() -> None:
    two, three = np.zeros(2, dtype=np.int64), np.zeros(3, dtype=np.int64)
    with pytest.raises(ValueError, match="length"):
        overlap_pairs(two, two, three, tile_px=8)


# ------------------------------------------------------------------------------------- real lists


@needs_real_lists
def test_public_lists_read_whole_and_label_by_list() -> None:
    tumor = read_ncrf_list(str(REAL_LISTS / "tumor_valid.txt"), label="tumor", tile_px=1024)
    normal = read_ncrf_list(str(REAL_LISTS / "normal_valid.txt"), label="normal", tile_px=1024)
    assert rows_of(tumor)[0] == ("Tumor_106", 35081 - 512, 33425 - 512, "tumor")
    assert (tumor.num_rows, normal.num_rows) == (20_000, 20_000)
    names = sorted(set(tumor["slide"].to_pylist()) | set(normal["slide"].to_pylist()))
    assert [sum(name.startswith(kind) for name in names) for kind in ("Tumor", "Normal")] == [
        10,
        19,
    ]
    both = pa.concat_tables([tumor, normal])
    table, missing = resolve_slides(both, [f"s3://b/{name}.tif" for name in names[1:]])
    assert missing == names[:1]
    left_out = both["slide"].to_pylist().count(names[0])
    assert table.num_rows == 40_000 - left_out - 2  # two positions stand there twice


@needs_real_lists
def test_random_draw_of_the_public_list_leaks_as_published() -> None:
    # 10 coordinates a slide over the list's 10 slides, 30 seeds: measured 34.0 % of the tiles
    # overlap another, 13.5 % by more than half of their area.
    table = read_ncrf_list(str(REAL_LISTS / "tumor_valid.txt"), label="tumor", tile_px=1024)
    shares_of_tiles = []
    for seed in range(30):
        drawn = draw_positions(
            table, per_class=100, seed=seed, even_over_slides=True, allow_overlap=True, tile_px=1024
        )
        x, y = drawn["x_l0"].to_numpy(), drawn["y_l0"].to_numpy()
        i, j, share = overlap_pairs(drawn["slide"].to_numpy(), x, y, tile_px=1024)
        touched = [np.union1d(i[share > least], j[share > least]) for least in (0, 0.5)]
        shares_of_tiles.append([len(tiles) / 100 for tiles in touched])
    any_overlap, by_half = np.mean(shares_of_tiles, axis=0)
    assert any_overlap == pytest.approx(0.35, abs=0.04)
    assert by_half == pytest.approx(0.145, abs=0.03)
    apart = draw_positions(
        table, per_class=100, seed=0, even_over_slides=True, allow_overlap=False, tile_px=1024
    )
    columns = [apart[name].to_numpy() for name in ("slide", "x_l0", "y_l0")]
    assert apart.num_rows == 100  # small lesions hold fewer than 10 tiles, others make up for them
    assert len(overlap_pairs(*columns, tile_px=1024)[0]) == 0
