"""The values that flow through a run: patterns, models with a plan for each layer, and results of passes."""

from mpcompile.ir.model import LayerPlan, Model, Source
from mpcompile.ir.pattern import NM
from mpcompile.ir.results import Certificate, Epoch, LayerCertificate, Spectrum

__all__ = ["NM", "Certificate", "Epoch", "LayerCertificate", "LayerPlan", "Model", "Source", "Spectrum"]
