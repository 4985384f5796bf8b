"""The shifted environments: what is drawn, when, and what it does."""

import re

import numpy as np
import pytest

from common.envs import ROBOT_SHIFTS, BadInput, find_task, make_env, make_vec
from common.omar import ParticleVec

SLOWEST = {"simple_spread": 0.3, "simple_tag": 0.4, "simple_world": 0.5}
BODIES = {  # power, density and friction, as datasets/README.md has them
    "random": [[(0.8, 1.2)], [(750, 1250)], [(0.25, 0.55)]],
    "extreme": [[(0.6, 0.8), (1.2, 1.4)], [(500, 750), (1250, 1500)], [(0.1, 0.25), (0.55, 0.7)]],
}


@pytest.mark.parametrize("scenario", SLOWEST)
def test_paces_are_drawn_for_every_agent_in_every_episode(scenario):
    usual, vec = ParticleVec(scenario, 300), ParticleVec(scenario, 300, shift="speed")
    np.testing.assert_array_equal(
        usual.reset(seed=5)[0], vec.reset(seed=5)[0]
    )  # the starts are those of the usual environment
    paces = np.array([agent.pace for agent in vec.world.agents])  # [agents, E]
    low = SLOWEST[scenario]
    assert paces.min() > low and paces.max() < 1 and abs(paces.mean() - (1 + low) / 2) < 0.03
    assert abs(np.corrcoef(paces)[0, 1]) < 0.2  # each its own
    assert paces.min() < low + 0.02 and paces.max() > 0.98
    vec.reset(options={"reset_mask": np.arange(300) < 150})
    again = np.array([agent.pace for agent in vec.world.agents])
    assert (again[:, :150] != paces[:, :150]).all() and (again[:, 150:] == paces[:, 150:]).all()
    assert all(np.all(agent.pace == 1) for agent in usual.world.agents)


def test_a_pace_slows_a_push_and_the_greatest_speed():
    for scenario, gain, top in (("simple_spread", 5, np.inf), ("simple_tag", 9, 1.0)):
        vec = ParticleVec(scenario, 1, shift="speed")
        vec.reset(seed=0)
        for i, agent in enumerate(vec.world.agents):
            agent.state.p_pos[:] = 3.0 * i + 1.0  # far from each other
            agent.pace[:] = 0.5
        vec.step(np.full((1, 3, 2), (1.0, 0.0), np.float32))
        speed = np.sqrt((vec.world.agents[0].state.p_vel ** 2).sum())
        assert speed == pytest.approx(0.5 * gain * 0.1, rel=1e-6), scenario
        for _ in range(24):
            vec.step(np.full((1, 3, 2), (1.0, 0.0), np.float32))
        speed = np.sqrt((vec.world.agents[0].state.p_vel ** 2).sum())
        assert speed == pytest.approx(min(0.5 * gain * 0.1 / 0.25, 0.5 * top), rel=0.01), scenario


def test_fewer_landmarks():
    usual, vec = ParticleVec("simple_spread_6", 200), ParticleVec("simple_spread_6", 200, shift="fewer")
    before, after = usual.reset(seed=5)[0], vec.reset(seed=5)[0]  # [E, 3, 24]
    assert before.shape == (200, 3, 24)
    np.testing.assert_array_equal(
        np.delete(before, np.s_[4:16], 2), np.delete(after, np.s_[4:16], 2)
    )  # the agents start where they did
    for seen in (before, after):  # the nearest first
        far = np.linalg.norm(seen[..., 4:16].reshape(200, 3, 6, 2), axis=-1)
        assert (np.diff(far) >= 0).all()
    ring = np.stack([landmark.state.p_pos.T for landmark in usual.world.landmarks], 1)  # [E, 6, xy]
    for i in range(3):  # each agent sees all of them
        seen = before[:, i, 4:16].reshape(200, 6, 2) + before[:, i, None, 2:4]
        np.testing.assert_allclose(np.sort(seen @ (1, 0.01), 1), np.sort(ring @ (1, 0.01), 1), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(ring, axis=-1), 0.6, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(ring - np.roll(ring, 1, 1), axis=-1), 0.6, rtol=1e-5)  # a hexagon
    turned = np.arctan2(ring[:, 0, 1], ring[:, 0, 0])
    assert abs(turned).max() <= np.pi / 6 and turned.min() < -0.4 and turned.max() > 0.4
    assert 0.29 < abs(before[..., 2:4]).max() <= 0.3
    pushed = usual.step(np.zeros((200, 3, 2), np.float32))[0][
        ..., :2
    ]  # small enough that contacts do not choose the way
    assert (np.linalg.norm(pushed, axis=-1) > 0.05).mean() < 0.25
    landmarks = np.stack([landmark.state.p_pos.T for landmark in vec.world.landmarks], 1)
    same = (landmarks[:, :, None] == landmarks[:, None]).all(-1)
    assert (same.sum(2) == 2).all()  # each of three, twice
    counts = np.array([landmark.counts for landmark in vec.world.landmarks])
    assert (counts.sum(0) == 3).all() and 0.35 < counts.mean(1).min() and counts.mean(1).max() < 0.65  # any three
    kept = (ring == landmarks).all(-1)
    np.testing.assert_array_equal(kept, counts.T == 1)  # those left stay where they were
    for env, number in ((usual, 6), (vec, 3)):
        env.world.agents[0].state.p_vel[:], env.world.agents[0].state.p_pos[:] = 0.0, 50.0
        env.step(np.full((200, 3, 2), (1.0, 0.0), np.float32))
        np.testing.assert_allclose(env.world.agents[0].state.p_vel[0], 0.4)  # as fast as they get
        for landmark, agent in zip(env.world.landmarks, [*env.world.agents, *env.world.agents]):
            landmark.state.p_pos[:] = 100.0
        for i, agent in enumerate(env.world.agents):
            agent.state.p_pos[:], agent.state.p_vel[:] = 3.0 * i, 0.0
        reward = env.step(np.zeros((200, 3, 2), np.float32))[4]["agent_rewards"]
        far = np.sqrt(2) * 94
        np.testing.assert_allclose(reward, number / far, rtol=1e-5)  # landmarks that are gone do not count


