"""One widget over a run's teacher and students: what `inside` reads, drawn by `plots` and `alignment_plots`.
ipywidgets, which Jupyter and Colab bring, is imported where it is used."""

from html import escape

import numpy as np

from xdistil import alignment, alignment_plots, inside, plots
from xdistil.tables import Spans

SHADES = 40  # of a grid
NO_MAPS = "A BiLSTM has no attention maps: the teacher's alone."
SMALL = '<div style="font-size:11px;line-height:1.4;margin-top:6px">'
HEADS = f"""KL(teacher ‖ student) here: <b>{{}} nats</b>{{}}{SMALL}Colour: how far a student head is from the teacher's
beside it, dark = the same, yellow = 1 nat or more. Text: the nearest of all teacher heads, LAYER.HEAD. Click a cell to
see its maps.</div>"""
CKA = f"""CKA of these layers: <b>{{:.3f}}</b><br>Mean cosine of a token with itself: <b>{{:.3f}}</b>{SMALL}CKA on 16
windows of dev, as the few tokens of one sentence look alike anyway: 1 = the same up to rotation and scale. Columns:
student layers, 0 = embeddings. Click a cell to see its tokens.</div>"""


def attention_figure(look: inside.Look, layer: int, head: int | None = None):
    """Attention of a student layer, 1..L_s, and the teacher's beside it, of a head (from 0) or in the mean; on one
    scale for all layers, heads and stages."""
    return plots.plot_attention_pair(look.tokens, *look.attention(layer), _beside(look, layer), head, top=1)


def _beside(look, layer):
    return f"Student layer {layer} beside teacher layer {max(1, look.paired[layer])}"


def heads_figure(look: inside.Look, title: str):
    """Divergence of each student head from the teacher's beside it, and in each cell the nearest of all teacher
    heads, LAYER.HEAD."""
    pairs = [(s, max(1, t)) for s, t in look.paired.items() if s]
    kl, nearest = look.heads
    return plots.plot_attention_kl(kl, pairs if kl else [], title, nearest)


def similarity_figure(look: inside.Look, s: int, t: int):
    """Token-by-token cosine of student layer `s` and teacher layer `t`, 0 = embeddings."""
    return alignment_plots.plot_token_similarity(look.tokens, *_similarity(look, s, t))


def _similarity(look, s, t):
    teacher, student, how = look.states(s, t)
    return alignment.token_similarity(teacher, student).numpy(), f"Student layer {s}, teacher layer {t}\n{how}"


def states_figure(look: inside.Look, s: int, t: int, types):
    """Token states of student layer `s` and teacher layer `t`, 0 = embeddings, in the teacher's plane."""
    teacher, student, share = alignment.principal_plane(*look.states(s, t)[:2])
    title = f"Student layer {s} in the plane of teacher layer {t}\n{share:.0%} of the teacher's variance"
    return alignment_plots.plot_states(look.tokens, look.types, teacher.numpy(), student.numpy(), title,
                                       alignment_plots.type_colours(types))


def spans(look: inside.Look, types) -> Spans:
    """What gold, teacher and student find in the sentence."""
    return Spans(look.words, look.tags, alignment_plots.type_colours(types))


