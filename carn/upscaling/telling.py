"""Tell an adaptive network how LR was made, in place of its own estimate."""

from collections.abc import Mapping

from torch import nn

from carn.degradation.conditions import read_conditions
from carn.degradation.numbers import NUMBERS, numbers_of
from carn.errors import CheckpointError
from carn.models.adaptive_carn import AdaptiveCarn


def told_by(lr_like: str | None, *, scale: int) -> dict[str, float]:
    """What `--lr-like` says, as `AdaptiveCarn.tell` takes it; nothing where it says nothing.

    Args:
        lr_like: a condition by name, or a .yaml file with one (`read_conditions`).
        scale: the SR factor.

    Raises:
        ValueError: no such condition, or several.
        StorageError: the file cannot be read.
    """
    if lr_like is None:
        return {}
    conditions = read_conditions((lr_like,))
    if len(conditions) != 1:
        raise ValueError(
            f"lr_like={lr_like!r} is {', '.join(conditions)}; LR is like one of them: name that"
        )
    (way,) = conditions.values()
    values = numbers_of(way, scale=scale)
    return dict(zip(NUMBERS, map(float, values), strict=True))


def tell(model: nn.Module, told: Mapping[str, float], *, network: str) -> None:
    """Tell a network, in place, where there is something to be told.

    Args:
        model: the network.
        told: by `told_by`.
        network: its name in errors.

    Raises:
        CheckpointError: it does not adapt to what it gets.
    """
    if not told:
        return
    if not isinstance(model, AdaptiveCarn):
        raise CheckpointError(
            f"{network} does not adapt to its input: --lr-like does nothing with it; leave it out, "
            "or take an adaptive network such as carn-x2"
        )
    model.tell(told)
