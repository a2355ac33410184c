"""All panels on one page, with a tab for each and a menu of models: what `make app` serves.

Playground()                                        in a notebook
playground.open("Sample", "tiny-i2v")               the same from Python: the panel
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from ipywidgets import HTML, ToggleButtons, VBox

from ..drawing import note
from ..models import VideoModel, load
from ..stepwise import Job
from .comparison import RewardComparison
from .composer import RewardComposer
from .controls import FULL, choice
from .monitor import TrainingMonitor
from .panel import Panel
from .planner import MemoryPlanner
from .run_viewer import RunViewer
from .sampler import Sampler
from .truncation import TruncationExplorer

MODELS = ("tiny", "tiny-wan", "tiny-i2v")
# Tab -> the question that its panel answers.
TABS = {
    "Sample": "What does an adapter do to a clip?",
    "Compare": "Is an adapter better than the base model, and by which reward? Vote without knowing which is which.",
    "Compose": "What do I want, in one number? A weighted sum of rewards, and how it ranks clips.",
    "Truncate": "How far back must the gradient go, and what does that cost?",
    "Plan memory": "Does training a model of full size fit on a GPU? Nothing is downloaded.",
    "Watch a run": "Is a run going where I want? “vader-nb align name=playground” in a shell starts one.",
    "Compare runs": "Which method gets more for what it spends? “vader-nb race races/tiny” in a shell starts a race.",
}
WITHOUT_MODEL = ("Plan memory", "Watch a run")


class Playground(Panel):
    """Every panel, made when its tab is first opened.

    Args:
        models: Names for `vader_nb.load`.
        run: The folder of the run that is watched. The race beside it is looked at, too.
    """

    title = "Video models that learn from rewards"
    hint = (
        "VADER trains a video model with the gradient of a reward, through its last denoising steps. "
        "Choose a question; the models are tiny, and answer in seconds."
    )

    def __init__(self, models: Sequence[str] = MODELS, run: str | Path = "runs/playground"):
        # Of this page alone: a visitor sees no clips, votes or exports of another one.
        self.folder, self.run = Path(tempfile.mkdtemp(prefix="vader-nb-")), Path(run)
        self.models: dict[str, VideoModel] = {}
        self.panels: dict[tuple[str, str], Panel] = {}
        super().__init__(
            tab=ToggleButtons(options=[*TABS], style={"button_width": "auto"}, layout=FULL),
            model=choice("model", models, width="260px"),
        )
        self.question, self.place = HTML(), VBox(layout=FULL)
        self.on(self._job, self.tab, self.model)
        self.assemble(self.tab, self.question, self.model, self.place)

    def _make(self, tab: str, name: str) -> Panel:
        if tab == "Plan memory":
            return MemoryPlanner()
        if tab == "Watch a run":
            return TrainingMonitor(self.run)
        if name not in self.models:
            self.models[name] = load(name)
        make: dict[str, Callable[[VideoModel], Panel]] = {
            "Sample": lambda model: Sampler(model, folder=self.folder / "clips"),
            "Compare": lambda model: RewardComparison(model, folder=self.folder / name),
            "Compose": RewardComposer,
            "Truncate": TruncationExplorer,
            "Compare runs": lambda model: RunViewer(self.run.with_name("race"), model),
        }
        return make[tab](self.models[name])

    @property
    def key(self) -> tuple[str, str]:
        """The tab that is open, and the model of its panel, empty for those without one."""
        return self.tab.value, "" if self.tab.value in WITHOUT_MODEL else self.model.value

    def _job(self) -> Job:
        key = tab, name = self.key
        self.model.layout.display = "" if name else "none"
        self.question.value = note(TABS[tab])
        if key not in self.panels:
            self.place.children = []
            self.say("One moment: the models are loading, and the first clips are being made.")
            yield 0.1
            self.panels[key] = self._make(tab, name)
            self.panels[key].bundles()  # its first picture
            self.say("")
        self.place.children = [self.panels[key].box]

    def open(self, tab: str, model: str | None = None) -> Panel:
        """Open a tab, and return its panel. Raises ValueError for a tab or model that does not exist."""
        self.set(tab=tab, model=model or self.model.value)
        self.prepare()
        return self.panels[self.key]

    def prepare(self) -> None:
        self.jobs.finish(self._job)

    def to_html(self) -> str:
        return self.panels[self.key].to_html()
