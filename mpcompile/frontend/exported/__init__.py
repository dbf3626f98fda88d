"""Models that torch.export wrote: reads .pt2 files without running what they hold, and lifts programs to nn.Modules.

`load_exported` is for files; `exported` is for a module that capture refuses.
"""

from mpcompile.frontend.exported.export_module import exported
from mpcompile.frontend.exported.load import ExportedModel, exported_weights, is_exported_file, load_exported

__all__ = ["ExportedModel", "exported", "exported_weights", "is_exported_file", "load_exported"]
