"""One self-contained HTML page from executed notebooks; it works offline and holds no script."""

import html
import re
from base64 import b64encode
from pathlib import Path

TAGS = set(re.findall(r"\w+", """a b blockquote br caption code dd details div dl dt em h1 h2 h3
    h4 hr i img kbd li ol p pre span strong sub summary sup table tbody td th thead tr u ul"""))
SETUP = {"parameters", "injected-parameters", "setup"}
CSS = """
:root{--bg:#fff;--fg:#1c2024;--soft:#5d666f;--line:#d9dee3;--box:#f4f6f8;--link:#0b61a4;
--bad:#b3261e}
@media (prefers-color-scheme:dark){:root{--bg:#15181c;--fg:#e3e6e9;--soft:#9aa4ae;--line:#343b43;
--box:#1f242a;--link:#7db9ec;--bad:#ff9a91}}*{box-sizing:border-box}html{color-scheme:light dark}
body{margin:0 auto;max-width:1400px;padding:0 1.2rem 4rem;background:var(--bg);color:var(--fg);
font:16px/1.55 system-ui,"Segoe UI",Roboto,"Noto Sans",sans-serif}header h1{font-size:2.1rem}
.page{display:grid;grid-template-columns:230px minmax(0,1fr);gap:2rem;align-items:start}
nav{position:sticky;top:0;max-height:100vh;overflow:auto;padding:.5rem 0;font-size:.86rem}
nav a{display:block;padding:.12rem 0;text-decoration:none;color:var(--soft)}
nav .h1{font-weight:600;color:var(--fg)}nav .h2{padding-left:.8rem}nav .h3{padding-left:1.6rem}
a{color:var(--link)}h1,h2,h3,h4{line-height:1.25;margin:1.6rem 0 .6rem}h1{font-size:1.7rem}
header,section{border-bottom:1px solid var(--line);margin-bottom:1rem}details{margin:.3rem 0}
p,ul,ol{max-width:78ch;overflow-wrap:anywhere}pre code{padding:0}code,pre{background:var(--box)}
pre{padding:.6rem .8rem;border-radius:6px;overflow:auto;max-height:32rem;font-size:.82rem;
line-height:1.4;margin:.5rem 0}code{padding:.1em .25em}pre.stderr{color:var(--soft)}
pre.error{border:2px solid var(--bad);color:var(--bad)}figure,.out{margin:.8rem 0;overflow-x:auto}
img{max-width:100%;height:auto;background:#fff;border-radius:6px;padding:6px;
border:1px solid var(--line)}figcaption,summary{color:var(--soft);font-size:.85rem}
summary{cursor:pointer}table{border-collapse:collapse;font-size:.88rem}.out td{text-align:right}
th,td{padding:.25rem .6rem;border-bottom:1px solid var(--line);text-align:left}
@media (max-width:860px){.page{display:block}nav{position:static;max-height:40vh}
body{padding:0 .8rem 3rem}}
"""
# The browser itself refuses scripts and everything from the network, whatever a cell printed.
CSP = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def _clean(text):
    """HTML without scripts and styles, and without pictures that are not in the page itself."""
    import bleach  # comes with nbconvert
    def keep(tag, name, value):
        if name in ("src", "href"):  # pictures only as data; links into the page or to the web
            return value.startswith("data:image/" if tag == "img" else ("#", "http"))
        return name in ("class", "alt", "title", "colspan", "rowspan", "start")

    def only_data(match):
        found = dict(re.findall(r"""\b(src|alt)\s*=\s*["']([^"']*)""", match.group(0)))
        if found.get("src", "").startswith("data:image/"):
            return match.group(0)
        return f"<em>[picture: {found.get('alt', '')}]</em>"

    text = re.sub(r"(?is)<(script|style)\b.*?(</\1\s*>|\Z)", "", text)
    text = re.sub(r"(?is)<img\b[^>]*>", only_data, text)
    # Links between the notebooks become links inside the page.
    text = re.sub(r'href="(?:\./)?([\w.-]+)\.ipynb(#[^"]*)?"', r'href="#nb-\1"', text)
    return bleach.clean(text, TAGS, keep, protocols={"http", "https", "data"}, strip=True)


