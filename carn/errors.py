"""The errors a caller can handle, each naming the thing that is wrong and the way out.

Every error travels between processes: it pickles with all its attributes.
"""


class CarnError(Exception):
    """Root of the errors this package raises on purpose."""


class UriError(CarnError, ValueError):
    """A name is of no storage this package knows."""


class StorageError(CarnError):
    """A storage location could not be read or written.

    Attributes:
        uri: the location, as it was given.
    """

    def __init__(self, uri: str, reason: str) -> None:
        super().__init__(uri, reason)
        self.uri = uri
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.uri}: {self.reason}"


class MissingObjectError(StorageError):
    """No file or object is there."""


class AccessDeniedError(StorageError):
    """The credentials at hand do not open this location."""


class CacheError(StorageError):
    """The node's cache cannot hold what it was to hold."""


class UploadGoneError(StorageError):
    """An object written in parts is no longer (or not yet) under way: completed, or aborted."""


class StalePartError(StorageError):
    """Parts of an upload are missing, or are not those that were to be joined.

    Attributes:
        numbers: of these parts.
    """

    def __init__(self, uri: str, numbers: tuple[int, ...]) -> None:
        shown = ", ".join(f"{number}" for number in numbers[:20])
        more = f" and {len(numbers) - 20:,} more" if len(numbers) > 20 else ""
        super().__init__(uri, f"parts {shown}{more} are missing or were replaced; write them again")
        self.args = (uri, numbers)
        self.numbers = numbers


class ExtraPartError(StorageError):
    """An upload has parts besides those that were to be joined, and its store joins all or none.

    Attributes:
        numbers: of the parts too many.
    """

    def __init__(self, uri: str, numbers: tuple[int, ...]) -> None:
        shown = ", ".join(f"{number}" for number in numbers[:20])
        more = f" and {len(numbers) - 20:,} more" if len(numbers) > 20 else ""
        super().__init__(
            uri,
            f"its upload has parts {shown}{more} besides those to be joined, and this store (as "
            "Ceph does) joins all or none; abort the upload and begin another",
        )
        self.args = (uri, numbers)
        self.numbers = numbers


class SlideError(CarnError):
    """A slide could not be opened or read.

    Attributes:
        uri: the slide.
        reason: what is wrong, and what to do about it.
    """

    def __init__(self, uri: str, reason: str) -> None:
        super().__init__(uri, reason)
        self.uri = uri
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.uri}: {self.reason}"


class DamagedTileError(SlideError):
    """Pixels of one place of a slide cannot be decoded; the rest of the slide still reads.

    Attributes:
        level: pyramid level of the damaged place.
        x_l0, y_l0: its top-left corner in level-0 px.
    """

    def __init__(self, uri: str, reason: str, level: int, x_l0: int, y_l0: int) -> None:
        place = f"damaged tile on level {level} at level-0 px ({x_l0}, {y_l0})"
        super().__init__(uri, f"{place}: {reason}")
        self.args = (uri, reason, level, x_l0, y_l0)
        self.level = level
        self.x_l0 = x_l0
        self.y_l0 = y_l0


class CoordinateError(CarnError, ValueError):
    """A coordinate list or an annotation file does not say what it must."""


class DatasetError(CarnError):
    """A dataset on storage is incomplete, foreign or not what was asked for."""


class CheckpointError(CarnError):
    """Weights on storage are incomplete, damaged, foreign or not those that were asked for."""


class RunError(CarnError):
    """A training run cannot begin, or not go on, where it was asked to."""


class DivergedError(RunError):
    """The loss stopped being a number.

    Attributes:
        step: the update (from 1) whose loss was the first.
        tile_ids: the tiles of its batch.
        checkpoint: the last checkpoint before it; None where there is none.
    """

    def __init__(self, step: int, tile_ids: tuple[str, ...], checkpoint: str | None) -> None:
        super().__init__(step, tile_ids, checkpoint)
        self.step = step
        self.tile_ids = tile_ids
        self.checkpoint = checkpoint

    def __str__(self) -> str:
        last = f"the last good checkpoint is {self.checkpoint}" if self.checkpoint else "no "
        last += "" if self.checkpoint else "checkpoint was written before"
        return (
            f"the loss of update {self.step:,} is not a finite number; {last}. Its batch was cut "
            f"from {', '.join(self.tile_ids)}. Look at these tiles, or lower --learning-rate, set "
            "--gradient-clip, or choose another --loss"
        )


class UnfinishedError(CarnError):
    """A slide cannot be finished before some of its blocks are written, or written again.

    Attributes:
        uri: the slide.
        blocks: their indexes.
    """

    def __init__(self, uri: str, blocks: tuple[int, ...]) -> None:
        super().__init__(uri, blocks)
        self.uri = uri
        self.blocks = blocks

    def __str__(self) -> str:
        shown = ", ".join(f"{block}" for block in self.blocks[:20])
        more = f" and {len(self.blocks) - 20:,} more" if len(self.blocks) > 20 else ""
        return (
            f"{self.uri} cannot be finished: blocks {shown}{more} are missing or not what was "
            "recorded; write them, then finish again"
        )
