"""OMAR's tasks: single steps worked out by hand, many copies against one, the prey, and the port against published figures."""

import json
import os
import re
from pathlib import Path

import collect
import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium_robotics import mamujoco_v1
from torch import nn

from common.envs import BadInput, find_task, make_env, make_vec, sha256
from common.omar import PREY_SIZES, FilePrey, ParticleVec, ScriptedPrey
from conftest import SHORT, rows

# Folder with simple_tag.pt and simple_world.pt: OMAR's pretrained_adv_model.pt of both tasks, under these names.
PREY_FILES = Path(os.environ.get("OMAR_PREY", "no folder given"))
SCENARIOS = ("simple_spread", "simple_tag", "simple_world")
PARTICLES = [f"omar_{name}" for name in SCENARIOS]


def still(prey_obs):
    return np.zeros((*prey_obs.shape[:-1], 2), np.float32)


def place(vec: ParticleVec, positions, velocities=None, landmarks=None) -> None:
    """Puts the agents (and landmarks) of every copy there; landmarks that are not named go far away."""
    for agent, at, v in zip(vec.world.agents, positions, velocities or [(0, 0)] * len(positions)):
        agent.state.p_pos, agent.state.p_vel = (
            np.tile(np.array([at], float).T, vec.num_envs),
            np.tile(np.array([v], float).T, vec.num_envs),
        )
    for k, landmark in enumerate(vec.world.landmarks):
        at = landmarks[k] if landmarks and k < len(landmarks) else (50.0 + 10 * k, 50.0)
        landmark.state.p_pos = np.tile(np.array([at], float).T, vec.num_envs)


def opened(scenario: str, positions, velocities=None, landmarks=None, prey=still) -> ParticleVec:
    vec = ParticleVec(scenario, 1)
    vec.policy = prey
    vec.reset(seed=0)
    place(vec, positions, velocities, landmarks)
    return vec


def states(vec):
    return [(agent.state.p_pos[:, 0], agent.state.p_vel[:, 0]) for agent in vec.world.agents]


APART = [(0, 0), (5, 0), (0, 5), (9, 9)]


PREDATOR, PREY = (
    (0.075, True, 3.0, 1.0),
    {"simple_tag": (0.05, True, 4.0, 1.3), "simple_world": (0.045, True, 4.0, 1.3)},
)
ENTITIES = {  # size, whether it is solid, acceleration, greatest speed
    "simple_spread": [(0.15, True, None, None)] * 3 + [(0.05, False, None, None)] * 3,
    "simple_tag": [PREDATOR] * 3 + [PREY["simple_tag"]] + [(0.2, True, None, None)] * 2,
    "simple_world": [PREDATOR] * 3 + [PREY["simple_world"]] + [(0.2, True, None, None)] + [(0.03, False, None, None)] * 2 + [(0.3, False, None, None)] * 2,
}  # fmt: skip


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_entities_are_those_of_the_older_tasks(scenario):
    world = ParticleVec(scenario, 1).world
    found = [(e.size, e.collide, e.accel, e.max_speed) for e in world.entities]
    assert found == ENTITIES[scenario]
    assert (world.dt, world.damping, world.contact_force, world.contact_margin) == (0.1, 0.25, 100.0, 0.001)
    assert all(e.mass == 1 and e.movable == (e in world.agents) for e in world.entities)


