"""What all panels share: a frame with a place for errors, a look, a still picture."""

import base64
import mimetypes
import sys
from collections.abc import Callable
from html import escape
from pathlib import Path

from ipywidgets import HTML, Button, FloatProgress, VBox

from .jobs import Jobs

# Colors are the page's own, thinned, so that they go with a light theme and a dark one.
STYLE = """<style>
.vader { max-width: 1000px; box-sizing: border-box; padding: 4px }
.vader .widget-html-content, .vader .widget-html, .vader .jupyter-widgets { max-width: 100% }
.vader .widget-html-content { line-height: 1.4; white-space: normal; overflow-wrap: anywhere }
.vader .widget-html, .vader .widget-hbox, .vader .widget-vbox { height: auto }
.vader-title { font-weight: 600; font-size: 1.15em }
.vader-note, .vader figcaption { font-size: .85em; opacity: .8 }
.vader-error { border-left: 4px solid #d1453b; background: #d1453b22; padding: 6px 10px; border-radius: 3px }
.vader-code { user-select: all; white-space: pre-wrap; overflow-wrap: anywhere; background: #8882; padding: 8px;
  border-radius: 4px; font-family: monospace; font-size: .85em; margin: 4px 0; max-height: 18em; overflow-y: auto }
.vader figure { margin: 0 } .vader summary { cursor: pointer }
.vader-side { display: flex; flex-wrap: wrap; gap: 10px; align-items: flex-start }
.vader-side > figure { flex: 1 1 130px; max-width: 256px; min-width: 0 }
.vader img.vader-frame { image-rendering: pixelated; border-radius: 6px; width: 100%; display: block }
.vader table { border-collapse: collapse; font-variant-numeric: tabular-nums }
.vader td, .vader th { padding: 1px 8px 1px 0; text-align: right }
.vader td:first-child, .vader th:first-child, .vader .vader-columns :is(td, th) { text-align: left }
.vader-columns td { overflow-wrap: anywhere }
.vader-up { color: #1f9d4d } .vader-down { color: #e0573e }
.vader-scroll { overflow-x: auto; max-width: 100% }
.vader-frames > .p-TabBar, .vader-frames > .lm-TabBar { display: none !important }
.vader-frames > .widget-tab-contents { border: 0 !important; padding: 0 !important; background: transparent !important }
</style>"""

# Layouts are dictionaries, of which each widget makes a Layout of its own.
WIDE = {"width": "auto", "max_width": "640px"}  # of a control: one line, also on a phone
FULL = {"width": "100%"}
ROW = FULL | {"flex_flow": "row wrap", "align_items": "center"}
SIDE = FULL | {"flex_flow": "row wrap", "align_items": "flex-start", "grid_gap": "4px 16px"}
LABEL = {"description_width": "96px"}
LINE = {"style": LABEL, "layout": WIDE}  # of a control with a label
VIEW = "application/vnd.jupyter.widget-view+json"


def note(text: str) -> str:
    """A text as a small line of HTML, nothing for an empty one."""
    return f"<div class=vader-note>{escape(text)}</div>" if text else ""


def data_url(data: bytes, kind: str) -> str:
    """An address that holds data of a kind such as "image/png", for an <img> or a link."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def download_link(path: Path) -> str:
    """A link that carries a file within the page."""
    kind = mimetypes.guess_type(path, strict=False)[0] or "application/octet-stream"
    url = data_url(path.read_bytes(), kind)
    return f' · <a download="{escape(path.name)}" href="{url}">download</a>'


class Panel:
    """A control panel, shown in a notebook as `box`, a widget; without a kernel as `to_html()`.

    Attributes that are widgets (`prompt`, `seed`, …) can be set from Python by their `value`. `error`
    is the last error or None; the panel shows it, since a notebook drops what a handler raises.
    """

    title = ""
    hint = ""  # what to do, in a line

    def __init__(self):
        self.error: Exception | None = None
        self.remark = HTML()
        self.progress = FloatProgress(min=0, max=1, description="working", **LINE)
        self.progress.layout.visibility = "hidden"
        self.jobs = Jobs(self.busy, self.waiting, self.failed)
        self.box = VBox()  # filled by `assemble`

    def assemble(self, *children) -> None:
        """Put the panel together, once its parts are made."""
        title = HTML(f"{STYLE}<div class=vader-title>{escape(self.title)}</div>{note(self.hint)}")
        self.box = VBox([title, *children, self.progress, self.remark], layout=FULL)
        self.box.add_class("vader")

    def say(self, text: str) -> None:
        self.remark.value = note(text)

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
        if on:
            self.say(text)
        elif text in self.remark.value:
            self.say("")

    def on(self, handler: Callable[[], object], *controls) -> None:
        """Call handler() when one of the controls changes or is clicked, and show its errors."""

        def respond(_event) -> None:
            self.error = None
            self.say("")
            try:
                handler()
            except Exception as error:
                self.failed(error)

        for source in controls:
            if isinstance(source, Button):
                source.on_click(respond)
            else:
                source.observe(respond, "value")

    def prepare(self) -> None:
        """Make what the panel needs before it is first shown."""

    def to_html(self) -> str:
        """The panel as a still picture."""
        raise NotImplementedError

    def _repr_mimebundle_(self, **_):
        bundle = {"text/plain": repr(self)}
        try:
            self.prepare()
            picture = self.to_html()
        except Exception as error:  # shown in the panel, which has the controls to fix it
            self.failed(error)
            picture = self.remark.value
        if "google.colab" not in sys.modules:  # Colab could prefer the picture to the widget
            bundle["text/html"] = picture
        view = {"version_major": 2, "version_minor": 0, "model_id": self.box.model_id}
        return bundle | {VIEW: view}

    def __repr__(self) -> str:
        return f"{type(self).__name__}: {self.hint}"


def disable(why: str, *controls, remark: HTML | None = None) -> None:
    """Disable controls and say why, in their tooltips and in `remark`; an empty reason enables."""
    for item in controls:
        item.disabled = bool(why)
        # the trait's name in ipywidgets 8, and in 7
        trait = "tooltip" if item.has_trait("tooltip") else "description_tooltip"
        setattr(item, trait, why)
    if remark is not None:
        remark.value = f"<span class=vader-note>{escape(why)}</span>"
