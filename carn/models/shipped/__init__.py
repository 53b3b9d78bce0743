"""The trained networks that come with the project, found by name.

`carn-x2` stands for one wherever a checkpoint is asked for. Outputs call it `shipped:carn-x2`: the
package lies elsewhere on every node, and a folder of that name may be anything.
"""

from pathlib import Path

from carn.errors import CheckpointError

SCHEME = "shipped:"
FOLDER = Path(__file__).parent
# What a scale's network is called, and the scale that is meant where none is said.
NAME = "carn-x{scale}"
DEFAULT_SCALE = 2


def shipped_names() -> tuple[str, ...]:
    """The networks that come with the project, in the order of their names."""
    return tuple(sorted(path.parent.name for path in FOLDER.glob("*/checkpoint.json")))


def shipped_uri(name: str) -> str | None:
    """The one spelling of a name, `shipped:<name>`; None where it is none of a shipped network.

    Args:
        name: what somebody wrote where a checkpoint is asked for.

    Raises:
        CheckpointError: it is also that of something in the working folder, or `shipped:` stands
            before a name that there is none of.
    """
    if name.startswith(SCHEME):
        name = name.rstrip("/")
        if name.removeprefix(SCHEME) not in shipped_names():
            raise CheckpointError(
                f"{name}: no such network comes with the project; there are "
                f"{', '.join(SCHEME + known for known in shipped_names())}"
            )
        return name
    if name not in shipped_names():
        return None
    if Path(name).exists():
        raise CheckpointError(
            f"{name} is here, and the name of a network that comes with the project; say ./{name} "
            f"for what is here, {SCHEME}{name} for the network"
        )
    return f"{SCHEME}{name}"


def shipped_for(scale: int | None) -> str:
    """The network that is taken where none is named.

    Args:
        scale: the SR factor; None for 2.

    Raises:
        CheckpointError: none for this scale comes with the project.
    """
    name = NAME.format(scale=DEFAULT_SCALE if scale is None else scale)
    if name not in shipped_names():
        raise CheckpointError(
            f"no network for x{scale} comes with the project (there are "
            f"{', '.join(shipped_names())}); name one with --checkpoint"
        )
    return f"{SCHEME}{name}"


def place_of(uri: str) -> str:
    """Where the files are that a URI below `shipped:` names; any other URI as it is."""
    return str(FOLDER / uri.removeprefix(SCHEME)) if uri.startswith(SCHEME) else uri
