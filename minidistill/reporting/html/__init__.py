"""A run's report: one self-contained HTML page, without network access.

Its style and its script are inline, and the only ones that its Content-Security-Policy admits.
"""

from __future__ import annotations

from minidistill.reporting.html.comparison import write_comparison
from minidistill.reporting.html.live import LiveReport
from minidistill.reporting.html.report import has_report, write_report
from minidistill.reporting.html.summary import summary_html

__all__ = ["LiveReport", "has_report", "summary_html", "write_comparison", "write_report"]