def _plain(text):
    """Text as a terminal would leave it: no ANSI codes, no overwritten states, no tqdm bars."""
    text = re.sub(r"\x1b(\[[0-?]*[ -/]*[@-~]|[@-Z\\-_])", "", text).replace("\r\n", "\n")
    lines = [[s for s in line.split("\r") if s.strip()][-1:] or [""] for line in text.split("\n")]
    bar = re.compile(r"\d%\|.*\||\d\w* \[\d\d:\d\d.*\]")
    return "\n".join(line for (line,) in lines if not bar.search(line)).strip("\n")


def _pre(text, kind=""):
    return f'<pre class="{kind}">{html.escape(text)}</pre>' if text.strip() else ""


def _output(out, folder):
    if out.output_type == "stream":
        return _pre(_plain(out.text), out.name)
    if out.output_type == "error":
        return _pre(_plain("\n".join([f"{out.ename}: {out.evalue}", *out.traceback])), "error")
    for mime in sorted({"image/png", "image/jpeg"} & set(out.data)):
        data = "".join(out.data[mime].split())
        return f'<div class="out"><img alt="figure" src="data:{mime};base64,{data}"></div>'
    if (table := _clean(out.data.get("text/html", ""))).strip():
        return f'<div class="out">{table}</div>'
    if "text/markdown" in out.data:
        return _markdown(out.data["text/markdown"], folder)
    widget = any("widget-view" in mime for mime in out.data)  # nothing to show without scripts
    return "" if widget else _pre(_plain(out.data.get("text/plain", "")))


def _markdown(source, folder, attachments=None):
    from nbconvert.filters import markdown_mistune as nb
    # Pictures attached to the cell or lying in the notebooks' folder become data URIs.
    renderer = nb.IPythonRenderer(escape=False, embed_images=True, exclude_anchor_links=True,
                                  path=str(folder), attachments=attachments)
    return _clean(nb.MarkdownWithMath(renderer=renderer).render(source))


def _cell(cell, folder):
    body = ""
    if cell.cell_type == "markdown":
        body = _markdown(cell.source, folder, cell.get("attachments"))
    elif cell.cell_type == "code" and cell.source.strip():
        body = f"<details><summary>code</summary>{_pre(cell.source)}</details>"
        body += "".join(_output(out, folder) for out in cell.outputs)
    hidden = body and SETUP & set(cell.metadata.get("tags", ()))
    return f"<details><summary>setup</summary>{body}</details>" if hidden else body


def write_report(notebooks_dir, out_path, *, title, summary_html="", figures=()):
    """Write the page and return its path: ``summary_html``, the PNGs of ``figures`` (paths), then
    all executed ``*.ipynb`` of ``notebooks_dir`` by name, code folded away. It is written under a
    temporary name first: a reader never sees half a page."""
    import nbformat
    folder, out_path = Path(notebooks_dir), Path(out_path)
    paths = sorted(folder.glob("*.ipynb"))
    if not paths:
        raise FileNotFoundError(f"no notebook (*.ipynb) in {folder.resolve()}: run them first")
    contents, sections = [], []

    def anchor(match):
        level, text = match.groups()
        at, plain = len(contents), re.sub("<[^>]+>", "", text)
        contents.append(f'<a class="h{level}" href="#s{at}">{plain}</a>')
        return f'<h{level} id="s{at}">{text}</h{level}>'

    for path in paths:
        body = "\n".join(_cell(c, folder) for c in nbformat.read(path, as_version=4).cells)
        body = body if "<h1>" in body else f"<h1>{html.escape(path.stem)}</h1>{body}"
        body = re.sub(r"(?s)<h([1-3])>(.*?)</h\1>", anchor, body)
        sections.append(f'<section id="nb-{html.escape(path.stem)}">{body}</section>')
    shown = ""
    for path in map(Path, figures):
        caption = html.escape(re.sub("[_-]+", " ", path.stem))
        data = b64encode(path.read_bytes()).decode()
        shown += f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
        shown += f"<figcaption>{caption}</figcaption></figure>"
    page = f"""<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{CSP}">
<title>{html.escape(title)}</title><style>{CSS}</style></head><body>
<header><h1>{html.escape(title)}</h1>{_clean(summary_html)}</header>
<div class="page"><nav aria-label="Contents">{"".join(contents)}</nav>
<main>{shown}{"".join(sections)}</main></div></body></html>"""
    out_path.parent.mkdir(parents=True, exist_ok=True)
    temporary = out_path.with_name(f".{out_path.name}.tmp")
    temporary.write_text(page, encoding="utf-8")
    return temporary.replace(out_path)