class Grid:
    """Buttons in rows and columns, coloured by numbers; a click calls `chosen(row, column)`."""

    def __init__(self, rows, columns, chosen):
        import ipywidgets as widgets

        cell = {"width": "46px", "height": "24px", "margin": "0", "padding": "0"}
        self.plain = widgets.Layout(**cell, border="2px solid transparent")
        self.framed = widgets.Layout(**cell, border=f"2px solid {plots.STUDENT}")
        self.styles = [widgets.ButtonStyle(button_color=colour, text_color=ink, font_size="11px")
                       for colour, ink in alignment_plots.shades(SHADES)]
        self.buttons = [[widgets.Button(layout=self.plain) for _ in columns] for _ in rows]
        sides = ((rows, "flex-start"), (("", *columns), "center"))
        names, heads = ([widgets.Label(str(name), layout=widgets.Layout(height="24px", margin="0", justify_content=x))
                         for name in some] for some, x in sides)
        for i, line in enumerate(self.buttons):
            for j, button in enumerate(line):
                button.on_click(lambda _, place=(i, j): chosen(*place))
        cells = [x for name, line in zip(names, self.buttons, strict=True) for x in (name, *line)]
        self.box = widgets.GridBox([*cells, *heads], layout=widgets.Layout(
            flex="0 0 auto", align_content="flex-start", grid_gap="1px",
            grid_template_columns=f"78px repeat({len(columns)}, 46px)"))

    def show(self, values, texts, tips):
        """Colour, from 0 to 1, text and tooltip of each cell."""
        for line, *rows in zip(self.buttons, values, texts, tips, strict=True):
            for button, value, text, tip in zip(line, *rows, strict=True):
                with button.hold_sync():
                    button.style = self.styles[round((SHADES - 1) * min(1, value))]
                    button.description, button.tooltip = text, tip

    def mark(self, row, column):
        """Frame one cell."""
        for i, line in enumerate(self.buttons):
            for j, button in enumerate(line):
                button.layout = self.framed if (i, j) == (row, column) else self.plain


