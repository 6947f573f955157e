"""Training while it runs: numbers, curves and a stop button in Jupyter, elsewhere a line now and then."""

import json
import os
import signal
import sys
import time
from contextlib import ExitStack, contextmanager, suppress
from threading import current_thread, main_thread

from xdistil.tables import Table

SHARES = {"numbers": 0.0025, "curves": 0.006}  # of the time of training, at the most, that showing them takes
TEXT_EVERY, LINE_EVERY = 1.0, 15.0  # seconds between two updates of the numbers, or two lines
PLACE = ("kind", "step", "step_name", "epoch", "update", "lr")  # in a training record, beside the losses


class Lines:
    """What `training.fit` calls after each update: prints a line now and then."""

    def __init__(self, name: str, epochs: int):
        self.name, self.epochs, self.stopping, self.last = name, epochs, False, time.monotonic()

    def stop(self, *_):
        """Ask training to stop at its next checkpoint."""
        self.stopping = True

    def __call__(self, records: list[dict], done: float) -> bool:
        """Show where training stands, `done` (0..1) of this unfreezing step; whether it is to stop."""
        if time.monotonic() - self.last > LINE_EVERY and records[-1]["kind"] == "train":
            self.last, now = time.monotonic(), records[-1]
            print(f"[{self.name}] {now['step_name']}: {done:.0%} of {self.epochs} epochs, loss {now['loss']:.4g}",
                  flush=True)
        return self.stopping

    def close(self, why: str) -> None:
        """Training ended."""


class Display(Lines):
    """The same in Jupyter: numbers, at most once a second, and curves as often as `SHARES` allow, and a button where
    ipywidgets are. `spent`: seconds that this took since `started`."""

    def __init__(self, name: str, epochs: int, kernel):
        from IPython.display import HTML, display

        super().__init__(name, epochs)
        self.html, self.kernel, self.button, self.drawn = HTML, kernel, None, 0
        self.costs, self.paid = {"numbers": 0.002, "curves": 0.5}, dict.fromkeys(SHARES, 0.0)  # seconds, last and all
        self.text = display(HTML(f"[{name}] starts"), display_id=True)
        with suppress(ImportError):
            from ipywidgets import Button

            self.button = Button(description="Stop at a checkpoint", icon="stop", layout={"width": "auto"})
            display(self.button)
        self.figure = display(HTML(""), display_id=True)
        self.started, self.spent, self.step = time.perf_counter(), 0.0, (1.0, 0.0)  # share and time it began with

    def __call__(self, records: list[dict], done: float) -> bool:
        """As `Lines`; numbers and curves in place of the line."""
        start = time.perf_counter()
        self.step = (done, start) if done < self.step[0] else self.step
        if time.monotonic() - self.last > TEXT_EVERY:
            self.last = time.monotonic()
            if self.button and not getattr(self.kernel, "shell_channel_thread", None):
                self.kernel.shell_stream.flush(1)  # POLLIN: before ipykernel 7 nothing comes in while a cell runs
            self._show("numbers", self.text, lambda: self.html(self._numbers(records, done)))
            if len(records) > self.drawn and records[-1]["kind"] == "train":
                self._show("curves", self.figure, lambda: self._curves(records))
        self.spent += time.perf_counter() - start
        return self.stopping

    def _show(self, what: str, where, make) -> None:
        """Show it, if training has gone on for long enough to pay for it."""
        start = time.perf_counter()
        if self.paid[what] + self.costs[what] < SHARES[what] * (start - self.started):
            where.update(make())
            self.costs[what] = time.perf_counter() - start
            self.paid[what] += self.costs[what]

    def _curves(self, records: list[dict]):
        from xdistil.plots import plot_history

        self.drawn = len(records)
        return plot_history(records, f"{self.name}: what is left to learn")

    def _numbers(self, records: list[dict], done: float) -> str:
        left = (time.perf_counter() - self.step[1]) * (1 - done) / max(done - self.step[0], 1e-9) / 60
        row = {"epoch": f"{done * self.epochs:.1f} of {self.epochs}"}
        row["minutes left"] = left if done > self.step[0] else None
        train, judged = ([r for r in records if r["kind"] == kind] for kind in ("train", "eval"))
        row |= {name: value for record in train[-1:] for name, value in record.items() if name not in PLACE}
        row |= {name: r["score"] for r in judged for name in (r["metric"], *["best"] * r["best"])}
        state = "stops at the next checkpoint" if self.stopping else records[-1]["step_name"]
        bar = f'<progress max="1" value="{done:.3f}"></progress>'
        return bar + Table([row], f"[{self.name}] {state}")._repr_html_()

    def close(self, why: str) -> None:
        """Say how it ended. The curves stay where training stopped; at the end the notebook draws them again."""
        if self.button:
            self.button.close()
        self.text.update(self.html(f"[{self.name}] {why}"))
        if why == "trained":
            self.figure.update(self.html(""))


@contextmanager
def _clicks(kernel, button, clicked):
    """Call `clicked` on a click. While a cell runs a kernel handles no such message: each one is looked at, by its
    frames, where it comes in, in a thread of ipykernel 7 or when flushed, and handed on as it is."""
    stream = kernel.shell_stream
    handle = stream._recv_callback  # there is no public way to ask for it

    def look(frames):
        parts = [bytes(frame) for frame in frames]
        _, header, _, _, content = parts[parts.index(b"<IDS|MSG>") + 1 :][:5]
        if json.loads(header)["msg_type"] == "comm_msg":
            said = json.loads(content)
            if said["comm_id"] == button.model_id and (said["data"].get("content") or {}).get("event") == "click":
                clicked()
        return handle(frames)

    stream.on_recv(look, copy=False)
    try:
        yield
    finally:
        stream.on_recv(handle, copy=False)


@contextmanager
def _interrupts(asked):
    """Call `asked` on the first interrupt or SIGTERM; the second is what it always was."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    usual = {number: plain for number, plain in usual.items()
             if signal.getsignal(number) == plain and current_thread() is main_thread()}

    def handle(handlers):
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def first(*_):
        handle(usual)
        asked()

    handle(dict.fromkeys(usual, first))
    try:
        yield
    finally:
        handle(usual)


@contextmanager
def watching(name: str, epochs: int):
    """A `watch` for `training.fit`: `Display` in a Jupyter kernel unless XDISTIL_HEADLESS is set, else `Lines`. The
    first interrupt or SIGTERM stops training at its next checkpoint, the second at once."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    kernel = None if os.environ.get("XDISTIL_HEADLESS") else getattr(shell, "kernel", None)
    watch = Display(name, epochs, kernel) if kernel else Lines(name, epochs)
    why = "stopped; run this cell again to go on"
    with ExitStack() as stack:
        stack.enter_context(_interrupts(watch.stop))
        if kernel and watch.button:
            stack.enter_context(_clicks(kernel, watch.button, watch.stop))
        try:
            yield watch
            why = "trained"
        finally:
            watch.close(why)
