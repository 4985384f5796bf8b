"""Where robots have been: what training records."""

import tracemalloc

import gymnasium as gym
import numpy as np
import pytest

import omad
from common.envs import RecordPositions, make_env, make_vec


def test_positions_take_the_memory_of_the_steps_taken():
    """Eight bytes each, step after step and in each copy after copy, behind those from before a run was resumed."""

    class Robots(gym.vector.VectorEnv):
        number = 0

        def step(self, actions):
            self.number += 1
            return 0, 0, 0, 0, {"torso_xy": np.array([[self.number, 0], [self.number, 1]], np.float64)}

    recorder = RecordPositions(Robots(), np.array([[7.0, 8.0]]))
    tracemalloc.start()
    for _ in range(10_000):
        recorder.step(None)
    assert tracemalloc.get_traced_memory()[1] < 1.5 * 8 * 20_000
    tracemalloc.stop()
    assert recorder.positions.shape == (20_001, 2) and recorder.positions.dtype == np.float32
    assert recorder.positions[:5].tolist() == [[7, 8], [1, 0], [1, 1], [2, 0], [2, 1]]
    assert recorder.positions[-1].tolist() == [10_000, 1]


ROBOT = "mamujoco_swimmer_2x1"
SWIM = f"--env-id {ROBOT} --total-timesteps 4000 --num-envs 2 --eval-every 2000 --eval-episodes 1 --device cpu"
SWIM += " --learning-starts 3950 --updates-per-step 0.5 --policy-hidden 8 --critic-hidden 8 --batch-size 8 --n-atoms 5"
SWIM += " --denoising-steps 1"


class Watched(gym.vector.VectorWrapper):
    """Writes down where the robots say they are, and dies at a step."""

    def __init__(self, envs, death=0):
        super().__init__(envs)
        self.seen, self.death = [], death

    def step(self, actions):
        if len(self.seen) + 1 == self.death:
            raise KeyboardInterrupt
        result = self.env.step(actions)
        self.seen.append(result[4]["torso_xy"].copy())
        return result


def test_training_records_where_the_torso_is(cli, tmp_path, monkeypatch):
    """Row by row what the environments say, and a resumed run's file is the uninterrupted one's."""
    monkeypatch.setattr(omad, "evaluate", lambda *_: np.zeros(1))  # a thousand steps each
    started, train = [], omad.train
    monkeypatch.setattr(omad, "train", started.append)
    assert cli(*SWIM.split())[0] == 0
    monkeypatch.setattr(omad, "train", train)
    watched = Watched(make_vec(ROBOT, 2))
    omad.train(started[0], watched)
    (whole,) = tmp_path.glob("*__omad__*")
    xy = np.load(whole / "torso_xy.npy", allow_pickle=False)
    assert xy.shape == (4000, 2) and np.isfinite(xy).all() and np.ptp(xy) > 0.1
    np.testing.assert_array_equal(xy, np.concatenate(watched.seen))

    with pytest.raises(KeyboardInterrupt):
        omad.train(started[0], Watched(make_vec(ROBOT, 2), death=1100))
    run = next(path for path in tmp_path.glob("*__omad__*") if path != whole)
    assert len(np.load(run / "torso_xy.npy")) == 2000
    (run / "torso_xy.npy").write_bytes(b"newer than the checkpoint, or damaged: it is in there too")
    code, _, err = cli("--resume", run, run_dir=False)
    assert code == 0, err
    np.testing.assert_array_equal(np.load(run / "torso_xy.npy"), xy)


def test_robots_on_a_line_have_no_positions():
    env = make_env("mamujoco_halfcheetah_2x3")
    env.reset(seed=0)
    assert "torso_xy" not in env.step(np.zeros((2, 3)))[4]
