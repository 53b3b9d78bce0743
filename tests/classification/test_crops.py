"""Which crops there are, and that their pixels are those of the whole tile's pictures."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from carn.bcsr.dataset import open_dataset
from carn.classification.bcsr_corpus import open_bcsr
from carn.classification.crop_store import PictureSource, load_crops
from carn.classification.crops import CropIndex, check_index, cut_grid, draw_subset
from carn.classification.kinds import Kind, find_kinds, make_pictures
from carn.degradation.bicubic import degrade
from carn.errors import CheckpointError, DatasetError
from carn.models.bicubic import enlarge_bicubic
from carn.models.checkpoint import load_model
from carn.training.group import WorkerGroup
from tests.classification.lab import CROP_PX, CROPS_PER_TILE, write_labelled, write_model

CPU = torch.device("cpu")


def test_a_tile_of_the_paper_gives_8_x_8_crops() -> None:
    grid = cut_grid(1024, 1024, crop_px=128)
    assert len(grid) == 64
    assert grid[:3].tolist() == [[0, 0], [128, 0], [256, 0]]
    assert grid[-1].tolist() == [896, 896]


@given(st.integers(1, 80), st.integers(1, 80), st.integers(4, 40))
def test_crops_cover_each_pixel_at_most_once_and_lie_in_the_tile(width, height, crop_px) -> None:
    covered = np.zeros((height, width), int)
    for x, y in cut_grid(width, height, crop_px=crop_px):
        part = covered[y : y + crop_px, x : x + crop_px]
        assert part.shape == (crop_px, crop_px)
        part += 1
    assert covered.max() <= 1
    # What is left out is less than a crop at the right and at the bottom.
    assert covered.sum() == (width // crop_px) * (height // crop_px) * crop_px**2


def _index(num_tiles: int = 10, per_tile: int = 4) -> CropIndex:
    count = num_tiles * per_tile
    return CropIndex(
        tile=np.repeat(np.arange(num_tiles), per_tile),
        x_px=np.tile(np.arange(per_tile), num_tiles),
        y_px=np.zeros(count, np.int64),
        label=np.repeat(np.arange(num_tiles) % 2, per_tile),
        tile_ids=tuple(f"t{n}" for n in range(num_tiles)),
        slides=tuple(f"s{n // 2}" for n in range(num_tiles)),
    )


def test_a_subset_is_seeded_bounded_and_in_order() -> None:
    index = _index()
    assert draw_subset(index, max_tiles=None, max_crops=None, seed=1) is index
    few = draw_subset(index, max_tiles=3, max_crops=None, seed=1)
    assert len(np.unique(few.tile)) == 3
    assert len(few) == 12
    fewer = draw_subset(index, max_tiles=5, max_crops=7, seed=1)
    assert len(fewer) == 7
    places = list(zip(fewer.tile.tolist(), fewer.x_px.tolist(), strict=True))
    assert places == sorted(set(places))
    again = draw_subset(index, max_tiles=5, max_crops=7, seed=1)
    assert (again.tile == fewer.tile).all()
    others = [draw_subset(index, max_tiles=3, max_crops=None, seed=s).tile[0] for s in range(20)]
    assert len(set(others)) > 1
    assert fewer.slide_of_crops() == [f"s{tile // 2}" for tile in fewer.tile]


def test_a_split_without_crops_or_with_one_class_is_refused() -> None:
    with pytest.raises(DatasetError, match="no crop in its test split"):
        check_index(_index().take(np.empty(0, np.int64)), uri="/d", split="test")
    with pytest.raises(DatasetError, match="no tumor crop in its train split"):
        check_index(_index().take(np.arange(4)), uri="/d", split="train")
    check_index(_index(), uri="/d", split="train")


# ---------------------------------------------------------------------------------------- bcSR


def test_crops_of_bcsr_inherit_their_tiles_label_and_slide(labelled: str) -> None:
    index = open_bcsr(labelled, crop_px=CROP_PX).index("test")
    rows = open_dataset(labelled).table("test").to_pylist()
    assert len(index) == CROPS_PER_TILE * len(rows)
    for tile, label, slide in zip(index.tile, index.label, index.slide_of_crops(), strict=True):
        assert label == (rows[tile]["label"] == "tumor")
        assert slide == rows[tile]["slide"]
    corners = {(int(x), int(y)) for x, y in zip(index.x_px, index.y_px, strict=True)}
    assert corners == {(0, 0), (32, 0), (0, 32), (32, 32)}
    grouped = open_bcsr(labelled, crop_px=CROP_PX, group_regex=r"^test").index("test")
    assert set(grouped.slide_of_crops()) == {"test"}


def test_an_unlabelled_dataset_is_refused(tmp_path) -> None:
    uri = write_labelled(tmp_path / "bcsr", labels=("unlabeled", "tumor"))
    with pytest.raises(DatasetError, match=r"tiles labelled unlabeled.*--coordinates"):
        open_bcsr(uri, crop_px=CROP_PX).index("train")


def _source(uri: str, kind: Kind, model: nn.Module | None, **changes: Any) -> PictureSource:
    corpus = open_bcsr(uri, crop_px=CROP_PX)
    fields: dict[str, Any] = {
        "corpus": corpus,
        "split": "test",
        "index": corpus.index("test"),
        "kind": kind,
        "model": model,
        "scale": 2,
        "device": CPU,
    }
    return PictureSource(**(fields | changes))


def test_gt_and_lr_crops_are_parts_of_the_tile_and_of_its_lr(labelled: str) -> None:
    gt, lr, *_ = find_kinds((), scale=2)
    tiles = [pixels for _, pixels in open_dataset(labelled).tiles("test")]
    source = _source(labelled, gt, None)
    index, crops, small = source.index, source.crops(0), _source(labelled, lr, None).crops(0)
    assert crops.shape == (len(index), 32, 32, 3)
    assert small.shape == (len(index), 16, 16, 3)
    for row in range(len(index)):
        tile, x, y = tiles[index.tile[row]], index.x_px[row], index.y_px[row]
        assert (crops[row] == tile[y : y + 32, x : x + 32]).all()
        whole = degrade(tile, scale=2)
        assert (small[row] == whole[y // 2 : y // 2 + 16, x // 2 : x // 2 + 16]).all()


class Pooling(nn.Module):
    """SR whose every pixel hangs on the whole tile."""

    def forward(self, lr: torch.Tensor) -> torch.Tensor:
        brightest = lr.amax((-2, -1), keepdim=True)
        return enlarge_bicubic(lr, scale=2) - 0.5 * brightest


def test_sr_is_made_of_the_whole_tile_and_then_cut(labelled: str) -> None:
    kind = Kind(key="pooling", title="pooling", model_name="pooling")
    source = _source(labelled, kind, Pooling())
    crops = source.crops(0)
    tiles = [pixels for _, pixels in open_dataset(labelled).tiles("test")]
    whole = list(make_pictures(tiles, kind=kind, model=Pooling(), scale=2, device=CPU))
    assert whole[0].shape == (70, 70, 3)
    row = 3
    x, y = source.index.x_px[row], source.index.y_px[row]
    assert (crops[row] == whole[0][y : y + 32, x : x + 32]).all()
    # A crop's own SR is another.
    (alone,) = make_pictures(
        [tiles[0][y : y + 32, x : x + 32]], kind=kind, model=Pooling(), scale=2, device=CPU
    )
    assert (alone != crops[row]).any()


def test_some_crops_are_cut_from_their_tiles_only(labelled: str) -> None:
    gt, *_ = find_kinds((), scale=2)
    everything = _source(labelled, gt, None)
    wanted = np.array([1, 6, 7, 30])
    few = _source(labelled, gt, None, index=everything.index.take(wanted))
    assert (few.crops(0) == everything.crops(0)[wanted]).all()


# --------------------------------------------------------------------------------------- kinds


def test_kinds_stand_in_the_papers_order_with_hashes_in_their_keys(tmp_path) -> None:
    uris = [write_model(tmp_path / f"m{n}", name=name, seed=n) for n, name in enumerate(NAMES)]
    kinds = find_kinds(uris, scale=2)
    assert [kind.key for kind in kinds[:3]] == ["gt", "lr", "bicubic"]
    hashes = [kind.checkpoint.weights_sha256[:8] for kind in kinds if kind.checkpoint]
    assert [kind.key for kind in kinds[3:]] == [
        f"{name}-{sha}" for name, sha in zip(NAMES, hashes, strict=True)
    ]
    # Two of one architecture are told apart in print, too.
    assert [kind.title for kind in kinds[3:]] == [
        f"CARN {hashes[0]}",
        "EDSR",
        f"CARN {hashes[2]}",
    ]
    with pytest.raises(ValueError, match="same weights"):
        find_kinds([uris[0], uris[0]], scale=2)
    with pytest.raises(CheckpointError, match=r"x2, and x4 is compared.*--scale"):
        find_kinds(uris, scale=4)


NAMES = ("carn", "edsr", "carn")


def test_a_models_pictures_are_its_sr_of_lr(tmp_path, labelled: str) -> None:
    *_, kind = find_kinds([write_model(tmp_path / "m")], scale=2)
    tiles = [pixels for _, pixels in open_dataset(labelled).tiles("test")][:2]
    model = kind.make_model(scale=2, device=CPU)
    made = list(make_pictures(tiles, kind=kind, model=model, scale=2, device=CPU))
    for tile, picture in zip(tiles, made, strict=True):
        lr = torch.from_numpy(degrade(tile, scale=2)).permute(2, 0, 1)[None] / 255
        with torch.inference_mode():
            sr = load_model(str(tmp_path / "m"))(lr)
        wanted = (sr.clamp(0, 1) * 255).round()[0].permute(1, 2, 0).numpy()
        assert np.abs(picture - wanted).max() <= 1


# --------------------------------------------------------------------------------------- store


def test_sr_of_training_crops_is_kept_and_not_made_again(
    tmp_path, labelled: str, monkeypatch
) -> None:
    *_, kind = find_kinds([write_model(tmp_path / "m")], scale=2)
    model = kind.make_model(scale=2, device=CPU)
    source = _source(labelled, kind, model)
    work = str(tmp_path / "work")
    first = load_crops(source, work_uri=work, group=WorkerGroup())
    assert (first.pixels == source.crops(0)).all()
    # With another node's empty cache, and no model at hand.
    monkeypatch.setenv("CARN_CACHE_DIR", str(tmp_path / "other-node"))
    without = _source(labelled, kind, None)
    second = load_crops(without, work_uri=work, group=WorkerGroup())
    assert (first.pixels == second.pixels).all()
    assert second.pixels.flags.writeable is False
