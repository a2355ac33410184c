"""Will a training step fit on a GPU? `vader_nb.memory` with controls: bars by stage, and what to change if it does not.

planner = MemoryPlanner("modelscope", "hps", gpu="T4")   in a notebook
planner.simulate(height=320, width=576)                   the same from Python: a Memory
"""

import shlex
from dataclasses import fields

import torch
from ipywidgets import HTML, Button, Checkbox, Dropdown, HBox, IntSlider, Layout, Text, VBox

from ..gradient import Frames, Last
from ..memory import GIB, GPUS, MARGIN, STAGES, Memory, Setting, fits, simulate, spelled, trying
from ..models import CHECKPOINTS, checkpoint_of
from ..rewards import syntax
from .diagram import GRADIENT, WIDTH, box, image, svg, words
from .panel import LABEL, ROW, SIDE, WIDE, Panel, disable, escape

OWN = "the model’s own"  # as a value 0: None would be to a Dropdown that nothing is chosen
SIZES = (64, 128, 192, 256, 320, 384, 448, 512, 576, 768, 1024)
LENGTHS = (1, 4, 8, 12, 16, 24, 32, 48, 64)
FRAMES = {
    "1 random": Frames(),
    "ends": Frames("ends"),
    "every 2nd": Frames("nth", 2),
    "all": Frames("all"),
}
COMMAND = {
    Frames(): "random:1",
    Frames("ends"): "ends",
    Frames("nth", 2): "nth:2",
    Frames("all"): "all",
}
CODE = {
    frames: f"Frames({frames.how!r}{f', {frames.k}' if frames.how == 'nth' else ''})"
    for frames in COMMAND
}
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
KEPT = 100  # simulations whose figures are kept
WAITS = "“Simulate” waits for a reward that can be read."
PRESS = (
    "Press “simulate”: a training step is gone through with tensors that have sizes but no numbers. That takes seconds for "
    "tiny, half a minute or so for the big models."
)


