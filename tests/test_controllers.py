"""runs/controllers.py: what the controllers do, and where their returns go."""

import csv
import itertools

import controllers
import numpy as np
import pytest
import scripts

from common.envs import make_vec, mix_seed
from conftest import ROOT

ROWS = list(csv.DictReader((ROOT / "runs" / "results" / "controllers.csv").open()))


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Rows of a file, which goes elsewhere."""
    monkeypatch.setattr(controllers, "RESULTS", tmp_path)
    return lambda name: list(csv.DictReader((tmp_path / name).open()))


def test_every_controller_has_its_row():
    known = [(task, name) for task, found in controllers.CONTROLLERS.items() for name in found]
    assert sorted((row["task"], row["controller"]) for row in ROWS if row["setting"] == "usual") == sorted(known)
    shifted = [row["controller"] for row in ROWS if row["setting"] == "fewer"]
    assert shifted == list(controllers.CONTROLLERS["omar_simple_spread_6"]) and len(ROWS) == len(known) + 3


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(list(row.values())[:3]))
def test_results_are_of_todays_controllers(row):
    """On other episodes; one of a robot."""
    task, mean, std = row["task"], float(row["return_mean"]), float(row["return_std"])
    if task.startswith("mamujoco_"):
        assert abs(controllers.play(task, controllers.CONTROLLERS[task][row["controller"]], 1, 7)[0] - mean) < 4 * std
        return
    shift = row["setting"].replace("usual", "")
    count = 60 if task.startswith("mpe_") else 500
    returns = controllers.play(task, controllers.CONTROLLERS[task][row["controller"]], count, 7, shift=shift)
    assert abs(returns.mean() - mean) < 4 * std / count**0.5


@pytest.mark.parametrize("n", [3, 4])
def test_spread_takes_the_assignment_with_the_shortest_way(n):
    rng = np.random.default_rng(0)
    start, now = rng.normal(size=(2, 30, n, 6 * n))
    near = now * 0.02  # forces are not clipped
    act = controllers.spread(None, start, rng)
    for e in range(30):
        way = lambda order: sum(np.hypot(*near[e, i, 4 + 2 * k : 6 + 2 * k]) for i, k in enumerate(order))
        best = min(itertools.permutations(range(n)), key=way)  # of this moment, whatever they saw at the start
        force = [8 * near[e, i, 4 + 2 * k : 6 + 2 * k] - 2 * near[e, i, :2] for i, k in enumerate(best)]
        np.testing.assert_allclose(act(near)[e], force)
    assert np.abs(act(start)).max() == 1


@pytest.mark.parametrize("task", controllers.PURSUIT)
def test_pursuit_by_hand(task):
    count, _ = controllers.PURSUIT[task]
    first, width = (12, 16) if count == 2 else (18, 24)
    obs = np.zeros((1, 3, width), np.float32)
    obs[0, :, first : first + 2] = ahead = np.array([(3, 4), (0, -2), (-1, 0)])  # where each sees the prey
    straight = controllers.pursuit(None, None, None, count)
    np.testing.assert_allclose(straight(obs)[0], [(0.6, 0.8), (0, -1), (-1, 0)], atol=1e-6)
    obs[..., first + 2 : first + 4], obs[..., :2] = (0.5, 0), (0.25, 0)  # the prey's velocity, and their own
    act = lambda *constants: controllers.pursuit(None, None, None, count, constants)(obs / 100)[0]
    np.testing.assert_allclose(act(0, 6, 10, 4), 0.06 * (ahead + 4 * np.array([0.5, 0])) + 0.1 * np.array([0.25, 0]))
    np.testing.assert_allclose(act(0, 600, 100, 0), np.clip(6 * ahead + np.array([0.25, 0]), -1, 1), atol=1e-5)
    # Around the prey, where they are already: of three on a circle nobody moves to another's place.
    angles = np.array([0.3, 0.3 + 2 * np.pi / 3, 0.3 - 2 * np.pi / 3])
    ring = np.stack([np.cos(angles), np.sin(angles)], -1)
    obs[0, :, first : first + 2] = -0.2 * ring
    np.testing.assert_allclose(controllers.pursuit(None, None, None, count, (0.2, 1, 0, 0))(obs)[0], 0, atol=1e-6)


def test_who_decides_for_itself_goes_where_another_goes():
    returns = {row["controller"]: float(row["return_mean"]) for row in ROWS if row["setting"] == "usual"}
    assert returns["some good way"] - returns["own good way"] > 30
    envs, rng = make_vec("omar_simple_spread_6", 200, shift="fewer"), np.random.default_rng(0)
    obs, _ = envs.reset(seed=0)
    act = controllers.walk(envs, obs, rng, 10)
    for _ in range(25):
        obs = envs.step(act(obs))[0]
    places, gone = scripts.landmarks(envs)
    far = np.linalg.norm(places[:, None] - obs[:, :, None, 2:4], axis=-1) + 9 * gone[:, None]  # [200, agent, landmark]
    nearest = far.argmin(-1)
    assert (far.min(-1) < 0.2).mean() > 0.9 and np.mean([len(set(row)) == 3 for row in nearest]) > 0.9


def test_play_begins_where_the_controller_was_asked():
    seen = []

    def controller(envs, start, rng):
        seen.append(start)
        return lambda obs: seen.append(obs) or rng.uniform(-1, 1, envs.action_space.shape)

    returns = controllers.play("omar_simple_spread", controller, 3, 11)
    np.testing.assert_array_equal(seen[0], seen[1])
    np.testing.assert_array_equal(seen[0], make_vec("omar_simple_spread", 3).reset(seed=11)[0])
    assert len(seen) == 26 and returns.shape == (3,)


def test_rows_take_the_place_of_older_ones(results, monkeypatch):
    asked = []

    def play(env_id, controller, episodes, seed, shift=""):
        asked.append((env_id, episodes, seed, shift))
        return np.arange(episodes) + 1000.0 * len(asked)

    monkeypatch.setattr(controllers, "play", play)
    tasks = ("mpe_simple_spread", "omar_simple_spread_6", "mamujoco_ant_2x4")
    controllers.main(tasks)
    before = results("controllers.csv")
    assert before[1] == dict(
        task=tasks[0],
        setting="usual",
        controller="standing still",
        return_mean="2499.5",
        return_std="288.675",
        episodes="1000",
    )
    fresh = mix_seed(1000, 1)
    settings = [("mpe_simple_spread", 1000, fresh, "")] * 3 + [("mamujoco_ant_2x4", 20, fresh, "")] * 2
    settings[3:3] = [(tasks[1], 1000, fresh, shift) for shift in ("", "fewer") for _ in range(3)]
    assert asked == settings
    controllers.main(tasks[1:2])
    after = results("controllers.csv")
    assert len(after) == 11 and after[:3] + after[9:] == before[:3] + before[9:]
    key = lambda row: list(row.values())[:3]
    assert list(map(key, after)) == list(map(key, before))
    assert [float(new["return_mean"]) - float(old["return_mean"]) for new, old in zip(after, before)][3:9] == [8000] * 6
