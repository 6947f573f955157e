"""Rows that print in a terminal and in a notebook."""

from html import escape


def format_cell(value) -> str:
    """One value as text: floats with one decimal, below 1 with three digits, None and NaN as a dash."""
    if value is None or value != value:
        return "-"
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 1 else f"{value:.3g}"
    return f"{value:,}" if type(value) is int else str(value)


class Table:
    """A list of rows (dicts) that prints in a terminal and in a notebook."""

    def __init__(self, rows: list[dict], title: str = ""):
        self.rows, self.title, self.columns = rows, title, list(dict.fromkeys(key for row in rows for key in row))
        self.cells = [[format_cell(row.get(column)) for column in self.columns] for row in rows]

    def __repr__(self) -> str:
        widths = [max(map(len, column)) for column in zip(self.columns, *self.cells, strict=True)]
        form = "  ".join(f"{{:{'>' if i else '<'}{width}}}" for i, width in enumerate(widths))
        lines = [self.columns, ["-" * width for width in widths], *self.cells]
        return "\n".join([self.title] * bool(self.title) + [form.format(*line).rstrip() for line in lines])

    def _repr_html_(self) -> str:
        left = ' style="text-align:left"'  # notebooks set everything to the right, words too
        head = "<thead><tr>" + "".join(f"<th{left}>{escape(column)}</th>" for column in self.columns)
        rows = "".join("<tr>" + "".join(f"<td{left}>{escape(x)}</td>" for x in row) + "</tr>" for row in self.cells)
        return f"<table><caption>{escape(self.title)}</caption>{head}</tr></thead><tbody>{rows}</tbody></table>"
