"""Chapter 01 as a student meets it: JupyterLab in a real browser, all cells run, the slider moved.

The test starts its own server on a free loopback port and drives a Chromium that is installed on
the machine (the environment variable PUMA_NB_CHROMIUM names another one); it downloads no browser.
"""
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from execute_notebooks import is_skipped
from project import read, settings

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = Path(os.environ.get("PUMA_NB_BROWSER_NOTEBOOK", ROOT / "nbs" / "01_pyramid.ipynb"))
SLIDER_CALL = "scale_slider("  # the text of the cell whose slider is moved
RUN_SECONDS = 300  # limit for running all cells with the small budget of IN_TEST=1
CHROMIUM_NAMES = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"]
CHROMIUM_FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                  "--disable-background-networking", "--disable-component-update", "--disable-sync"]

# What the page knows of the notebook: every code cell's state, first line and errors.
NOTEBOOK_STATE = """() => {
  const panel = window.jupyterapp?.shell.currentWidget;
  if (!panel?.content?.widgets || !panel.sessionContext?.isReady) return null;
  const source = c => c.model.sharedModel.getSource();
  const waits = c => c.model.executionCount === null || c.model.executionState === 'running';
  const errors = c => c.model.outputs.toJSON().filter(o => o.output_type === 'error');
  const cells = panel.content.widgets.filter(c => c.model.type === 'code' && source(c).trim());
  return {
    kernel: panel.sessionContext.session?.kernel?.status ?? 'none',
    cells: cells.length,
    waiting: cells.filter(waits).length,
    errors: cells.flatMap(c => errors(c).map(
      o => source(c).split('\\n')[0] + ': ' + o.ename + ': ' + o.evalue)),
  };
}"""

# The pixels of every picture in the slider's cell, as one string.
PIXELS = """cell => [
  ...cell.querySelectorAll('.jp-OutputArea img, .jp-OutputArea canvas')
].map(e => {
  if (e.tagName === 'IMG' && !(e.complete && e.naturalWidth)) return 'loading';
  const canvas = document.createElement('canvas');
  canvas.width = e.naturalWidth || e.width; canvas.height = e.naturalHeight || e.height;
  canvas.getContext('2d').drawImage(e, 0, 0);
  return canvas.toDataURL();
}).join(' ')"""


def missing(reason):
    "Without the browser this test means nothing: skip it on a developer's machine, fail in CI"
    if os.environ.get("CI"):
        pytest.fail(f"{reason}, and CI is set: this test must run there", pytrace=False)
    pytest.skip(reason)


def find_chromium():
    named = os.environ.get("PUMA_NB_CHROMIUM")
    if named and Path(named).exists(): return named
    found = next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)
    return found or missing("no Chromium on this machine (Debian: apt-get install chromium)")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def request(url, token, method="GET"):
    req = urllib.request.Request(url, method=method, headers={"Authorization": f"token {token}"})
    with urllib.request.urlopen(req, timeout=10) as reply:
        return json.loads(reply.read() or b"null")


