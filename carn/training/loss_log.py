"""The loss's terms between two rows of metrics, summed where they are made."""

from collections.abc import Iterator

import torch
from torch import Tensor

from carn.training.group import WorkerGroup


class LossLog:
    """Sums of the terms on the device; the host waits for them once a row, not once a step."""

    def __init__(self, *, batch_size: int, group: WorkerGroup) -> None:
        self._group = group
        self._share = group.num_samples(batch_size) / batch_size
        self.clear()

    def clear(self) -> None:
        """Forget what was added."""
        self._sums: dict[str, Tensor] = {}
        self._losses: list[Tensor] = []
        self.num_steps = 0

    def add(self, terms_of_players: dict[str, dict[str, Tensor]]) -> None:
        """The terms of an update, by player; those of the network itself keep their names."""
        losses = []
        for player, terms in terms_of_players.items():
            prefix = "" if player == "model" else f"{player}_"
            for name, term in terms.items():
                part = term.double() * self._share
                known = self._sums.get(prefix + name)
                self._sums[prefix + name] = part if known is None else known + part
            losses.append(terms["loss"].double())
        self._losses.append(torch.stack(losses).sum())
        self.num_steps += 1

    def means(self) -> dict[str, float]:
        """Means of all terms over the updates added, over all workers' samples."""
        names = sorted(self._sums)
        sums = self._group.sum(torch.stack([self._sums[name] for name in names]))
        return dict(zip(names, (sums / self.num_steps).tolist(), strict=True))

    def not_finite(self) -> Iterator[int]:
        """Which of the updates added, from 0, had a loss that is no finite number."""
        losses = self._group.sum(torch.stack(self._losses))
        for index in (~torch.isfinite(losses)).nonzero().flatten().tolist():
            yield int(index)
