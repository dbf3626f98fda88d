"""The words of a report for what a head decides."""

from mpcompile.ir.head import Head


def accuracy_name(head: Head | None) -> str:
    """The name of the share of right decisions: top-1 for classes, accuracy for a threshold, exact match for labels."""
    return {"sigmoid": "accuracy", "ordinal": "accuracy", "multilabel": "exact match"}.get(
        head.kind if head else "softmax", "top-1"
    )