@pytest.mark.parametrize("shift", ROBOT_SHIFTS)
def test_another_body_in_every_episode(shift):
    usual, env = make_env("omar_halfcheetah_2x3"), make_env("omar_halfcheetah_2x3", shift=shift)
    model, normal = (
        env.unwrapped.env.single_agent_env.unwrapped.model,
        usual.unwrapped.env.single_agent_env.unwrapped.model,
    )
    make_env("omar_halfcheetah_2x3", shift=shift).reset()  # needs no seed
    torso, found = model.body("torso").id, []
    for seed in range(60):
        obs, _ = env.reset(seed=seed) if seed < 30 else env.reset()
        if seed < 30:
            np.testing.assert_array_equal(obs, usual.reset(seed=seed)[0])
        power, mass = (
            model.actuator_gear[:, 0] / normal.actuator_gear[:, 0],
            model.body_mass / normal.body_mass.clip(1e-9),
        )
        inertia, friction = model.body_inertia[torso] / normal.body_inertia[torso], model.geom_friction[:, 0]
        assert np.ptp(power) < 1e-9 and np.ptp(friction) == 0 and np.allclose(inertia, mass[torso])
        assert np.allclose(np.delete(mass, [0, torso]), 1) and (model.geom_friction[:, 1:] == 0.1).all()
        assert model.body_subtreemass[0] == pytest.approx(
            model.body_mass.sum()
        )  # what follows from the masses has followed
        found.append((power[0], 1000 * mass[torso], friction[0]))
    for values, intervals in zip(np.array(found).T, BODIES[shift], strict=True):
        inside = [(low <= values) & (values <= high) for low, high in intervals]
        assert np.any(inside, 0).all() and all(x.mean() > 0.8 / len(intervals) - 0.2 for x in inside)
        assert len(np.unique(values)) == 60
    env.reset(seed=3)
    assert (model.actuator_gear[:, 0] / normal.actuator_gear[:, 0])[0] == pytest.approx(found[3][0])  # repeatable


def test_a_shift_changes_what_happens_not_what_is_seen_first():
    envs = [make_vec("omar_halfcheetah_2x3", 2, shift=shift) for shift in ("", "extreme")]
    first, later = [], []
    for vec in envs:
        first.append(vec.reset(seed=1)[0])
        for _ in range(5):
            obs = vec.step(np.full((2, 2, 3), 0.5, np.float32))[0]
        later.append(obs)
        vec.close()
    np.testing.assert_array_equal(*first)
    assert np.abs(later[0] - later[1]).max() > 0.01


def test_a_shifted_environment_has_the_sizes_of_the_usual_one():
    robots = (("omar_halfcheetah_2x3", "random"), ("mamujoco_halfcheetah_2x3", "extreme"))
    for env_id, shift in (*robots, ("omar_simple_spread", "speed")):
        usual, shifted = make_env(env_id), make_env(env_id, shift=shift)
        for name in ("obs_sizes", "action_sizes", "state_size", "num_agents"):
            assert getattr(usual, name) == getattr(shifted, name)
        if find_task(env_id).robot:
            gears = [env.env.single_agent_env.unwrapped.model.actuator_gear for env in (usual, shifted)]
            shifted.reset(seed=0)
            assert (gears[0] != gears[1]).any()


@pytest.mark.parametrize(
    "env_id, shift, reason",
    [
        ("omar_simple_spread", "random", "can be shifted by 'speed' only"),
        ("omar_halfcheetah_2x3", "speed", "'random' or 'extreme' only"),
        ("omar_simple_spread", "fewer", "can be shifted by 'speed' only"),
        ("omar_simple_spread_6", "speed", "can be shifted by 'fewer' only"),
        ("mpe_simple_spread", "speed", "cannot be shifted"),
        ("mamujoco_ant_2x4", "extreme", "cannot be shifted"),
    ],
)
def test_a_task_is_shifted_only_as_it_can_be(env_id, shift, reason):
    for opened in (lambda: make_env(env_id, shift=shift), lambda: make_vec(env_id, 2, shift=shift)):
        with pytest.raises(BadInput, match=re.escape(f"--shift {shift!r}: {env_id} ") + ".*" + re.escape(reason)):
            opened()
    shifts = find_task(env_id).shifts
    assert shift not in shifts and all(f"'{other}'" in reason for other in shifts)
