"""The values that flow: patterns, models with a plan a layer, and what passes find out about them."""

from mpcompile.ir.model import LayerPlan, Model, Source
from mpcompile.ir.pattern import NM
from mpcompile.ir.results import Certificate, Epoch, LayerCertificate, Spectrum

__all__ = ["NM", "Certificate", "Epoch", "LayerCertificate", "LayerPlan", "Model", "Source", "Spectrum"]