@pytest.mark.parametrize("scenario, agent, gain, top", [("simple_spread", 0, 5, None), ("simple_tag", 0, 9, 1.0), ("simple_tag", 3, 16, 1.3), ("simple_world", 1, 9, 1.0), ("simple_world", 3, 16, 1.3)])  # fmt: skip
def test_a_push_and_a_glide_by_hand(scenario, agent, gain, top):
    """v = 0.75 v + 0.1 gain a, at most `top`; then x = x + 0.1 v, with the new v. spread: 5; predators 3 * 3; prey 4 * 4."""
    force = np.array([0.6, -0.8]) * 0.5
    vec = opened(scenario, APART, prey=lambda obs: np.tile(force, (1, 1)) if agent == 3 else still(obs))
    x, v = np.array(APART[agent], float), np.zeros(2)
    for step in range(4):
        push = force if step < 3 else np.zeros(2)
        actions = np.zeros((1, 3, 2), np.float32)
        if agent < 3:
            actions[0, agent] = push
        elif step == 3:
            vec.policy = still
        vec.step(actions)
        v = 0.75 * v + 0.1 * gain * push
        if top and (speed := np.sqrt((v**2).sum())) > top:
            v = v / speed * top
        x = x + 0.1 * v
        np.testing.assert_allclose(states(vec)[agent], (x, v), atol=1e-6)
    if scenario == "simple_tag" and agent == 0:
        assert x[0] == pytest.approx(0.027 + 0.04725 + 0.06 + 0.045) and v[0] == pytest.approx(
            0.45
        )  # figures from paper and pencil


def test_a_contact_by_hand():
    """Two agents of size 0.15, 0.2 apart, overlap by 0.1: each is pushed by 100 * 0.1 = 10, so that v = 1 and x moves by 0.1."""
    vec = opened("simple_spread", [(-0.1, 3), (0.1, 3), (8, 8)])
    vec.step(np.zeros((1, 3, 2)))
    np.testing.assert_allclose([at for at, _ in states(vec)], [(-0.2, 3), (0.2, 3), (8, 8)], atol=1e-12)
    np.testing.assert_allclose([v for _, v in states(vec)], [(-1, 0), (1, 0), (0, 0)], atol=1e-12)


def test_a_contact_is_soft():
    """Agents that just touch, 0.3 apart, are pushed by 100 * 0.001 * log(2); the margin of 0.001 decides how softly it begins."""
    vec = opened("simple_spread", [(-0.15, 3), (0.15, 3), (8, 8)])
    vec.step(np.zeros((1, 3, 2)))
    np.testing.assert_allclose(states(vec)[1][1], (0.1 * 100 * 0.001 * np.log(2), 0), rtol=1e-9)


@pytest.mark.parametrize("scenario", ["simple_tag", "simple_world"])
def test_obstacles_push_and_stay_but_foods_and_forests_do_not(scenario):
    start = [(0, 0), (5, 0), (0, 5), (9, 9)]
    soft = [(5, 0), (5, 0.1), (0, 5), (0, 5.1)] if scenario == "simple_world" else []
    vec = opened(scenario, start, landmarks=[(0.2, 0), *soft])
    vec.step(np.zeros((1, 3, 2)))
    (x, v), *others = states(vec)
    # predator 0.075 and obstacle 0.2 are 0.2 apart: overlap 0.075, force 7.5, v = -0.75
    np.testing.assert_allclose((x, v), [(-0.075, 0), (-0.75, 0)], atol=1e-9)
    np.testing.assert_allclose([at for at, _ in others], start[1:], atol=1e-12)
    np.testing.assert_allclose(vec.world.landmarks[0].state.p_pos[:, 0], (0.2, 0))


def test_rewards_of_spread_by_hand():
    vec = opened("simple_spread", [(0, 0), (2, 0), (0, 2)], landmarks=[(0, 0.04), (2, 0.5), (0, 3)])
    rewards = vec.step(np.zeros((1, 3, 2)))[4]["agent_rewards"]
    np.testing.assert_allclose(rewards, [[10 + 2 + 1] * 3], rtol=1e-6)  # 1 / 0.04 is cut to 10; the same for all
    place(
        vec, [(0, 0), (0.29, 0), (0, 2)], landmarks=[(0, 1.5), (0, 1.5), (0, 1.5)]
    )  # the step pushes the two apart, to 0.31
    assert (vec.step(np.zeros((1, 3, 2)))[4]["agent_rewards"] == 6).all()
    place(
        vec,
        [(0, 0), (0.29, 0), (0, 2)],
        velocities=[(0.8, 0), (-0.8, 0), (0, 0)],
        landmarks=[(0, 1.5), (0, 1.5), (0, 1.5)],
    )
    rewards = vec.step(np.zeros((1, 3, 2)))[4]["agent_rewards"]  # now they are still closer than 0.3
    np.testing.assert_allclose(rewards, [[6 - 5, 6 - 5, 6]])


