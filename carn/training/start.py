"""Weights that training starts from, instead of fresh ones."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from carn.errors import CheckpointError
from carn.models.adaptive_carn import AdaptiveCarn
from carn.models.checkpoint import load_model, read_checkpoint
from carn.models.weights import listed
from carn.training.config import NetworkConfig

# What an adaptive CARN has beside a CARN's weights.
_ADAPTIVE = ("estimator.", "adaptation.")


@dataclass(frozen=True, kw_only=True)
class StartingPoint:
    """Weights of another training.

    Attributes:
        uri: of the checkpoint.
        tensors: by name.
        mean: RGB level that its network takes away, on 0..1; None where it takes none.
    """

    uri: str
    tensors: Mapping[str, Tensor]
    mean: tuple[float, float, float] | None

    def give_to(self, model: nn.Module) -> None:
        """Load the weights into a fresh network, all of them.

        What makes a CARN adaptive stays fresh where a plain CARN is the start.

        Raises:
            CheckpointError: the network has other tensors.
        """
        own = model.state_dict()
        is_plain = not any(name.startswith(_ADAPTIVE) for name in self.tensors)
        fresh = {
            name: tensor
            for name, tensor in own.items()
            if isinstance(model, AdaptiveCarn) and is_plain and name.startswith(_ADAPTIVE)
        }
        tensors = {**fresh, **self.tensors}
        wrong = sorted(own.keys() ^ tensors.keys()) or sorted(
            name for name, tensor in own.items() if tensors[name].shape != tensor.shape
        )
        if wrong:
            raise CheckpointError(
                f"training cannot start from {self.uri}: its network differs in {listed(wrong)}; "
                "name one of the same blocks, channels and reduction"
            )
        model.load_state_dict(tensors)


def starting_point(network: NetworkConfig) -> StartingPoint | None:
    """Read the weights that the settings name; None where they name none.

    Raises:
        CheckpointError: there are none, or they are of another scale or model.
        StorageError: they cannot be read.
    """
    if network.start_from is None:
        return None
    checkpoint = read_checkpoint(network.start_from)
    models = {network.model, *(("carn",) if network.model == "adaptive-carn" else ())}
    if checkpoint.model_name not in models or checkpoint.scale != network.scale:
        raise CheckpointError(
            f"{checkpoint.uri} is {checkpoint.model_name} x{checkpoint.scale}; training "
            f"{network.model} x{network.scale} cannot start from it"
        )
    mean = checkpoint.model_config.get("mean")
    return StartingPoint(
        uri=checkpoint.uri,
        tensors=load_model(checkpoint).state_dict(),
        mean=None if mean is None else (mean[0], mean[1], mean[2]),
    )
