"""What a person looks at: contact sheets, the HTML report, tables and a verdict in the terminal."""

import importlib

from topgap_jax.report.compare import compare, table
from topgap_jax.report.read import read_runs
from topgap_jax.report.verdict import verdict

DRAWN = {"report": "page", "sheet": "sheets", "field_figure": "sheets"}
__all__ = ["compare", "field_figure", "read_runs", "report", "sheet", "table", "verdict"]


def __getattr__(name: str):
    # Imported when named: a table in the terminal need not wait for matplotlib.
    if name in DRAWN:
        return getattr(importlib.import_module(f"topgap_jax.report.{DRAWN[name]}"), name)
    raise AttributeError(f"module 'topgap_jax.report' has no attribute '{name}'")


def __dir__():
    return sorted([*globals(), *DRAWN])
