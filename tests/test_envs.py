"""The wrapper against the upstream environment."""

import os
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from mpe2 import simple_reference_v3, simple_speaker_listener_v4, simple_spread_v3

from common.envs import TASKS, BadInput, RecordPositions, evaluate, make_env, make_vec, mix_seed, record_video, versions
from conftest import ROOT

UPSTREAM = {
    "mpe_simple_spread": (simple_spread_v3, dict(N=3, local_ratio=0.5)),
    "mpe_simple_spread_n4": (simple_spread_v3, dict(N=4, local_ratio=0.5)),
    "mpe_simple_reference": (simple_reference_v3, dict(local_ratio=0.5)),
    "mpe_simple_speaker_listener": (simple_speaker_listener_v4, dict()),
}


def mpe_action(own: np.ndarray, space: gym.spaces.Box, movable: bool) -> np.ndarray:
    """A second, slot-by-slot writing of the action's meaning, to compare the wrapper's with."""
    out = np.zeros(space.shape, np.float32)
    if movable:
        for axis in range(2):
            out[2 + 2 * axis if own[axis] > 0 else 1 + 2 * axis] = abs(own[axis])
        own, at = own[2:], 5
    else:
        at = 0
    for k in range(len(out) - at):
        out[at + k] = 0.5 + own[k] / 2
    return out


@pytest.mark.parametrize(
    "env_id, episodes", [("mpe_simple_spread", 50)] + [(name, 10) for name in UPSTREAM if name != "mpe_simple_spread"]
)
def test_wrapper_equals_upstream(env_id, episodes):
    module, kwargs = UPSTREAM[env_id]
    theirs, ours = module.parallel_env(continuous_actions=True, max_cycles=25, **kwargs), make_env(env_id)
    rng = np.random.default_rng(0)
    for episode in range(episodes):
        want, _ = theirs.reset(seed=episode)
        obs, info = ours.reset(seed=episode)
        for step in range(1, 26):
            for i, agent in enumerate(ours.agents):
                np.testing.assert_array_equal(obs[i, : ours.obs_sizes[i]], want[agent])
                assert not obs[i, ours.obs_sizes[i] :].any()
            np.testing.assert_array_equal(info["state"], theirs.state())
            action = rng.uniform(-1, 1, ours.action_space.shape).astype(np.float32)
            bodies = theirs.unwrapped.world.agents
            moves = {
                a: mpe_action(action[i], theirs.action_space(a), bodies[i].movable) for i, a in enumerate(ours.agents)
            }
            want, rewards, _, truncations, _ = theirs.step(moves)
            obs, reward, terminated, truncated, info = ours.step(action)
            np.testing.assert_allclose(info["agent_rewards"], [rewards[a] for a in ours.agents], rtol=1e-6)
            assert reward == pytest.approx(np.mean(list(rewards.values())), rel=1e-6)  # the team reward is the mean
            assert not terminated and truncated == all(truncations.values()) == (step == 25)
        for i, agent in enumerate(ours.agents):  # the true final observation
            np.testing.assert_array_equal(obs[i, : ours.obs_sizes[i]], want[agent])


def test_actions_beyond_the_box_are_clipped():
    ours, same = make_env("mpe_simple_spread"), make_env("mpe_simple_spread")
    ours.reset(seed=0), same.reset(seed=0)
    far = np.array([[7.0, -7.0], [0.5, 2.0], [-3.0, 0.0]])  # float64 on purpose
    np.testing.assert_array_equal(ours.step(far)[0], same.step(np.clip(far, -1, 1).astype(np.float32))[0])


@pytest.mark.parametrize("env_id", TASKS)
def test_gymnasium_accepts_it(env_id):
    check_env(make_env(env_id), skip_render_check=True)


def test_unequal_agents_are_masked():
    env = make_env("mpe_simple_speaker_listener")
    assert env.obs_sizes == [3, 11] and env.action_sizes == [3, 2] and env.state_size == 14
    assert env.obs_mask.sum(1).tolist() == [3, 11] and env.action_mask.sum(1).tolist() == [3, 2]
    obs, _ = env.reset(seed=0)
    ignored = np.zeros((2, 3), np.float32)
    ignored[1, 2] = 1.0  # the listener has two numbers; the third is padding
    first = env.step(ignored)[0]
    env.reset(seed=0)
    np.testing.assert_array_equal(first, env.step(np.zeros((2, 3)))[0])


def test_vector_env_returns_the_final_observation_and_statistics():
    envs = make_vec("mpe_simple_spread", 3)
    single = make_env("mpe_simple_spread")
    envs.reset(seed=5), single.reset(seed=6)  # copy 1 gets seed 6
    total = 0.0
    for _ in range(25):
        action = np.full((3, 3, 2), 0.3, np.float32)
        obs, reward, _, truncated, info = envs.step(action)
        want, r, *_ = single.step(action[0])
        total += r
    assert truncated.all()
    np.testing.assert_array_equal(obs[1], want)  # not the first observation of the next episode
    assert info["episode"]["r"][1] == pytest.approx(total) and info["episode"]["l"].tolist() == [25, 25, 25]
    after, _ = envs.reset(options={"reset_mask": np.array([False, True, False])})
    np.testing.assert_array_equal(after[0], obs[0])
    assert not np.array_equal(after[1], obs[1])


