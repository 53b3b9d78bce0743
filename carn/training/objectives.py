"""What each network is trained to minimise, as a module that holds the network.

One call, `objective(lr, hr)`, runs the network and gives `loss`, which carries the gradient, beside
the terms for the log. So a training loop is the same for all networks, and one call is what it
compiles, captures or wraps for several processes.

The losses are computed in float32 whatever the autocast says.
"""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from carn.models.adaptive_carn import AdaptiveCarn
from carn.models.srcnn import LUMA
from carn.models.swdnet import SwdNet, mirrored_to_multiple
from carn.models.wavelet import haar
from carn.training.loss import LossConfig, PixelLoss, check_same_shape

Terms = dict[str, Float[Tensor, ""]]


class PixelObjective(nn.Module):
    """`PixelLoss` of a network's result; for CARN, EDSR, RDN and RCAN."""

    def __init__(self, model: nn.Module, config: LossConfig) -> None:
        super().__init__()
        self.model = model
        self.pixel_loss = PixelLoss(config)

    def forward(self, lr: Float[Tensor, "b 3 h w"], hr: Float[Tensor, "b 3 H W"]) -> Terms:
        """`loss` and the unweighted terms of `PixelLoss`, on the scale 0..255.

        Raises:
            ValueError: HR of another size than SR, or smaller than SSIM's window.
        """
        terms: Terms = self.pixel_loss(self.model(lr), hr)
        return terms


class EstimatorObjective(nn.Module):
    """The squared error of an adaptive network's estimate of how LR was made."""

    def __init__(self, model: AdaptiveCarn) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        lr: Float[Tensor, "b 3 h w"],
        hr: Float[Tensor, "b 3 H W"],
        numbers: Float[Tensor, "b k"],
    ) -> Terms:
        """`loss`, and the same as `estimate`: a mean over the numbers, which are of about 0..1.

        Args:
            lr: RGB on 0..1.
            hr: not looked at.
            numbers: how LR was made, see `carn.degradation.numbers`.
        """
        del hr
        estimate: Tensor = self.model.estimator(lr)
        loss = functional.mse_loss(estimate.flatten(1), numbers)
        return {"loss": loss, "estimate": loss.detach()}


class SrcnnObjective(nn.Module):
    """The mean squared error of luma, full range BT.601 on 0..1: all that SRCNN changes.

    Source: Dong et al., https://arxiv.org/abs/1501.00092, equation 4, on the Y channel.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, lr: Float[Tensor, "b 3 h w"], hr: Float[Tensor, "b 3 H W"]) -> Terms:
        """`loss`, and the same as `luma_mse`.

        Raises:
            ValueError: HR of another size than SR.
        """
        sr: Tensor = self.model(lr)
        check_same_shape(sr, hr)
        with torch.autocast(device_type=sr.device.type, enabled=False):
            error = sr.float() - hr.float()
            red, green, blue = LUMA
            loss = (red * error[:, 0] + green * error[:, 1] + blue * error[:, 2]).square().mean()
        return {"loss": loss, "luma_mse": loss.detach()}


class SwdNetObjective(nn.Module):
    """The two stages in which SWD-Net is trained: sums of absolute errors, on pixels in 0..1.

    A sum runs over all channels and places and is divided by the batch size, so that the batch does
    not change the step. Stage 1 looks at the spatial stage's result alone; stage 2 at .1 of that,
    .1 of the final result and 1 of its Haar coefficients.
    Source: the paper that `SwdNet` names, equation 4, with the weights of its published code.
    """

    def __init__(self, model: SwdNet, *, stage: Literal[1, 2]) -> None:
        """The objective of one stage.

        Stage 1 freezes the model's wavelet stage (`requires_grad`), which it does not run; stage 2
        thaws it, so that training in several processes waits for no gradient that never comes.

        Raises:
            ValueError: another stage.
        """
        super().__init__()
        if stage not in (1, 2):
            raise ValueError(f"stage={stage} must be 1 (spatial) or 2 (all)")
        self.model = model
        self.stage = stage
        model.wavelet.requires_grad_(stage == 2)

    def forward(self, lr: Float[Tensor, "b 3 h w"], hr: Float[Tensor, "b 3 H W"]) -> Terms:
        """`loss` and the unweighted sums an image: `spatial`, in stage 2 also `final`, `wavelet`.

        Raises:
            ValueError: HR of another size than SR.
        """
        if self.stage == 1:
            height, width = (self.model.scale * side for side in lr.shape[-2:])
            spatial = self.model.spatial(mirrored_to_multiple(lr, 2))[..., :height, :width]
            loss = _sum_of_errors(spatial, hr)
            return {"loss": loss, "spatial": loss.detach()}
        stages = self.model.forward_stages(lr)
        terms = {
            "spatial": _sum_of_errors(stages.spatial, hr),
            "final": _sum_of_errors(stages.sr, hr),
            # Mirrored as the network does where a side is odd, which takes an odd LR at x3.
            "wavelet": _sum_of_errors(
                stages.coefficients, haar(mirrored_to_multiple(hr.float(), 2))
            ),
        }
        loss = 0.1 * terms["spatial"] + 0.1 * terms["final"] + terms["wavelet"]
        return {"loss": loss} | {name: term.detach() for name, term in terms.items()}


class GeneratorObjective(nn.Module):
    """SRGAN's generator: near the target, and taken for real by the discriminator.

    Content, the mean squared error on pixels in -1..1, plus a small weight times the adversarial
    loss, the cross-entropy of the discriminator's verdict against "real".
    Source: Ledig et al., https://arxiv.org/abs/1609.04802, equations 3, 4 and 6, and section 3.2 on
    the range; without their VGG term.
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        *,
        adversarial_weight: float = 1e-3,
    ) -> None:
        """The objective; only the generator is its submodule.

        Args:
            generator: `model` of this module.
            discriminator: judges, and gets neither gradients nor new statistics from it. It is used
                where it is: put it on the device by its own objective.
            adversarial_weight: of the adversarial loss, beside content's 1.

        Raises:
            ValueError: the weight is negative or not finite.
        """
        super().__init__()
        if not (math.isfinite(adversarial_weight) and adversarial_weight >= 0):
            raise ValueError(
                f"adversarial_weight={adversarial_weight} must be a finite number of at least 0"
            )
        self.model = generator
        self.adversarial_weight = adversarial_weight
        # In a tuple it is no submodule: no optimizer, checkpoint or gradient exchange meets it.
        self._discriminator = (discriminator,)

    def forward(self, lr: Float[Tensor, "b 3 h w"], hr: Float[Tensor, "b 3 H W"]) -> Terms:
        """`loss` and the unweighted terms `content` and `adversarial`.

        Raises:
            ValueError: HR of another size than SR.
        """
        sr: Tensor = self.model(lr)
        check_same_shape(sr, hr)
        verdict = _call_apart(self._discriminator[0], sr)
        with torch.autocast(device_type=sr.device.type, enabled=False):
            content = functional.mse_loss(2 * sr.float() - 1, 2 * hr.float() - 1)
            adversarial = _cross_entropy(verdict, is_real=True)
            loss = content + self.adversarial_weight * adversarial
        return {"loss": loss, "content": content.detach(), "adversarial": adversarial.detach()}


