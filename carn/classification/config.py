"""All that decides what a classifier learns and what it is tested on."""

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any, Literal

from carn.classification.resnet import Depth
from carn.degradation.bicubic import SCALES

# `gt`: one classifier, trained on GT and tested on every kind of picture. `each`: one classifier
# for each kind, trained and tested on that kind.
TrainOn = Literal["gt", "each"]


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """How the classifier is trained.

    The paper names the network (ResNet-50) and nothing else of it. Optimiser, learning rate and
    batch are those that PCam was published with (Adam, 1e-3, 64; Veeling et al. 2018,
    https://arxiv.org/abs/1806.03962), so that both datasets are served by one recipe
    that somebody chose for this tissue. The rate falls along a half cosine to zero (Loshchilov and
    Hutter 2017, https://arxiv.org/abs/1608.03983) instead of by plateaus, for the number of epochs
    is given beforehand. Crops are flipped and turned (8 ways), which changes no label. Classes
    count as they come and are not balanced.
    """

    depth: Depth = 50
    """Layers of the ResNet: 50 as in the paper, 18 for a machine without a GPU."""
    weights: str | None = None
    """File of weights to start from (.safetensors or torchvision's .pth); the last layer starts
    anew. None for random weights."""
    epochs: int = 10
    """Times that each training crop is seen."""
    batch_size: int = 64
    """Crops of an update, all workers together."""
    learning_rate: float = 1e-3
    """Adam's, at the first update."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of training; bf16 keeps the weights in fp32. Tests are always in fp32."""
    seed: int = 1
    """Of weights, order, flips and turns, and of which crops are taken."""

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"epochs={self.epochs} must be at least 1")
        if self.batch_size < 2:
            raise ValueError(f"batch_size={self.batch_size} must be at least 2")
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise ValueError(f"learning_rate={self.learning_rate} must be positive and finite")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must not be negative")


@dataclass(frozen=True, kw_only=True)
class CropConfig:
    """Which crops there are."""

    scale: Literal[2, 3, 4, 8] = 2
    """SR factor; the paper's table is of 2."""
    crop_px: int = 128
    """Side of the crops that tiles of bcSR are cut into, px of HR. PCam's images stay whole."""
    max_tiles: int | None = None
    """Tiles of each split that are used, drawn at random; None for all. (With PCam: images.)"""
    max_crops: int | None = None
    """Crops of each split that are used, drawn at random; None for all."""
    group_regex: str | None = None
    """What of a slide's name tells what is independent, such as `^(patient_\\d+)`: intervals draw
    these. None for the slide itself."""

    def __post_init__(self) -> None:
        if self.scale not in SCALES:
            raise ValueError(f"scale={self.scale} is not one of {', '.join(map(str, SCALES))}")
        if self.crop_px < 8 * self.scale or self.crop_px % self.scale:
            raise ValueError(
                f"crop_px={self.crop_px} must be a multiple of scale={self.scale}, and at least "
                f"{8 * self.scale}"
            )
        for name in ("max_tiles", "max_crops"):
            value = getattr(self, name)
            if value is not None and value < 2:
                raise ValueError(f"{name}={value} must be at least 2")
        if self.group_regex is not None:
            try:
                re.compile(self.group_regex)
            except re.error as error:
                raise ValueError(f"group_regex={self.group_regex!r}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """A study: what is compared, on what, by which classifier.

    Attributes:
        dataset: finished bcSR dataset, or None.
        pcam: folder of PCam's HDF5 files, or None.
        models: checkpoints by any name that `carn.models.checkpoint.read_checkpoint` takes.
        output: folder or prefix of the study, seen by every worker.
        train_on: see TrainOn.
        crops: which crops there are.
        classifier: how the classifier is trained.
        device: where to compute; `auto` is a GPU where there is one.
        num_threads: CPU threads of one worker; None for what torch or Ray chose.
    """

    dataset: str | None
    pcam: str | None
    models: tuple[str, ...]
    output: str
    train_on: TrainOn = "gt"
    crops: CropConfig = CropConfig()
    classifier: ClassifierConfig = ClassifierConfig()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_threads: int | None = None

    def learning(self) -> dict[str, Any]:
        """All that decides a classifier and its predictions on given pictures, as JSON has it.

        Which models are compared is not among it: others may be added to a study later.
        """
        return {
            "crops": dataclasses.asdict(self.crops),
            "classifier": dataclasses.asdict(self.classifier),
        }