@pytest.mark.parametrize("scenario, contact", [("simple_tag", 10), ("simple_world", 5)])
def test_rewards_of_pursuit_by_hand(scenario, contact):
    size = 0.05 if scenario == "simple_tag" else 0.045
    far = [(3, 0), (0, 4), (-3, -4), (0, 0)]
    vec = opened(scenario, far)
    reward, info = vec.step(np.zeros((1, 3, 2)))[1::3]
    np.testing.assert_allclose(info["agent_rewards"], [[-0.1 * (3 + 4 + 5)] * 3], rtol=1e-6)
    assert reward[0] == pytest.approx(-1.2)
    meal = 0.05 * np.hypot(60, 50) if scenario == "simple_world" else 0  # the closer food is at (60, 50)
    assert info["prey_reward"][0] == pytest.approx(1.2 + meal, rel=1e-5)

    # Two predators run into the prey, one of them from each side, so that it stays; each contact counts for everybody.
    near = 0.075 + size - 0.004
    vec = opened(scenario, [(near, 0), (-near, 0), (0, 4), (0, 0)], velocities=[(-0.5, 0), (0.5, 0), (0, 0), (0, 0)])
    info = vec.step(np.zeros((1, 3, 2)))[4]
    gaps = [np.hypot(*(at - states(vec)[3][0])) for at, _ in states(vec)[:3]]
    assert gaps[0] < 0.075 + size and gaps[1] < 0.075 + size
    np.testing.assert_allclose(info["agent_rewards"], [[2 * contact - 0.1 * sum(gaps)] * 3], rtol=1e-5)


@pytest.mark.parametrize("scenario, reach", [("simple_tag", 0.125), ("simple_world", 0.12), ("simple_spread", 0.3)])
def test_a_contact_begins_where_the_sizes_say(scenario, reach):
    """Just inside and just outside the sum of both sizes, after a step in which nothing moves (`world.step` is taken out)."""
    for gap, touches in ((reach - 0.001, True), (reach + 0.001, False)):
        vec = opened(
            scenario, [(0, 0), (9, 0), (0, 9), (gap, 0)] if scenario != "simple_spread" else [(0, 0), (gap, 0), (9, 0)]
        )
        vec.world.step = lambda: None
        last = vec.world.agents[3] if scenario != "simple_spread" else vec.world.agents[1]
        alone = vec.rules.reward(vec.world.agents[0], vec.world)
        last.state.p_pos = last.state.p_pos + np.array([[0.05], [0]])  # beyond reach in any case
        jump = alone - vec.rules.reward(vec.world.agents[0], vec.world)
        contact = {"simple_tag": 10, "simple_world": 5, "simple_spread": -5}[scenario] * touches
        assert jump == pytest.approx(contact, abs=0.2)


def test_a_forest_begins_where_its_size_says():
    for who, size in ((0, 0.075), (3, 0.045)):
        for gap, inside in ((0.299 + size, 1), (0.301 + size, -1)):
            at = [(0, 0), (9, 0), (0, 9), (3, 3)]
            forest = (at[who][0] + gap, at[who][1])
            vec = opened("simple_world", at, landmarks=[(50, 50), (60, 50), (70, 50), forest, (50, 60)])
            obs = vec._observe(vec.world.agents[who : who + 1])[0, 0]
            assert obs[-2:].tolist() == [inside, -1], (who, gap)


