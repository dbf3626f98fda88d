"""From a model to an ONNX file in which each mask was found again."""

from mpcompile.export.onnx_export import INPUT, Exported, Lowered

__all__ = ["INPUT", "Exported", "Lowered"]
