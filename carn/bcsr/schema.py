"""The tables of a bcSR dataset: each column named, typed and explained in this one place."""

import pyarrow as pa

# A tile before and after it was measured. A row with a `reason` is a failure and has no numbers.
MEASURED = pa.schema(
    [
        ("slide", pa.string()),  # the slide's stem, as coordinate lists name it
        ("uri", pa.string()),
        ("x_l0", pa.int64()),  # top-left corner, level-0 px; may hang over the slide's border
        ("y_l0", pa.int64()),
        ("width_px", pa.int32()),
        ("height_px", pa.int32()),
        ("label", pa.string()),
        ("inside_fraction", pa.float64()),  # share of the tile's area that lies on the slide
        ("white_fraction", pa.float64()),  # share of px with grey above the threshold
        ("mean_r", pa.float64()),  # channel means, 0..255
        ("mean_g", pa.float64()),
        ("mean_b", pa.float64()),
        ("mpp_x", pa.float64()),  # um per px; null when the slide does not say
        ("mpp_y", pa.float64()),
        ("slide_width_l0", pa.int64()),
        ("slide_height_l0", pa.int64()),
        ("reader", pa.string()),
        ("slide_identity", pa.string()),  # ETag or fingerprint of the file that was read
        ("reason", pa.string()),  # why the tile could not be read; null when it was
        ("failed_scope", pa.string()),  # `slide` when nothing of it can be read, else `tile`
        ("is_transient", pa.bool_()),  # storage failed: another run may succeed
    ]
)

# What became of each measured tile: `measured.parquet`.
SELECTED = pa.schema(
    [
        *MEASURED,
        # a split, or `white` (filtered out), `surplus` (ranked too low), `failed`
        ("status", pa.string()),
        ("distance", pa.float64()),  # from the survivors' mean RGB, 0..255 scale; null if filtered
        ("rank", pa.int32()),  # 0 is the farthest; null if filtered
    ]
)

# The dataset's shards: `tiles/<split>-<number>-<hash>.parquet`.
TILES = pa.schema(
    [
        ("tile_id", pa.string()),  # <slide>_<x_l0>_<y_l0>, unique in the dataset
        *(
            MEASURED.field(name)
            for name in (
                *("slide", "uri", "x_l0", "y_l0", "width_px", "height_px", "label"),
                *("inside_fraction", "white_fraction", "mean_r", "mean_g", "mean_b"),
                *("mpp_x", "mpp_y"),
            )
        ),
        ("distance", pa.float64()),
        ("rank", pa.int32()),
        ("split", pa.string()),
        ("encoding", pa.string()),  # `jxl` or `png`, both lossless
        ("image", pa.binary()),
    ]
)

# What could not be read: `failures.parquet`. Without x_l0, y_l0 the whole slide failed.
FAILURES = pa.schema(
    [
        ("slide", pa.string()),
        ("uri", pa.string()),
        ("x_l0", pa.int64()),
        ("y_l0", pa.int64()),
        ("num_tiles", pa.int64()),  # tiles that are missing for this reason
        ("stage", pa.string()),  # `resolve`, `locate`, `measure` or `write`
        ("reason", pa.string()),
    ]
)

SPLITS = ("train", "validation", "test")
