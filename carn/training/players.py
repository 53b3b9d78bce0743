"""What is updated in a step: a network under its loss, and for SRGAN its discriminator too."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from carn.errors import RunError
from carn.models.adaptive_carn import AdaptiveCarn
from carn.models.srcnn import Srcnn
from carn.models.srgan import Srgan, SrganDiscriminator
from carn.models.swdnet import SwdNet
from carn.training.config import ESTIMATOR_FACTOR, SRCNN_LAST_LAYER_FACTOR, TrainConfig
from carn.training.group import WorkerGroup
from carn.training.objectives import (
    DiscriminatorObjective,
    EstimatorObjective,
    GeneratorObjective,
    PixelObjective,
    SrcnnObjective,
    SwdNetObjective,
)

BATCH_NORM_ON_CPU = (
    "SRGAN normalizes over its batch, which torch does for several workers on GPUs only; on CPUs "
    "train it with --num-workers 1"
)


@dataclass(frozen=True, kw_only=True)
class Player:
    """A network with what it is judged by and what updates it.

    Attributes:
        name: `model`, or `discriminator`.
        network: the network itself, whose weights are saved.
        objective: forward(lr, hr) gives the terms of its loss, `loss` being the one to minimise.
        optimizer: over the network's parameters.
    """

    name: str
    network: nn.Module
    objective: nn.Module
    optimizer: torch.optim.Optimizer

    def update(
        self,
        lr: Tensor,
        hr: Tensor,
        *,
        learning_rate: float,
        weight: float,
        gradient_clip: float | None,
        autocast: AbstractContextManager[Any],
        numbers: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """One step of the optimiser; returns the detached terms of the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_factor"]
        self.optimizer.zero_grad(set_to_none=True)
        inner = getattr(self.objective, "module", self.objective)  # within DDP
        needs_numbers = isinstance(inner, EstimatorObjective)
        with autocast:
            terms: dict[str, Tensor] = (
                self.objective(lr, hr, numbers) if needs_numbers else self.objective(lr, hr)
            )
        torch.autograd.backward(terms["loss"] * weight)
        if gradient_clip is not None:
            nn.utils.clip_grad_norm_(self.network.parameters(), gradient_clip)
        self.optimizer.step()
        return {name: term.detach() for name, term in terms.items()}


def make_players(
    model: nn.Module, config: TrainConfig, *, device: torch.device, group: WorkerGroup
) -> list[Player]:
    """The players of a network's recipe, in the order of their updates, on the device.

    The network is moved to the device in place. SRGAN's discriminator is drawn from torch's
    generator.

    Raises:
        RunError: SRGAN on the CPUs of several workers.
    """
    model.to(device)
    if isinstance(model, Srgan):
        if group.world_size > 1 and device.type == "cpu":
            raise RunError(BATCH_NORM_ON_CPU)
        discriminator = SrganDiscriminator().to(device)
        objectives: list[tuple[str, nn.Module, nn.Module]] = [
            ("discriminator", discriminator, DiscriminatorObjective(discriminator, model)),
            ("model", model, GeneratorObjective(model, discriminator)),
        ]
    elif isinstance(model, SwdNet):
        objectives = [("model", model, SwdNetObjective(model, stage=1))]
    elif isinstance(model, AdaptiveCarn):
        objectives = [("model", model, _adaptive_objective(model, config, step=0))]
    elif isinstance(model, Srcnn):
        objectives = [("model", model, SrcnnObjective(model))]
    else:
        objectives = [("model", model, PixelObjective(model, config.loss))]
    return [
        Player(
            name=name,
            network=network,
            objective=_parallel(objective.to(device), device=device, group=group),
            optimizer=_optimizer(network, config, device=device),
        )
        for name, network, objective in objectives
    ]


def at_stage(
    players: list[Player],
    *,
    step: int,
    config: TrainConfig,
    device: torch.device,
    group: WorkerGroup,
) -> list[Player]:
    """The players of an update: some networks' objective changes on its way, all others stay."""
    (player, *others) = players
    if others or not isinstance(player.network, (SwdNet, AdaptiveCarn)):
        return players
    objective = player.objective
    inner = objective.module if isinstance(objective, DistributedDataParallel) else objective
    changed: nn.Module
    if isinstance(player.network, AdaptiveCarn):
        is_first = step < (config.estimator_steps or 0)
        if isinstance(inner, EstimatorObjective) == is_first:
            return players
        changed = _adaptive_objective(player.network, config, step=step).to(device)
        changed = _parallel(changed, device=device, group=group)
        return [dataclasses.replace(player, objective=changed)]
    stage: Literal[1, 2] = 1 if step < (config.swdnet_stage_steps or 0) else 2
    if inner.stage == stage:
        return players
    changed = SwdNetObjective(player.network, stage=stage).to(device)
    return [dataclasses.replace(player, objective=_parallel(changed, device=device, group=group))]


