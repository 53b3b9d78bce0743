"""Pickled weights from elsewhere, .pt and .pth: tensors only, nothing of them is executed."""

import io
import zipfile

import torch

# Of a file of weights. The largest of the networks here take 170 MB, with an optimiser thrice that.
MAX_WEIGHTS_BYTES = 4 * 1024**3


def load_pickled(content: bytes) -> object:
    """What torch's restricted unpickler makes of a file's content, on the CPU.

    Raises:
        ValueError: damaged, holding more than plain values and tensors, or packed: torch stores,
            and what unpacks to more than the file is none of its files.
    """
    try:
        if zipfile.is_zipfile(io.BytesIO(content)):
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                if sum(item.file_size for item in archive.infolist()) > len(content):
                    raise ValueError("it unpacks to more than its size, which torch never writes")
        found: object = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    # A malformed pickle raises whatever its opcodes lead to; none of it has run code.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise ValueError(reason) from error
    return found


def is_plain_tensor(value: object) -> bool:
    """Whether this is a tensor whose elements are all there: none is repeated by its strides."""
    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )
