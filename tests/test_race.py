"""A race: equal budgets, every job once, resumed as if it had not been killed, and its tables."""

import json
import math
import multiprocessing
import os
import sys
from pathlib import Path

import pytest
import torch

from vader_nb import cli, config, lora, race, race_results, stats, zoo
from vader_nb.distributed import launch
from vader_nb.estimators import parse_estimator
from vader_nb.meter import COSTS, Meter
from vader_nb.race_jobs import SETTINGS as SETTABLE
from vader_nb.race_jobs import checked_budget, plan_jobs
from vader_nb.race_results import LINES, Race, read_lines
from vader_nb.racing import Runner
from vader_nb.rewards import brightness, colorfulness
from vader_nb.train_config import TrainConfig

from .test_parallel import build

sys.path.insert(0, str(Path(__file__).parent.parent / "notebooks"))
import pages  # noqa: E402

CAPTIONS = ["a red star", "a blue circle", "a green square growing"]
CONTESTANTS = {
    "VADER": {"strategy": "Last(1)"},
    "GRPO, n = 2": {"estimator": "GRPO(group_size=2)", "eta": 1.0},
    "best of 2": {"best_of": 2},
}
SETTINGS = {
    "held_out": CAPTIONS[:2],
    "held_out_reward": colorfulness(),
    "budget": {"reward_queries": 4},
    "learning_rates": [1e-2, 1e-1],
    "seeds": [0, 1],
    "evaluations": 2,
    "seeds_per_prompt": 1,
    "num_inference_steps": 2,
    "batch_size": 2,
    "rank": 2,
    "progress": False,
}


def run(directory, folder, contestants=CONTESTANTS, **changes):
    options = SETTINGS | {"output_dir": folder} | changes
    return race(build(directory), contestants, brightness(), CAPTIONS, **options)


def untimed(folder):
    """All lines, without seconds."""
    return [line | {"seconds": 0} for line in Race(folder).lines]


