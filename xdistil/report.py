"""One HTML page from executed notebooks, all in one file: it works offline and runs no script."""

import re
from base64 import b64encode
from html import escape
from importlib import resources
from pathlib import Path

from xdistil.files import save_text

FOLDED = {"parameters", "injected-parameters", "setup"}  # tags of the cells that start closed
# With this the browser itself runs no script and loads nothing, whatever a cell printed.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; form-action 'none'"
UNWANTED = re.compile(r"""(?isx)
    <(script|style)\b .*? </\1\s*>
    | <a\ class="anchor-link" .*? </a>                        # the pilcrow behind a heading
    | <a\s[^>]*> \s* <img\s[^>]*\bsrc=(?!"data:)[^>]*> \s* </a>   # a badge
    | <img\s[^>]*\bsrc=(?!"data:)[^>]*>                       # any other picture from outside
    """)
PNG = '<img alt="{}" src="data:image/png;base64,{}">'
ANSI = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|[@-Z\\-_])")
PROGRESS = re.compile(r"\d%\|.*\||\d\w* \[\d\d:\d\d.*\]")  # a bar of tqdm


def _plain(text, kind=""):
    """Text as a terminal would leave it: no ANSI codes, no overwritten states, no progress bars."""
    lines = (line.rstrip("\r").split("\r")[-1] for line in ANSI.sub("", text).split("\n"))
    text = "\n".join(line for line in lines if not PROGRESS.search(line)).strip("\n")
    return f'<pre class="{kind}">{escape(text)}</pre>' if text.strip() else ""


def _output(out, markdown):
    if out.output_type == "stream":
        return _plain(out.text, out.name)
    if out.output_type == "error":
        return _plain("\n".join([f"{out.ename}: {out.evalue}", *out.traceback]), "error")
    if png := out.data.get("image/png", "").strip():
        return f'<div class="out">{PNG.format("figure", png)}</div>'
    if table := UNWANTED.sub("", out.data.get("text/html", "")):
        return f'<div class="out">{table}</div>'
    return markdown(out.data.get("text/markdown", "")) or _plain(out.data.get("text/plain", ""))


def _cell(cell, markdown):
    body = markdown(cell.source) if cell.cell_type == "markdown" else (
        f"<details><summary>code</summary>{_plain(cell.source)}</details>"
        + "".join(_output(out, markdown) for out in cell.outputs))
    folded = FOLDED & set(cell.metadata.get("tags", ()))
    return f"<details><summary>setup</summary>{body}</details>" if folded else body


def write_report(notebooks_dir, out_path, *, title, summary_html="", figures=()):
    """Write one HTML page: summary, figures (paths of PNGs), then each executed notebook by name."""
    import nbformat
    from nbconvert.filters import markdown2html

    contents, shown = [], ""

    def anchor(heading):
        level, text = heading.groups()
        contents.append(f'<a class="h{level}" href="#s{len(contents)}">{re.sub("<[^>]+>", "", text)}</a>')
        return f'<h{level} id="s{len(contents) - 1}">{text}</h{level}>'

    for path in filter(Path.is_file, map(Path, figures)):
        caption, data = escape(re.sub("[_-]+", " ", path.stem)), b64encode(path.read_bytes()).decode()
        shown += f"<figure>{PNG.format(caption, data)}<figcaption>{caption}</figcaption></figure>"
    for path in sorted(Path(notebooks_dir).glob("*.ipynb")):
        cells = nbformat.read(path, as_version=4).cells
        body = UNWANTED.sub("", "\n".join(_cell(cell, markdown2html) for cell in cells))
        body = re.sub(r"(?s)<h([1-3])\b[^>]*>(.*?)</h\1>", anchor, body)
        body = re.sub(r'href="([\w.-]+)\.ipynb"', r'href="#\1"', body)
        shown += f'<section id="{escape(path.stem)}">{body}</section>'
    style = resources.files("xdistil").joinpath("report.css").read_text(encoding="utf-8")
    page = f"""<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width,initial-scale=1">
<title>{escape(title)}</title><style>{style}</style></head><body>
<header><h1>{escape(title)}</h1>{UNWANTED.sub("", summary_html)}</header>
<div class="page"><nav aria-label="Contents">{"".join(contents)}</nav><main>{shown}</main></div></body></html>"""
    return save_text(Path(out_path), page)
