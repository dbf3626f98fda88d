"""The pass manager, which verifies every pass, and the checkpoints from which a stopped run resumes.

The names are imported on first use, so that `mpcompile.pipeline.pass_record` can be imported without torch.
"""

from typing import TYPE_CHECKING

from mpcompile.system.lazy_imports import lazy_names

if TYPE_CHECKING:  # for type checkers and editors; the table below imports the same names on first use
    from mpcompile.pipeline.pass_manager import Pass, PassManager
    from mpcompile.pipeline.pass_record import Effect, PassRecord
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "mpcompile.pipeline.pass_manager": ("Pass", "PassManager"),
            "mpcompile.pipeline.pass_record": ("Effect", "PassRecord"),
        },
        submodules=("pass_manager", "pass_record"),
    )

__all__ = ["Effect", "Pass", "PassManager", "PassRecord"]