@pytest.fixture(scope="module")
def whole(micro_directory, tmp_path_factory):
    """A race that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    run(micro_directory, folder)
    return folder


def killed(directory, folder, at):
    """A race that dies right after its so-manieth line, before the checkpoint."""
    add_line, seen = Runner.add_line, []

    def mortal(self, job, file, values):
        add_line(self, job, file, values)
        seen.append(file)
        if len(seen) == at:
            with file.open("a") as stream:
                stream.write('{"contestant": "VAD')  # a torn line
            os._exit(9)

    Runner.add_line = mortal
    run(directory, folder)


def test_a_killed_race_goes_on_as_if_it_had_not_been(micro_directory, whole, tmp_path):
    server = multiprocessing.get_context("forkserver")  # a fork of this process might stand still
    server.set_forkserver_preload([__name__])
    for at in (2, 3):  # after a run's first part, and its last one
        dies = server.Process(target=killed, args=(micro_directory, tmp_path / "killed", at))
        dies.start()
        dies.join()
        assert dies.exitcode == 9
    assert 0 < len(untimed(tmp_path / "killed")) < len(untimed(whole))
    run(micro_directory, tmp_path / "killed")
    assert untimed(tmp_path / "killed") == untimed(whole)
    for path in whole.rglob("adapter.safetensors"):
        ours = lora.read(tmp_path / "killed" / path.relative_to(whole))[0]
        assert all(torch.equal(ours[key], value) for key, value in lora.read(path)[0].items())


def test_every_run_spends_the_budget_and_is_evaluated_at_its_parts(whole):
    lines = Race(whole).lines
    runs = [line for line in lines if line["seed"] is not None]
    assert len(runs) == 2 * 2 * 2 * 2 and len(lines) == len(runs) + 2
    assert {(line["part"], line["reward_queries"]) for line in runs} == {(1, 2), (2, 4)}
    for line in runs:  # two denoising steps of two clips, in two branches; one step learns (DDIM's last has no noise)
        clips = 2 * line["part"]
        assert line["denoiser_backwards"] == 2 * clips
        assert line["denoiser_calls"] == 2 * 2 * clips + 2 * clips
        assert line["bytes_kept"] > 0 and line["seconds"] > 0
    (best,) = [line for line in lines if line["contestant"] == "best of 2"]
    assert best["per_clip"] == {"reward_queries": 2, "denoiser_calls": 2 * 2 * 2}
    assert best["reward_queries"] == 0  # of training


def test_a_contestant_may_train_on_a_reward_of_its_own(micro_directory, tmp_path):
    contestants = {"bright": {}, "dark": {"reward": -1.0 * brightness()}}
    changes = {"learning_rates": [1e-1], "seeds": [0], "budget": {"reward_queries": 18}}
    best = run(micro_directory, tmp_path, contestants, evaluations=3, **changes).best()
    assert best["bright"].spent("reward_queries") == [2, 8, 18]  # (k / 3)² of the budget
    assert best["dark"].end("reward") < best["base"].end("reward") < best["bright"].end("reward")


def test_starting_a_race_that_is_over_changes_nothing(micro_directory, whole):
    before = {path: path.read_bytes() for path in whole.rglob("*.jsonl")}
    run(micro_directory, whole)
    assert {path: path.read_bytes() for path in whole.rglob("*.jsonl")} == before


def in_processes(directory, folder):
    own, ran = torch.distributed.get_rank(), Runner.run

    def noted(self, job):
        (folder / f"{job.folder}.by-{own}").touch()
        return ran(self, job)

    Runner.run = noted
    run(directory, folder)
    assert os.environ["WORLD_SIZE"] == "2"  # as before


def test_processes_share_the_jobs(micro_directory, whole, tmp_path):
    launch(in_processes, micro_directory, tmp_path, num_processes=2)
    assert untimed(tmp_path) == untimed(whole)
    owners = sorted(path.name for path in tmp_path.glob("*.by-*"))
    assert len(owners) == 10 and sum(name.endswith("by-1") for name in owners) == 5


@pytest.mark.parametrize(
    ("contestants", "changes", "message"),
    [
        ({"A": {"strateg": "Last(1)"}}, {}, "'strateg' of contestant 'A': did you mean strategy"),
        ({"A": {"steps": 3}}, {}, "'steps' of contestant 'A': the race decides it"),
        ({"A": {"strategy": "Lost(1)"}}, {}, "contestant 'A': cannot read strategy 'Lost"),
        ({"A": {"estimator": "GRPO(group_size=3)"}}, {}, "contestant 'A'.*group"),
        ({"A": {"best_of": 0}}, {}, "contestant 'A': n must be at least 1"),
        ({"A": {"best_of": 2, "rank": 4}}, {}, "rank of contestant 'A' has no effect"),
        ({"A": {"lr_scheduler": "cosine"}}, {}, "contestant 'A': lr_scheduler=cosine"),
        ({"A": {"learning_rates": [1e-3]}, "B": {}}, {}, "the same number of rates, got A 1, B 2"),
        ({"A": {"learning_rates": 1e-3}}, {}, "learning_rates of contestant 'A'"),
        ({"A": {}, "a": {}}, {}, "two jobs are named 'a-0.01-0'"),
        ({"A": "VADER"}, {}, "contestants.A must be a mapping"),
        ({"A": {}}, {"budget": {"hours": 3}}, "budget must be one of reward_queries"),
        ({"A": {}}, {"budget": {"seconds": 0}}, "budget.seconds must be a number above 0"),
        ({"A": {}}, {"evaluations": 0}, "evaluations must be at least 1"),
        ({"A": {}}, {"extend": 2}, "'extend'"),
        ({"A": {}}, {"held_out_reward": brightness()}, "trained on"),
    ],
)
def test_a_bad_race_names_the_key(micro_directory, tmp_path, contestants, changes, message):
    with pytest.raises(ValueError, match=message):
        run(micro_directory, tmp_path / "new", contestants, **changes)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "path", sorted((config.FOLDER / "races").glob("*.yaml")), ids=lambda p: p.stem
)
def test_shipped_races(path):
    got = config.read(config.Race, [f"races/{path.stem}"])
    rates, seeds = map(float, got.learning_rates), map(int, got.seeds)
    settings = {name: getattr(got, name) for name in SETTABLE}
    jobs = plan_jobs(got.contestants, settings, list(rates), list(seeds))
    assert jobs[0].contestant == "base" and checked_budget(got.budget, got.evaluations)
    for job in jobs:
        own = {name: value for name, value in job.settings.items() if name in SETTABLE}
        assert TrainConfig.from_flat(own).strategy
        assert parse_estimator(job.settings.get("estimator", "RewardGradient"))


def test_a_bad_race_file_names_the_key(tmp_path):
    for text, message in {
        "contestant: {}": "unknown key 'contestant' in .*did you mean contestants",
        "evaluations: many": "evaluations: ",
        "resume: true": "unknown key 'resume'",
    }.items():
        (tmp_path / "race.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            config.read(config.Race, [str(tmp_path / "race.yaml")])
    with pytest.raises(SystemExit):
        cli.main(["race", "races/tiny", "seeds=[a]"])


def test_another_race_in_the_folder_is_refused(micro_directory, whole):
    with pytest.raises(ValueError, match="another race: budget was .*4.* now .*6"):
        run(micro_directory, whole, budget={"reward_queries": 6})


# ---------------------------------------------------------------------------------------- results


def made_up(folder, curves, prompts=8):
    """A race's folder: (contestant, rate, seed) -> means of both rewards at the evaluations, captions spread around."""
    spread = torch.linspace(-0.1, 0.1, prompts, dtype=torch.float64)
    folder.mkdir()
    (folder / "race.json").write_text(json.dumps({"reward": "r", "held_out_reward": "h"}))
    for number, ((name, rate, seed), means) in enumerate(curves.items()):
        for part, (r, h) in enumerate(means, start=1):
            scores = {"r": (r + spread).tolist(), "h": (h + spread * (1 + h)).tolist()}
            scores |= {"diversity": (spread + 1 - h).tolist(), "motion": (spread + 2 - h).tolist()}
            line = {"contestant": name, "learning_rate": rate, "seed": seed, "part": part}
            line |= dict.fromkeys(COSTS, 100 * part if rate else 0) | {"step": part}
            line |= {"per_clip": {"reward_queries": 8 * (name == "best of 8")}, "scores": scores}
            path = folder / str(number) / LINES
            path.parent.mkdir(exist_ok=True)
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")
    return Race(folder)