class MemoryPlanner(Panel):
    """The peak memory of a training step by stage, simulated without weights and without a GPU, against a GPU's size.

    model: a name of `models.CHECKPOINTS` or a pipeline directory; reward: an expression; gpu: one of `memory.GPUS`, the
    first setting of the controls, which bear the names of `memory.Setting`. Nothing is simulated before it is asked for,
    since it takes some seconds (tiny) to half a minute: until then the page shows what there is to fit into. Raises
    ValueError for an unknown model, reward or GPU, FileNotFoundError for a directory that is no pipeline's.
    """

    title = "Memory planner"
    hint = "Choose what to train and on which GPU, then press “simulate”: does a training step fit?"

    def __init__(self, model: str = "modelscope", reward: str = "hps", gpu: str = "T4"):
        super().__init__()
        checkpoint_of(model)
        syntax(reward)
        if gpu not in GPUS:
            raise ValueError(f"unknown GPU {gpu!r}; choose one of {', '.join(GPUS)}")
        self.stages: dict[Setting, dict[str, int]] = {}  # bytes by stage of what was simulated
        self.remedies: dict[
            tuple[Setting, str], dict | None
        ] = {}  # what to change, where it was looked for
        self._filling = False
        self._controls(str(model), reward, gpu)
        self.drawing, self.verdict, self.code = HTML(), HTML(), HTML()
        half = Layout(flex="1 1 300px", max_width="440px", min_width="0")
        first, second, *rest = self.settings.values()
        controls = VBox([first, second, self.gpu, *rest, self.why], layout=half)
        buttons = HBox([self.button, self.change], layout=ROW)
        answer = VBox(
            [buttons, self.drawing, self.verdict],
            layout=Layout(flex="2 1 330px", max_width="560px", min_width="0"),
        )
        self.assemble(HBox([controls, answer], layout=SIDE), self.code)
        self._moved()

    def _controls(self, model: str, reward: str, gpu: str) -> None:
        look = {"style": LABEL, "layout": WIDE}
        models = dict.fromkeys([*CHECKPOINTS, model])
        self.model = Dropdown(options=list(models), value=model, description="model", **look)
        self.reward = Text(reward, description="reward", continuous_update=False, **look)
        sizes = [(OWN, 0), *((f"{n} pixels", n) for n in SIZES)]
        self.height = Dropdown(options=sizes, description="height", **look)
        self.width = Dropdown(options=sizes, description="width", **look)
        lengths = [(OWN, 0), *((str(n), n) for n in LENGTHS)]
        self.num_frames = Dropdown(options=lengths, description="num_frames", **look)
        self.batch_size = IntSlider(1, min=1, max=16, description="batch_size", **look)
        self.K = IntSlider(1, min=1, max=50, description="K, steps", **look)
        self.frames = Dropdown(options=list(FRAMES), description="frames", **look)
        self.dtype = Dropdown(options=list(DTYPES), description="dtype", **look)
        self.checkpoint_blocks = Checkbox(
            True, description="checkpoint_blocks: compute blocks again", indent=False
        )
        self.sequential_guidance = Checkbox(
            False, description="sequential_guidance: its halves in turn", indent=False
        )
        self.model_cpu_offload = Checkbox(
            False, description="model_cpu_offload: idle networks wait", indent=False
        )
        for switch in (self.checkpoint_blocks, self.sequential_guidance, self.model_cpu_offload):
            switch.layout.width = "auto"
        names = "model reward height width num_frames batch_size K frames dtype"
        names += " checkpoint_blocks sequential_guidance model_cpu_offload"
        self.settings = {name: getattr(self, name) for name in names.split()}
        gpus = [(f"{name}, {size:g} GiB", name) for name, size in GPUS.items()]
        self.gpu = Dropdown(options=gpus, value=gpu, description="GPU", **look)
        self.button = Button(
            description="simulate",
            icon="play",
            button_style="primary",
            layout=Layout(width="110px"),
        )
        self.change = Button(description="make it fit", icon="wrench", layout=Layout(width="120px"))
        self.why = HTML()
        self.on(self._moved, *self.settings.values(), self.gpu)
        self.on(lambda: self.jobs.submit(self._job), self.button)
        self.on(self.make_it_fit, self.change)

    # ------------------------------------------------------------------------------------------ the setting

    @property
    def setting(self) -> Setting:
        values = {name: control.value for name, control in self.settings.items()}
        strategy = Last(values.pop("K"))
        values |= {name: values[name] or None for name in ("height", "width", "num_frames")}
        values |= {"frames": FRAMES[values["frames"]], "dtype": DTYPES[values["dtype"]]}
        return Setting(**values, strategy=strategy)

    def set(self, **changes) -> None:
        """Set controls by name, `gpu` among them; a size of 0 is the model's own. Raises ValueError for a value that they
        cannot have, and for a reward that cannot be read."""
        known = self.settings | {"gpu": self.gpu}
        self._filling = True
        try:
            for name in sorted(
                changes, key=lambda name: name != "model"
            ):  # which decides how many steps there are
                if name not in known:
                    raise ValueError(
                        f"unknown setting {name!r}; the planner has {', '.join(known)}"
                    )
                known[name].value = possible(name, known[name], changes[name])
                self._limit()
        finally:
            self._filling = False
            self._show()
        syntax(self.reward.value)

    def _moved(self) -> None:
        if not self._filling:
            self._limit()
            self._show()
            syntax(self.reward.value)

    def _limit(self) -> None:
        """K ends at the steps of the model; a larger value comes down to it."""
        filling, self._filling = self._filling, True
        self.K.max = checkpoint_of(self.model.value).defaults["num_inference_steps"]
        self._filling = filling

    @property
    def unread(self) -> str:
        """Why the reward's expression cannot be read; empty if it can."""
        try:
            syntax(self.reward.value)
        except ValueError as error:
            return str(error)
        return ""

    # ------------------------------------------------------------------------------------------- simulating

    @property
    def memory(self) -> Memory | None:
        """The answer for the current setting, None if it has not been simulated."""
        setting, gpu = self.setting, self.gpu.value
        if setting not in self.stages:
            return None
        found = {gpu: self.remedies[setting, gpu]} if (setting, gpu) in self.remedies else {}
        return Memory(setting, self.stages[setting], remedies=found)

    def simulate(self, **changes) -> Memory:
        """Simulate now, after setting controls by name, and wait for it."""
        self.set(**changes)
        self.jobs.finish(self._job)
        return self.memory

    def _job(self):
        setting, gpu = self.setting, self.gpu.value
        syntax(setting.reward)
        whole = "A simulation is one piece of work of some seconds to half a minute, which cannot be stopped midway."
        self.say(f"Simulating one training step. {whole}")
        yield 0.05
        self.stages[setting] = simulate(setting)
        for old in list(self.stages)[:-KEPT]:
            del self.stages[old]
        self._show()
        if (
            not fits(max(self.stages[setting].values()), gpu)
            and (setting, gpu) not in self.remedies
        ):
            self.remedies[setting, gpu] = yield from self._search(setting, gpu, whole)
            for old in list(self.remedies)[:-KEPT]:
                del self.remedies[old]
        self.say("")
        self._show()

    def _search(self, setting: Setting, gpu: str, whole: str):
        """`memory.remedy`, which is a simulation after the other."""
        search, tried = trying(setting, gpu), 0
        while True:
            try:
                next(search)
            except StopIteration as found:
                return found.value
            tried += 1
            self.say(
                f"Too small for a {gpu}. Looking for what to change, simulation {tried}. {whole}"
            )
            yield min(0.95, 0.3 + 0.1 * tried)

    def make_it_fit(self) -> None:
        """Set the controls to what was found to fit, and simulate that."""
        change = self.remedies.get((self.setting, self.gpu.value))
        if not change:
            raise ValueError("nothing was found that would make it fit: press “simulate” first")
        spelling = {frames: name for name, frames in FRAMES.items()}
        self.set(
            **{
                name: spelling[value] if name == "frames" else value
                for name, value in change.items()
            }
        )
        self.jobs.submit(self._job, settle=0)

    # --------------------------------------------------------------------------------------------- showing

    def _show(self) -> None:
        unread = self.unread
        disable(WAITS if unread else "", self.button)
        remedy = self.remedies.get((self.setting, self.gpu.value))
        disable("" if remedy else "nothing to change is known", self.change)
        self.change.layout.display = "" if remedy else "none"
        self.why.value = f"<div class=vader-note>{WAITS}</div>" if unread else ""
        self.drawing.value = self.bars[0]
        self.verdict.value = f"<div role=status>{self.answer}</div>"
        self.code.value = "" if unread else self._code()

    @property
    def answer(self) -> str:
        """The verdict in words, as HTML."""
        memory, gpu = self.memory, self.gpu.value
        if memory is None:
            return WAITS if self.unread else PRESS
        need = f"{memory.bytes / GIB:.2f} GiB and {MARGIN:g} GiB to spare, of {GPUS[gpu]:g} GiB on a {gpu}"
        if memory.fits[gpu]:
            return f"<b>Fits:</b> {escape(need)}."
        if gpu not in memory.remedies:
            return f"<b>Too small:</b> {escape(need)}. What to change is not known yet: press “simulate”."
        change = memory.remedies[gpu]
        way = (
            f"It fits {spelled(change)}." if change else f"N{spelled(change)[1:]}."
        )  # "no setting of ours …"
        return f"<b>Too small:</b> {escape(need)}. {escape(way)}"

    @property
    def bars(self) -> tuple[str, str]:
        """The drawing of the current setting, and what it shows in words."""
        memory = self.memory
        return bars(memory.stages if memory else None, self.gpu.value)

    @property
    def python(self) -> str:
        """The call that answers the same."""
        setting, usual = self.setting, Setting()
        parts = [repr(setting.model), repr(setting.reward), f"gpu={self.gpu.value!r}"]
        for name in (f.name for f in fields(Setting) if f.name not in ("model", "reward")):
            value = getattr(setting, name)
            if value != getattr(usual, name):
                home = "vader_nb." if name in ("strategy", "frames") else ""
                parts.append(f"{name}={home}{CODE[value] if name == 'frames' else repr(value)}")
        return f"vader_nb.memory({', '.join(parts)})"

    @property
    def shell(self) -> str:
        """The command that answers the same; empty where the command has no word for it."""
        setting, usual = self.setting, Setting()
        if setting.dtype != usual.dtype:
            return ""
        asked = {"model": setting.model, "reward": setting.reward, "gpu": self.gpu.value}
        for name in (f.name for f in fields(Setting) if f.name not in (*asked, "frames")):
            value = getattr(setting, name)
            if value != getattr(usual, name):
                asked |= {"K": value.K} if name == "strategy" else {name: value}
        asked["frames"] = COMMAND[
            setting.frames
        ]  # always said: the command's default depends on the reward
        return " ".join(
            ["vader-nb memory", *(shlex.quote(f"{name}={value}") for name, value in asked.items())]
        )

    def _code(self) -> str:
        shell = (
            self.shell
            or f"# the command always takes float16; {self.dtype.value} needs the call from Python"
        )
        return (
            "<div class=vader-note>The same question from Python, and from a shell:</div>"
            f"<div class=vader-code>{escape(self.python)}</div><div class=vader-code>{escape(shell)}</div>"
        )

    def to_html(self) -> str:
        drawing, alt = self.bars
        memory = self.memory
        table = memory._repr_html_() if memory else ""
        return f"<div>{image(drawing, alt)}<p>{self.answer}</p>{table}{'' if self.unread else self._code()}</div>"


