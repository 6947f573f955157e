import base64
import re

import pytest

pytest.importorskip("nbconvert")
import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from xdistil.report import write_report

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
SECRET = "alert('no')"


def stream(text, name="stdout"):
    return new_output("stream", name=name, text=text)


def shown(**data):
    names = {"png": "image/png", "html": "text/html", "plain": "text/plain"}
    return new_output("display_data", data={names[key]: value for key, value in data.items()})


def code(source, *outputs, tags=()):
    return new_code_cell(source, outputs=list(outputs), metadata={"tags": list(tags)})


@pytest.fixture
def page(tmp_path):
    """Builds the page from the cells of one or more notebooks and returns its text."""

    def build(*notebooks, **kwargs):
        folder = tmp_path / "notebooks"
        folder.mkdir()
        for i, cells in enumerate(notebooks, 1):
            nbformat.write(new_notebook(cells=list(cells)), folder / f"0{i}_part.ipynb")
        out = write_report(folder, tmp_path / "out" / "report.html", title="T <1>", **kwargs)
        assert [path.name for path in out.parent.iterdir()] == ["report.html"]  # no leftovers
        return out.read_text(encoding="utf-8")

    return build


def test_pictures_are_data_uris_and_notebooks_come_in_order(page, tmp_path):
    (tmp_path / "f1_per_language.png").write_bytes(base64.b64decode(PIXEL))
    text = page(
        [new_markdown_cell("# First"), code("a", shown(png=PIXEL + "\n", plain="<Figure>"))],
        [new_markdown_cell("# Second"), code("b", shown(png=PIXEL))],
        figures=[tmp_path / "f1_per_language.png", tmp_path / "absent.png"],
        summary_html="<p>kept <b>96 %</b></p>",
    )
    assert text.count("data:image/png;base64,iVBORw0KGgo") == text.count("<img") == 3
    assert 'alt="f1_per_language"' in text
    assert "&lt;Figure&gt;" not in text
    assert "<title>T &lt;1&gt;</title>" in text and "kept <b>96 %</b>" in text
    assert text.index(">First</h1>") < text.index(">Second</h1>")


def test_contents_stand_at_the_side_and_summary_and_figures_come_first(page, tmp_path):
    for name in ("languages", "confusion"):
        (tmp_path / f"{name}.png").write_bytes(base64.b64decode(PIXEL))
    text = page([new_markdown_cell("# First")], figures=[tmp_path / f"{x}.png" for x in ("languages", "confusion")],
                summary_html="<table id=scores></table>")
    order = [text.index(x) for x in ('<div class="page">', "<nav", 'href="#summary"', "<main>", 'id="summary"',
                                     "<table id=scores>", 'alt="languages"', 'alt="confusion"', ">First</h1>")]
    assert order == sorted(order)


def test_contents_list_links_to_headings_and_between_notebooks(page):
    text = page([new_markdown_cell("# One\n\n## A *b*\n\n[on](02_part.ipynb)")], [new_markdown_cell("# Two")])
    links = re.findall(r'<a class="h(\d)" href="#(s\d+)">([^<]*)</a>', text)
    assert [(level, name) for level, _, name in links] == [("1", "One"), ("2", "A b"), ("1", "Two")]
    assert all(f'id="{target}"' in text for _, target, _ in links)
    assert 'href="#02_part"' in text and 'id="02_part"' in text
    assert "¶" not in text and "&#182;" not in text


def test_page_has_no_script_and_loads_nothing_remote(page):
    bad = f'<script>{SECRET}</script><style scoped>td{{color:red}}</style><img src="https://e.com/a.png">'
    badge = "[![Open in Colab](https://colab.example/badge.svg)](https://colab.example/nb.ipynb)"
    text = page(
        [
            new_markdown_cell(f"# H\n\n{badge}\n\n{bad}\n\n![far](http://e.com/b.png) [kept](https://e.com)"),
            code("print('<script>')", shown(html=bad + "<table><tr><td>7</td></tr></table>")),
            code("x", shown(html=f"<script>{SECRET}</script>", plain="fallback")),
            code("x", stream("<script src='https://example.com'></script>")),
        ],
        summary_html=bad,
    )
    assert "<script" not in text.lower() and SECRET not in text and "color:red" not in text
    assert "<img" not in text and "colab" not in text.lower()
    assert "<td>7</td>" in text and 'href="https://e.com"' in text
    policy = '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:;'
    assert policy in text[: text.index("<title>")]


def test_code_and_the_output_of_set_up_cells_stay_out(page):
    text = page([
        code("shown_code()", stream("visible")),
        code("seq_len = 7", tags=["parameters"]),
        code("import os", stream("quiet"), tags=["setup"]),
        new_markdown_cell("## Same in every notebook", metadata={"tags": ["head"]}),
    ])
    assert "Same in every notebook" not in text
    assert "visible" in text
    assert not any(hidden in text for hidden in ("shown_code", "seq_len", "import os", "quiet"))


def test_text_and_errors_are_shown_without_terminal_codes(page):
    text = page([
        code("a", stream("\x1b[1;31mred\x1b[0m <b>\n")),
        code("1/0", new_output("error", ename="ValueError", evalue="bad <x>", traceback=["\x1b[31mTrace\x1b[0m"])),
    ])
    assert "\x1b" not in text and "red" in text and "&lt;b&gt;" in text and "Trace" in text and "output_error" in text


def test_a_folder_without_notebooks_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no notebook"):
        write_report(tmp_path, tmp_path / "report.html", title="T")
    assert not list(tmp_path.iterdir())


def test_page_follows_the_colour_scheme_and_the_width(page):
    text = page([new_markdown_cell("| a | b |\n|---|---|\n| 1 | 2 |")])
    assert "prefers-color-scheme: dark" in text and "max-width: 860px" in text
    assert 'name="viewport"' in text and "<td>1</td>" in text


def test_lines_printed_one_after_another_are_one_block(page):
    text = page([code("a", stream("[teacher] 10%\n"), stream("[teacher] 20%\n"), stream("[teacher] done\n"))])
    (block,) = re.findall(r"(?s)<pre>(.*?)</pre>", text)
    assert block.split() == "[teacher] 10% [teacher] 20% [teacher] done".split()
