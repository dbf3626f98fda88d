"""The report of an output folder: its values (schema.py), and the tables, charts and sentences that show them."""

from mpcompile.report.schema import Report

__all__ = ["Report"]
