"""What a person looks at: contact sheets, the HTML report, tables in the terminal."""

import importlib

from topgap_jax.report.compare import compare, demo_table, table

# Imported when it is named: `topgap compare` prints a table, and need not wait for Matplotlib and JAX.
LATER = {"report": "page", "field_figure": "sheets", "sheet": "sheets"}
__all__ = ["compare", "demo_table", "field_figure", "report", "sheet", "table"]


def __getattr__(name: str):
    if name in LATER:
        return getattr(importlib.import_module(f"topgap_jax.report.{LATER[name]}"), name)
    raise AttributeError(f"module 'topgap_jax.report' has no attribute '{name}'")


def __dir__():
    return sorted([*globals(), *LATER])
