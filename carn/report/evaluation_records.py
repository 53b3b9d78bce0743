"""What the page of an evaluation shows, as plain values: scores, comparisons, timings, crops."""

from dataclasses import dataclass
from typing import Literal

Variant = Literal["", "MSE", "*"]


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
        psnr_y_db, ssim_y: of the Y channel.
        lpips: None where it was not measured; less is better.
        params: trainable parameters, 0 for none.
        flops: of one LR image, stated in the notes; 0 for none.
        steps: updates that it was trained for; None where nothing is trained or nobody knows.
        trained_on: a short digest of the dataset; "" where nothing is trained.
        paper_psnr_db, paper_ssim: of the same row of the paper's Table 2.
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
    ssim_y: float
    lpips: float | None
    params: int
    flops: int
    steps: int | None
    trained_on: str
    paper_psnr_db: float | None
    paper_ssim: float | None

    @property
    def title(self) -> str:
        """Name and variant: `CARN`, `CARN (MSE)`, `CARN*`."""
        return self.model + {"": "", "MSE": " (MSE)", "*": "*"}[self.variant]


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
    num_tiles: int
    num_slides: int


@dataclass(frozen=True, kw_only=True)
class TimingRow:
    """How long one model takes for one image.

    Attributes:
        model: its name in print, as in its ModelRow.
        scale: SR factor.
        seconds: median of the repeats.
        low_s, high_s: their quartiles.
        params: trainable parameters.
        flops: of the pass that was timed.
        device, threads: the machine, and the threads used of it.
        paper_seconds: of the paper's Figure 4, on a machine of its own.
    """

    model: str
    scale: int
    seconds: float
    low_s: float
    high_s: float
    params: int
    flops: int
    device: str
    threads: int
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
        seconds: that the evaluation took.
        machine: that it ran on.
        rows: in the order of the table, within each scale.
        comparisons: pairs of models, in any order.
        timings: in any order; different machines are never drawn in one plot.
        crops: pictures to judge by eye.
        notes: what the caller has to say of it all, on top of the page.
        spread: by label, PSNR gains over bicubic of all tiles, dB.
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
    spread: tuple[tuple[str, tuple[float, ...]], ...] = ()
