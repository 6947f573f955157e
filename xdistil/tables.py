"""Rows that read well in a terminal and in a notebook."""

from __future__ import annotations

from html import escape


def format_cell(value) -> str:
    """One value as text: floats with four significant digits, None and NaN as a dash."""
    if value is None or value != value:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if type(value) is int else str(value)


class Table:
    """A list of rows (dicts) that prints in a terminal and in a notebook."""

    def __init__(self, rows: list[dict], title: str = ""):
        self.rows, self.title = rows, title
        self.columns = list(dict.fromkeys(key for row in rows for key in row))

    def cells(self) -> list[list[str]]:
        """The formatted values, row by row."""
        return [[format_cell(row.get(column)) for column in self.columns] for row in self.rows]

    def __repr__(self) -> str:
        lines = [self.columns, *self.cells()]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        lines.insert(1, ["-" * width for width in widths])
        text = ["  ".join(cell.rjust(w) if i else cell.ljust(w)
                          for i, (cell, w) in enumerate(zip(line, widths, strict=True))) for line in lines]
        return "\n".join([self.title] * bool(self.title) + [line.rstrip() for line in text])

    def _repr_html_(self) -> str:
        rows = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in self.cells()]
        head = "".join(f"<th>{escape(column)}</th>" for column in self.columns)
        return (f"<table><caption>{escape(self.title)}</caption><thead><tr>{head}</tr></thead><tbody>"
                + "".join(f"<tr>{row}</tr>" for row in rows) + "</tbody></table>")
