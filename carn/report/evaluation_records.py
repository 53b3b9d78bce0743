"""What the page of an evaluation shows, as plain values: scores, comparisons, timings, crops."""

from dataclasses import dataclass
from typing import Literal

Variant = Literal["", "MSE", "*"]
Unit = Literal["slide", "tile"]

# A difference is more than chance where its p, corrected for the number of comparisons, is lower.
ALPHA = 0.05


@dataclass(frozen=True, kw_only=True)
class ModelRow:
    """The scores of one model at one scale, means over tiles and then over seeds.

    Attributes:
        model: its name in print.
        key: its key in the table of models; "bicubic" is what the gains are over.
        scale: SR factor.
        variant: "MSE" for the loss of squared errors alone, "*" where the tiles that were sorted
            out of the dataset are scored too, else "".
        num_seeds, seeds: of the trainings that are averaged; none where nothing is trained.
        psnr_db, psnr_std: dB, RGB. Spreads are over the seeds; None where there are not two.
        ssim, ssim_std: RGB.
        psnr_y_db, psnr_y_std, ssim_y, ssim_y_std: of the Y channel.
        lpips, lpips_std: None where it was not measured; less is better.
        params: trainable parameters, 0 for none.
        flops: of one LR image, stated in the notes; 0 for none.
        steps: updates that it was trained for; None where nothing is trained or nobody knows.
        planned_steps: updates that its training was to have; likewise.
        best_steps: of each seed, the updates after which its weights were taken, as the best of its
            training; none where nobody knows.
        trained_on: a short digest of the dataset; "" where nothing is trained.
        paper_psnr_db, paper_ssim: of the same row of the paper's Table 2.
        paper_params: millions, of its Table 1, which is of x2.
    """

    model: str
    key: str
    scale: int
    variant: Variant
    num_seeds: int
    seeds: tuple[int, ...]
    psnr_db: float
    psnr_std: float | None
    ssim: float
    ssim_std: float | None
    psnr_y_db: float
    psnr_y_std: float | None
    ssim_y: float
    ssim_y_std: float | None
    lpips: float | None
    lpips_std: float | None
    params: int
    flops: int
    steps: int | None
    planned_steps: int | None
    best_steps: tuple[int, ...]
    trained_on: str
    paper_psnr_db: float | None
    paper_ssim: float | None
    paper_params: float | None

    @property
    def title(self) -> str:
        """Name and variant: `CARN`, `CARN (MSE)`, `CARN*`."""
        return self.model + {"": "", "MSE": " (MSE)", "*": "*"}[self.variant]