def test_only_the_first_episode_of_each_copy_counts():
    """The first copy earns 1 in its first step and is done, 100 in all that it makes until the other is."""

    class Unequal(gym.vector.VectorEnv):
        num_envs, count = 2, 0

        def reset(self, *, seed=None, options=None):
            self.count = 0 if seed is not None else self.count
            return np.zeros((2, 1, 1)), {}

        def step(self, actions):
            self.count += 1
            done = np.array([True, self.count == 3])
            earned = np.array([1.0 if self.count == 1 else 100.0, 7.0])
            return np.zeros((2, 1, 1)), None, done, np.zeros(2, bool), {"episode": {"r": earned}}

    assert evaluate(lambda obs: obs, Unequal(), 0).tolist() == [1.0, 7.0]


def test_gymnasiums_asynchronous_vector_env_gives_the_same():
    disabled = gym.vector.AutoresetMode.DISABLED
    parallel = gym.vector.AsyncVectorEnv([lambda: make_env("mpe_simple_spread")] * 2, autoreset_mode=disabled)
    serial = make_vec("mpe_simple_spread", 2)
    try:
        np.testing.assert_array_equal(parallel.reset(seed=3)[0], serial.reset(seed=3)[0])
        action = np.random.default_rng(0).uniform(-1, 1, (2, 3, 2)).astype(np.float32)
        for ours, theirs in zip(serial.step(action)[:4], parallel.step(action)[:4]):
            np.testing.assert_array_equal(ours, theirs)
    finally:
        parallel.close()


def test_unknown_task_names_the_near_misses():
    with pytest.raises(BadInput, match="mpe_simple_spread"):
        make_env("simple_spread")


def test_positions_are_recorded_step_by_step():
    """Rows are environment steps: copy after copy within a step. A resumed recording goes on below what was there."""
    wrapped, plain, rng = make_vec("mamujoco_ant_2x4", 2), make_vec("mamujoco_ant_2x4", 2), np.random.default_rng(0)
    before = np.arange(4, dtype=np.float64).reshape(2, 2)
    envs, fresh = RecordPositions(wrapped, before), RecordPositions(plain)
    assert fresh.positions.shape == (0, 2)
    envs.reset(seed=1), fresh.reset(seed=1)
    want = [before]
    for _ in range(5):
        action = rng.uniform(-1, 1, envs.action_space.shape)
        want.append(fresh.step(action)[4]["torso_xy"])
        envs.step(action)
    envs.reset(options={"reset_mask": np.array([True, False])})
    assert envs.positions.dtype == np.float32
    np.testing.assert_array_equal(envs.positions, np.concatenate(want).astype(np.float32))
    np.testing.assert_array_equal(fresh.positions, envs.positions[2:])
    line = RecordPositions(make_vec("mamujoco_halfcheetah_2x3", 1))
    line.reset(seed=0), line.step(np.zeros((1, 2, 3)))
    assert line.positions.shape == (0, 2)  # it moves along a line


def test_videos_show_the_episodes_of_the_seeds(tmp_path, monkeypatch, capsys):
    seen = []
    record_video(
        lambda obs: seen.append(obs.copy()) or np.zeros((1, 3, 2)), "mpe_simple_spread", tmp_path / "videos", 7
    )
    assert len(list((tmp_path / "videos").glob("*.mp4"))) == 4 and len(seen) == 100
    for episode in range(4):
        np.testing.assert_array_equal(seen[25 * episode][0], make_env("mpe_simple_spread").reset(seed=7 + episode)[0])
    assert f"videos    {tmp_path / 'videos'}" in capsys.readouterr().out
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(BadInput, match="--capture-video needs the package moviepy"):
        record_video(None, "mpe_simple_spread", tmp_path, 7)


def test_versions_and_seeds():
    about = versions()
    assert (
        {"torch", "mpe2", "tyro", "tensorboard"} <= set(about["packages"]) and about["git_revision"] and about["python"]
    )
    seeds = {mix_seed(a, b) for a in range(30) for b in range(30)}
    assert len(seeds) == 900 and all(0 <= seed < 2**31 for seed in seeds)


WITHOUT_EGL = """
import ctypes, ctypes.util, os
load, find = ctypes.CDLL.__init__, ctypes.util.find_library
def without(self, name, *args, **options):
    if "EGL" in str(name):
        raise OSError("no libEGL here")
    load(self, name, *args, **options)
ctypes.CDLL.__init__, ctypes.util.find_library = without, lambda name: None if "EGL" in name else find(name)
import common.envs
print(common.envs.make_env("mamujoco_ant_2x4").num_agents, os.environ.get("MUJOCO_GL"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere mujoco draws without EGL")
def test_only_films_need_egl():
    usual = {name: value for name, value in os.environ.items() if name not in ("MUJOCO_GL", "PYOPENGL_PLATFORM")}
    done = subprocess.run([sys.executable, "-c", WITHOUT_EGL], cwd=ROOT, env=usual, capture_output=True, text=True)
    assert done.stdout == "2 None\n", done.stderr