def test_the_prey_pays_for_leaving_the_square():
    for scenario, weight in (("simple_tag", 1), ("simple_world", 2)):
        for x, fine in ((0.89, 0.0), (0.95, 0.5), (1.5, np.exp(1.0)), (4.0, 10.0)):
            food = (x, 3.0)  # far enough not to be eaten
            vec = opened(scenario, [(x, 1), (x, -1), (x + 1, 0), (x, 0)], landmarks=[(50, 50), food, food])
            meal = 0.05 * 3 if scenario == "simple_world" else 0
            got = vec.step(np.zeros((1, 3, 2)))[4]["prey_reward"][0]
            assert got == pytest.approx(0.3 - weight * fine + meal, abs=1e-5), (scenario, x)
    vec = opened("simple_world", APART, landmarks=[(50, 50), (9, 9.07), (9, 8.0)])  # closer than 0.045 + 0.03: eaten
    eaten = vec.step(np.zeros((1, 3, 2)))[4]["prey_reward"][0]
    distances = sum(np.hypot(9 - x, 9 - y) for x, y in APART[:3])
    assert eaten == pytest.approx(0.1 * distances - 2 * 2 * 10 + 2 + 0.05 * 0.07, rel=1e-5)


def test_layout_of_observations():
    spread = opened("simple_spread", [(1, 2), (3, 5), (8, 13)], [(0.4, 0.8), (0, 0), (0, 0)], [(2, 2), (4, 4), (6, 6)])
    obs = spread._observe(spread.team)[0]
    np.testing.assert_allclose(obs[0], [0.4, 0.8, 1, 2, 1, 0, 3, 2, 5, 4, 2, 3, 7, 11, 0, 0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(obs[1, 10:14], [-2, -3, 5, 8])
    tag = opened(
        "simple_tag", [(1, 2), (3, 5), (8, 13), (2, 4)], [(0.4, 0.8), (0, 0), (0, 0), (0.1, 0.2)], [(2, 2), (4, 4)]
    )
    np.testing.assert_allclose(
        tag._observe(tag.team)[0, 0], [0.4, 0.8, 1, 2, 1, 0, 3, 2, 2, 3, 7, 11, 1, 2, 0.1, 0.2], atol=1e-6
    )
    np.testing.assert_allclose(
        tag._observe(tag.prey)[0, 0], [0.1, 0.2, 2, 4, 0, -2, 2, 0, -1, -2, 1, 1, 6, 9], atol=1e-6
    )
    five = [(1, 2.1), (4, 4), (6, 6), (1.1, 2), (3, 5)]  # obstacle, foods, forests
    wood = opened("simple_world", [(1, 2), (3, 5), (8, 13), (1.3, 2)], [(0, 0)] * 3 + [(0.1, 0.2)], five)
    obs, prey = wood._observe(wood.team)[0], wood._observe(wood.prey)[0, 0]
    np.testing.assert_allclose(
        obs[0], [0, 0, 1, 2, 0, 0.1, 3, 2, 5, 4, 0.1, 0, 2, 3, 2, 3, 7, 11, 0.3, 0, 0.1, 0.2, 1, -1], atol=1e-6
    )
    np.testing.assert_allclose(obs[1, -4:], [0.1, 0.2, -1, 1], atol=1e-6)
    np.testing.assert_allclose(obs[2, 18:20], [-6.7, -11], atol=1e-6)  # everybody sees the prey, in a forest or not
    assert prey.shape == (22,) and prey[-2:].tolist() == [1, -1]


@pytest.mark.parametrize("env_id, shift", [*((e, s) for e in PARTICLES for s in ("", "speed")), ("omar_simple_spread_6", ""), ("omar_simple_spread_6", "fewer")])  # fmt: skip
def test_many_copies_are_that_many_environments(env_id, shift):
    """Number for number, through several episodes and restarts of some copies only."""
    single = lambda: gym.wrappers.RecordEpisodeStatistics(make_env(env_id, shift=shift))
    vec, slow = (
        make_vec(env_id, 4, shift=shift),
        gym.vector.SyncVectorEnv([single] * 4, autoreset_mode=gym.vector.AutoresetMode.DISABLED),
    )
    assert vec.action_space == slow.action_space and vec.observation_space == slow.observation_space
    rng = np.random.default_rng(0)
    (obs, info), (want, known) = vec.reset(seed=7), slow.reset(seed=7)
    for step in range(70):
        np.testing.assert_array_equal(obs, want)
        np.testing.assert_array_equal(info["state"], known["state"])
        assert obs.dtype == want.dtype == np.float32
        # Towards the last agent seen, so that there are contacts, and sometimes beyond the box.
        aim = obs[:, :, 12:14] if env_id in ("omar_simple_spread", "omar_simple_tag") else obs[:, :, 18:20]
        actions = 3 * aim + rng.normal(0, 0.3, aim.shape)
        obs, reward, terminated, truncated, info = vec.step(actions)
        want, wanted, ends, cuts, known = slow.step(actions)
        np.testing.assert_array_equal(info["agent_rewards"], known["agent_rewards"])
        np.testing.assert_array_equal(reward, wanted)
        assert (terminated == ends).all() and (truncated == cuts).all() and not terminated.any()
        if step < 30:
            assert truncated.tolist() == [step == 24] * 4
        if truncated.any():
            np.testing.assert_array_equal(info["episode"]["r"], known["episode"]["r"])
            np.testing.assert_array_equal(info["episode"]["l"], known["episode"]["l"])
        restart = truncated if step != 30 else np.array([True, False, False, True])
        if restart.any():
            (obs, again), (want, also) = (envs.reset(options={"reset_mask": restart.copy()}) for envs in (vec, slow))
            np.testing.assert_array_equal(again["state"][restart], also["state"][restart])
            info = known = {"state": again["state"]}


@pytest.mark.parametrize("scenario, edge", [("simple_spread", 1.0), ("simple_tag", 0.9), ("simple_world", 0.9)])
def test_start_states_are_those_of_the_scenarios(scenario, edge):
    vec = ParticleVec(scenario, 4000)
    vec.reset(seed=0)
    for entities, bound in ((vec.world.agents, 1.0), (vec.world.landmarks, edge)):
        for entity in entities:  # uniform in the square, at rest
            at = entity.state.p_pos
            assert not entity.state.p_vel.any() and np.abs(at.mean()) < 0.03
            assert 0.995 * bound < np.abs(at).max() <= bound and at.std() == pytest.approx(bound / 3**0.5, rel=0.03)
    vec.reset(seed=[3] * 4000)
    assert (vec.world.agents[0].state.p_pos.std(1) < 1e-12).all()  # a list seeds each copy


def test_halfcheetah_shows_each_agent_its_own_joints_only():
    env, upstream = make_env("omar_halfcheetah_2x3"), mamujoco_v1.parallel_env("HalfCheetah", "2x3")
    assert env.obs_sizes == [6, 6] and env.action_sizes == [3, 3] and env.state_size == 17
    assert find_task("omar_halfcheetah_2x3").horizon == 1000
    obs, info = env.reset(seed=3)
    upstream.reset(seed=3)
    rng = np.random.default_rng(0)
    for _ in range(20):
        state = upstream.state()  # 8 positions without x, then 9 velocities
        joints = lambda first: np.ravel([(state[2 + j], state[11 + j]) for j in first])
        np.testing.assert_allclose(
            obs[0], joints((2, 1, 0)), rtol=1e-6
        )  # foot, shin, thigh: position, velocity of each
        np.testing.assert_allclose(obs[1], joints((5, 4, 3)), rtol=1e-6)
        np.testing.assert_allclose(info["state"], state, rtol=1e-6)
        action = rng.uniform(-1, 1, (2, 3)).astype(np.float32)
        obs, reward, _, _, info = env.step(action)
        rewards = upstream.step({agent: action[i] for i, agent in enumerate(upstream.agents)})[1]
        assert reward == pytest.approx(rewards["agent_0"], rel=1e-5)


# --- the prey ---


def test_the_scripted_prey():
    prey = ScriptedPrey(landmarks=2, solid=2)
    see = lambda position=(0, 0), obstacles=((9, 9), (9, 9)), predators=((9, 9), (9, 9), (9, 9)): np.concatenate(
        [(0, 0), position, *obstacles, *predators]
    )
    assert not prey(see()).any()  # nobody near: it stands still
    np.testing.assert_allclose(prey(see(predators=[(0.3, 0), (9, 9), (9, 9)])), [-0.14, 0], atol=1e-9)
    assert not prey(see(predators=[(0.51, 0), (9, 9), (9, 9)])).any()  # out of sight
    away = prey(see(predators=[(0.3, 0), (0, 0.1), (9, 9)]))
    np.testing.assert_allclose(away, 0.14 * np.array([-1, -9]) / np.hypot(1, 9), rtol=1e-6)  # 1 / distance^2
    np.testing.assert_allclose(prey(see(obstacles=[(0, -0.3), (9, 9)])), [0, 0.14], atol=1e-9)
    np.testing.assert_allclose(prey(see(position=(0.9, 0))), [-0.14, 0], atol=1e-9)
    many = np.random.default_rng(0).normal(size=(5, 4, 14))
    np.testing.assert_array_equal(prey(many)[2, 3], prey(many[2, 3]))
    wood = ScriptedPrey(landmarks=5, solid=1)
    seen = np.full(22, 9.0)
    seen[2:4], seen[6:8], seen[14:16] = 0, 0.1, (0.2, 0)  # a food close by, and a predator
    np.testing.assert_allclose(wood(seen), [-0.14, 0], atol=1e-9)


def test_the_scripted_prey_is_slower_than_a_predator():
    vec = opened("simple_tag", [(-0.49, 0), (9, 9), (-9, 9), (0, 0)], prey=ScriptedPrey(2, 2))
    gaps, speeds = [], []
    for _ in range(20):
        vec.step(np.array([[[1.0, 0], [0, 0], [0, 0]]]))
        gaps.append(states(vec)[3][0][0] - states(vec)[0][0][0])
        speeds.append(states(vec)[3][1][0])
        place(vec, [at - states(vec)[3][0] for at, _ in states(vec)], [v for _, v in states(vec)])  # an endless plane
    speed = np.cumsum(0.14 * 16 * 0.1 * 0.75 ** np.arange(10))  # towards 0.896, where a predator's is 1
    np.testing.assert_allclose(speeds[:10], speed, rtol=1e-6)
    assert (np.diff(gaps[:10]) < 0).all() and gaps[9] > 0.125 > min(gaps)  # it is caught up with


class Network(nn.Module):
    """OMAR's prey, written with torch."""

    def __init__(self, n):
        super().__init__()
        self.in_fn, self.fc1, self.fc2, self.fc3 = (
            nn.BatchNorm1d(n),
            nn.Linear(n, 64),
            nn.Linear(64, 64),
            nn.Linear(64, 2),
        )

    def forward(self, x):
        return torch.tanh(self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(self.in_fn(x)))))))


