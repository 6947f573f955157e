"""The explorer as a person has it: JupyterLab in headless Chromium, on the demo's task and models."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from test_stages import run_stages

from xdistil.params import load_params

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.notebook]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SHORT = {"teacher_epochs": 1, "distil_epochs": 1, "ft_epochs": 1, "train_limit": 600, "transfer_limit": 600}
SLOW = 1000 * int(os.environ.get("XDISTIL_BROWSER_SECONDS", 180))  # what a step may take, ms
PNG = "async i => Array.from(new Uint8Array(await (await fetch(i.src)).arrayBuffer()))"


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e .[browser]")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"needs one of {BROWSERS} on the path, such as Debian's package chromium")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def overrides(root, tmp_path_factory):
    """A finished demo run, or the demo in short."""
    if (root / "runs/demo/student/done.json").is_file():
        return {}
    changed = SHORT | {"model_dir": str(tmp_path_factory.mktemp("demo") / "run")}
    run_stages(load_params("params/demo.yaml", changed), last="labels")
    return changed


@pytest.fixture(scope="module")
def lab(root, overrides, tmp_path_factory):
    """The address of JupyterLab with the notebook open."""
    folder = tmp_path_factory.mktemp("lab")
    notebook = json.loads((root / "notebooks/explore_alignment.ipynb").read_text(encoding="utf-8"))
    cell = next(c for c in notebook["cells"] if "parameters" in c["metadata"].get("tags", ()))
    cell["source"] = ['experiment = "params/demo.yaml"\n', f"overrides = {overrides!r}"]
    (folder / "explore.ipynb").write_text(json.dumps(notebook), encoding="utf-8")
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")
    environment = os.environ | {name: str(folder / f".{name.lower()}") for name in places} | {
        "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    news = folder / ".jupyterlab_settings_dir/@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    news.parent.mkdir(parents=True)
    news.write_text('{"fetchNews": "false"}')  # else it asks
    log = open(folder / "log.txt", "w")  # noqa: SIM115
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}", "--port-retries=0",
         "--ip=127.0.0.1", "--IdentityProvider.token=", f"--ServerApp.root_dir={folder}",
         "--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"],
        env=environment, stdout=log, stderr=log, cwd=folder)
    address = f"http://127.0.0.1:{port}"
    for _ in range(SLOW // 200):
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{address}/api", timeout=1).close()
            break
        assert server.poll() is None, (folder / "log.txt").read_text()
        time.sleep(0.2)
    yield f"{address}/lab/tree/explore.ipynb?reset"
    server.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(20)
    server.kill()
    log.close()


def changed(page, image, before):
    """What an image shows as soon as that is no longer `before`, and the seconds until then."""
    start = time.monotonic()
    while (found := bytes(image.evaluate(PNG))) == before:
        assert time.monotonic() - start < SLOW / 1000, "the figure stays as it was"
        page.wait_for_timeout(20)
    assert found.startswith(b"\x89PNG")
    return found, time.monotonic() - start


def test_sliders_sentences_and_clicks_change_what_is_shown(browser, lab, record_property):
    page, dialogs, errors = browser.new_page(viewport={"width": 1280, "height": 1400}), [], []
    page.set_default_timeout(SLOW)
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    page.on("pageerror", lambda error: errors.append(str(error)))

    def shoot(name):
        if folder := os.environ.get("XDISTIL_SCREENSHOTS"):
            page.screenshot(path=Path(folder) / f"{name}.png")

    def handle(name, nth=0):
        return page.locator(".widget-hslider", has_text=name).nth(nth).locator(".noUi-handle")

    page.goto(lab)
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()  # what runs before is lost
    page.keyboard.press("Control+b")  # hides the list of files
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()
    box = page.locator(".widget-vbox").first
    box.wait_for()
    image = box.locator("img.widget-image").first
    image.wait_for()
    page.wait_for_function("document.querySelectorAll('.jp-OutputArea-output.jp-RenderedImage img').length == 6")
    box.scroll_into_view_if_needed()
    shown, seconds = changed(page, image, b""), {}
    shown = shown[0]
    shoot("attention")

    for name in ("student layer", "head"):
        handle(name).focus()
        page.keyboard.press("ArrowLeft" if name == "student layer" else "ArrowRight")
        shown, seconds[name] = changed(page, image, shown)
    shoot("attention-head")
    dropdown = box.locator("select")
    dropdown.select_option(index=dropdown.locator("option").count() - 1)
    shown, seconds["sentence"] = changed(page, image, shown)
    shoot("attention-sentence")
    box.locator(".widget-gridbox button").nth(3).click()  # the top layer's head 3
    shown, seconds["cell"] = changed(page, image, shown)
    assert box.locator(".widget-hslider", has_text="head").locator(".widget-readout").inner_text() == "3"
    handle("after stage").focus()
    page.keyboard.press("Home")
    shown, seconds["stage"] = changed(page, image, shown)
    shoot("attention-first-stage")

    box.get_by_role("tab", name="Hidden states").click()
    tokens = box.locator("img.widget-image:visible").first
    tokens.wait_for()
    kept, _ = changed(page, tokens, b"")
    shoot("states")
    box.locator(".widget-gridbox button:visible").first.click()  # the teacher's top layer and the student's embeddings
    kept, seconds["pair of layers"] = changed(page, tokens, kept)
    shoot("states-pair")

    text = box.locator("input[type=text]:visible").first
    text.fill("<script>alert(1)</script> met Angela Braun in Hamburg")
    text.press("Enter")
    changed(page, tokens, kept)
    box.get_by_text("<script>alert(1)</script>").first.wait_for()  # shown, not run
    shoot("typed")
    assert dialogs == [] and errors == []
    record_property("seconds", seconds)
    print("\nseconds until the figure changed:", {name: round(x, 2) for name, x in seconds.items()})
    page.close()