CURVES = {
    ("base", None, None): [(0.0, 0.0)],
    ("A", 1e-3, 0): [(0.2, 0.2), (0.4, 0.4)],
    ("A", 1e-3, 1): [(0.4, 0.4), (0.6, 0.6)],
    ("A", 1e-2, 0): [(0.1, 0.9), (0.2, 0.9)],  # better by the held-out reward, which has no say
    ("A", 1e-2, 1): [(0.1, 0.9), (0.2, 0.9)],
    ("B", 1e-3, 0): [(0.1, 0.1), (0.2, 0.2)],
    ("B", 1e-3, 1): [(0.1, 0.1), (0.2, 0.2)],
    ("best of 8", None, None): [(0.3, 0.3)],
}


def test_the_table_has_the_intervals_of_stats(tmp_path):
    made = made_up(tmp_path / "race", CURVES)
    best = made.best()
    assert {name: runs.rate for name, runs in best.items()} == {
        "base": None,
        "A": 1e-3,
        "B": 1e-3,
        "best of 8": None,
    }
    ends = best["A"].scores("held-out reward")[:, -1].mean(0)
    low, high = stats.paired_interval(ends - best["base"].scores("held-out reward")[0, -1])
    table = made.table().markdown()
    assert f"0.5000: +0.5000 [{low:+.4f}, {high:+.4f}]; seeds 0.4000 to 0.6000" in table
    assert "best of 8 (8 queries per clip)" in table and "oracle" not in table
    chosen, other = "0.5000 (0.4000 to 0.6000)", "0.2000 (0.2000 to 0.2000)"
    rates = made.rates().markdown()
    assert f"| A | 0.001 | 2 | {chosen} | {chosen} | chosen |" in rates
    assert f"| A | 0.01 | 2 | {other} | 0.9000 (0.9000 to 0.9000) |  |" in rates
    assert "A" in made._repr_html_() and "| base |" in repr(made)


def test_the_base_comes_first_and_what_is_not_trained_last(tmp_path):
    """Colors follow that order, so that a contestant has the same one with and without best of n beside it."""
    made = made_up(tmp_path / "race", dict(reversed(CURVES.items())))
    assert list(made.best()) == ["base", "B", "A", "best of 8"]


def test_a_table_against_another_contestant(tmp_path):
    made = made_up(tmp_path / "race", CURVES)
    ends = [made.best()[name].scores("reward")[:, -1].mean(0) for name in "AB"]
    low, high = stats.paired_interval(ends[0] - ends[1])
    table = made.table(against="B").markdown()
    assert f"0.5000: +0.3000 [{low:+.4f}, {high:+.4f}]" in table
    assert "| 0.2000 |" in table  # B's own
    with pytest.raises(KeyError, match="no contestant 'C'; choose one of 'base', 'A', 'B'"):
        made.table(against="C")


