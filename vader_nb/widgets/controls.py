"""The pieces that panels are made of: controls of one look, columns, HTML from templates, settings by name."""

import functools
from collections.abc import Sequence

import jinja2
from ipywidgets import (
    Button,
    Checkbox,
    Dropdown,
    FloatSlider,
    HBox,
    IntSlider,
    Layout,
    VBox,
    Widget,
)

from .panel import LABEL, ROW, SIDE, WIDE, Panel

_TEMPLATES = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)


@functools.cache
def template(source: str) -> jinja2.Template:
    """A jinja2 template that escapes what it is given; Markup stays as it is."""
    return _TEMPLATES.from_string(source)


def slider(description: str, value: float, low: float, high: float, **options) -> IntSlider:
    """A slider: of whole numbers if `value` is one."""
    kind = IntSlider if isinstance(value, int) else FloatSlider
    look = {"description": description, "style": LABEL, "layout": WIDE}
    return kind(value, min=low, max=high, **look, **options)


def choice(description: str, options: Sequence, value=None) -> Dropdown:
    """A list to choose from; by default its first entry is chosen."""
    look = {"description": description, "style": LABEL, "layout": WIDE}
    if value is None:
        return Dropdown(options=options, **look)
    return Dropdown(options=options, value=value, **look)


def switch(description: str, value: bool) -> Checkbox:
    return Checkbox(value, description=description, indent=False, layout={"width": "auto"})


def button(description: str, icon: str, width: int, primary: bool = False) -> Button:
    return Button(
        description=description,
        icon=icon,
        button_style="primary" if primary else "",
        layout={"width": f"{width}px"},
    )


def column(*children: Widget, flex: str = "1 1 300px", max_width: str = "560px") -> VBox:
    """Widgets below each other, in one of the columns of `side_by_side`."""
    return VBox(children, layout=Layout(flex=flex, max_width=max_width, min_width="0"))


def row(*children: Widget) -> HBox:
    return HBox(children, layout=ROW)


def beside(*columns: Widget) -> HBox:
    """Columns beside each other, on a phone below each other."""
    return HBox(columns, layout=SIDE)


class SettingsPanel(Panel):
    """A panel with controls that have names, `settings`: `set` moves them from Python.

    Subclasses fill `settings` and call `watch_settings`; `changed` is called after each change, and once after all
    changes of a `set`.
    """

    def __init__(self):
        super().__init__()
        self.settings: dict[str, Widget] = {}
        self._setting = False

    def watch_settings(self) -> None:
        self.on(lambda: None if self._setting else self.changed(), *self.settings.values())

    def changed(self) -> None:
        """Show the settings as they are now."""
        raise NotImplementedError

    def values(self) -> dict:
        """The settings' values by name."""
        return {name: control.value for name, control in self.settings.items()}

    def set(self, **changes) -> None:
        """Set controls by name, in their order on the page.

        Raises:
            ValueError: for an unknown name, or a value that the control cannot have. What was set before stays.
        """
        for name in changes:
            if name not in self.settings:
                raise ValueError(f"unknown setting {name!r}; there are {', '.join(self.settings)}")
        self._setting = True
        try:
            for name in sorted(changes, key=list(self.settings).index):
                validate_value(name, self.settings[name], changes[name])
                self.settings[name].value = changes[name]
        finally:
            self._setting = False
            self.changed()


def validate_value(name: str, control: Widget, value) -> None:
    """Raises ValueError if the control cannot have the value, and says which it can."""
    if isinstance(control, Dropdown):
        choices = [option[1] if isinstance(option, tuple) else option for option in control.options]
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}; got {value!r}")
    if hasattr(control, "max") and not control.min <= value <= control.max:
        raise ValueError(f"{name} must lie in {control.min:g}..{control.max:g}, got {value}")
