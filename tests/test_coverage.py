"""runs/coverage.py, and the positions that training records for it."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import omad
from common.envs import make_env, make_vec
from conftest import ROOT, SHORT

sys.path.insert(0, str(ROOT / "runs"))
import coverage as coverage_script


def make_run(folder: Path, xy, seed=1) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"args": {"env_id": "mamujoco_ant_2x4", "policy": "diffusion", "seed": seed}}))
    np.save(folder / "torso_xy.npy", np.asarray(xy, np.float32))
    return folder


def run_script(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["coverage.py", *map(str, argv)])
    coverage_script.main()


def test_bins_counts_and_shares(tmp_path, monkeypatch, capsys):
    one = make_run(
        tmp_path / "one", [[0.1, 0.1], [0.9, 0.9], [-0.1, 0.1], [np.nan, np.nan], [1.5, 0.2], [9.0, 9.0]]
    )  # 3 in five steps
    two = make_run(tmp_path / "two", [[0.1, 0.1], [5.5, 5.5]], seed=2)  # one of them shared
    run_script(monkeypatch, one, two, "--steps", 5, "--picture", tmp_path / "map.png")
    out, err = capsys.readouterr()
    assert "union of the 2 runs: 4 bins" in out and "bins of 1 m x 1 m" in out
    assert "     3 bins  75.0 %" in out and "     2 bins  50.0 %" in out
    assert "two has the positions of 2 steps only" in err and "one has the positions of 4 steps only" in err
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    bins, counts = coverage_script.visited(np.array([[0.1, 0.1], [0.9, 0.9], [-0.1, 0.1]]), 1.0)
    assert bins.tolist() == [[-1, 0], [0, 0]] and counts.tolist() == [1, 2]
    assert len(coverage_script.visited(np.array([[0.1, 0.1], [0.9, 0.9]]), 0.5)[0]) == 2


@pytest.mark.parametrize("damage", ["missing", "pickle", "shape", "config"])
def test_runs_without_positions_are_one_line(tmp_path, monkeypatch, damage):
    run = make_run(tmp_path / "run", [[0.0, 0.0]])
    if damage == "missing":
        (run / "torso_xy.npy").unlink()
    elif damage == "pickle":
        np.save(run / "torso_xy.npy", np.array([{}], object), allow_pickle=True)
    elif damage == "shape":
        np.save(run / "torso_xy.npy", np.zeros((4, 3)))
    else:
        (run / "config.json").unlink()
    with pytest.raises(SystemExit) as stop:
        run_script(monkeypatch, run, "--picture", tmp_path / "map.png")
    assert str(run) in str(stop.value.code) and "\n" not in str(stop.value.code) and not (tmp_path / "map.png").exists()


@pytest.mark.parametrize("flags", [(), ("RUN", "--bin-size", 0), ("RUN", "--steps", -5), ("RUN", "--picture", "/nowhere/map.png")])
def test_bad_flags_are_one_line(tmp_path, monkeypatch, flags):
    run = make_run(tmp_path / "run", [[0.0, 0.0]])
    with pytest.raises(SystemExit) as stop:
        run_script(monkeypatch, *(run if flag == "RUN" else flag for flag in flags))
    assert str(stop.value.code).startswith("coverage.py: error: ") and "\n" not in str(stop.value.code)


def test_positions_take_the_memory_of_the_steps_taken():
    """Not of those planned; and an unrecorded stretch is NaN."""
    run = omad.Run.__new__(omad.Run)
    run.torso_xy, run.step = None, 7
    for run.step in range(7, 300_007, 50_000):
        run.record_path(np.full((3, 2), run.step))
    assert len(run.torso_xy) <= 600_020 and np.isnan(run.torso_xy[:7]).all() and np.isnan(run.torso_xy[10:50_007]).all()
    assert run.torso_xy[250_007:250_010].tolist() == [[250_007.0] * 2] * 3 and run.torso_xy[7].tolist() == [7.0, 7.0]


ANT = [*SHORT, "--env-id", "mamujoco_ant_2x4", "--num-envs", "2", "--eval-every", "2000", "--eval-episodes", "1"]
ANT += ["--learning-starts", "1900", "--updates-per-step", "0.5", "--total-timesteps", "4000"]


def test_training_records_where_the_torso_is(cli, tmp_path, monkeypatch):
    """Row by row what the environments say, and a resumed run's file is the uninterrupted one's."""
    seen, step = [], omad.Run.record_path

    def spy(self, xy, at=None):
        seen.append(np.array(xy))
        step(self, xy, at)

    monkeypatch.setattr(omad.Run, "record_path", spy)
    assert cli(*ANT)[0] == 0
    (whole,) = tmp_path.glob("*__omad__*")
    xy = np.load(whole / "torso_xy.npy", allow_pickle=False)
    assert xy.shape == (4000, 2) and np.isfinite(xy).all()
    np.testing.assert_array_equal(xy, np.concatenate(seen))
    monkeypatch.setattr(omad.Run, "record_path", step)
    envs, args = make_vec("mamujoco_ant_2x4", 2), omad.preset("mamujoco_ant_2x4")
    envs.reset(seed=omad.mix_seed(1, 0))
    g = torch.Generator().manual_seed(1)
    for t in range(20):  # the first, random, steps again
        info = envs.step(torch.rand(2, 2, 4, generator=g).numpy() * 2 - 1)[4]
        np.testing.assert_allclose(xy[2 * t : 2 * t + 2], info["torso_xy"], atol=1e-6)
    envs.close()
    assert args.observation == "full"

    save = omad.Run.evaluate_and_save

    def then_stop(self, envs):
        save(self, envs)
        if self.step == 2000:
            raise KeyboardInterrupt

    monkeypatch.setattr(omad.Run, "evaluate_and_save", then_stop)
    assert cli(*ANT)[0] == 130
    run = next(path for path in tmp_path.glob("*__omad__*") if path != whole)
    assert len(np.load(run / "torso_xy.npy")) == 2000
    np.save(run / "torso_xy.npy", np.concatenate([np.load(run / "torso_xy.npy"), np.ones((7, 2))]))  # newer than the checkpoint
    monkeypatch.setattr(omad.Run, "evaluate_and_save", save)
    assert cli("--resume", run, run_dir=False)[0] == 0
    np.testing.assert_array_equal(np.load(run / "torso_xy.npy"), xy)
    (run / "torso_xy.npy").write_bytes(b"damaged")
    config = (run / "config.json").read_bytes()
    code, _, err = cli("--resume", run, "--total-timesteps", 6000, run_dir=False)
    assert code == 2 and "torso_xy.npy" in err and len(err.splitlines()) == 1 and (run / "config.json").read_bytes() == config


def test_robots_on_a_line_have_no_positions():
    env = make_env("mamujoco_halfcheetah_2x3")
    env.reset(seed=0)
    assert "torso_xy" not in env.step(np.zeros((2, 3)))[4]