class Explorer:
    """The widgets of `explorer` and what they show; of two tabs only the open one is drawn."""

    def __init__(self, pair: inside.Pair):
        import ipywidgets as widgets

        self.pair, self.look, self.choosing = pair, None, False
        listed, last = pair.sentences(), pair.stages[-1]
        look = pair.look(last, listed[0][1])
        top, n_teacher = max(look.paired), len(look.teacher.states) - 1
        n_heads = 0 if look.student.maps is None else look.student.maps.shape[1]

        def slider(kind, width="330px", **options):
            return kind(**options, layout=widgets.Layout(width=width), style={"description_width": "110px"})

        self.stage = slider(widgets.SelectionSlider, "430px", options=pair.stages, value=last,
                            description="after stage", continuous_update=False)
        self.sentence = slider(widgets.Dropdown, "98%", options=listed, description="sentence")
        self.text = slider(widgets.Text, "98%", placeholder="your own, then Enter", description="or type one",
                           continuous_update=False)
        self.layer = slider(widgets.IntSlider, value=top, min=1, max=top, description="student layer")
        self.head = slider(widgets.SelectionSlider, options=[("mean", -1), *((str(h), h) for h in range(n_heads))],
                           value=-1, description="head")
        self.s = slider(widgets.IntSlider, value=top, min=0, max=top, description="student layer")
        self.t = slider(widgets.IntSlider, value=look.paired[top], min=0, max=n_teacher, description="teacher layer")
        self.wait, self.spans, self.said, self.noted = (widgets.HTML() for _ in range(4))
        self.attention, self.similarity, self.states = (
            widgets.Image(layout=widgets.Layout(max_width=width)) for width in ("100%", "49%", "49%"))
        rows = [f"S{s} ← T{max(1, look.paired[s])}" for s in range(top, 0, -1)] if n_heads else []
        self.heads = Grid(rows, range(n_heads), lambda row, column: self._choose(
            (self.layer, top - row), (self.head, column)))
        self.cka = Grid([f"teacher {t}" for t in range(n_teacher, -1, -1)], range(top + 1),
                        lambda row, column: self._choose((self.s, column), (self.t, n_teacher - row)))
        beside = widgets.Layout(margin="0 0 0 24px", flex="1 1 300px")
        tabs = [widgets.VBox([widgets.HBox([grid.box, widgets.VBox(side, layout=beside)]), figure])
                for grid, side, figure in ((self.heads, [self.layer, self.head, self.said], self.attention), (
                    self.cka, [self.s, self.t, self.noted], widgets.HBox([self.similarity, self.states])))]
        self.tabs = widgets.Tab(tabs, titles=("Attention", "Hidden states"), selected_index=0)
        self.box = widgets.VBox([widgets.HBox([self.stage, self.wait]), self.sentence, self.text, self.spans,
                                 self.tabs])
        for control, call in ((self.stage, self._read), (self.sentence, self._read), (self.text, self._read),
                              (self.layer, self._draw), (self.head, self._draw), (self.s, self._follow),
                              (self.t, self._draw)):
            control.observe(call, "value")
        self.tabs.observe(self._draw, "selected_index")
        self._read()

    def _read(self, change=None) -> None:
        """Look at another sentence, or after another stage."""
        if change and change["owner"] is self.sentence and self.text.value:
            self.text.value = ""  # which reads
            return
        self.wait.value = "reading …"
        try:
            words = self.pair.words_of(self.text.value) if self.text.value else self.sentence.value
            look = self.pair.look(self.stage.value, words)
            if self.look is None or look.tokens != self.look.tokens:
                self.figures = {}  # else only what is in them changes
            self.look = look
            self.spans.value = spans(self.look, self.pair.types)._repr_html_()
            self._draw()
        except ValueError as error:
            self.spans.value = f"<b>{escape(str(error))}</b>"
        self.wait.value = ""

    def _choose(self, *values) -> None:
        self.choosing = True
        for control, value in values:
            control.value = value
        self.choosing = False
        self._draw()

    def _follow(self, _) -> None:
        if not self.choosing:  # a slider moves on to the layer that is paired with its own
            self._choose((self.t, self.look.paired[self.s.value]))

    def _draw(self, _=None) -> None:
        if not self.choosing:
            (self._draw_attention, self._draw_states)[self.tabs.selected_index]()

    def _draw_attention(self) -> None:
        look, layer, head = self.look, self.layer.value, self.head.value if self.head.value >= 0 else None
        kl, nearest = (rows[::-1] for rows in look.heads)
        if "attention" not in self.figures:
            self.figures["attention"] = attention_figure(look, layer, head)
        self.heads.show(np.sqrt(kl), nearest, [[f"KL {x:.3f} nats" for x in row] for row in kl])
        maps = [maps.mean(0) if head is None else maps[head] for maps in look.attention(layer)]
        title = _beside(look, layer) + plots.name_head(head)
        self.attention.value = alignment_plots.redraw(
            self.figures["attention"], title, *maps, maps[1] - maps[0])
        self.heads.mark(max(look.paired) - layer, head)
        chosen = kl and [f"{np.mean(kl[-layer]):.3f}", ""] if head is None else [
            f"{kl[-layer][head]:.3f}", f"<br>Nearest teacher head: <b>{nearest[-layer][head]}</b>"]
        self.said.value = NO_MAPS if not kl else HEADS.format(*chosen)

    def _draw_states(self) -> None:
        look, s, t = self.look, self.s.value, self.t.value
        cka = np.array(self.pair.cka(self.stage.value))
        similarity, title = _similarity(look, s, t)
        if "similarity" not in self.figures:
            self.figures["similarity"] = similarity_figure(look, s, t)
        self.cka.show(cka[::-1], [[f"{x:.2f}" for x in row] for row in cka[::-1]], [
            [f"teacher {t}, student {s}" for s in range(cka.shape[1])] for t in range(len(cka) - 1, -1, -1)])
        self.similarity.value = alignment_plots.redraw(self.figures["similarity"], title, similarity)
        figure = states_figure(look, s, t, self.pair.types)
        self.states.value = alignment_plots.redraw(figure, figure.get_suptitle())
        self.cka.mark(len(cka) - 1 - t, s)
        self.noted.value = CKA.format(cka[t, s], float(similarity.diagonal().mean()))


def explorer(pair: inside.Pair):
    """The explorer of a run, one ipywidgets VBox: stage, sentence, attention and states, layer by layer."""
    return Explorer(pair).box