def possible(name: str, control, value):
    """The value, if the control can have it. Raises ValueError that says which it can."""
    if isinstance(control, Dropdown):
        choices = [option[1] if isinstance(option, tuple) else option for option in control.options]
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}; got {value!r}")
    if isinstance(control, IntSlider) and not control.min <= value <= control.max:
        raise ValueError(f"{name} must lie in {control.min}..{control.max}, got {value}")
    return value


# ------------------------------------------------------------------------------------------- the drawing

LEFT, RIGHT, TOP, ROW_HEIGHT = 74, WIDTH - 64, 34, 24


def bars(stages: dict[str, int] | None, gpu: str) -> tuple[str, str]:
    """A bar for each stage against the GPU's size, with what is to spare on the longest; and the same in words. Without
    stages only the GPU's size."""
    size, most = GPUS[gpu], max(stages.values()) / GIB if stages else 0.0
    scale = (RIGHT - LEFT) / max(size * 1.08, most + MARGIN)
    bottom = TOP + ROW_HEIGHT * len(STAGES)
    parts = []
    for i, stage in enumerate(STAGES):
        y, amount = TOP + ROW_HEIGHT * i, stages[stage] / GIB if stages else 0.0
        worst = bool(stages) and amount == most
        parts.append(words(LEFT - 6, y + 15, stage, 12, "end", worst))
        if not stages:
            continue
        length = amount * scale
        parts.append(box(LEFT, y + 2, max(1, length), ROW_HEIGHT - 6, "stage", True))
        if worst:
            parts.append(
                f'<rect class="margin" x="{LEFT + length:g}" y="{y + 2}" width="{MARGIN * scale:g}" height="{ROW_HEIGHT - 6}" '
                'fill="none" stroke="currentColor" stroke-dasharray="3 2"/>'
            )
        parts.append(words(WIDTH - 2, y + 15, f"{amount:.2f}", 12, "end", worst))
    limit = LEFT + size * scale
    parts += [
        f'<path d="M{limit:g} {TOP - 4}V{bottom + 2}" stroke="{GRADIENT}" stroke-width="2" fill="none"/>',
        words(limit, TOP - 10, f"{gpu}: {size:g} GiB", 12, "end", True),
        words(WIDTH - 2, TOP - 10, "GiB", 11, "end"),
        words(
            LEFT,
            bottom + 16,
            f"dashed: {MARGIN:g} GiB to spare for what is not a tensor" if stages else "",
            11,
        ),
    ]
    if not stages:
        parts.append(words(LEFT + 6, (TOP + bottom) / 2 + 4, "not simulated yet", 12))
        return svg(
            bottom + 22, parts, f"Not simulated yet; a {gpu} has {size:g} GiB."
        ), f"A {gpu} has {size:g} GiB."
    told = ", ".join(f"{stage} {amount / GIB:.2f}" for stage, amount in stages.items())
    alt = f"Peak memory by stage in GiB: {told}; a {gpu} has {size:g}."
    return svg(bottom + 22, parts, alt), alt
