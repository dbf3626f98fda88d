"""The values that passes read and write: N:M patterns, models with a plan for each layer, and analysis results.

The names are imported on first use, so that `mpcompile.ir.pattern` can be imported without torch.
"""

from typing import TYPE_CHECKING

from mpcompile.system.lazy_imports import lazy_names

if TYPE_CHECKING:  # for type checkers and editors; the table below imports the same names on first use
    from mpcompile.ir.model import LayerPlan, Model
    from mpcompile.ir.pattern import NM
    from mpcompile.ir.results import Certificate, Epoch, LayerCertificate, Spectrum
    from mpcompile.ir.source import Source
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "mpcompile.ir.model": ("LayerPlan", "Model"),
            "mpcompile.ir.pattern": ("NM",),
            "mpcompile.ir.results": ("Certificate", "Epoch", "LayerCertificate", "Spectrum"),
            "mpcompile.ir.source": ("Source",),
        },
        submodules=("model", "pattern", "results", "source"),
    )

__all__ = ["NM", "Certificate", "Epoch", "LayerCertificate", "LayerPlan", "Model", "Source", "Spectrum"]
