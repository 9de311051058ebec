"""What a person looks at: contact sheets, the HTML report, tables in the terminal."""

from topgap_jax.report.compare import compare, demo_table, table
from topgap_jax.report.page import report
from topgap_jax.report.sheets import field_figure, sheet

__all__ = ["compare", "demo_table", "field_figure", "report", "sheet", "table"]
