"""datasets/port.py: random teams here and in OMAR's environment."""

import csv

import numpy as np
import port
import pytest

from conftest import one_line


def test_the_port_is_compared_with_what_was_measured_there(tmp_path, monkeypatch):
    returns = np.random.default_rng(0).normal(150.0, 60.0, 40_000)
    uniform = port.uniform
    monkeypatch.setattr(port, "RESULTS", tmp_path)
    monkeypatch.setattr(port, "play", lambda env_id, who, *_, prey: (returns - 100 * bool(prey)) * (who is uniform))
    monkeypatch.setattr(port, "make_env", lambda env_id, prey: None)
    assert port.main(["--prey-tag", "file"]) == 0
    spread, *tag, world = csv.DictReader((tmp_path / "omar_port.csv").open())
    assert [row["prey"] for row in (spread, *tag, world)] == ["none", "omar", "own", "own"]
    assert tag[1]["apart_se"] == world["there_mean"] == "" and float(tag[0]["here_mean"]) == pytest.approx(50, abs=1)
    assert float(spread["here_std"]) == pytest.approx(60, rel=0.02) and spread["there_mean"] == "156"
    # Six below, where the difference of two means of 400 has a standard error of 4.2: 1.4 of them.
    assert float(spread["apart_se"]) == pytest.approx(-6 / np.hypot(3, 2.9), abs=0.15)


def test_bad_input_is_one_line(capsys):
    assert port.main(["--prey-tag", "x"]) == 2
    out, err = capsys.readouterr()
    assert one_line(err, "port") and "--prey x" in err and not out
