"""One HTML page from executed notebooks, all in one file: it works offline and runs no script."""

import re
from base64 import b64encode
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

from xdistil.files import save_text

UNWANTED = re.compile(r"""(?isx) <(script|style)\b.*?</\1\s*> | <a\ [^>]*>\s*<img\ [^>]*src="http[^>]*>\s*</a>
    | <img\ [^>]*src="http[^>]*>""")  # badges and other pictures from the network go as well


def write_report(notebooks_dir, out_path, *, title: str, summary_html: str = "", figures=()) -> Path:
    """Write one page, contents at the side: summary and figures (paths of PNGs; absent ones are skipped), then each
    notebook without its code.
    Raises FileNotFoundError if the folder holds no notebook."""
    import nbformat
    from nbconvert import HTMLExporter
    from traitlets.config import Config

    quiet = Config(TagRemovePreprocessor={"enabled": True, "remove_all_outputs_tags": ["setup"],
                                             "remove_cell_tags": ["head"]})
    exporter = HTMLExporter(config=quiet, template_name="basic", exclude_input=True, exclude_output_prompt=True,
                            exclude_anchor_links=True)
    exporter.register_preprocessor("nbconvert.preprocessors.CoalesceStreamsPreprocessor", enabled=True)
    contents, first, sections, paths = [], [], [], sorted(Path(notebooks_dir).glob("*.ipynb"))
    if not paths:
        raise FileNotFoundError(f"{notebooks_dir} holds no notebook; run `xdistil run` first")

    def anchor(heading):
        level, text = heading.groups()
        contents.append(f'<a class="h{level}" href="#s{len(contents)}">{re.sub("<[^>]+>", "", text)}</a>')
        return f'<h{level} id="s{len(contents) - 1}">{text}</h{level}>'

    for path in (path for path in map(Path, figures) if path.is_file()):
        picture = b64encode(path.read_bytes()).decode()
        first.append(f'<figure><img alt="{path.stem}" src="data:image/png;base64,{picture}"></figure>')
    for path in paths:
        body = UNWANTED.sub("", exporter.from_notebook_node(nbformat.read(path, as_version=4))[0])
        body = re.sub(r'href="([\w.-]+)[.]ipynb', r'href="#\1', body)
        body = re.sub(r"\[[\w-]+\] \[alarm\] [^<\n]*", r'<b class="alarm">\g<0></b>', body)
        body = re.sub(r"(?s)<h([1-3])\b[^>]*>(.*?)</h\1>", anchor, body)
        sections.append(f'<section id="{path.stem}">{body}</section>')
    page = Template(resources.files("xdistil").joinpath("report.html").read_text(encoding="utf-8"))
    parts = {"contents": contents, "figures": first, "sections": sections}
    return save_text(Path(out_path), page.substitute(title=escape(title), summary=UNWANTED.sub("", summary_html),
                                                     **{name: "".join(part) for name, part in parts.items()}))