def _adaptive_objective(model: AdaptiveCarn, config: TrainConfig, *, step: int) -> nn.Module:
    """First the estimator alone, then all but the estimator.

    What does not learn is frozen (`requires_grad`), so that training in several processes waits for
    no gradient that never comes.
    """
    is_first = step < (config.estimator_steps or 0)
    model.requires_grad_(not is_first)
    model.estimator.requires_grad_(is_first)
    return EstimatorObjective(model) if is_first else PixelObjective(model, config.loss)


def _parallel(objective: nn.Module, *, device: torch.device, group: WorkerGroup) -> nn.Module:
    if group.world_size == 1:
        return objective
    # Else each worker would normalize by its own part of the batch.
    objective = nn.SyncBatchNorm.convert_sync_batchnorm(objective)  # type: ignore[no-untyped-call]
    return DistributedDataParallel(
        objective,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
    )


def _optimizer(
    network: nn.Module, config: TrainConfig, *, device: torch.device
) -> torch.optim.Optimizer:
    settings = config.optimizer
    special: list[nn.Parameter] = []
    if isinstance(network, Srcnn):
        special, factor = _last_layer(network), SRCNN_LAST_LAYER_FACTOR
    elif isinstance(network, AdaptiveCarn):
        special, factor = list(network.estimator.parameters()), ESTIMATOR_FACTOR
    others = [item for item in network.parameters() if all(item is not one for one in special)]
    groups: list[dict[str, Any]] = [{"params": others, "lr_factor": 1.0}]
    if special:
        groups.append({"params": special, "lr_factor": factor})
    return torch.optim.Adam(
        groups,
        lr=settings.learning_rate,
        betas=settings.adam_betas,
        eps=settings.adam_eps,
        weight_decay=settings.weight_decay,
        # One pass over all weights; there is no reason to take the slow way on either device.
        fused=device.type in ("cpu", "cuda"),
    )


def _last_layer(network: nn.Module) -> list[nn.Parameter]:
    convolutions = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    return list(convolutions[-1].parameters())


def make_average(network: nn.Module, decay: float | None) -> AveragedModel | None:
    """The moving average of a network's weights, or None without a decay.

    After n updates the decay is (1 + n) / (10 + n) at most, so that the average soon forgets what
    the weights were at first: with a decay of 0.999, they would weigh a third after 1,000 updates.
    Source: https://www.tensorflow.org/api_docs/python/tf/train/ExponentialMovingAverage
    """
    if decay is None:
        return None

    def mix(
        averaged: list[Tensor] | tuple[Tensor, ...],
        current: list[Tensor] | tuple[Tensor, ...],
        num_averaged: Tensor | int,
    ) -> None:
        if not averaged[0].is_floating_point():  # counts, of batches seen
            torch._foreach_copy_(averaged, current)
            return
        # A tensor all the way: its value is on the device, and nobody need wait for it.
        num = torch.as_tensor(num_averaged)
        share = 1 - torch.clamp((1 + num) / (10 + num), max=decay)
        steps = torch._foreach_sub(current, averaged)
        torch._foreach_mul_(steps, share)
        torch._foreach_add_(averaged, steps)

    return AveragedModel(network, multi_avg_fn=torch.no_grad()(mix), use_buffers=True)


def autocast_for(precision: str, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """A maker of the context that a forward pass of that precision runs in."""
    if precision == "fp32":
        return nullcontext
    return lambda: torch.autocast(device.type, dtype=torch.bfloat16)


# ----------------------------------------------------------------------------------------- state


def player_tensors(players: list[Player]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that the next update depends on, by a name that says whose it is."""
    for player in players:
        for name, tensor in player.network.state_dict().items():
            yield f"{player.name}/network/{name}", tensor
        for index, state in player.optimizer.state_dict()["state"].items():
            for name, tensor in state.items():
                yield f"{player.name}/optimizer/{index}/{name}", tensor


def restore_players(players: list[Player], tensors: dict[str, Tensor]) -> None:
    """Put back what `player_tensors` gave.

    Raises:
        KeyError, RuntimeError: tensors of another network.
    """
    for player in players:
        prefix = f"{player.name}/network/"
        network = {
            name.removeprefix(prefix): tensor
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
        player.network.load_state_dict(network)
        prefix = f"{player.name}/optimizer/"
        state: dict[int, dict[str, Tensor]] = {}
        parameters = [item for group in player.optimizer.param_groups for item in group["params"]]
        for full_name, tensor in tensors.items():
            if full_name.startswith(prefix):
                index, name = full_name.removeprefix(prefix).split("/")
                parameter = parameters[int(index)]
                # In the parameter's memory order, in which the optimiser would have made it.
                if tensor.shape == parameter.shape:
                    tensor = torch.empty_like(parameter).copy_(tensor).detach()  # noqa: PLW2901
                state.setdefault(int(index), {})[name] = tensor
        groups = player.optimizer.state_dict()["param_groups"]
        player.optimizer.load_state_dict({"state": state, "param_groups": groups})
