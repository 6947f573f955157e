"""Rows that read well in a terminal and in a notebook."""

from __future__ import annotations

from html import escape


def format_cell(value) -> str:
    """One value as text: floats with four significant digits, None as a dash."""
    if value is None or value != value:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


class Table:
    """A list of rows (dicts with the same keys) that prints in a terminal and in a notebook."""

    def __init__(self, rows: list[dict], title: str = ""):
        self.rows, self.title = rows, title
        self.columns = list(dict.fromkeys(key for row in rows for key in row))

    @classmethod
    def transposed(cls, rows: list[dict], name: str, title: str = "") -> Table:
        """A table with one column per row given, headed by the row's value of `name`."""
        keys = [key for key in rows[0] if key != name]
        return cls([{"": key, **{row[name]: row.get(key) for row in rows}} for key in keys], title)

    def _cells(self) -> list[list[str]]:
        return [[format_cell(row.get(column)) for column in self.columns] for row in self.rows]

    def __str__(self) -> str:
        cells = self._cells()
        widths = [max(map(len, column)) for column in zip(self.columns, *cells, strict=True)]
        lines = [[*self.columns], ["-" * width for width in widths], *cells]
        text = [
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        return "\n".join([self.title] * bool(self.title) + text)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{escape(column)}</th>" for column in self.columns)
        body = "".join(
            "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
            for row in self._cells()
        )
        caption = f"<caption>{escape(self.title)}</caption>" if self.title else ""
        return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
