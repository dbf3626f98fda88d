"""Images of a folder or an .npz file as calibration, validation, training and held-out splits, decoded once a run.

The names are imported on first use, so that `mpcompile.data.metric_values` can be imported without torch.
"""

from typing import TYPE_CHECKING

from mpcompile.system.lazy_imports import lazy_names

if TYPE_CHECKING:  # for type checkers and editors; the table below imports the same names on first use
    from mpcompile.data.folder import FolderImages
    from mpcompile.data.images import Data, Split
    from mpcompile.data.loading import load_data
    from mpcompile.data.npz import ArrayImages
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "mpcompile.data.folder": ("FolderImages",),
            "mpcompile.data.images": ("Data", "Split"),
            "mpcompile.data.loading": ("load_data",),
            "mpcompile.data.npz": ("ArrayImages",),
        },
        submodules=("folder", "images", "loading", "npz"),
    )

__all__ = ["ArrayImages", "Data", "FolderImages", "Split", "load_data"]
