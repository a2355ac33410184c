"""What panels are built from: controls, columns, HTML from templates, named settings."""

import functools
from collections.abc import Sequence
from typing import Any

import jinja2
from ipywidgets import Button, Checkbox, Dropdown, FloatSlider, HBox, IntSlider, VBox, Widget

from .panel import LINE, ROW, SIDE, Panel

FRAMES = ("random:1", "ends", "every:2", "all")  # choices of the frames that are scored

_ENVIRONMENT = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)


@functools.cache
def template(source: str) -> jinja2.Template:
    """A jinja2 template that escapes all texts but those that are Markup."""
    return _ENVIRONMENT.from_string(source)


def slider(description: str, value: float, low: float, high: float, **options) -> Widget:
    """A slider, of whole numbers if `value` is one."""
    kind = IntSlider if isinstance(value, int) else FloatSlider
    return kind(value, min=low, max=high, description=description, **LINE, **options)


def choice(description: str, options: Sequence, value=None) -> Dropdown:
    """A list to choose from; by default its first entry is chosen."""
    chosen = {} if value is None else {"value": value}
    return Dropdown(options=options, description=description, **chosen, **LINE)


def switch(description: str, value: bool) -> Checkbox:
    return Checkbox(value, description=description, indent=False, layout={"width": "auto"})


def button(description: str, icon: str, width: int, primary: bool = False) -> Button:
    style, layout = "primary" if primary else "", {"width": f"{width}px"}
    return Button(description=description, icon=icon, button_style=style, layout=layout)


def row(*children: Widget) -> HBox:
    return HBox(children, layout=ROW)


def column(*children: Widget, flex: str = "1 1 300px", max_width: str = "560px") -> VBox:
    """Widgets below each other, for `beside`."""
    return VBox(children, layout={"flex": flex, "max_width": max_width, "min_width": "0"})


def beside(*columns: Widget) -> HBox:
    """Columns beside each other; on a phone they are below each other."""
    return HBox(columns, layout=SIDE)


class SettingsPanel(Panel):
    """A panel with named controls, `settings`, which `set` changes from Python."""

    def __init__(self):
        super().__init__()
        self.settings: dict[str, Any] = {}
        self._setting = False

    def watch_settings(self) -> None:
        """Call `changed` after each change of a setting, and once after a `set`."""
        self.on(lambda: None if self._setting else self.changed(), *self.settings.values())

    def changed(self) -> None:
        """Show the settings as they are now."""
        raise NotImplementedError

    def values(self) -> dict:
        return {name: control.value for name, control in self.settings.items()}

    def set(self, **changes) -> None:
        """Set controls by name, in the order of `settings`.

        Raises:
            ValueError: an unknown name, or a value that a control does not offer; what was set
                before it stays set.
        """
        for name in changes:
            if name not in self.settings:
                raise ValueError(f"unknown setting {name!r}; there are {', '.join(self.settings)}")
        self._setting = True
        try:
            for name in (name for name in self.settings if name in changes):
                validate_value(name, self.settings[name], changes[name])
                self.settings[name].value = changes[name]
        finally:
            self._setting = False
            self.changed()


def validate_value(name: str, control: Any, value) -> None:
    if isinstance(control, Dropdown):
        offered = [option[1] if isinstance(option, tuple) else option for option in control.options]
        if value not in offered:
            raise ValueError(f"{name} must be one of {', '.join(map(str, offered))}; got {value!r}")
    elif hasattr(control, "max") and not control.min <= value <= control.max:
        raise ValueError(f"{name} must lie in {control.min:g}..{control.max:g}, got {value}")
