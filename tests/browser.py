"""A real browser on a real Jupyter or Voila server, for the tests that press what a user presses."""

import contextlib
import os
import re
import site
import socket
import subprocess
import sys
import time
import urllib.request
import venv
from collections.abc import Iterator
from pathlib import Path

import nbformat
from playwright.sync_api import Browser, Page, sync_playwright
from playwright.sync_api import expect as expect_of_page

SECONDS = 90  # that a test waits for what it expects: two cores, and another test beside it
expect_of_page.set_options(timeout=SECONDS * 1000)
expect = expect_of_page
ROOT = Path(__file__).parent.parent
CHROMIUM = "/usr/bin/chromium"  # Debian's package


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@contextlib.contextmanager
def serving(command: list[str], address: str, log: Path) -> Iterator[str]:
    """A server in its own process, from when it answers."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    with log.open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        for _ in range(240):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(address, timeout=5).close()
                break
            assert server.poll() is None, log.read_text()
            time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


@contextlib.contextmanager
def lab(folder: Path, python: str | Path = sys.executable, *more: str) -> Iterator[str]:
    """JupyterLab in a folder, without a password, for this machine only."""
    port = free_port()
    options = {
        "IdentityProvider.token": "''",
        "ServerApp.root_dir": f"'{folder}'",
        "ServerApp.port": port,
    }
    options |= {
        "ServerApp.port_retries": 0,
        "ServerApp.open_browser": False,
        "ServerApp.allow_root": True,
    }
    options |= {
        "ServerApp.disable_check_xsrf": True,
        "LabApp.news_url": None,
        "LabApp.collaborative": False,
    }
    command = [
        str(python),
        "-m",
        "jupyterlab",
        *(f"--{key}={value}" for key, value in options.items()),
        *more,
    ]
    with serving(command, f"http://127.0.0.1:{port}/api", folder / "lab.log"):
        yield f"http://127.0.0.1:{port}"


def environment(folder: Path, *packages: str) -> Path:
    """The Python of an environment with these packages before those of the environment that runs the tests."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    (own,) = folder.glob("lib/python*/site-packages")
    (own / "behind.pth").write_text(f"{site.getsitepackages()[0]}\n{ROOT}\n")
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "--ignore-installed", "--no-deps", *packages],
        check=True,
    )
    subprocess.run(
        [python, "-m", "ipykernel", "install", "--prefix", folder, "--name", "python3"], check=True
    )
    return python


@contextlib.contextmanager
def voila(notebook: Path) -> Iterator[str]:
    port = free_port()
    options = ["--no-browser", f"--port={port}", "--show_tracebacks=True"]
    command = [sys.executable, "-m", "voila", str(notebook), *options]
    with serving(
        command, f"http://127.0.0.1:{port}/voila/static/voila.js", notebook.parent / "voila.log"
    ):
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield browser
        browser.close()


@contextlib.contextmanager
def window(browser: Browser, width: int = 1280, height: int = 900) -> Iterator[Page]:
    page = browser.new_page(viewport={"width": width, "height": height})
    page.set_default_timeout(SECONDS * 1000)
    yield page
    page.close()


def notebook(path: Path, *cells: str) -> Path:
    """A notebook of code cells."""
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    made.metadata["kernelspec"] = {
        "name": "python3",
        "display_name": "Python 3",
        "language": "python",
    }
    nbformat.write(made, path)
    return path


def open_notebook(page: Page, address: str, name: str) -> None:
    page.goto(f"{address}/lab/tree/{name}?reset")
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
    page.locator(".jp-StatusBar-TextItem, .jp-StatusBar-Item", has_text="| Idle").first.wait_for()


def menu(page: Page, first: str, entry: str) -> None:
    page.locator(".lm-MenuBar-itemLabel", has_text=re.compile(f"^{first}$")).click()
    page.locator(".lm-Menu-itemLabel", has_text=re.compile(entry)).first.click()


def run_all(page: Page) -> None:
    """Lab shows a kernel as idle a little before it takes what is sent to it."""
    # [ ], [*] or [1]; numbers of an earlier run may be there.
    prompts = page.locator(".jp-InputPrompt")
    before = prompts.all_inner_texts()
    for _ in range(10):
        menu(page, "Run", "^Run All Cells$")
        for _ in range(60):
            if prompts.all_inner_texts()[: len(before)] != before:
                return
            page.wait_for_timeout(50)
    raise AssertionError("the notebook does not run")