def checkpoint(path, n, change=lambda policy: policy, agents=4, old=True):
    torch.manual_seed(0)
    network = Network(n)
    network.in_fn.running_mean.normal_(), network.in_fn.running_var.uniform_(0.1, 2.0)
    nn.init.normal_(network.in_fn.weight), nn.init.normal_(network.in_fn.bias)
    others = [{"policy": Network(n).state_dict()} for _ in range(3)]  # predators come first
    saved = {"agent_params": [*others, {"policy": change(network.state_dict())}][:agents], "init_dict": {"lr": 0.01}}
    torch.save(saved, path, _use_new_zipfile_serialization=not old)
    return network.eval()


@pytest.mark.parametrize("scenario", PREY_SIZES)
def test_a_prey_from_a_file_is_the_network_in_it(scenario, tmp_path):
    size = PREY_SIZES[scenario]
    network = checkpoint(tmp_path / "prey.pt", size)
    prey = FilePrey(str(tmp_path / "prey.pt"), size)
    seen = np.random.default_rng(0).normal(size=(50, size)).astype(np.float32)
    with torch.no_grad():
        np.testing.assert_allclose(prey(seen), network(torch.from_numpy(seen)), atol=2e-6)
    np.testing.assert_allclose(prey(seen[3]), prey(seen)[3], atol=1e-6)
    # The same prey in one environment and in many; and it is not the project's own.
    file = str(tmp_path / "prey.pt")
    env, vec, own = (
        make_env(f"omar_{scenario}", prey=file),
        make_vec(f"omar_{scenario}", 2, prey=file),
        make_env(f"omar_{scenario}"),
    )
    obs, _ = env.reset(seed=0)
    vec.reset(seed=0), own.reset(seed=0)
    for _ in range(5):
        obs, far = env.step(np.zeros((3, 2)))[0], own.step(np.zeros((3, 2)))[0]
        np.testing.assert_allclose(vec.step(np.zeros((2, 3, 2)))[0][0], obs, atol=1e-5)
    assert np.abs(obs - far).max() > 0.01


