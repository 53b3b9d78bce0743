"""Open a slide by its content: the direct reader where it can, OpenSlide for the rest."""

import functools
import os
from pathlib import Path

from carn import storage
from carn.errors import SlideError
from carn.slides import node_cache
from carn.slides.slide import Slide

# Open slides a process keeps. Each holds a descriptor and, for the largest, a few MB of tile
# positions; work is ordered by slide, so more would not be used again.
MAX_OPEN_SLIDES = 8


def open_slide(uri: str | Path) -> Slide:
    """Open a whole-slide image from a local path or `s3://`, whichever reader suits its content.

    TIFF and SVS of RGB tiles are read directly, by byte range, and so are the chunks of a folder or
    prefix that is an OME-Zarr (`.zarr`). Everything else goes to OpenSlide; remote files of those
    formats are fetched once into the node's slide cache.

    Raises:
        MissingObjectError, AccessDeniedError: nothing there, or not for these credentials.
        SlideError: an empty file, a directory, not a slide, truncated, damaged or absurd.
        StorageError: storage does not answer.
    """
    # Readers and their libraries wait for a slide: whoever trains on a dataset opens none.
    from carn.slides.openslide_reader import OpenSlideSlide
    from carn.slides.tiled_tiff import NotTiledTiffError, TiledTiffSlide

    name = storage.normalize(uri)
    if storage.is_zarr(name):
        from carn.slides.zarr_slide import OmeZarrSlide

        return OmeZarrSlide(name)
    if not storage.is_s3(name) and Path(name).is_dir():
        raise SlideError(name, "is a directory; name a slide file in it")
    source = storage.open_source(name)
    try:
        if source.size == 0:
            raise SlideError(name, "is an empty file")
        try:
            return TiledTiffSlide(source)
        except NotTiledTiffError as error:
            why_not_direct = str(error)
    except BaseException:
        source.close()
        raise
    source.close()
    path, pin = node_cache.fetch(name) if storage.is_s3(name) else (Path(name), None)
    try:
        return OpenSlideSlide(name, path, pin=pin)
    except SlideError as error:
        if pin is not None:
            pin.close()
        raise SlideError(name, f"{error.reason}; as a TIFF of tiles: {why_not_direct}") from error


def open_image(uri: str | Path) -> Slide:
    """Open a plain image (PNG, JPEG, TIFF, ...) as a slide of one level, without MPP.

    Raises:
        MissingObjectError, AccessDeniedError, StorageError: it cannot be read.
        SlideError: not an image, damaged, truncated or absurdly large.
    """
    from carn.slides.image import ImageSlide

    return ImageSlide(storage.normalize(uri))


def cached_slide(uri: str, *, identity: str = "") -> Slide:
    """`open_slide`, from this process's small cache of open slides.

    The slide is shared: callers read from it and leave it open. It is closed when it has fallen out
    of the cache and nobody holds it any more.

    Args:
        uri: the slide.
        identity: what `storage.identity` says of it now; a slide that was replaced since it was
            opened is opened anew.
    """
    return _cached(os.getpid(), uri, identity)


@functools.lru_cache(maxsize=MAX_OPEN_SLIDES)
def _cached(_process: int, uri: str, _identity: str) -> Slide:
    return open_slide(uri)
