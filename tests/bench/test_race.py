"""The race of recipes: what a run trains with, that results are kept, and which share of the characters the tables name."""

import json
import sys

import pytest

from bench import race
from tritale.common.errors import UserError
from tritale.data.built_in import open_data, write_built_in


@pytest.fixture
def text(tmp_path) -> race.Text:
    write_built_in(tmp_path / "few", seed=1, stories=60, validation_stories=10, vocab_size=600)
    return race.Text(tmp_path / "few", *open_data(tmp_path / "few")[1:], characters=4000)


def test_a_race_is_trained_resumed_and_reported(text, tmp_path, monkeypatch, capsys):
    for keys in race.RECIPES.values():
        monkeypatch.setitem(keys, "train.compile", "false")
    command = ["race", "series", "ours@0.5", "--data", str(text.folder), "--characters", "4000", "--seeds", "1", "2", "--preset", "tiny"]
    monkeypatch.setattr(sys, "argv", [*command, "--results", str(tmp_path / "results.jsonl")])
    race.main()
    rows = race.read(tmp_path / "results.jsonl")
    assert [(r["run"], r["seed"]) for r in rows] == [("series", 1), ("series", 2), ("ours@0.5", 1), ("ours@0.5", 2)]
    assert rows[0]["characters"] == pytest.approx(4000, rel=0.03) and rows[2]["characters"] == pytest.approx(2000, rel=0.06)
    assert 5 < rows[0]["bits"] != rows[1]["bits"]  # two seeds; hardly trained
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[:3]))
    monkeypatch.setattr(race, "train", lambda config, *_: rows[3] | {"bits": 1.0, "seed": config.seed})
    race.main()
    assert race.read(tmp_path / "results.jsonl") == [*rows[:3], rows[3] | {"bits": 1.0}]
    assert "4 of 4: ours@0.5, seed 2" in capsys.readouterr().out
    race.chart(rows, tmp_path / "race.png")
    assert (tmp_path / "race.png").read_bytes()[1:4] == b"PNG"


def test_a_run_has_its_recipe_its_share_and_its_changes(text):
    config, init = race.config_of("adamw@0.5 optim.lr=0.125", 7, text, "tiny")
    assert (config.optim.matrices, config.optim.lr, config.seed, init) == ("adamw", 0.125, 7, "normal")
    whole, init = race.config_of("adamw+init", 7, text, "tiny")
    assert init == "ours"
    assert whole.train.max_steps == pytest.approx(2 * config.train.max_steps, abs=1)
    series, _ = race.config_of("series", 7, text, "tiny")
    assert series.optim.embedding_lr is None and series.optim.decay_fraction == 0
    with pytest.raises(UserError, match="'sgd' is unknown; choose one of series"):
        race.config_of("sgd", 7, text, "tiny")


def test_the_smallest_share_whose_mean_reaches_the_figure_is_named():
    def rows(run: str, steps: int, *bits: float) -> list[dict]:
        return [{"run": run, "seed": i, "bits": b, "steps": steps, "characters": 10 * steps} for i, b in enumerate(bits)]

    times = [{"run": "series", "step_seconds": 0.1}, {"run": "ours", "step_seconds": 0.2}]
    shares = rows("ours@0.4", 40, 1.9, 2.0) + rows("ours@0.2", 20, 2.2, 2.4) + rows("ours@0.3", 30, 1.9, 2.2)
    table = race.tables([*times, *rows("series", 100, 2.0, 2.1), *rows("adamw", 100, 1.0, 1.0), *shares, *rows("ours optim.lr=1", 90, 0.5)])
    assert "| series | 0.30 × | 0.60 × | no |" in table
    assert "| adamw | not reached |  |  |" in table
    assert "| ours | 0.4 | 400 | 40 | 2 | 1.950 (1.900–2.000) | 8 |" in table
    assert "| ours | 1 | `optim.lr=1` | 0.500 |" in table