WEIGHTS = "no plain weights of agent_params[3]['policy'] with in_fn, fc1, fc2 and fc3"
BROKEN = {  # what is wrong with the file -> what the message says
    "nothing there": (lambda path: None, "there is no such file"),
    "a folder": (lambda path: path.mkdir(), "there is no such file"),
    "a text": (lambda path: path.write_bytes(b"not a checkpoint"), WEIGHTS),
    "empty": (lambda path: path.write_bytes(b""), WEIGHTS),
    "no prey": (lambda path: checkpoint(path, 14, agents=2), WEIGHTS),
    "no bias": (lambda path: checkpoint(path, 14, lambda p: {k: v for k, v in p.items() if k != "fc2.bias"}), WEIGHTS),
    "of world": (lambda path: checkpoint(path, 22), "that takes 14 numbers"),
    "negative": (
        lambda path: checkpoint(path, 14, lambda p: p | {"in_fn.running_var": p["in_fn.running_var"] - 3}),
        "its actions are not two finite numbers",
    ),
    "infinite": (
        lambda path: checkpoint(path, 14, lambda p: p | {"fc1.weight": p["fc1.weight"] / 0}),
        "its actions are not two finite numbers",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_bad_prey_files_say_what_is_wrong(kind, tmp_path, cli):
    path, (damage, reason) = tmp_path / "prey.pt", BROKEN[kind]
    damage(path)
    for opened in (
        lambda: make_env("omar_simple_tag", prey=str(path)),
        lambda: make_vec("omar_simple_tag", 2, prey=str(path)),
    ):
        with pytest.raises(BadInput) as caught:
            opened()
        assert str(caught.value).startswith(f"--prey {path}: ") and reason in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
    code, out, err = cli("--env-id", "omar_simple_tag", "--prey", path)
    assert code == 2 and reason in err and len(err.splitlines()) == 1 and not out


def test_a_prey_file_is_never_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"agent_params": [Evil()]}, tmp_path / "prey.pt")
    with pytest.raises(BadInput, match="code in a file is never run"):
        FilePrey(str(tmp_path / "prey.pt"), 14)
    assert not (tmp_path / "executed").exists()