class DiscriminatorObjective(nn.Module):
    """SRGAN's discriminator: tells HR from what the generator makes of LR.

    The sum of the cross-entropies of both verdicts; HR and SR go through it as separate batches,
    so that batch normalization does not tell them apart by itself.
    Source: Ledig et al., https://arxiv.org/abs/1609.04802, equation 2.
    """

    def __init__(self, discriminator: nn.Module, generator: nn.Module) -> None:
        """The objective; only the discriminator is its submodule.

        Args:
            discriminator: `model` of this module.
            generator: makes SR, and gets neither gradients nor new statistics from it.
        """
        super().__init__()
        self.model = discriminator
        self._generator = (generator,)

    def forward(self, lr: Float[Tensor, "b 3 h w"], hr: Float[Tensor, "b 3 H W"]) -> Terms:
        """`loss` and its terms `real` (of HR) and `fake` (of SR).

        Raises:
            ValueError: HR of another size than SR.
        """
        with torch.no_grad():
            sr = _call_apart(self._generator[0], lr)
        check_same_shape(sr, hr)
        real, fake = self.model(hr), self.model(sr)
        with torch.autocast(device_type=sr.device.type, enabled=False):
            real, fake = _cross_entropy(real, is_real=True), _cross_entropy(fake, is_real=False)
            loss = real + fake
        return {"loss": loss, "real": real.detach(), "fake": fake.detach()}


def _sum_of_errors(
    found: Float[Tensor, "b c h w"], wanted: Float[Tensor, "b c h w"]
) -> Float[Tensor, ""]:
    check_same_shape(found, wanted)
    with torch.autocast(device_type=found.device.type, enabled=False):
        return (found.float() - wanted.float()).abs().sum() / len(found)


def _cross_entropy(verdict: Float[Tensor, " b"], *, is_real: bool) -> Float[Tensor, ""]:
    verdict = verdict.float()
    target = torch.full_like(verdict, float(is_real))
    return functional.binary_cross_entropy_with_logits(verdict, target)


def _call_apart(module: nn.Module, images: Tensor) -> Tensor:
    """What the module makes of images, in its present mode, without a trace in the module.

    Its parameters get no gradients (the images do), and its buffers, such as running statistics,
    stay as they are.
    """
    state = {name: parameter.detach() for name, parameter in module.named_parameters()}
    state |= {name: buffer.clone() for name, buffer in module.named_buffers()}
    result: Tensor = torch.func.functional_call(module, state, (images,))
    return result