@dataclass(frozen=True, kw_only=True)
class ConditionRow:
    """The scores of one model at one scale under one condition, that is way to make LR.

    Attributes:
        scale: SR factor.
        model: its name in print, variant and all.
        key: its key in the table of models; gains are over "bicubic" on the same LR.
        condition: its name.
        num_seeds: trainings that are averaged; 0 where nothing is trained.
        psnr_db, ssim: RGB, means over tiles and then over seeds.
        gain_db, ssim_gain: over bicubic interpolation of the same LR; None for that itself.
        num_images: tiles that were scored.
        num_slides: slides that they are of, or whatever else the dataset was split by.
        least_gain_db: of a tile; None for bicubic interpolation.
        least_slide_gain_db: of the slides' means; likewise.
    """

    scale: int
    model: str
    key: str
    condition: str
    num_seeds: int
    psnr_db: float
    ssim: float
    gain_db: float | None
    ssim_gain: float | None
    num_images: int
    num_slides: int
    least_gain_db: float | None
    least_slide_gain_db: float | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two models on the same tiles.

    Attributes:
        scale: SR factor.
        a, b: the models' names in print.
        difference_db: mean PSNR of a less that of b.
        low_db, high_db: the 95 % interval of the difference; None where it could not be had.
        p: of a test of no difference; None where all tiles are equal.
        p_holm: the same, corrected for the number of comparisons.
        ssim_difference, ssim_low, ssim_high, ssim_p, ssim_p_holm: the same of SSIM.
        unit: what intervals and tests are over: slides, or the tiles where all are of one slide.
        num_tiles, num_slides: what was compared.
    """

    scale: int
    a: str
    b: str
    difference_db: float
    low_db: float | None
    high_db: float | None
    p: float | None
    p_holm: float | None
    ssim_difference: float
    ssim_low: float | None
    ssim_high: float | None
    ssim_p: float | None
    ssim_p_holm: float | None
    unit: Unit
    num_tiles: int
    num_slides: int

    @property
    def is_clear(self) -> bool:
        """Whether it is more than chance, on slides like these: by its interval and its test.

        Both, since the interval is too narrow where slides are few. Tiles of one slide are alike,
        and whatever they say of it, they say nothing of another.
        """
        low, high, p = self.low_db, self.high_db, self.p_holm
        if self.unit != "slide" or low is None or high is None or p is None:
            return False
        return (low > 0 or high < 0) and p < ALPHA


@dataclass(frozen=True, kw_only=True)
class TimingRow:
    """How long one model takes for one image.

    Attributes:
        model: its name in print, as in its ModelRow.
        scale: SR factor.
        seconds: median of the repeats.
        low_s, high_s: their quartiles.
        lr_width_px, lr_height_px: of the image that was timed.
        repeats: passes that were timed.
        params: trainable parameters.
        flops: of the pass that was timed.
        device, threads: the machine, and the threads used of it.
        torch_version: it has much to do with it.
        paper_seconds: of the paper's Figure 4, on a machine of its own.
    """

    model: str
    scale: int
    seconds: float
    low_s: float
    high_s: float
    lr_width_px: int
    lr_height_px: int
    repeats: int
    params: int
    flops: int
    device: str
    threads: int
    torch_version: str
    paper_seconds: float | None


@dataclass(frozen=True, kw_only=True)
class CropStrip:
    """One place of a tile as HR, LR and each model have it.

    Attributes:
        tile_id, slide: the tile.
        x, y: top-left corner of the crop, HR px from the tile's.
        side_px: of the crop, HR px.
        scale: SR factor.
        pictures: name, PNG, and PSNR of the crop in dB or None; shown equally large.
    """

    tile_id: str
    slide: str
    x: int
    y: int
    side_px: int
    scale: int
    pictures: tuple[tuple[str, bytes, float | None], ...]


@dataclass(frozen=True, kw_only=True)
class EvaluationReport:
    """All that the page shows.

    Attributes:
        title: heading of the page and name of its window.
        dataset_uri: what was scored.
        convention: how PSNR and SSIM are measured, a sentence.
        convention_y: the same for those of the Y channel.
        num_tiles, num_slides: of the test split.
        code_version: of the code that scored.
        seconds: that the evaluation took, over all times that it was begun.
        machine: that it ran on.
        rows: in the order of the table, within each scale.
        comparisons: pairs of models, in any order.
        timings: in any order; different machines are never drawn in one plot.
        crops: pictures to judge by eye.
        notes: what the caller has to say of it all, on top of the page.
        left_out: runs that were found and not scored, since they are not finished.
        spread: by label, PSNR gains over bicubic of all tiles, dB.
        conditions: names of the ways to make LR and what they are, in words; `rows`, `comparisons`,
            `crops` and `spread` are of the first.
        condition_rows: scores under each of them, in the order of the table.
    """

    title: str
    dataset_uri: str
    convention: str
    convention_y: str
    num_tiles: int
    num_slides: int
    code_version: str
    seconds: float
    machine: str
    rows: tuple[ModelRow, ...]
    comparisons: tuple[Comparison, ...]
    timings: tuple[TimingRow, ...]
    crops: tuple[CropStrip, ...]
    notes: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    spread: tuple[tuple[str, tuple[float, ...]], ...] = ()
    conditions: tuple[tuple[str, str], ...] = ()
    condition_rows: tuple[ConditionRow, ...] = ()
