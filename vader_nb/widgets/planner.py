"""Does a training step fit on a GPU? `vader_nb.memory` with controls.

planner = MemoryPlanner("modelscope", "hps", gpu_memory="T4")   in a notebook
planner.simulate(height=320, width=576)                         the same from Python: a Memory
"""

import shlex

from ipywidgets import HTML, Text

from ..memory_planner import (
    GIB,
    GPUS,
    MARGIN,
    STAGES,
    Memory,
    describe,
    is_per_frame,
    search_settings,
    simulate,
)
from ..models import CHECKPOINTS, checkpoint_of
from . import controls as ui
from .controls import SettingsPanel
from .drawing import bars
from .panel import LABEL, WIDE, disable, note

DEFAULT = ("default of the model", 0)  # of a size
PIXELS = (64, 128, 192, 256, 320, 384, 448, 512, 576, 768, 1024)
LENGTHS = (1, 4, 8, 12, 16, 24, 32, 48, 64)
MAX_STEPS = 50  # of a directory that does not say how many are usual
KEPT = 100  # answers that are kept
UNREADABLE = "“Simulate” waits for a reward that can be read."
UNKNOWN = (
    "Press “simulate”: a training step runs on tensors that have shapes but no numbers. This takes "
    "seconds for tiny, and about half a minute for the large models."
)
ATOMIC = "A simulation takes seconds to half a minute and cannot be stopped midway."
VERDICT = """
<div role=status>
{% if not memory %}{{ unknown }}{% else %}
<b>{{ "Fits" if memory.fits[gpu] else "Too small" }}:</b> {{ "%.2f"|format(need) }} GiB
and {{ margin }} GiB to spare, of {{ size }} GiB on a {{ gpu }}.
{% if gpu in memory.suggestions %}
{{ "It fits" if suggestion else "Nothing helps:" }} {{ describe(suggestion) }}.
{% elif not memory.fits[gpu] %}Press “simulate” to search for settings that fit.{% endif %}
{% endif %}
</div>
"""
CODE = """
<div class=vader-note>The same question from Python, and from a shell:</div>
<div class=vader-code>{{ python }}</div><div class=vader-code>{{ shell }}</div>
"""


