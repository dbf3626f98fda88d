"""The report of an output folder: its values, and the tables, charts and sentences made of them."""

from mpcompile.report.schema import Report

__all__ = ["Report"]
