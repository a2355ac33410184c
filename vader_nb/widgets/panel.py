"""What all controls share: a frame with a place for errors, a look, escaped texts, a picture for readers without a kernel."""

import functools
import html
import sys
from collections.abc import Callable

import ipywidgets
from ipywidgets import HTML, Layout, VBox

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
.vader td, .vader th { padding: 1px 8px 1px 0; text-align: right } .vader td:first-child, .vader th:first-child { text-align: left }
.vader-up { color: #1f9d4d } .vader-down { color: #e0573e }
.vader-scroll { overflow-x: auto; max-width: 100% }
.vader-frames > .p-TabBar, .vader-frames > .lm-TabBar { display: none !important }
.vader-frames > .widget-tab-contents { border: 0 !important; padding: 0 !important; background: transparent !important }
</style>"""

# Layouts are dictionaries, of which each widget makes a Layout of its own.
WIDE = {"width": "auto", "max_width": "640px"}  # of a control: one line, also on a phone
ROW = {"flex_flow": "row wrap", "align_items": "center", "width": "100%"}
SIDE = {
    "flex_flow": "row wrap",
    "align_items": "flex-start",
    "width": "100%",
    "grid_gap": "4px 16px",
}  # stacked on a phone
LABEL = {"description_width": "96px"}
VIEW = "application/vnd.jupyter.widget-view+json"

escape = functools.partial(html.escape, quote=True)


class Panel:
    """A control. Shows itself in a notebook as `box`, a widget, and where there is no kernel as `to_html()`, a picture.

    Attributes that are widgets (`prompt`, `seed`, …) may be set from Python, by their `value`, as in the page. `error` is
    what went wrong last, None if nothing did: it stands in the panel, since what a handler raises is lost in a notebook.
    """

    title = ""
    hint = ""  # what to do, in a line

    def __init__(self):
        self.error: Exception | None = None
        self.remark = HTML()
        self.progress = ipywidgets.FloatProgress(
            min=0, max=1, description="working", style=LABEL, layout=WIDE
        )
        self.progress.layout.visibility = "hidden"
        self.jobs = Jobs(self.busy, self.waiting, self.failed)
        self.box = None

    def assemble(self, *children) -> None:
        """Put the panel together, once its parts are made."""
        head = f"{STYLE}<div class=vader-title>{escape(self.title)}</div><div class=vader-note>{escape(self.hint)}</div>"
        self.box = VBox(
            [HTML(head), *children, self.progress, self.remark], layout=Layout(width="100%")
        )
        self.box.add_class("vader")

    # ------------------------------------------------------------------------------------ what the user is told

    def say(self, text: str) -> None:
        self.remark.value = f"<div class=vader-note>{escape(text)}</div>" if text else ""

    def failed(self, error: Exception) -> None:
        self.error = error
        what = (
            str(error)
            if isinstance(error, (ValueError, OSError))
            else f"{type(error).__name__}: {error}"
        )
        self.remark.value = f"<div class=vader-error role=alert>{escape(what)}</div>"

    def busy(self, fraction: float | None) -> None:
        self.progress.layout.visibility = "hidden" if fraction is None else "visible"
        self.progress.value = fraction or 0.0

    def waiting(self, on: bool) -> None:
        """For a model that a cell is at work with."""
        text = "waits: a cell is at work with a model"
        if on:
            self.say(text)
        elif text in self.remark.value:
            self.say("")

    def answers(self, handler: Callable) -> Callable:
        """The handler of an event: clears the last error, and shows its own."""

        @functools.wraps(handler)
        def answer(*args):
            self.error = None
            self.say("")
            try:
                handler(*args)
            except Exception as error:
                self.failed(error)

        return answer

    def on(self, handler: Callable, *controls) -> None:
        """Call handler() whenever one of the controls gets another value, or is clicked."""
        answer = self.answers(lambda *_: handler())
        for control in controls:
            if isinstance(control, ipywidgets.Button):
                control.on_click(answer)
            else:
                control.observe(answer, "value")

    # ------------------------------------------------------------------------------------------- where it is shown

    def prepare(self) -> None:
        """What has to be there before the panel is shown for the first time."""

    def to_html(self) -> str:
        """The panel as a picture."""
        raise NotImplementedError

    def _repr_mimebundle_(self, **_):
        bundle = {"text/plain": repr(self)}
        try:
            self.prepare()
            picture = self.to_html()
        except Exception as error:  # the panel itself shows it, and has the controls to mend it
            self.failed(error)
            picture = self.remark.value
        if "google.colab" not in sys.modules:  # which might take the picture for the better choice
            bundle["text/html"] = picture
        return bundle | {
            VIEW: {"version_major": 2, "version_minor": 0, "model_id": self.box.model_id}
        }

    def __repr__(self) -> str:
        return f"{type(self).__name__}: {self.hint}"


def disable(why: str, *controls, remark: HTML | None = None) -> None:
    """Controls that cannot act now, and the reason, where one sees it: beside them, and when one points at them. An empty
    reason: they can."""
    for control in controls:
        control.disabled = bool(why)
        setattr(
            control, "tooltip" if control.has_trait("tooltip") else "description_tooltip", why
        )  # ipywidgets 8, 7
    if remark is not None:
        remark.value = f"<span class=vader-note>{escape(why)}</span>"