def test_a_run_with_a_prey_file(tmp_path, cli):
    """Trains, evaluates and goes on against the prey of the file; an evaluation may have another one."""
    file, other = tmp_path / "prey.pt", tmp_path / "other.pt"
    checkpoint(file, 14), checkpoint(other, 14, lambda policy: {name: 2 * value for name, value in policy.items()})
    code, out, err = cli("--env-id", "omar_simple_tag", "--prey", file, *SHORT)
    assert code == 0, err
    (run,) = tmp_path.glob("omar_simple_tag__*")
    last = rows(run)[-1]["return_mean"]
    earned = lambda *argv: re.search("return ([-0-9.,]+)", cli("--evaluate", run, *argv, run_dir=False)[1])[1]
    assert earned() == f"{float(last):.2f}" and earned("--prey", file) == earned() != earned("--prey", other)
    moved = file.rename(tmp_path / "moved.pt")
    for old in ("--evaluate", "--resume"):
        code, _, err = cli(old, run, run_dir=False)
        assert code == 2 and str(file) in err and len(err.splitlines()) == 1
    assert earned("--prey", moved) == f"{float(last):.2f}"
    assert cli("--resume", run, "--prey", moved, "--total-timesteps", 500, run_dir=False)[0] == 0
    assert earned() == f"{float(rows(run)[-1]['return_mean']):.2f}"  # it knows the new place


