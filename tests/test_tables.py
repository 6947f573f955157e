from xdistil.tables import Spans, spans_of

COLOURS = {"PER": "#009E73", "LOC": "#CC79A7"}


def test_entities_and_what_lies_between_them():
    assert spans_of(["O", "B-PER", "I-PER", "B-PER", "O", "I-LOC"]) == [
        ("", 0, 1), ("PER", 1, 3), ("PER", 3, 4), ("", 4, 5), ("LOC", 5, 6)]
    assert spans_of(["sports"]) == [("sports", 0, 1)] and spans_of([]) == []


def test_words_are_escaped_and_marked_where_not_all_agree():
    page = Spans(["<script>", "Ada", "&"], {"gold": ["O", "B-PER", "O"], "student": ["O", "B-LOC", "O"]}, COLOURS)
    html = page._repr_html_()
    assert "<script>" not in html and html.count("&lt;script&gt;") == 2 and html.count("&amp;") == 2
    assert html.count('dotted #D55E00">Ada<') == 2 and html.count("dotted #D55E00") == 3  # and the legend
    assert COLOURS["PER"] in html and COLOURS["LOC"] in html
    assert str(page) == "gold    <script>/O Ada/B-PER &/O\nstudent <script>/O Ada/B-LOC &/O"
    agreed = Spans(["Ada"], {"teacher": ["B-PER"], "student": ["B-PER"]}, COLOURS)._repr_html_()
    assert "all agree" in agreed and "dotted" not in agreed
    assert "sports</b>" in Spans(["a text"], {"student": ["sports"]}, {})._repr_html_()
