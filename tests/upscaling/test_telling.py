"""How LR was made can be said by hand, to networks that adapt to it."""

from pathlib import Path

import pytest

from carn.degradation.conditions import CONDITIONS
from carn.degradation.numbers import NUMBERS, numbers_of
from carn.errors import CheckpointError
from carn.models.adaptive_carn import AdaptiveCarn
from carn.upscaling.telling import tell, told_by
from tests.upscaling.lab import small_carn
from tests.upscaling.networks import batch_of, network, tissue


def test_a_condition_becomes_the_numbers_that_a_network_is_told(tmp_path: Path) -> None:
    assert told_by(None, scale=2) == {}
    found = told_by("jpeg80-420", scale=2)
    expected = numbers_of(CONDITIONS["jpeg80-420"], scale=2)
    assert list(found) == list(NUMBERS)
    assert list(found.values()) == pytest.approx(expected.tolist())
    own = tmp_path / "own.yaml"
    own.write_text("ours: {blur_px: 0.5, jpeg_quality: 60}\n")
    assert told_by(str(own), scale=2)["luma_step"] > found["luma_step"]
    with pytest.raises(ValueError, match="is not one of"):
        told_by("jpeg17", scale=2)
    with pytest.raises(ValueError, match="one of them"):
        told_by("all", scale=2)


def test_an_adaptive_network_goes_by_it_and_others_refuse() -> None:
    model = network("adaptive-carn")
    assert isinstance(model, AdaptiveCarn)
    told = told_by("jpeg70-422", scale=2)
    tell(model, {}, network="net")
    assert model.told.isnan().all()
    tell(model, told, network="net")
    found = model.numbers(batch_of(tissue(40)))
    assert found.flatten().tolist() == pytest.approx(list(told.values()))
    plain = small_carn(2, num_blocks=1)
    tell(plain, {}, network="net")
    with pytest.raises(CheckpointError, match="net does not adapt to its input"):
        tell(plain, told, network="net")