def wait_until(what, done, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = done()
        if value: return value
        time.sleep(0.25)
    pytest.fail(f"{what}: not within {seconds} s", pytrace=False)


def end_process(server, url, token):
    "End the server and the kernels that it started, politely first"
    children = psutil.Process(server.pid).children(recursive=True) if server.poll() is None else []
    try: request(f"{url}/api/shutdown", token, "POST")
    except (OSError, ValueError): server.terminate()
    try: server.wait(15)
    except subprocess.TimeoutExpired: os.killpg(server.pid, signal.SIGKILL)
    server.wait(15)
    for child in psutil.wait_procs(children, timeout=5)[1]: child.kill()


@contextmanager
def jupyterlab(folder, home):
    "A JupyterLab server on `folder` with none of the user's own settings; yields address and token"
    settings = home / "settings" / "@jupyterlab"
    for path, value in {
        "apputils-extension/notification": {
            "fetchNews": "false",
            "checkForUpdates": False,
            "doNotDisturbMode": True,
        },
        # keep cells that are scrolled away in the page
        "notebook-extension/tracker": {"windowingMode": "none"},
    }.items():
        file = settings / f"{path}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(value))
    env = {
        **os.environ,
        "HOME": str(home),
        "IN_TEST": "1",
        "JUPYTER_CONFIG_DIR": str(home / "config"),
        "JUPYTER_DATA_DIR": str(home / "data"),
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "IPYTHONDIR": str(home / "ipython"),
        "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
    }
    env.pop("JUPYTER_PATH", None)
    token, port = secrets.token_hex(16), free_port()
    url, log = f"http://127.0.0.1:{port}", home / "server.log"
    with open(log, "wb") as out:
        server = subprocess.Popen(
            [
                sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root",
                "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0",
                f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder}",
                "--LabApp.expose_app_in_browser=True", "--LabApp.extension_manager=readonly",
                "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
            ],
            env=env, cwd=folder, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        def answers():
            if server.poll() is not None:
                pytest.fail(f"JupyterLab ended at once:\n{log.read_text()[-3000:]}", pytrace=False)
            try: return request(f"{url}/api/status", token)
            except (OSError, urllib.error.URLError): return None
        wait_until("JupyterLab answers", answers, 60)
        yield url, token
    finally:
        end_process(server, url, token)


def copy_runnable(notebook, target):
    "A copy without outputs and without the cells that nbdev_test skips"
    nb, flags = read(notebook), settings()["tst_flags"].split()
    nb["cells"] = [
        c for c in nb["cells"] if c["cell_type"] != "code" or not is_skipped(c["source"], flags)
    ]
    for cell in nb["cells"]:
        if cell["cell_type"] == "code":
            cell.update(outputs=[], execution_count=None)
    target.write_text(json.dumps(nb), encoding="utf-8")


def run_all_cells(page):
    "Run > Run All Cells, then wait until every cell has run and the kernel is idle"
    state = wait_until(
        "the notebook opens with a kernel", lambda: page.evaluate(NOTEBOOK_STATE), 90
    )
    assert state["cells"] > 0, "the notebook has no code cells"
    page.locator(".lm-MenuBar-itemLabel", has_text="Run").first.click()
    page.locator(".lm-Menu-itemLabel").get_by_text("Run All Cells", exact=True).click()

    def finished():
        state = page.evaluate(NOTEBOOK_STATE)
        assert not state["errors"], "cells fail in JupyterLab:\n" + "\n".join(state["errors"])
        return state["waiting"] == 0 and state["kernel"] == "idle"
    wait_until("all cells run and the kernel is idle", finished, RUN_SECONDS)


def pixels(cell):
    "The pictures in the cell, once they are all loaded"
    def loaded():
        found = cell.evaluate(PIXELS)
        return found if found and "loading" not in found else None
    return wait_until("the slider's picture is drawn", loaded, 30)


def move_slider(page, cell):
    "One step with the arrow keys; returns the slider's value before and after"
    handle = cell.locator(".widget-slider .noUi-handle").first
    value = lambda: float(handle.get_attribute("aria-valuenow"))
    before = value()
    handle.focus()
    for key in ("ArrowRight", "ArrowLeft"):
        page.keyboard.press(key)
        page.wait_for_timeout(300)
        if value() != before: break
    return before, value()


def test_slider_changes_picture(tmp_path):
    chromium = find_chromium()
    try: from playwright.sync_api import sync_playwright
    except ImportError:
        missing("playwright is not installed (pip install -e '.[dev]')")
    folder, home = tmp_path / "work", tmp_path / "home"
    folder.mkdir(), home.mkdir()
    copy_runnable(NOTEBOOK, folder / NOTEBOOK.name)
    for beside in ("images", "styles.css"):  # what the chapter's Markdown may show
        source = NOTEBOOK.parent / beside
        if source.is_dir(): shutil.copytree(source, folder / beside)
        elif source.exists(): shutil.copy(source, folder)

    with jupyterlab(folder, home) as (url, token), sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, headless=True, args=CHROMIUM_FLAGS)
        try:
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.goto(f"{url}/lab/tree/{NOTEBOOK.name}?token={token}")
            try:
                run_all_cells(page)
                cells = page.locator(".jp-CodeCell", has=page.locator(".widget-slider"))
                cell = cells.filter(has_text=SLIDER_CALL).first
                wait_until(f"a slider below the cell with {SLIDER_CALL}...)", cell.count, 20)
                cell.scroll_into_view_if_needed()
                first = pixels(cell)
                before, after = move_slider(page, cell)
                assert before != after, f"the slider stays at {before}"
                changes = f"the picture changes from scale {before:g} to {after:g}"
                wait_until(changes, lambda: pixels(cell) != first, 30)
            finally: page.screenshot(path=tmp_path / "slider.png")
        finally: browser.close()
