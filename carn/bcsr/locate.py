"""Find tile positions on a slide itself: a grid over its tissue, or points by its annotation."""

from collections import Counter
from collections.abc import Mapping, Sequence

import pyarrow as pa

from carn import storage
from carn.bcsr.annotations import draw_in_annotation, read_annotation
from carn.bcsr.coordinates import POSITION_SCHEMA
from carn.errors import CoordinateError
from carn.slides import cached_slide
from carn.slides.tissue import find_tissue, tissue_grid

# The label of tiles of which nothing is known but that they hold tissue.
UNLABELED = "unlabeled"
ANNOTATION_SUFFIXES = (".xml", ".json")

# Positions with the URI of their slide.
LOCATED = POSITION_SCHEMA.append(pa.field("uri", pa.string()))


def name_slides(uris: Sequence[str]) -> dict[str, str]:
    """A distinct name for each slide URI: its stem, with as many folders as make it distinct."""
    names = {uri: storage.stem_of(uri) for uri in uris}
    depth = 1
    while any(count > 1 for count in Counter(names.values()).values()):
        depth += 1
        counts = Counter(names.values())
        for uri, name in names.items():
            if counts[name] > 1:
                folders = uri.rstrip("/").split("/")[-depth:-1]
                # The file name with its extension is what tells a.svs from a.tif beside it.
                last = storage.stem_of(uri) if depth < 4 else storage.name_of(uri)
                names[uri] = "/".join([*folders, last])
    return names


def find_annotations(root: str, names: Mapping[str, str]) -> dict[str, str]:
    """The annotation file of each slide that has one, by the slide's name.

    An annotation belongs to the slide of its stem.

    Args:
        root: folder or prefix of the annotations, searched at any depth.
        names: the slides' names by URI, as of `name_slides`.

    Raises:
        CoordinateError: two annotations, or two slides with an annotation, share a stem.
    """
    annotations: dict[str, str] = {}
    for item in storage.list_objects(storage.normalize(root)):
        if item.uri.lower().endswith(ANNOTATION_SUFFIXES):
            stem = storage.stem_of(item.uri)
            if stem in annotations:
                raise CoordinateError(
                    f"{annotations[stem]} and {item.uri} are both of the slide {stem!r}; keep one"
                )
            annotations[stem] = item.uri
    found: dict[str, str] = {}
    owners: dict[str, str] = {}
    for uri, name in names.items():
        stem = storage.stem_of(uri)
        if stem in annotations:
            if stem in owners:
                raise CoordinateError(
                    f"{annotations[stem]} fits {owners[stem]} and {uri}; give slides and "
                    "annotations distinct names"
                )
            owners[stem] = uri
            found[name] = annotations[stem]
    return found


def locate_grid(slide_name: str, uri: str, *, tile_px: int, min_tissue: float) -> pa.Table:
    """The positions of a grid over the tissue of a slide: columns of LOCATED, label UNLABELED.

    Args:
        slide_name: the name its rows carry.
        uri: the slide.
        tile_px: side of a tile in level-0 px.
        min_tissue: least share (0..1) of tissue a tile must hold.

    Raises:
        SlideError, StorageError: the slide cannot be opened, or its coarse level not be read.
    """
    corners = tissue_grid(find_tissue(cached_slide(uri)), tile_px=tile_px, min_share=min_tissue)
    return pa.table(
        {
            "slide": [slide_name] * len(corners),
            "x_l0": corners[:, 0],
            "y_l0": corners[:, 1],
            "label": [UNLABELED] * len(corners),
            "uri": [uri] * len(corners),
        },
        schema=LOCATED,
    )


def locate_by_annotation(
    slide_name: str,
    uri: str,
    annotation_uri: str | None,
    *,
    tile_px: int,
    points_per_label: int,
    tumor_groups: Sequence[str],
    excluded_groups: Sequence[str],
    seed: int,
) -> pa.Table:
    """Positions drawn by a slide's annotation: columns of LOCATED, labels `tumor` and `normal`.

    Args:
        slide_name: the name its rows carry; it also seeds the slide's draw.
        uri: the slide.
        annotation_uri: CAMELYON/ASAP XML or NCRF JSON; None for a slide known to hold no tumour.
        tile_px: side of a tile in level-0 px.
        points_per_label: most positions of each label.
        tumor_groups, excluded_groups: names of ASAP's groups, as of `read_asap_xml`.
        seed: of the draw.

    Raises:
        CoordinateError: the annotation cannot be understood.
        SlideError, StorageError: the slide cannot be opened, or its coarse level not be read.
    """
    annotation = None
    if annotation_uri is not None:
        annotation = read_annotation(
            annotation_uri, tumor_groups=tumor_groups, excluded_groups=excluded_groups
        )
    positions = draw_in_annotation(
        annotation,
        slide=slide_name,
        tissue=find_tissue(cached_slide(uri)),
        tile_px=tile_px,
        points_per_label=points_per_label,
        seed=seed,
    )
    return positions.append_column("uri", pa.array([uri] * len(positions), pa.string()))
