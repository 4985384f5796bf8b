"""datasets/assignments.py: its script, and the data that it makes."""

import itertools
import shutil

import assignments
import numpy as np
import pytest

from common.datasets import load_dataset
from common.envs import BadInput, make_vec


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where 40 episodes go instead."""
    monkeypatch.setattr(assignments, "FOLDER", tmp_path / "simple_spread_6" / "assignments" / "seed_0_data")
    monkeypatch.setattr(assignments, "EPISODES", 40)
    return assignments.FOLDER


def test_data_are_made_once_until_they_are_deleted(folder, monkeypatch, capsys):
    told = lambda: (assignments.make_data(), "return" in capsys.readouterr().out)[1]
    assert [told(), told()] == [True, False]  # the second time they are there
    before = np.load(folder / "acs_1.npy")
    assert before.shape == (1000, 2) and before.dtype == np.float32
    monkeypatch.setattr(assignments, "NOISE", 0.05)
    assert not told() and (np.load(folder / "acs_1.npy") == before).all()
    shutil.rmtree(folder)
    assert [told(), told()] == [True, False] and (np.load(folder / "acs_1.npy") != before).any()


@pytest.mark.parametrize("wrong", ["", "in the order of the ring", "one of them twice"])
def test_landmarks_are_listed_nearest_first(folder, wrong):
    assignments.make_data()
    for name in ("obs_1", "next_obs_1") if wrong else ():
        rows = np.load(folder / f"{name}.npy")
        places = rows[:, 4:16].reshape(-1, 6, 2)
        if wrong == "one of them twice":
            places[:, 5] = places[:, 4]
        else:
            turn = np.argsort(np.arctan2(*(places + rows[:, None, 2:4]).T).T, 1)
            places[:] = np.take_along_axis(places, turn[..., None], 1)
        np.save(folder / f"{name}.npy", rows)
    if wrong:
        with pytest.raises(BadInput, match="sees landmark"):
            load_dataset(folder, env_id=assignments.TASK)
    else:
        data = load_dataset(folder, env_id=assignments.TASK)
        assert len(data.obs) == 1000 and 690 < data.returns.mean() < 750  # noisy, but nobody is far from a landmark


def test_assignments():
    """Against brute force; the script reaches what it walks to."""
    envs, rng = make_vec(assignments.TASK, 60), np.random.default_rng(0)
    obs, _ = envs.reset(seed=0)
    places, gone = assignments.landmarks(envs)
    assert places.shape == (60, 6, 2) and not gone.any()
    index = lambda goal: (places[:, None] == goal[:, :, None]).all(-1).argmax(-1)  # of each agent's landmark [60, 3]
    goal = assignments.choose(obs, places, gone, rng, 1)
    best = index(goal)
    for e in range(60):
        far = np.linalg.norm(places[e] - obs[e, :, None, 2:4], axis=-1)
        totals = {order: sum(far[i, k] for i, k in enumerate(order)) for order in itertools.permutations(range(6), 3)}
        assert totals[tuple(best[e])] == pytest.approx(min(totals.values()))
        assert len(set(best[e])) == 3
        ten = sorted(totals.values())[9]
        for _ in range(3):
            assert totals[tuple(index(assignments.choose(obs, places, gone, rng, 10))[e])] <= ten + 1e-6
    many = np.array([index(assignments.choose(obs, places, gone, rng, 10)) for _ in range(40)])
    assert np.mean([len({tuple(x) for x in many[:, e]}) for e in range(60)]) > 8  # several good ways from one start
    gone = np.tile([True, False, True, False, True, False], (60, 1))
    assert (index(assignments.choose(obs, places, gone, rng, 6)) % 2 == 1).all()
    for _ in range(25):
        obs, _, _, _, info = envs.step(assignments.script(obs, goal))
    assert (np.linalg.norm(goal - obs[..., 2:4], axis=-1) < 0.1).mean() > 0.95 and info["episode"]["r"].mean() > 680
    obs[:1, :, :4], goal = [(0.2, 0, 1, 1), (0.4, 0, 1, 1), (0, 0, 1, 1)], np.array([[(1, 1), (9, 1), (1, 1.1)]])
    np.testing.assert_allclose(assignments.script(obs[:1], goal)[0], [(-0.3, 0), (1, 0), (0, 0.4)], atol=1e-6)
    few = make_vec(assignments.TASK, 8, shift="fewer")
    few.reset(seed=0)
    assert (assignments.landmarks(few)[1].sum(1) == 3).all()