def test_data_against_the_prey_of_a_file(tmp_path):
    """The prey in the rows acts as the network in the file, and the card names the file."""
    file = tmp_path / "prey.pt"
    network = checkpoint(file, 14)
    folder = collect.collect(collect.Options("omar_simple_tag-random", 500, prey=str(file), out=tmp_path / "data"))
    seen, acted = (torch.from_numpy(np.load(folder / f"{kind}_3.npy")) for kind in ("obs", "acs"))
    with torch.no_grad():
        np.testing.assert_allclose(acted, network(seen), atol=2e-5)
    assert json.loads((folder / "card.json").read_text())["prey"] == sha256(file)


@pytest.mark.parametrize("env_id", PARTICLES)
def test_pictures(env_id):
    env = make_env(env_id, render_mode="rgb_array")
    env.reset(seed=0)
    frames = [env.render(), (env.step(np.ones((3, 2))), env.render())[1]]
    assert all(frame.shape == (700, 700, 3) and len(np.unique(frame.reshape(-1, 3), axis=0)) > 3 for frame in frames)
    assert (frames[0] != frames[-1]).any()
    env.close()


@pytest.mark.parametrize("env_id", ["omar_simple_spread", "mpe_simple_spread", "omar_halfcheetah_2x3"])
def test_tasks_without_prey_refuse_a_prey_file(env_id, tmp_path, cli):
    checkpoint(tmp_path / "prey.pt", 14)
    code, out, err = cli("--env-id", env_id, "--prey", tmp_path / "prey.pt")
    assert code == 2 and "has no prey" in err and len(err.splitlines()) == 1 and not out
    with pytest.raises(BadInput, match="has no prey"):
        make_vec(env_id, 2, prey=str(tmp_path / "prey.pt"))


# --- the port ---


@pytest.mark.parametrize(
    "scenario, mean, std, tolerance, measured",
    [
        ("simple_spread", 160.0, 60.0, 1.6, (156.0, 58.0)),
        ("simple_tag", -4.1, 10.8, 0.4, (-5.3, 8.8)),
        ("simple_world", -6.8, 5.7, 0.25, (-7.1, 5.1)),
    ],
)
def test_random_play_scores_as_in_omars_environment(scenario, mean, std, tolerance, measured):
    """Mean and standard deviation of the return against OMAR's own prey (OMAR_PREY above), over 20,000 episodes.

    Against OMAR's random data, 40,000 episodes: the tolerance is three standard errors of the difference, and the rounding of the
    published figure. Against a measurement over 400 episodes in OMAR's environment: two standard errors of a difference of two such.
    """
    file = PREY_FILES / f"{scenario}.pt"
    if scenario in PREY_SIZES and not file.is_file():
        pytest.skip("needs OMAR's prey: set OMAR_PREY to a folder with simple_tag.pt and simple_world.pt")
    vec = ParticleVec(scenario, 20_000, str(file) if scenario in PREY_SIZES else "")
    vec.reset(seed=2024)
    rng, returns = np.random.default_rng(5), 0.0
    for _ in range(25):
        returns = returns + vec.step(rng.uniform(-1, 1, (20_000, 3, 2)))[1]
    assert returns.mean() == pytest.approx(mean, abs=tolerance) and returns.std() == pytest.approx(std, rel=0.05)
    assert abs(returns.mean() - measured[0]) < 2 * np.hypot(returns.std(), measured[1]) / 400**0.5
    if scenario in PREY_SIZES:
        assert isinstance(vec.policy, FilePrey)
