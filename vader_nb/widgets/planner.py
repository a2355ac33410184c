"""Does a training step fit on a GPU? `vader_nb.memory` with controls.

planner = MemoryPlanner("modelscope", "hps", gpu_memory="T4")   in a notebook
planner.simulate(height=320, width=576)                         the same from Python: a Memory
"""

import shlex

from ipywidgets import HTML

from ..drawing import bars, code, note
from ..memory_planner import GIB, GPUS, MARGIN, STAGES, Memory, describe, is_per_frame, simulate
from ..models import CHECKPOINTS, checkpoint_of, is_causal
from ..stepwise import Job, remember
from .controls import FRAMES, beside, choice, column, disable, fold, row, slider, switch, text
from .panel import Panel

ASKED = ("model", "reward", "gpu_memory")  # the controls that are not settings of the step
DEFAULT = {0: "default of the model"}  # of a size
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


class MemoryPlanner(Panel):
    """The peak memory of a training step by stage, simulated without weights and without a GPU.

    The controls have the names of the settings of `vader_nb.memory`.

    Args:
        model: A name of `models.CHECKPOINTS` or the directory of a pipeline.
        reward: An expression.
        gpu_memory: One of `memory.GPUS`.

    Raises:
        ValueError: An unknown model, reward or GPU.
        FileNotFoundError: A directory without a pipeline.
    """

    title = "Memory planner"
    hint = "Choose what to train and on which GPU, then press “simulate”: does a training step fit?"

    def __init__(self, model: str = "modelscope", reward: str = "hps", gpu_memory: str = "T4"):
        checkpoint_of(model)
        is_per_frame(str(model), reward)
        if gpu_memory not in GPUS:
            raise ValueError(f"unknown GPU {gpu_memory!r}; choose one of {', '.join(GPUS)}")
        gpus = {name: f"{name}, {size:g} GiB" for name, size in GPUS.items()}
        pixels = DEFAULT | {n: f"{n} pixels" for n in PIXELS}
        lengths = DEFAULT | {n: str(n) for n in LENGTHS}
        super().__init__(
            model=choice("model", list(dict.fromkeys([*CHECKPOINTS, str(model)])), str(model)),
            reward=text("reward", reward),
            gpu_memory=choice("GPU", gpus, gpu_memory),
            height=choice("height", pixels),
            width=choice("width", pixels),
            num_frames=choice("num_frames", lengths),
            batch_size=slider("batch_size", 1, 1, 16),
            K=slider("K, steps", 1, 1, MAX_STEPS),
            frames=choice("frames", FRAMES),
            dtype=choice("dtype", ("float16", "bfloat16", "float32")),
            gradient_checkpointing=switch("gradient_checkpointing: recompute blocks", True),
            sequential_guidance=switch("sequential_guidance: its branches one by one", False),
            model_cpu_offload=switch("model_cpu_offload: idle networks on the CPU", False),
            activation_offload=switch("activation_offload: kept activations on the CPU", False),
            decoder_states=choice("decoder states", {0: "on the GPU", "cpu": "on the CPU"}),
            quantize=choice("quantize", {0: "no", "8bit": "8bit", "4bit": "4bit"}),
        )
        self.answers: dict[tuple, Memory] = {}
        self._defaults = self.values()
        # Also within `set`, in which the model comes before K.
        self.model.observe(self._limit_steps, "value")
        self.on(self.changed, *self.settings.values())
        self.simulate_button = self.button("simulate", "play", 110, self._job, "primary")
        self.fit_button = self.button("make it fit", "wrench", 120, self.make_it_fit)
        self.drawing, self.verdict, self.code = HTML(), HTML(), HTML()
        buttons = row(self.simulate_button, self.fit_button)
        answer = column(buttons, self.drawing, self.verdict, flex="2 1 330px")
        *shown, offload, states, quantize = self.settings.values()
        more = fold("more settings", offload, states, quantize)
        controls = column(*shown, self.why, more, max_width="440px")
        self.assemble(beside(controls, answer), self.code)
        self._limit_steps()
        self.changed()

    def _limit_steps(self, _change=None) -> None:
        defaults = checkpoint_of(self.model.value).defaults
        self.K.max = defaults.get("num_inference_steps", MAX_STEPS)

    @property
    def changes(self) -> dict:
        """The settings of `vader_nb.memory` that are not at their defaults."""
        values = {n: v for n, v in self.values().items() if v != self._defaults[n]}
        values["frames"] = self.frames.value  # whose default depends on the reward
        if not is_causal(self.model.value):  # then its control is disabled
            values.pop("decoder_states", None)
        if "K" in values:
            values["strategy"] = f"Last({values.pop('K')})"
        return {n: v for n, v in values.items() if n not in ASKED}

    def _question(self) -> tuple:
        return self.model.value, self.reward.value, *self.changes.items()

    @property
    def memory(self) -> Memory | None:
        """The answer for the current settings; None if it has not been simulated."""
        return self.answers.get(self._question())

    @property
    def suggestion(self) -> dict | None:
        """The settings to change so that it fits; None if none are known."""
        return self.memory.suggestions.get(self.gpu_memory.value) if self.memory else None

    def simulate(self, **changes) -> Memory:
        """Simulate now, after setting controls by name, and wait for the result."""
        self.set(**changes)
        self.jobs.finish(self._job)
        return self.answers[self._question()]

    def make_it_fit(self) -> None:
        """Change the settings to what was found to fit, and simulate that."""
        if not self.suggestion:
            raise ValueError("no settings that fit are known: press “simulate” first")
        changes = dict(self.suggestion)
        if "frames" in changes:
            changes["frames"] = str(changes["frames"])
        self.set(**changes)
        self.jobs.submit(self._job, 0)

    def _job(self) -> Job:
        asked, changes = (self.model.value, self.reward.value), self.changes
        gpu, question = self.gpu_memory.value, self._question()
        self.say(f"Simulating one training step. {ATOMIC}")
        yield 0.05
        answer = Memory(*asked, changes, simulate(*asked, **changes))
        remember(self.answers, question, answer, KEPT)
        self._show()
        if not answer.fits[gpu]:
            for tried, _ in enumerate(answer.search(gpu), 1):
                self.say(f"A {gpu} is too small. Searching, simulation {tried}. {ATOMIC}")
                yield min(0.95, 0.3 + 0.1 * tried)
        self.say("")
        self._show()

    def changed(self) -> None:
        try:
            is_per_frame(self.model.value, self.reward.value)
        except (ValueError, OSError):
            self._show(UNREADABLE)
            raise
        self._show()

    def _show(self, unreadable: str = "") -> None:
        memory, suggestion = self.memory, self.suggestion
        gpu, size = self.gpu_memory.value, GPUS[self.gpu_memory.value]
        disable(unreadable, self.simulate_button)
        causal = is_causal(self.model.value)
        disable("" if causal else "this model's decoder keeps no states", self.decoder_states)
        disable("" if suggestion else "no settings that fit are known", self.fit_button)
        self.fit_button.layout.display = "" if suggestion else "none"
        self.why.value = note(unreadable)
        values: dict[str, float] = dict.fromkeys(STAGES, 0.0)
        label, remark = f"A {gpu} has {size:g} GiB.", "not simulated yet"
        verdict = f"<div role=status>{unreadable or UNKNOWN}</div>"
        if memory:
            values |= {stage: peak / GIB for stage, peak in memory.stages.items()}
            peaks = ", ".join(f"{stage} {value:.2f}" for stage, value in values.items())
            label = f"Peak memory by stage in GiB: {peaks}; a {gpu} has {size:g}."
            remark = f"light: a margin of {MARGIN:g} GiB"
            verdict = self._verdict(memory, gpu)
        drawn = bars(values, size, MARGIN, f"{gpu}: {size:g} GiB", label)
        self.drawing.value, self.verdict.value = drawn + note(remark), verdict
        asking = note("The same question in Python, and in a shell:")
        self.code.value = "" if unreadable else asking + code(self.python) + code(self.shell)

    def _verdict(self, memory: Memory, gpu: str) -> str:
        """Whether it fits, and what would help."""
        answer, advice = "Fits" if memory.fits[gpu] else "Does not fit", ""
        if gpu in memory.suggestions:
            found = memory.suggestions[gpu]
            advice = f"{'It fits' if found else 'Nothing helps:'} {describe(found)}."
        elif not memory.fits[gpu]:
            advice = "Press “simulate” to search for settings that fit."
        return (
            f"<div role=status><b>{answer}:</b> {memory.bytes / GIB:.2f} GiB and a margin of {MARGIN:g} GiB, "
            f"of {GPUS[gpu]:g} GiB on a {gpu}. {advice}</div>"
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
        asked = {name: self.settings[name].value for name in ASKED}
        words = [f"{name}={value}" for name, value in (asked | self.changes).items()]
        return shlex.join(["vader-nb", "memory", *words])

    def to_html(self) -> str:
        table = self.memory._repr_html_() if self.memory else ""
        return f"{self.drawing.value}{self.verdict.value}{table}{self.code.value}"
