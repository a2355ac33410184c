"""Publish a race that was run: python -m tests.benchmarks.races runs/race-full full

Its lines go into vader_nb/zoo/races/NAME, as `vader-nb race` wrote them, in one file, numbers with five digits:
`vader_nb.Race(vader_nb.zoo.races()[NAME])`.
"""

import sys
from pathlib import Path

from vader_nb import checkpoints, zoo
from vader_nb.race_results import LINES, Race


def rounded(value):
    """Numbers with five digits, in whatever holds them."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def publish(source: str, name: str) -> None:
    race, folder = Race(source), zoo.RACES / name
    folder.mkdir(parents=True, exist_ok=True)
    lines = [{k: rounded(v) for k, v in line.items() if k != "folder"} for line in race.lines]
    (folder / LINES).write_text("".join(checkpoints.to_json(line) + "\n" for line in lines))
    (folder / "race.json").write_bytes((Path(source) / "race.json").read_bytes())
    print(Race(folder).table())


if __name__ == "__main__":
    publish(*sys.argv[1:])
