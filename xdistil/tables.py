"""Rows, and tagged sentences, that print in a terminal and in a notebook, and are copied into a paper."""

import itertools
from html import escape

LATEX = str.maketrans({**{x: f"\\{x}" for x in "&%$#_{}"}, "\\": r"\textbackslash{}", "~": r"\textasciitilde{}",
                       "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
                       "→": r"$\to$", "\n": " "})
MARKDOWN = str.maketrans({**{x: f"\\{x}" for x in "\\`*_|[]~$"}, "<": "&lt;", ">": "&gt;", "&": "&amp;", "\n": " "})


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

    def to_latex(self) -> str:
        """A booktabs table with the title as its caption; the first column to the left."""
        head, *rows = (" & ".join(x.translate(LATEX) for x in line) + r" \\" for line in (self.columns, *self.cells))
        body = [r"\toprule", head, r"\midrule", *rows, r"\bottomrule"]
        return "\n".join([r"\begin{table}", r"\centering", rf"\caption{{{self.title.translate(LATEX)}}}",
                          rf"\begin{{tabular}}{{l{'r' * (len(self.columns) - 1)}}}", *body, r"\end{tabular}",
                          r"\end{table}"])

    def to_markdown(self) -> str:
        """A Markdown table, without the title; the first column to the left."""
        rule = ["---", *["---:"] * (len(self.columns) - 1)]
        lines = [[x.translate(MARKDOWN) for x in line] for line in (self.columns, *self.cells)]
        return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))

    def _repr_html_(self) -> str:
        left = ' style="text-align:left"'  # notebooks set everything to the right, words too
        head = "<thead><tr>" + "".join(f"<th{left}>{escape(column)}</th>" for column in self.columns)
        rows = "".join("<tr>" + "".join(f"<td{left}>{escape(x)}</td>" for x in row) + "</tr>" for row in self.cells)
        return f"<table><caption>{escape(self.title)}</caption>{head}</tr></thead><tbody>{rows}</tbody></table>"


def spans_of(tags: list[str]) -> list[tuple[str, int, int]]:
    """Type, first word and the one after the last of each entity and, of type "", each stretch without one. An I- that
    continues nothing starts an entity; the label of a text is a type."""
    kinds = ["" if tag == "O" else tag[2:] if tag[:2] in ("B-", "I-") else tag for tag in tags]
    starts = [i for i, tag in enumerate(tags) if not i or tag[:2] == "B-" or kinds[i] != kinds[i - 1]]
    return [(kinds[a], a, b) for a, b in itertools.pairwise([*starts, len(tags)])]


class Spans:
    """One sentence as each of `tags` reads it, a row each: entities coloured by type, a dotted line under words that
    not all tag alike. `colours`: hexadecimal, by type."""

    def __init__(self, words: list[str], tags: dict[str, list[str]], colours: dict[str, str]):
        self.words, self.tags, self.colours = words, tags, colours
        self.differ = [len(set(found)) > 1 for found in zip(*tags.values(), strict=True)]

    def __repr__(self) -> str:
        return "\n".join(f"{name:8}" + " ".join(map("/".join, zip(self.words, tags, strict=True)))
                         for name, tags in self.tags.items())

    def _repr_html_(self) -> str:
        dotted = '<span style="border-bottom:2px dotted #D55E00">{}</span>'
        words = [(dotted if differ else "{}").format(escape(word))
                 for word, differ in zip(self.words, self.differ, strict=True)]

        def text(kind, first, end):
            shown, style = " ".join(words[first:end]), f"background:{self.colours.get(kind, '#999999')}50"
            return (f'<span style="{style};border-radius:4px;padding:1px 4px">{shown} <b style="font-size:10px">'
                    f'{escape(kind)}</b></span>' if kind else shown)

        left = 'style="text-align:left;vertical-align:top;line-height:1.8;padding:1px 14px 1px 0"'
        rows = {**{name: " ".join(text(*span) for span in spans_of(tags)) for name, tags in self.tags.items()},
                "": dotted.format("not all agree") if any(self.differ) else "all agree"}
        body = "".join(f'<tr style="background:none"><th {left[:-1]};width:80px">{escape(name)}</th>'
                       f'<td {left} dir="auto">{row}</td>' for name, row in rows.items())
        return f'<table style="width:100%"><tbody>{body}</tbody></table>'