def test_queries_to_reach_a_level(tmp_path):
    made = made_up(tmp_path / "race", CURVES)
    reached = made.reach("B")  # where B ended, 0.2
    assert reached["B"][0] == pytest.approx(200)
    assert reached["A"][0] == pytest.approx(100 * 0.2 / 0.3)
    low, high = reached["A"][1:]
    assert low < reached["A"][0] < high  # its seeds differ: one takes half as many queries
    assert math.isinf(made.reach(0.55)["B"][0])
    text = made.queries_to_reach(0.55).markdown()
    assert "not reached" in text and "| A |" in text
    assert made.reach(-1.0)["A"] == (0.0, 0.0, 0.0)


def test_plots(tmp_path):
    made = made_up(tmp_path / "race", CURVES)
    for x in COSTS:
        (axes,) = made.plot(x, "diversity").axes
        assert [text.get_text() for text in axes.get_legend().get_texts()] == [
            "base",
            "A",
            "B",
            "best of 8 (8 queries per clip)",
        ]
    first, second = both = made.pareto().axes
    assert (first.get_xlabel(), second.get_xlabel()) == ("diversity", "motion")
    assert made.plot(axes=first) is made.pareto(axes=both) is first.figure  # into what there is
    with pytest.raises(KeyError, match="no metric 'speed'; choose one of 'r', 'h'"):
        made.plot(y="speed")


@pytest.mark.parametrize("name", zoo.races())
def test_published_races_can_be_read(name):
    made = Race(zoo.races()[name])
    settings = config.read(config.Race, pages.SECTIONS[name].arguments.split())
    assert made.settings["budget"] == settings.budget and made.settings["model"] == settings.model
    assert set(made.best()) == {"base", *settings.contestants}
    for runs in made.best().values():
        assert runs.rate is None or len(runs.ends) == len(settings.seeds)


def test_a_race_is_read_while_it_is_written(tmp_path):
    made = made_up(tmp_path / "race", {("A", 1e-3, 0): [(0.1, 0.1)]})
    assert "not begun" in repr(made)
    made_up(tmp_path / "more", {key: CURVES[key] for key in list(CURVES)[:3]})
    more = Race(tmp_path / "more")
    file = tmp_path / "more" / "2" / LINES
    first, second = file.read_text().splitlines(keepends=True)
    file.write_text(first + second[:40])  # the second seed is on its way
    assert len(read_lines(file)) == 1
    assert more.best()["A"].scores("r").shape == (2, 1, 8)


def test_a_rate_that_was_not_finite_is_not_chosen(tmp_path):
    made = made_up(tmp_path / "race", CURVES)
    with (tmp_path / "race" / "1" / LINES).open("a") as file:
        line = {"contestant": "A", "learning_rate": 1e-3, "seed": 0, "part": 2, "failed": "nan"}
        file.write(json.dumps(line | dict.fromkeys(COSTS, 0)) + "\n")
    assert made.best()["A"].rate == 1e-2
    assert "| A | 0.001 | 2 | not finite | not finite |  |" in made.rates().markdown()


def test_crossing():
    x, y = torch.tensor([0.0, 10, 20]), torch.tensor([0.0, 1, 0.5])
    assert (
        race_results.crossing(x, y, 0.5) == pytest.approx(5) and race_results.crossing(x, y, 0) == 0
    )
    assert math.isinf(race_results.crossing(x, y, 1.5))


def test_the_meter_counts_what_autograd_keeps(micro_directory):
    model = build(micro_directory)
    weight = torch.nn.Parameter(torch.ones(10, dtype=torch.float64))
    with Meter(model) as meter, meter.saving():
        y = weight.exp()  # keeps its result: 80 bytes
        z = y.sin()  # keeps y, which is kept already
        assert meter.saved == 80
        z.sum().backward()
        assert (meter.saved, meter.kept) == (0, 80)
    assert "predict" not in vars(model)


def test_a_method_has_the_same_color_in_every_race():
    few, many = (
        race_results.colors(["base", "GRPO", "VADER"]),
        race_results.colors(["base", "mine", "DDPO", "DPO", "GRPO", "VADER", "yours"]),
    )
    assert [few[name] for name in ("GRPO", "VADER")] == [many[name] for name in ("GRPO", "VADER")]
    assert len(set(many.values())) == len(many)
