"""A run as one page: what was trained, how it went, and whether the images are used."""

from megatron_vl.train.report.page import write_report

__all__ = ["write_report"]
