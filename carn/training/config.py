"""The settings of a training run: everything that decides the weights it ends with."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from carn.degradation.bicubic import SCALES
from carn.degradation.conditions import CONDITIONS
from carn.degradation.config import DegradationConfig
from carn.metrics import SSIM_WINDOW_PX
from carn.models.layers import BCSR_MEAN
from carn.models.table import MODELS, ModelConfig, ModelName
from carn.training.loss import LossConfig
from carn.training.samples import Order

# The mean of DIV2K's training images, which the code released with the paper takes away.
DIV2K_MEAN = (0.4488, 0.4371, 0.4040)
# What the last layer of SRCNN learns at, relative to the others. Source: Dong et al. 2016, 3.3,
# https://doi.org/10.1109/TPAMI.2015.2439281.
SRCNN_LAST_LAYER_FACTOR = 0.1

# What an adaptive CARN's estimator, which is small and learns by itself, learns at.
ESTIMATOR_FACTOR = 5.0

Means = Literal["dataset", "published", "div2k"]
Precision = Literal["fp32", "bf16"]
Schedule = Literal["halving", "cosine"]


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """What is trained."""

    model: ModelName = "carn"
    """The network; all but bicubic can be trained."""
    scale: int = 2
    """The SR factor: 2, 3, 4 or 8."""
    num_blocks: int | None = None
    """Blocks of the network (the paper's N); None for the paper's configuration, 8 in CARN."""
    channels: int | None = None
    """Feature channels (the paper's C); None for the paper's configuration, 64 in CARN."""
    reduction: int | None = None
    """By how much channel attention squeezes (the paper's r); None for the paper's, 8 in CARN."""
    mean: Means = "dataset"
    """The RGB mean that the network takes away: that of the training tiles (or of the checkpoint
    that training starts from), the paper's published mean of bcSR, or the mean of DIV2K that the
    code released with the paper uses."""
    start_from: str | None = None
    """Checkpoint, run or name of a network that comes with the project, whose weights training
    starts from; None for fresh ones. An adaptive CARN can start from a CARN."""

    def __post_init__(self) -> None:
        if self.scale not in SCALES:
            raise ValueError(f"scale={self.scale} is not one of {', '.join(map(str, SCALES))}")
        if self.model not in MODELS:
            raise ValueError(f"model={self.model!r} is not one of {', '.join(MODELS)}")
        if self.model == "bicubic":
            raise ValueError("model='bicubic' has nothing to train; every run compares with it")
        self.model_config((0.5, 0.5, 0.5))

    @property
    def wants_numbers(self) -> bool:
        """Whether training tells the network how LR was made."""
        return self.model == "adaptive-carn"

    def model_config(self, dataset_mean: tuple[float, float, float]) -> ModelConfig:
        """The configuration of the network itself.

        Args:
            dataset_mean: mean RGB (0..1) of the training tiles.

        Raises:
            ValueError: the network has no such setting, or not that value of it.
        """
        config_class = MODELS[self.model].config
        known = {item.name for item in dataclasses.fields(config_class)}
        changes: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("num_blocks", "channels", "reduction")
            if getattr(self, name) is not None
        }
        if unknown := sorted(changes.keys() - known):
            raise ValueError(f"model={self.model!r} has no {', '.join(unknown)}; leave it out")
        if "mean" in known:
            means = {"dataset": dataset_mean, "published": BCSR_MEAN, "div2k": DIV2K_MEAN}
            changes["mean"] = means[self.mean]
        elif self.mean != "dataset":
            raise ValueError(f"model={self.model!r} takes no mean away; leave mean out")
        return config_class(**changes)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Adam and its schedule. Defaults are the paper's; what goes beyond it is off."""

    learning_rate: float = 1e-4
    """Adam's step size at the start."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates."""
    adam_eps: float = 1e-8
    """Adam's epsilon."""
    weight_decay: float = 0.0
    """L2 penalty that Adam adds to the gradient."""
    schedule: Schedule = "halving"
    """`halving`: by half every `halve_every` updates. `cosine`: down to zero over all steps."""
    halve_every: int = 200_000
    """Updates between two halvings of the learning rate."""
    warmup_steps: int = 0
    """Updates over which the learning rate rises from zero; 0 for none."""
    gradient_clip: float | None = None
    """Largest norm of the gradient; None for no limit."""
    ema_decay: float | None = None
    """Keep a moving average of the weights with this decay (at first with less), and validate and
    ship that."""
    precision: Precision = "fp32"
    """`bf16`: matrix products in bfloat16, weights and loss in float32."""

    def __post_init__(self) -> None:
        _check_positive("learning_rate", self.learning_rate)
        _check_positive("adam_eps", self.adam_eps)
        if not all(0 <= beta < 1 for beta in self.adam_betas):
            raise ValueError(f"adam_betas={self.adam_betas} must be in 0..1, below 1")
        if not (self.weight_decay >= 0 and math.isfinite(self.weight_decay)):
            raise ValueError(f"weight_decay={self.weight_decay} must not be negative")
        check_at_least("halve_every", self.halve_every, 1)
        check_at_least("warmup_steps", self.warmup_steps, 0)
        if self.gradient_clip is not None:
            _check_positive("gradient_clip", self.gradient_clip)
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay} must be between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class PatchConfig:
    """What a batch holds."""

    batch_size: int = 16
    """Patches of an update, over all workers together."""
    patch_px: int | None = None
    """Side of a patch in HR px; None for the paper's: 64, and 48 at x3."""
    augment: bool = True
    """Flip in x, flip in y and transpose, each with probability 1/2."""
    order: Order = "shuffled"
    """`shuffled`: every tile once an epoch, one patch a visit. `windowed`: many patches of a few
    neighbouring tiles, then of others, as a dataset that is streamed needs."""
    samples_per_tile: int = 32
    """With `windowed`: patches of a tile in one visit."""

    def __post_init__(self) -> None:
        check_at_least("batch_size", self.batch_size, 1)
        check_at_least("samples_per_tile", self.samples_per_tile, 1)
        check_at_least("patch_px", self.patch_px, 2)

    def side_px(self, scale: int) -> int:
        """Side of a patch in HR px. Source: the paper's released code, 64 px but 48 at x3."""
        return self.patch_px or (48 if scale == 3 else 64)


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """How a run is judged while it goes on."""

    validate_every: int = 1000
    """Updates between two validations; 1000 are the paper's epoch."""
    validation_crop_px: int | None = 256
    """Validate on the middle of each tile, of this side in HR px; None for whole tiles."""
    max_validation_tiles: int | None = 100
    """Validation tiles used, spread evenly over all there are; None for all."""
    self_ensemble: bool = False
    """Average over the eight flips and turns when validating."""
    validation_conditions: tuple[str, ...] = ()
    """Ways of making LR that the network is validated under, by name (of
    `carn.degradation.conditions`, or .yaml files of more); none for bicubic LR alone, and with
    `--degradation scanner` for all that have a name."""

    def __post_init__(self) -> None:
        check_at_least("validate_every", self.validate_every, 1)
        check_at_least("max_validation_tiles", self.max_validation_tiles, 1)
        # SSIM's window has 11 px.
        check_at_least("validation_crop_px", self.validation_crop_px, 16)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All that decides what a run learns. It is kept in every checkpoint."""

    network: NetworkConfig = field(default_factory=NetworkConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    patches: PatchConfig = field(default_factory=PatchConfig)
    degradation: DegradationConfig = field(default_factory=DegradationConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    steps: int = 300_000
    """Updates; the paper's 300 epochs of 1000."""
    estimator_steps: int | None = None
    """Adaptive CARN only: updates of its first stage, which trains its estimate of how LR was made
    alone and takes little time; None for a third of all. 0 where training starts from an adaptive
    network that is to keep its estimate."""
    swdnet_stage_steps: int | None = None
    """SWD-Net only: updates of its first stage, which trains the spatial network alone; None for
    half of them."""
    seed: int = 1
    """Of weights, samples and augmentation. The paper averages seeds 1, 7, 11, 18 and 1011."""

    def __post_init__(self) -> None:
        check_at_least("steps", self.steps, 1)
        check_at_least("seed", self.seed, 0)
        check_at_least("swdnet_stage_steps", self.swdnet_stage_steps, 0)
        check_at_least("estimator_steps", self.estimator_steps, 0)
        scale, side = self.network.scale, self.patches.side_px(self.network.scale)
        if side % scale:
            raise ValueError(f"patch_px={side} is not a multiple of scale={scale}")
        crop = self.validation.validation_crop_px
        if crop is not None and crop % scale:
            # The crop is rounded down where it is taken; a mismatch is no error.
            check_at_least("validation_crop_px", crop - crop % scale, 16)
        stage_steps = self.swdnet_stage_steps
        if stage_steps is not None and self.network.model == "swdnet" and stage_steps >= self.steps:
            raise ValueError(
                f"swdnet_stage_steps={stage_steps} leave nothing of steps={self.steps} to the "
                "second stage, which trains the wavelet network"
            )
        if (self.estimator_steps or 0) >= self.steps and self.network.wants_numbers:
            raise ValueError(
                f"estimator_steps={self.estimator_steps} leave nothing of steps={self.steps} to "
                "super-resolution; say fewer with --estimator-steps"
            )
        own = OWN_OBJECTIVES.get(self.network.model)
        if own and self.loss != LossConfig():
            raise ValueError(
                f"model={self.network.model!r} is trained by {own}; leave loss, alpha, beta and "
                "gamma out"
            )

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values, nested as the dataclasses are."""
        content: dict[str, Any] = _listed(dataclasses.asdict(self))
        return content


# Networks whose training is more than a loss between SR and HR.
OWN_OBJECTIVES: dict[ModelName, str] = {
    "srcnn": "the MSE of its Y channel",
    "srgan": "MSE and its discriminator",
    "swdnet": "its two stages of sums of L1",
}


def default_loss(model: ModelName) -> LossConfig:
    """The loss that a network's recipe trains with: CARN's combined one, for the others L1.

    Source: EDSR, RDN and RCAN are trained with L1 in their own papers
    (https://doi.org/10.1109/CVPRW.2017.151, https://doi.org/10.1109/CVPR.2018.00262,
    https://doi.org/10.1007/978-3-030-01234-2_18).
    """
    is_carn = model in ("carn", "adaptive-carn")
    return LossConfig(loss="combined") if is_carn else LossConfig(loss="l1")


def resolve(config: TrainConfig) -> TrainConfig:
    """The settings with nothing left open: loss, patch size and stages as the recipe has them.

    Raises:
        ValueError: a patch smaller than SSIM's window.
    """
    network = config.network
    loss = config.loss
    if loss.loss is None and network.model not in OWN_OBJECTIVES:
        own = default_loss(network.model)
        loss = dataclasses.replace(loss, loss=own.loss)
    side = config.patches.side_px(network.scale)
    if loss.has_ssim and side < SSIM_WINDOW_PX:
        raise ValueError(
            f"patch_px={side} is smaller than SSIM's window of {SSIM_WINDOW_PX} px; take larger "
            "patches, or gamma=0"
        )
    stage_steps = config.swdnet_stage_steps
    if network.model == "swdnet" and stage_steps is None:
        stage_steps = config.steps // 2
    estimator_steps = config.estimator_steps
    if network.wants_numbers and estimator_steps is None:
        estimator_steps = config.steps // 3
    validation = config.validation
    if config.degradation.degradation != "bicubic" and not validation.validation_conditions:
        validation = dataclasses.replace(validation, validation_conditions=tuple(CONDITIONS))
    return dataclasses.replace(
        config,
        loss=loss,
        validation=validation,
        patches=dataclasses.replace(config.patches, patch_px=side),
        estimator_steps=estimator_steps,
        swdnet_stage_steps=stage_steps,
    )


def learning_rate(step: int, config: TrainConfig) -> float:
    """The learning rate of an update (from 0): a function of nothing but its number."""
    optimizer = config.optimizer
    rate = optimizer.learning_rate
    if step < optimizer.warmup_steps:
        return rate * (step + 1) / optimizer.warmup_steps
    if optimizer.schedule == "halving":
        return float(rate * 0.5 ** (step // optimizer.halve_every))
    progress = (step - optimizer.warmup_steps) / max(1, config.steps - optimizer.warmup_steps)
    return rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def check_at_least(name: str, value: int | None, least: int) -> None:
    """Raise a ValueError that names the setting, unless it is None or large enough."""
    if value is not None and value < least:
        raise ValueError(f"{name}={value} must be at least {least}")


def _check_positive(name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):  # also false for NaN
        raise ValueError(f"{name}={value} must be a positive number")


def _listed(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _listed(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_listed(part) for part in value]
    return value
