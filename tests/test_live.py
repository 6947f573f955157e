"""Training watched: in a real kernel the button and an interrupt stop it at a checkpoint, and nothing is lost."""

import os
import queue
import signal
import sys
import time

import pytest
from test_stages import ROOT, copied, smoke, smoke_params  # noqa: F401  the fixtures

from xdistil import live, stages
from xdistil.runs import Run

pytest.importorskip("ipywidgets")
jupyter_client = pytest.importorskip("jupyter_client")

TRAIN = [{"kind": "train", "step": 1, "step_name": "all", "epoch": 1, "update": 20, "lr": 1e-4, "loss": 2.0,
          "hidden_1": 0.5}]
JUDGED = [{"kind": "eval", "step": 1, "step_name": "all", "epoch": 0, "update": 0, "best": True,
           "metric": "held-out loss", "score": 3.0}]
LONG = {"student_distil_batch_size": 1, "distil_epochs": 15}  # 40 batches a chunk: two records
CELL = """
import sys
from xdistil import stages
from xdistil.params import load_params
from xdistil.runs import Run
params = load_params({asked!r})
stages.distil_hidden(params, Run(params))
"""


class Kernel:
    """A kernel as a front end sees it: what it sent, and the button once it is there."""

    def __init__(self):
        environment = {k: v for k, v in os.environ.items() if k != "XDISTIL_HEADLESS"}
        self.manager, self.client = jupyter_client.manager.start_new_kernel(
            kernel_name="python3", env=environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})

    def run(self, code, once_training=None):
        """Execute a cell; when its numbers show that it trains, call `once_training`. Returns reply and messages."""
        asked, said, begun = self.client.execute(code), [], False
        deadline = time.monotonic() + 600
        while time.monotonic() < deadline:
            try:
                said.append(message := self.client.get_iopub_msg(timeout=1))
            except queue.Empty:
                continue
            if message["msg_type"] == "update_display_data" and "<progress" in str(message["content"]) and not begun:
                begun = True
                if once_training:
                    once_training(said)
            if message["parent_header"].get("msg_id") == asked and message["content"].get("execution_state") == "idle":
                while (reply := self.client.get_shell_msg(timeout=30))["parent_header"].get("msg_id") != asked:
                    pass
                return reply["content"], said
        raise AssertionError(f"the cell did not end: {said[-3:]}")

    def click(self, said):
        """What a front end sends of a click, on the channel of the cells; and a message of another widget before."""
        (opened,) = [m["content"] for m in said if m["msg_type"] == "comm_open"
                     and m["content"]["data"]["state"].get("_model_name") == "ButtonModel"]
        for comm, content in ((opened["comm_id"], {"event": "focus"}), ("another", {"event": "click"}),
                              (opened["comm_id"], {"event": "click"})):
            self.client.shell_channel.send(self.client.session.msg(
                "comm_msg", {"comm_id": comm, "data": {"method": "custom", "content": content}}))

    def interrupt(self, _):
        """As the stop button of the notebook."""
        self.manager.interrupt_kernel()

    def close(self):
        """Shut it down."""
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


@pytest.fixture
def kernel():
    found = Kernel()
    yield found
    found.close()


@pytest.mark.notebook
@pytest.mark.parametrize("how", ["click", "interrupt"])
def test_a_stage_stops_at_a_checkpoint_and_goes_on_to_the_same_bytes(copied, kernel, how):  # noqa: F811
    folder, unbroken = copied("student-init", "broken"), copied("student-init", "unbroken")
    params = smoke_params(folder, **LONG)
    cell = CELL.format(asked=params.model_dump(exclude_none=True))
    reply, said = kernel.run(cell, getattr(kernel, how))
    assert (reply["status"], reply["ename"]) == ("error", "Stopped"), said
    assert "[hidden] stopped at a checkpoint after" in reply["evalue"]
    assert [m["content"]["traceback"] for m in said if m["msg_type"] == "error"] == [[reply["evalue"]]]
    assert (folder / "hidden/checkpoint.safetensors").is_file() and not (folder / "hidden/done.json").exists()
    assert int(reply["evalue"].split("after ")[1].split()[0].replace(",", "")) < 15 * 76  # of all of them
    again, said = kernel.run(cell)
    assert again["status"] == "ok", again
    text = "".join(m["content"]["text"] for m in said if m["msg_type"] == "stream")
    assert "interrupted before: goes on" in text and "[hidden] resumes at step 1/1" in text
    stages.distil_hidden(smoke_params(unbroken, **LONG), Run(smoke_params(unbroken, **LONG)))
    for file in ("model.safetensors", "history.jsonl", "projections.safetensors"):
        assert (folder / "hidden" / file).read_bytes() == (unbroken / "hidden" / file).read_bytes(), file
    kernel.run("x = 1 + 1")  # and the kernel still takes cells
    assert not [m for m in said if m["msg_type"] == "error"]


def test_headless_a_line_is_printed_per_interval(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    with live.watching("hidden", 3) as watch:
        for done, seconds in ((0.1, 5.0), (0.2, 11.0), (0.3, 1.0), (0.4, 14.5)):
            now[0] += seconds
            assert watch(TRAIN, done) is False
    assert type(watch) is live.Lines
    assert capsys.readouterr().out.splitlines() == ["[hidden] all: 20% of 3 epochs, loss 2", "[hidden] all: 40% of 3 "
                                                    "epochs, loss 2"]


@pytest.fixture
def interruptible():
    """A process that an interrupt reaches: those that share out tests ignore it."""
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, usual)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_sigterm_asks_as_well(number, interruptible):
    usual = [signal.getsignal(x) for x in (signal.SIGINT, signal.SIGTERM)]
    with live.watching("hidden", 3) as watch:
        os.kill(os.getpid(), number)
        assert watch(JUDGED, 0.1) is True
    assert [signal.getsignal(x) for x in (signal.SIGINT, signal.SIGTERM)] == usual


def test_the_first_interrupt_asks_and_the_second_is_as_ever(interruptible):
    usual = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), live.watching("hidden", 3) as watch:
        os.kill(os.getpid(), signal.SIGINT)
        assert watch(JUDGED, 0.1) is True
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is usual


class Slow:
    """Stands for a kernel and for what Jupyter shows."""

    shell_channel_thread = True

    def __init__(self):
        self.shown = []

    def update(self, found):
        self.shown.append(found)


def test_the_display_costs_less_than_its_share(monkeypatch):
    shown, now = Slow(), [0.0]
    monkeypatch.setitem(sys.modules, "ipywidgets", None)  # without it there is no button
    monkeypatch.setattr("IPython.display.display", lambda *_, **__: shown)
    monkeypatch.setattr(live.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])

    def draw(*_):
        now[0] += 0.3
        return "curves"

    monkeypatch.setattr("xdistil.plots.plot_history", draw)
    watch, records = live.Display("hidden", 10, Slow()), list(JUDGED)
    for update in range(2000):
        now[0] += 0.1
        records += TRAIN if update % 20 == 0 else []
        watch(records, update / 2000)
    assert watch.spent / (now[0] - watch.started) < 0.01
    assert shown.shown.count("curves") == 4  # of 200 s, each 0.3 s: all of the 1.2 that they may take
    numbers = [x.data for x in shown.shown if x != "curves" and "<progress" in x.data]
    assert len(numbers) > 150
    for part in ("held-out loss", "hidden_1", "0.5", "5.0 of 10", "minutes left"):
        assert any(part in text for text in numbers), part
    assert watch.button is None
    watch.close("trained")
    assert shown.shown[-1].data == "" and "trained" in shown.shown[-2].data
