"""Images of a folder or an .npz file as calibration, validation, training and held-out splits, decoded once a run."""

from mpcompile.data.folder import FolderImages
from mpcompile.data.images import Data, Split
from mpcompile.data.loading import load_data
from mpcompile.data.npz import ArrayImages

__all__ = ["ArrayImages", "Data", "FolderImages", "Split", "load_data"]
