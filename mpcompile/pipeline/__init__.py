"""The pass manager, which verifies every pass, and the checkpoints from which a stopped run resumes."""

from mpcompile.pipeline.pass_manager import Effect, Pass, PassManager, PassRecord

__all__ = ["Effect", "Pass", "PassManager", "PassRecord"]