class MemoryPlanner(SettingsPanel):
    """The peak memory of a training step by stage, simulated without weights and without a GPU.

    The controls have the names of the settings of `vader_nb.memory`. A simulation takes seconds to
    half a minute, so it starts only on request.

    Args:
        model: a name of `models.CHECKPOINTS` or the directory of a pipeline.
        reward: an expression.
        gpu_memory: one of `memory.GPUS`.

    Raises:
        ValueError: an unknown model, reward or GPU.
        FileNotFoundError: a directory without a pipeline.
    """

    title = "Memory planner"
    hint = "Choose what to train and on which GPU, then press “simulate”: does a training step fit?"

    def __init__(self, model: str = "modelscope", reward: str = "hps", gpu_memory: str = "T4"):
        super().__init__()
        checkpoint_of(model)
        is_per_frame(str(model), reward)
        if gpu_memory not in GPUS:
            raise ValueError(f"unknown GPU {gpu_memory!r}; choose one of {', '.join(GPUS)}")
        self.answers: dict[tuple, Memory] = {}
        self._build(str(model), reward, gpu_memory)
        self._limit_steps()
        self.changed()

    def _build(self, model: str, reward: str, gpu: str) -> None:
        models = list(dict.fromkeys([*CHECKPOINTS, model]))
        gpus = [(f"{name}, {size:g} GiB", name) for name, size in GPUS.items()]
        pixels = [DEFAULT, *((f"{n} pixels", n) for n in PIXELS)]
        lengths = [DEFAULT, *((str(n), n) for n in LENGTHS)]
        look = {"continuous_update": False, "style": LABEL, "layout": WIDE}
        self.settings = {
            "model": ui.choice("model", models, model),
            "reward": Text(reward, description="reward", **look),
            "gpu_memory": ui.choice("GPU", gpus, gpu),
            "height": ui.choice("height", pixels),
            "width": ui.choice("width", pixels),
            "num_frames": ui.choice("num_frames", lengths),
            "batch_size": ui.slider("batch_size", 1, 1, 16),
            "K": ui.slider("K, steps", 1, 1, 50),
            "frames": ui.choice("frames", ui.FRAMES),
            "dtype": ui.choice("dtype", ("float16", "bfloat16", "float32")),
            "gradient_checkpointing": ui.switch("gradient_checkpointing: recompute blocks", True),
            "sequential_guidance": ui.switch("sequential_guidance: its halves one by one", False),
            "model_cpu_offload": ui.switch("model_cpu_offload: idle networks wait", False),
        }
        vars(self).update(self.settings)
        self._defaults = self.values()
        self.simulate_button = ui.button("simulate", "play", 110, primary=True)
        self.fit_button = ui.button("make it fit", "wrench", 120)
        self.why, self.drawing, self.verdict, self.code = HTML(), HTML(), HTML(), HTML()
        self.on(self._limit_steps, self.model)
        self.watch_settings()
        self.on(lambda: self.jobs.submit(self._job), self.simulate_button)
        self.on(self.make_it_fit, self.fit_button)
        buttons = ui.row(self.simulate_button, self.fit_button)
        answer = ui.column(buttons, self.drawing, self.verdict, flex="2 1 330px")
        controls = ui.column(*self.settings.values(), self.why, max_width="440px")
        self.assemble(ui.beside(controls, answer), self.code)

    def _limit_steps(self) -> None:
        defaults = checkpoint_of(self.model.value).defaults
        self.K.max = defaults.get("num_inference_steps", MAX_STEPS)

    @property
    def changes(self) -> dict:
        """The settings of `vader_nb.memory` that are not at their defaults."""
        values = {n: v for n, v in self.values().items() if v != self._defaults[n]}
        values["frames"] = self.frames.value  # whose default depends on the reward
        if "K" in values:
            values["strategy"] = f"Last({values.pop('K')})"
        return {n: v for n, v in values.items() if n not in ("model", "reward", "gpu_memory")}

    @property
    def memory(self) -> Memory | None:
        """The answer for the current settings; None if it has not been simulated."""
        return self.answers.get(self._question())

    def _question(self) -> tuple:
        return self.model.value, self.reward.value, *self.changes.items()

    # ---------------------------------------------------------------------------------- simulating

    def simulate(self, **changes) -> Memory:
        """Simulate now, after setting controls by name, and wait for the result."""
        self.set(**changes)
        self.jobs.finish(self._job)
        return self.memory

    def _job(self):
        asked, changes = (self.model.value, self.reward.value), self.changes
        gpu, question = self.gpu_memory.value, self._question()
        self.say(f"Simulating one training step. {ATOMIC}")
        yield 0.05
        answer = Memory(*asked, changes, simulate(*asked, **changes))
        self.answers[question] = answer
        for old in list(self.answers)[:-KEPT]:
            del self.answers[old]
        self._show()
        if not answer.fits[gpu]:
            search, tried = search_settings(*asked, GPUS[gpu], **changes), 0
            while gpu not in answer.suggestions:
                try:
                    next(search)
                except StopIteration as found:
                    answer.suggestions[gpu] = found.value
                tried += 1
                self.say(f"Too small for a {gpu}. Searching, simulation {tried}. {ATOMIC}")
                yield min(0.95, 0.3 + 0.1 * tried)
        self.say("")
        self._show()

    @property
    def suggestion(self) -> dict | None:
        """The settings to change so that it fits; None if none are known."""
        return self.memory.suggestions.get(self.gpu_memory.value) if self.memory else None

    def make_it_fit(self) -> None:
        """Change the settings to what was found to fit, and simulate that."""
        if not self.suggestion:
            raise ValueError("no settings that fit are known: press “simulate” first")
        changes = dict(self.suggestion)
        if "frames" in changes:
            changes["frames"] = str(changes["frames"])
        self.set(**changes)
        self.jobs.submit(self._job, 0)

    # ------------------------------------------------------------------------------------- display

    def changed(self) -> None:
        self._show()
        is_per_frame(self.model.value, self.reward.value)  # raises what the panel shows

    def _show(self) -> None:
        try:
            is_per_frame(self.model.value, self.reward.value)
            unreadable = ""
        except (ValueError, OSError):
            unreadable = UNREADABLE
        memory, gpu, suggestion = self.memory, self.gpu_memory.value, self.suggestion
        disable(unreadable, self.simulate_button)
        disable("" if suggestion else "no settings that fit are known", self.fit_button)
        self.fit_button.layout.display = "" if suggestion else "none"
        self.why.value = note(unreadable)
        self.drawing.value = self._bars()
        self.verdict.value = ui.template(VERDICT).render(
            memory=memory,
            unknown=unreadable or UNKNOWN,
            gpu=gpu,
            need=memory.bytes / GIB if memory else 0,
            margin=f"{MARGIN:g}",
            size=GPUS[gpu],
            suggestion=suggestion,
            describe=describe,
        )
        code = ui.template(CODE).render(python=self.python, shell=self.shell)
        self.code.value = "" if unreadable else code

    def _bars(self) -> str:
        gpu, stages = self.gpu_memory.value, self.memory.stages if self.memory else {}
        values = {stage: stages.get(stage, float("nan")) / GIB for stage in STAGES}
        peaks = ", ".join(f"{stage} {value:.2f}" for stage, value in values.items())
        words = f"Peak memory by stage in GiB: {peaks}; a {gpu} has {GPUS[gpu]:g}."
        return bars(
            values,
            GPUS[gpu],
            MARGIN,
            label=words if stages else f"A {gpu} has {GPUS[gpu]:g} GiB.",
            limit_label=f"{gpu}: {GPUS[gpu]:g} GiB",
            remark=f"light: {MARGIN:g} GiB to spare" if stages else "not simulated yet",
        )

    @property
    def python(self) -> str:
        """The call that answers the same question."""
        settings = {"gpu_memory": self.gpu_memory.value} | self.changes
        written = ", ".join(f"{name}={value!r}" for name, value in settings.items())
        return f"vader_nb.memory({self.model.value!r}, {self.reward.value!r}, {written})"

    @property
    def shell(self) -> str:
        """The command that answers the same question."""
        names = ("model", "reward", "gpu_memory")
        settings = {name: self.settings[name].value for name in names} | self.changes
        words = (f"{name}={value}" for name, value in settings.items())
        return shlex.join(["vader-nb", "memory", *words])

    def to_html(self) -> str:
        table = self.memory._repr_html_() if self.memory else ""
        return f"{self.drawing.value}{self.verdict.value}{table}{self.code.value}"
