"""Figures, tables and one self-contained page from what a store holds."""

from __future__ import annotations

from pnlac_fast.reporting.page import report, write_report

__all__ = ["report", "write_report"]
