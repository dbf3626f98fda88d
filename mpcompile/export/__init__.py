"""Model -> ONNX file, with every mask verified in the file."""

from mpcompile.export.onnx_export import INPUT, Exported, Lowered

__all__ = ["INPUT", "Exported", "Lowered"]
