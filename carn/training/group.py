"""The workers that train one network together; one worker where torch.distributed is not in use."""

from dataclasses import dataclass

import torch
from torch import Tensor, distributed


@dataclass(frozen=True, kw_only=True)
class WorkerGroup:
    """Which of how many workers this process is.

    Attributes:
        rank: 0 .. world_size - 1; rank 0 writes.
        world_size: the number of workers.
    """

    rank: int = 0
    world_size: int = 1

    @classmethod
    def current(cls) -> "WorkerGroup":
        """The group of torch.distributed, or one worker alone."""
        if distributed.is_available() and distributed.is_initialized():
            return cls(rank=distributed.get_rank(), world_size=distributed.get_world_size())
        return cls()

    def num_samples(self, batch_size: int) -> int:
        """This worker's samples of a batch."""
        return len(range(self.rank, batch_size, self.world_size))

    def gradient_weight(self, batch_size: int) -> float:
        """What this worker's mean loss is multiplied with.

        Data-parallel training averages gradients over workers as if each had as many samples; with
        this weight the average is that over the batch, however the batch divides.
        """
        return self.num_samples(batch_size) * self.world_size / batch_size

    def sum(self, values: Tensor) -> Tensor:
        """The element-wise sum over all workers, on each of them."""
        if self.world_size > 1:
            values = values.clone()
            distributed.all_reduce(values)
        return values

    def broadcast(self, value: int) -> int:
        """Rank 0's number, on each worker."""
        if self.world_size == 1:
            return value
        device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
        number = torch.tensor([value], device=device)
        distributed.broadcast(number, src=0)
        return int(number)

    def barrier(self) -> None:
        """Wait until every worker is here."""
        if self.world_size > 1:
            distributed.barrier()
