"""The pass manager, what it checks after each pass, and checkpoints that a stopped run goes on from."""

from mpcompile.pipeline.pass_manager import Effect, Pass, PassManager, PassRecord

__all__ = ["Effect", "Pass", "PassManager", "PassRecord"]
