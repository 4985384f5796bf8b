"""Blind doors: the environment, and its exact values by enumeration and by play."""

import itertools

import numpy as np
import pytest
from scipy.stats import norm

import doors
from common.datasets import load_dataset
from common.doors import WINDOWS, chances, exact_value, place
from common.envs import make_env, make_vec


def window(*numbers):
    """Chances [5] of an agent that draws evenly among these windows."""
    return np.bincount(numbers, minlength=5) / len(numbers)


def test_places():
    actions = np.array([-0.6, -0.551, -0.549, -0.5, -0.2, 0.149, 0.151, 0.2, 0.649, 0.651, 0.0, 1.0])
    assert place(actions).tolist() == [0, 0, 4, 4, 1, 4, 2, 2, 3, 4, 4, 4]
    assert chances(np.array([[0.2, 0.0], [0.6, 0.0]])).tolist() == [[0, 0, 0.5, 0.5, 0], [0, 0, 0, 0, 1]]


def test_best_mixtures_by_enumeration():
    """Of agents that draw evenly from any set of windows the best is .909, with one window each .500."""
    sets = [some for size in range(1, 5) for some in itertools.combinations(range(4), size)]
    values = {pair: exact_value(np.stack([window(*some) for some in pair])) for pair in itertools.product(sets, sets)}
    assert max(values.values()) == pytest.approx(1 / 1.1)
    assert {tuple(map(len, pair)) for pair, value in values.items() if value > 0.909} == {(2, 2)}
    assert max(value for (a, b), value in values.items() if len(a) == len(b) == 1) == pytest.approx(0.5)
    assert values[(0, 1, 2, 3), (0, 1, 2, 3)] == pytest.approx(0.886, abs=5e-4)


def test_no_mixture_is_better_by_enumeration():
    """Of all in which windows have multiples of one sixth."""
    sixths = np.array([m for m in itertools.product(range(7), repeat=4) if sum(m) == 6]) / 6  # [mixtures, 4]
    agents = np.pad(sixths, ((0, 0), (0, 1)))  # [mixtures, 5]
    pairs = np.stack(np.broadcast_arrays(agents[:, None], agents), -2)  # [mixtures, mixtures, 2, 5]
    assert exact_value(pairs).max() == pytest.approx(1 / 1.1)


def test_best_pair_of_gaussians_by_enumeration():
    """A mean and a width for each agent, tanh after: no pair is better than one window each."""
    low, high = np.arctanh(WINDOWS - 0.05), np.arctanh(WINDOWS + 0.05)
    grid = itertools.product(np.linspace(-1.2, 1.2, 41), np.geomspace(0.005, 2.0, 25))
    found = np.array([norm.cdf(high, mean, std) - norm.cdf(low, mean, std) for mean, std in grid])  # [policies, 4]
    agents = np.concatenate([found, 1 - found.sum(1, keepdims=True)], 1)  # [policies, 5]
    pairs = (np.stack(np.broadcast_arrays(agent, agents), 1) for agent in agents)  # [policies, 2, 5] each
    assert max(exact_value(pair).max() for pair in pairs) == pytest.approx(0.5, abs=2e-3)


def test_played_returns_are_the_exact_values():
    envs, rng = make_vec("doors_blind", 500), np.random.default_rng(0)
    places = np.array([[-0.6, 0.0], [0.2, 0.6]])  # the first tries a window or the wall, the second two windows
    value = exact_value(np.array([[0.5, 0, 0, 0, 0.5], [0, 0, 0.5, 0.5, 0]]))
    envs.reset(seed=1)
    returns, goes_on = np.zeros(500), np.ones(500, bool)
    while goes_on.any():
        action = rng.permuted(np.tile(places, (500, 1, 1)), axis=2)[..., :1]
        _, reward, terminated, truncated, _ = envs.step(action.astype(np.float32))
        returns += reward * goes_on
        goes_on &= ~(terminated | truncated)
        envs.reset(options={"reset_mask": terminated | truncated})
    assert returns.mean() == pytest.approx(value, abs=4 * returns.std() / 500**0.5)


def test_what_agents_and_critics_see():
    env = make_env("doors_blind", render_mode="rgb_array")
    states = set()
    for seed in range(40):
        obs, info = env.reset(seed=seed)
        states.add(int(info["state"].argmax()))
        assert (obs == 1).all() and info["state"].sum() == 1
        place_of_it = WINDOWS[info["state"].argmax()]
        obs, reward, terminated, truncated, after = env.step(np.array([[place_of_it], [0.0]]))
        assert terminated and reward == pytest.approx(0.95) and (after["state"] == info["state"]).all()
    assert states == {0, 1, 2, 3} and env.render().shape == (64, 256, 3)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the data go instead."""
    monkeypatch.setattr(doors, "FOLDER", tmp_path / "doors_blind" / "pairs" / "seed_0_data")
    monkeypatch.setattr(doors, "EPISODES", 5000)
    return doors.FOLDER


def test_data_have_two_modes_of_each_agent(folder, capsys):
    told = lambda: (doors.make_data(), "return" in capsys.readouterr().out)[1]
    assert [told(), told()] == [True, False]  # the second time they are there
    data = load_dataset(folder, env_id="doors_blind")
    actions = np.asarray(data.actions)[..., 0]  # [5000, 2]
    found = chances(actions)
    np.testing.assert_allclose(found[:, :4], [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]], atol=0.03)
    assert 0 < found[:, 4].max() < 0.03 and exact_value(found) > 0.85
    missed = place(actions) == 4
    np.testing.assert_allclose(np.asarray(data.rewards), ~missed.all(1, keepdims=True) - 0.1 * missed, atol=1e-6)
    assert data.terminations.all() and data.next_known.all() and len(data.episodes) == 5000
