"""What all panels share: a frame with a place for errors, named settings, a still picture."""

import contextlib
import os
from collections.abc import Callable, Generator, Iterator
from html import escape
from pathlib import Path
from typing import Any

from IPython.display import display
from ipywidgets import HTML, Button, FloatProgress, VBox, Widget

from ..drawing import note
from .controls import FULL, set_value
from .jobs import Jobs

STYLE = Path(__file__).with_name("panel.css.j2").read_text(encoding="utf-8")
VIEW = "application/vnd.jupyter.widget-view+json"
# ipywidgets gives the handle of a slider no accessible name; this gives it that of its label. A page
# that does not run such code lacks only these names.
NAMES = """
const root = this.closest('.vader'), name = () => root.querySelectorAll(
  '.noUi-handle, .ui-slider-handle').forEach(handle => {
    const label = handle.closest('.widget-slider').querySelector('.widget-label')
    if (label && label.textContent) handle.setAttribute('aria-label', label.textContent)
  })
new MutationObserver(name).observe(root, {childList: true, subtree: true}), name()
"""
# The picture of a panel is under the widget, which hides it. Where there is no widget, because its
# kernel is gone, the picture is visible, and Jupyter's remark that it finds no widget is hidden.
STILL = (
    "<style>:has(+ * .vader-still) > .jp-OutputArea-output.jupyter-widgets:not(:has(*)) {{ display: none }}</style>"
    "<div class='vader-still vader-still-{id}'>"
    "<p><em>A stored picture. Run this cell again to use its controls.</em></p>{picture}</div>"
)


class Panel:
    """A control panel, shown in a notebook as `box`, a widget; without a kernel as `to_html()`.

    Its `settings` are controls, each also an attribute, which can be set from Python by `value` or
    with `set`. `error` is the last error or None; the panel shows it, since a notebook drops what a
    handler raises.
    """

    title = ""
    hint = ""  # what to do, in a line
    box: VBox  # made by `assemble`

    def __init__(self, **settings: Widget):
        self.settings: dict[str, Any] = settings
        self.error: Exception | None = None
        self.remark, self.why = HTML(), HTML()
        bar = {"width": "auto", "height": "10px", "visibility": "hidden"}
        self.progress = FloatProgress(min=0, max=1, layout=bar)
        self.jobs = Jobs(self.busy, self.waiting, self.failed)
        self._quiet = False

    def __getattr__(self, name: str) -> Any:
        if name in vars(self).get("settings", ()):
            return self.settings[name]
        raise AttributeError(f"{type(self).__name__} has no {name!r}")

    def assemble(self, *children: Widget) -> None:
        """Put the panel together, once its parts are made."""
        head = HTML()
        self.box = VBox([head, self.progress, self.remark, *children], layout=FULL)
        self.box.add_class("vader")
        style = f"{STYLE}.vader-still-{self.box.model_id} {{ display: none }}"
        title = f"<div class=vader-title>{escape(self.title)}</div>{note(self.hint)}"
        head.value = f'<style onload="{escape(NAMES)}">{style}</style>{title}'

    def button(self, description: str, icon: str, width: int, press: Callable, style="") -> Button:
        """A button that calls press(), or starts it if it is a job."""
        layout = {"width": f"{width}px"}
        made = Button(description=description, icon=icon, button_style=style, layout=layout)
        self.on(press, made)
        return made

    def on(self, handler: Callable[[], object], *controls: Any) -> None:
        """Call handler() when a user changes or clicks one of the controls, and show its errors.

        A handler that yields is a job: it starts instead of the current one.
        """

        def respond(_event) -> None:
            if self._quiet:
                return
            self.say("")
            try:
                job = handler()
                if isinstance(job, Generator):
                    self.jobs.submit(lambda: job, 0)
            except Exception as error:
                self.failed(error)

        for source in controls:
            if isinstance(source, Button):
                source.on_click(respond)
            else:
                source.observe(respond, "value")

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Inside, controls change without calling their handlers."""
        self._quiet = True
        try:
            yield
        finally:
            self._quiet = False

    def values(self) -> dict:
        return {name: control.value for name, control in self.settings.items()}

    def set(self, **changes) -> None:
        """Set controls by name, in the order of `settings`.

        Raises:
            ValueError: An unknown name, or a value that a control does not offer; what was set
                before it stays set.
        """
        for name in changes:
            if name not in self.settings:
                raise ValueError(
                    f"unknown setting {name!r}; choose one of {', '.join(self.settings)}"
                )
        self.say("")
        try:
            with self.quiet():
                for name, control in self.settings.items():
                    if name in changes:
                        set_value(name, control, changes[name])
        finally:
            self.changed()

    def changed(self) -> None:
        """Show the settings as they are now."""

    def say(self, text: str) -> None:
        """Show a remark instead of the last one or the last error."""
        self.error, self.remark.value = None, note(text)

    def failed(self, error: Exception) -> None:
        self.error = error
        expected = isinstance(error, (ValueError, OSError))
        text = str(error) if expected else f"{type(error).__name__}: {error}"
        self.remark.value = f"<div class=vader-error role=alert>{escape(text)}</div>"

    def busy(self, fraction: float | None) -> None:
        """Show how much of the work is done, 0 to 1; None: no work."""
        self.progress.layout.visibility = "hidden" if fraction is None else "visible"
        self.progress.value = fraction or 0.0

    def waiting(self, on: bool) -> None:
        text = "waiting: another cell is using a model"
        if on or text in self.remark.value:
            self.say(text if on else "")

    def prepare(self) -> None:
        """Make what the panel needs before it is first shown."""

    def to_html(self) -> str:
        """The panel as a still picture."""
        raise NotImplementedError

    def bundles(self) -> list[dict]:
        """What a notebook shows, by MIME type: the widget, and the picture that it hides."""
        try:
            self.prepare()
            picture = self.to_html()
        except Exception as error:  # shown in the panel, which has the controls to fix it
            self.failed(error)
            picture = self.remark.value
        view = {"version_major": 2, "version_minor": 0, "model_id": self.box.model_id}
        still = STILL.format(id=self.box.model_id, picture=picture)
        return [{VIEW: view}, {"text/plain": repr(self), "text/html": still}]

    def _ipython_display_(self) -> None:
        for bundle in self.bundles():
            # A page of Voila's lives no longer than its kernel.
            if VIEW in bundle or "voila" not in os.environ.get("SERVER_SOFTWARE", ""):
                display(bundle, raw=True)

    def __repr__(self) -> str:
        return f"{type(self).__name__}: {self.hint}"
