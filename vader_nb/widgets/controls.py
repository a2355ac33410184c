"""What panels are built from: controls with labels, and columns of them."""

from collections.abc import Mapping, Sequence
from typing import Any

from ipywidgets import (
    HTML,
    Checkbox,
    Dropdown,
    FloatSlider,
    HBox,
    IntSlider,
    Text,
    ToggleButton,
    VBox,
    Widget,
)

from ..drawing import note

# Layouts are dictionaries, of which each widget makes a Layout of its own.
WIDE = {"width": "auto", "max_width": "640px"}  # of a control: one line, also on a phone
FULL = {"width": "100%"}
LABEL = {"description_width": "96px"}
LINE = {"style": LABEL, "layout": WIDE}  # of a control with a label
FRAMES = {  # choices of the frames that are scored
    "random:1": "random:1, one at random",
    "ends": "ends: first, middle, last",
    "every:2": "every:2, every second",
    "all": "all",
}


def text(description: str, value: str, **options) -> Text:
    """A line of text; its handler is called when it is finished."""
    return Text(value, description=description, continuous_update=False, **LINE, **options)


def slider(description: str, value: float, low: float, high: float, **options) -> Any:
    """A slider, of whole numbers if `value` is one."""
    kind = IntSlider if isinstance(value, int) else FloatSlider
    return kind(value, min=low, max=high, description=description, **LINE, **options)


def choice(
    description: str, options: Sequence | Mapping, value=None, width: str = "auto"
) -> Dropdown:
    """A list to choose from, or a mapping with its texts; by default its first entry is chosen."""
    options = [(t, o) for o, t in options.items()] if isinstance(options, Mapping) else options
    chosen = {} if value is None else {"value": value}
    layout = WIDE | {"width": width}
    return Dropdown(options=options, description=description, **chosen, style=LABEL, layout=layout)


def switch(description: str, value: bool) -> Checkbox:
    return Checkbox(value, description=description, indent=False, layout={"width": "auto"})


def row(*children: Widget, align: str = "center") -> HBox:
    return HBox(children, layout=FULL | {"flex_flow": "row wrap", "align_items": align})


def column(*children: Widget, flex: str = "1 1 300px", max_width: str = "560px") -> VBox:
    """Widgets one below the other, for `beside`."""
    return VBox(children, layout={"flex": flex, "max_width": max_width, "min_width": "0"})


def beside(*columns: Widget) -> HBox:
    """Columns side by side; on a phone, one below the other."""
    look = {"flex_flow": "row wrap", "align_items": "flex-start", "grid_gap": "4px 16px"}
    return HBox(columns, layout=FULL | look)


def fold(description: str, *children: Widget) -> VBox:
    """A button that shows and hides widgets, at first hidden. Unlike ipywidgets' accordion, it is in the tab order."""
    button = ToggleButton(
        value=False, description=description, icon="sliders", layout={"width": "auto"}
    )
    inside = VBox(children, layout=FULL | {"display": "none"})
    button.observe(
        lambda change: setattr(inside.layout, "display", "flex" if change["new"] else "none"),
        "value",
    )
    return VBox([button, inside], layout=FULL)


def disable(why: str, *controls, remark: HTML | None = None) -> None:
    """Disable controls and say why, in their tooltips and in `remark`; an empty reason enables."""
    for item in controls:
        item.disabled = bool(why)
        # the trait's name in ipywidgets 8, and in 7
        trait = "tooltip" if item.has_trait("tooltip") else "description_tooltip"
        setattr(item, trait, why)
    if remark is not None:
        remark.value = note(why)


def set_value(name: str, control: Any, value) -> None:
    """Set a control. Raises ValueError for a value that it does not offer."""
    if hasattr(control, "options"):
        offered = [option[1] if isinstance(option, tuple) else option for option in control.options]
        if value not in offered:
            raise ValueError(f"{name} must be one of {', '.join(map(str, offered))}; got {value!r}")
    elif hasattr(control, "max") and not control.min <= value <= control.max:
        raise ValueError(f"{name} must lie in {control.min:g}..{control.max:g}, got {value}")
    elif isinstance(control, Text) and (value is None or isinstance(value, int | float)):
        value = "" if value is None else f"{value:g}"  # a number that need not be given
    control.value = value
