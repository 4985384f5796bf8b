"""Every task: sizes, presets, real updates; Multi-Agent MuJoCo and the scripted adversary against the upstream packages."""

import dataclasses
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium_robotics import mamujoco_v1
from mpe2 import simple_adversary_v3

import common.envs
import omad
from common.envs import BadInput, find_task, list_tasks, make_env, make_vec, scripted_adversary, task_table
from conftest import SHORT

PAPER = [
    "mpe_simple_spread", "mpe_simple_spread_n4", "mpe_simple_adversary", "mamujoco_ant_2x4", "mamujoco_ant_2x4d", "mamujoco_ant_4x2",
    "mamujoco_halfcheetah_2x3", "mamujoco_halfcheetah_6x1", "mamujoco_walker2d_2x3", "mamujoco_swimmer_2x1",
]  # fmt: skip
MAMUJOCO = [env_id for env_id in list_tasks() if env_id.startswith("mamujoco_")]
ACTUATORS = {  # of each agent, in the robot's own order
    "mamujoco_ant_2x4": [[2, 3, 4, 5], [6, 7, 0, 1]],
    "mamujoco_ant_2x4d": [[2, 3, 0, 1], [4, 5, 6, 7]],
    "mamujoco_ant_4x2": [[2, 3], [4, 5], [6, 7], [0, 1]],
    "mamujoco_halfcheetah_2x3": [[0, 1, 2], [3, 4, 5]],
    "mamujoco_halfcheetah_6x1": [[0], [1], [2], [3], [4], [5]],
    "mamujoco_walker2d_2x3": [[2, 1, 0], [5, 4, 3]],
    "mamujoco_swimmer_2x1": [[0], [1]],
    "mamujoco_hopper_3x1": [[0], [1], [2]],
    "mamujoco_humanoid_9|8": [[2, 0, 1, 11, 12, 13, 14, 15, 16], [3, 5, 4, 6, 7, 9, 8, 10]],
    "mamujoco_manysegmentswimmer_10x2": [[2 * i, 2 * i + 1] for i in range(10)],
}  # fmt: skip


def robot(env):
    return env.env.single_agent_env.unwrapped


def test_the_papers_tasks_are_listed():
    assert set(PAPER) <= set(list_tasks())


def test_the_table_has_every_task_with_its_sizes():
    lines = {line.split()[0]: line for line in task_table().splitlines()}
    assert set(list_tasks()) <= set(lines)
    assert "2 x 107" in lines["mamujoco_ant_2x4"] and "105" in lines["mamujoco_ant_2x4"]
    assert "1 x 9, 1 x 8" in lines["mamujoco_humanoid_9|8"] and "1 x 3, 1 x 11" in lines["mpe_simple_speaker_listener"]


# --- Multi-Agent MuJoCo against upstream ---


@pytest.mark.parametrize("observation", ["full", "motion", "k0", "k1"])
@pytest.mark.parametrize(
    "env_id", ["mamujoco_halfcheetah_2x3", "mamujoco_ant_2x4", "mamujoco_ant_4x2", "mamujoco_hopper_3x1"]
)
def test_wrapper_equals_upstream(env_id, observation):
    """Against both gymnasium-robotics' partitioned robot and gymnasium's whole one, over several episodes with clipped actions."""
    _, name, partition = env_id.split("_")
    scenario = {"halfcheetah": "HalfCheetah", "ant": "Ant", "hopper": "Hopper"}[name]
    theirs = mamujoco_v1.parallel_env(
        scenario, partition, agent_obsk=int(observation[1]) if observation[0] == "k" else 0
    )
    whole, ours = gym.make(f"{scenario}-v5"), make_env(env_id, observation)
    rng = np.random.default_rng(0)
    seen = slice(27 if (observation, scenario) == ("motion", "Ant") else None)  # contact forces follow
    for seed in range(3):
        want, _ = theirs.reset(seed=seed)
        state, _ = whole.reset(seed=seed)
        obs, info = ours.reset(seed=seed)
        for _ in range(150):
            np.testing.assert_array_equal(info["state"], state[seen].astype(np.float32))
            for i, agent in enumerate(ours.agents):
                whole_state = observation in ("full", "motion")
                mine = np.append(state[seen], np.eye(ours.num_agents)[i]) if whole_state else want[agent]
                assert ours.obs_sizes[i] == len(mine)
                np.testing.assert_array_equal(obs[i, : len(mine)], mine.astype(np.float32))
                assert not obs[i, len(mine) :].any()
            action = rng.uniform(-1.3, 1.3, ours.action_space.shape).astype(np.float32)
            clipped = action.clip(-1, 1)
            joint = np.zeros(whole.action_space.shape)
            for own, numbers in zip(ACTUATORS[env_id], clipped):
                joint[own] = numbers
            want, rewards, *_ = theirs.step(dict(zip(theirs.possible_agents, clipped)))
            state, reward, terminated, truncated, about = whole.step(joint)
            obs, team_reward, ours_terminated, ours_truncated, info = ours.step(action)
            assert team_reward == pytest.approx(reward, rel=1e-5) == pytest.approx(rewards["agent_0"], rel=1e-5)
            assert (ours_terminated, ours_truncated) == (terminated, truncated)
            if scenario == "Ant":
                np.testing.assert_allclose(info["torso_xy"], robot(ours).data.qpos[:2], rtol=1e-6)
            if terminated:
                break


@pytest.mark.parametrize("robot_name", ["ant_2x4", "manysegmentant_2x3", "humanoid_9|8", "humanoidstandup_9|8"])
def test_motion_is_the_joints_positions_and_velocities(robot_name):
    env = make_env(f"mamujoco_{robot_name}", "motion")
    env.reset(seed=0)
    obs, *_, info = env.step(env.action_space.sample())
    data = robot(env).data
    joints = np.concatenate([data.qpos[2:], data.qvel]).astype(np.float32)  # without the place in the plane
    np.testing.assert_array_equal(info["state"], joints)
    np.testing.assert_array_equal(obs, np.hstack([np.tile(joints, (2, 1)), np.eye(2)]))


@pytest.mark.parametrize("env_id", ACTUATORS)
def test_partitions_reach_the_right_actuators(env_id):
    """Each agent's every number moves one actuator, the right one, over that actuator's whole range."""
    env = make_env(env_id)
    assert env.action_sizes == [len(own) for own in ACTUATORS[env_id]]
    limit = robot(env).action_space.high[0]
    for i, own in enumerate(ACTUATORS[env_id]):
        for j, actuator in enumerate(own):
            env.reset(seed=0)
            action = np.zeros(env.action_space.shape, np.float32)
            action[i, j] = -1.0
            env.step(action)
            want = np.zeros(robot(env).action_space.shape)
            want[actuator] = -limit
            np.testing.assert_allclose(robot(env).data.ctrl, want, atol=1e-7)


def test_unequal_agents_are_masked():
    env = make_env("mamujoco_humanoid_9|8", "k0")
    assert env.action_sizes == [9, 8] and env.obs_sizes == [236, 167] and env.state_size == 348
    assert env.action_mask.sum(1).tolist() == [9, 8] and env.obs_mask.sum(1).tolist() == [236, 167]
    obs, _ = env.reset(seed=0)
    assert not obs[1, 167:].any() and obs[1, :167].any()
    action = np.random.default_rng(0).uniform(-1, 1, (2, 9)).astype(np.float32)
    first = env.step(action)
    env.reset(seed=0)
    action[1, 8] = -action[1, 8]  # the second agent has eight numbers; the ninth is padding
    np.testing.assert_array_equal(first[0], env.step(action)[0])
    assert np.abs(robot(env).data.ctrl).max() <= 0.4 + 1e-6  # this robot's own range


ENDS = {
    **{
        f"mamujoco_{name}": "terminates"
        for name in ("ant_2x4", "ant_2x4d", "ant_4x2", "walker2d_2x3", "hopper_3x1", "humanoid_9|8")
    },
    **{
        f"mamujoco_{name}": "truncates"
        for name in ("halfcheetah_2x3", "halfcheetah_6x1", "swimmer_2x1", "manysegmentswimmer_10x2")
    },
    **{f"mamujoco_{name}": "truncates" for name in ("reacher_2x1", "pusher_3p", "humanoidstandup_9|8")},
    **{env_id: "truncates" for env_id in list_tasks() if env_id.startswith("mpe_")},
}


@pytest.mark.parametrize("env_id", ENDS)
def test_termination_and_truncation(env_id):
    """A fall terminates, a time limit truncates, and only the limit that the task states."""
    env, horizon, rng = make_env(env_id), find_task(env_id).horizon, np.random.default_rng(0)
    env.reset(seed=0)
    for step in range(1, horizon + 1):
        still = ENDS[env_id] == "truncates"
        *_, terminated, truncated, _ = env.step(
            env.action_space.low * 0 if still else rng.uniform(-1, 1, env.action_space.shape)
        )
        assert not (terminated and truncated)
        if terminated or truncated:
            break
    if ENDS[env_id] == "terminates":
        assert terminated and step < horizon
    else:
        assert truncated and step == horizon


def test_a_robot_that_stands_until_the_limit_is_truncated():
    """Ant at rest is healthy: its thousandth step is a truncation, which bootstraps."""
    env = make_env("mamujoco_ant_2x4")
    env.reset(seed=0)
    ends = [env.step(np.zeros(env.action_space.shape))[2:4] for _ in range(1000)]
    assert not any(map(any, ends[:-1])) and ends[-1] == (False, True)


def test_copies_in_processes_equal_copies_in_this_one():
    """Where there are cores for it `make_vec` puts robots into processes: same numbers, also across a masked reset."""
    env_id = "mamujoco_hopper_3x1"
    assert isinstance(make_vec(env_id, 1), gym.vector.SyncVectorEnv)
    serial, ours, rng = (
        make_vec(env_id, 3, processes=False),
        make_vec(env_id, 3, processes=True),
        np.random.default_rng(0),
    )
    try:
        results = [envs.reset(seed=5) for envs in (ours, serial)]
        ended = 0
        for _ in range(120):
            np.testing.assert_array_equal(results[0][0], results[1][0])
            np.testing.assert_array_equal(results[0][-1]["state"], results[1][-1]["state"])
            action = rng.uniform(-1, 1, (3, 3, 1)).astype(np.float32)
            results = [envs.step(action) for envs in (ours, serial)]
            for a, b in zip(results[0][:4], results[1][:4]):
                np.testing.assert_array_equal(a, b)
            done = results[0][2] | results[0][3]
            if done.any():
                ended += 1
                for key in ("r", "l"):
                    np.testing.assert_allclose(results[0][4]["episode"][key][done], results[1][4]["episode"][key][done])
                results = [envs.reset(options={"reset_mask": done.copy()}) for envs in (ours, serial)]
                for _, info in results:
                    info["state"] = np.where(done[:, None], info["state"], 0)
        assert ended > 2
    finally:
        ours.close()


def test_blind_doors_need_no_processes(monkeypatch):
    monkeypatch.setattr(common.envs, "cores", lambda: 4)
    assert isinstance(make_vec("doors_blind", 2), gym.vector.SyncVectorEnv)


@pytest.mark.parametrize(
    "cores, copies, processes", [(4, 2, True), (4, 64, True), (4, 1, False), (4, 65, False), (3, 2, False)]
)
def test_robots_get_processes_if_there_are_cores_for_them(monkeypatch, cores, copies, processes):
    monkeypatch.setattr(common.envs, "cores", lambda: cores)
    for kind in ("AsyncVectorEnv", "SyncVectorEnv"):
        monkeypatch.setattr(gym.vector, kind, lambda envs, kind=kind, **_: (kind, len(envs)))
    assert make_vec("mamujoco_hopper_3x1", copies) == ("AsyncVectorEnv" if processes else "SyncVectorEnv", copies)


def test_many_segments_leave_nothing_behind_and_open_side_by_side():
    """Upstream writes their description into the installed package; ours goes to a temporary folder, so that processes do not meet."""
    folder = Path(mamujoco_v1.__file__).parent / "assets"
    before = sorted(path.name for path in folder.iterdir())
    theirs, ours = (
        mamujoco_v1.parallel_env("ManySegmentAnt", "2x2", agent_obsk=0),
        make_env("mamujoco_manysegmentant_2x2"),
    )
    action = np.random.default_rng(0).uniform(-1, 1, ours.action_space.shape).astype(np.float32)
    theirs.reset(seed=0), ours.reset(seed=0)
    for _ in range(5):
        want = theirs.step(dict(zip(theirs.possible_agents, action)))
        assert ours.step(action)[1] == pytest.approx(want[1]["agent_0"], rel=1e-5)
    envs = make_vec("mamujoco_manysegmentant_2x2", 6, processes=True)
    envs.reset(seed=0), envs.close()
    assert sorted(path.name for path in folder.iterdir()) == before


# --- the scripted adversary ---


def test_the_team_of_simple_adversary_is_the_two_good_agents():
    theirs, ours = (
        simple_adversary_v3.parallel_env(N=2, max_cycles=25, continuous_actions=True),
        make_env("mpe_simple_adversary"),
    )
    assert ours.agents == ["agent_0", "agent_1"] and ours.state_size == 20
    rng = np.random.default_rng(0)
    for episode in range(20):
        want, _ = theirs.reset(seed=episode)
        obs, _ = ours.reset(seed=episode)
        for _ in range(25):
            np.testing.assert_array_equal(obs, np.stack([want["agent_0"], want["agent_1"]]))
            action = rng.uniform(-1, 1, (2, 2)).astype(np.float32)
            force = lambda f: np.array([0, max(-f[0], 0), max(f[0], 0), max(-f[1], 0), max(f[1], 0)], np.float32)
            moves = {"agent_0": force(action[0]), "agent_1": force(action[1])}
            moves["adversary_0"] = force(scripted_adversary(want["adversary_0"]))
            want, rewards, *_ = theirs.step(moves)
            obs, reward, *_, info = ours.step(action)
            assert (
                rewards["agent_0"] == rewards["agent_1"] == pytest.approx(reward, rel=1e-5)
            )  # and not the adversary's
            assert info["agent_rewards"].shape == (2,)


def test_the_scripted_adversary_goes_where_a_good_agent_is():
    near, far, away = [0.3, -0.1], [-1.9, 0.8], [0.0, 1.9]
    observe = lambda *points: np.concatenate(points).astype(np.float32)  # landmark, landmark, agent, agent
    np.testing.assert_allclose(
        scripted_adversary(observe(near, far, away, [-1.9, 0.7])), [-1, 0.8], rtol=1e-6
    )  # an agent stands at `far`
    np.testing.assert_allclose(
        scripted_adversary(observe(near, far, [0.3, 0.0], away)), near, rtol=1e-6
    )  # an agent stands at `near`
    np.testing.assert_allclose(
        scripted_adversary(observe(far, near, away, [0.3, 0.0])), near, rtol=1e-6
    )  # order does not matter
    env, distances = make_env("mpe_simple_adversary"), []
    for episode in range(50):  # standing agents: it ends at the landmark closest to one of them
        env.reset(seed=episode)
        for _ in range(25):
            env.step(np.zeros((2, 2)))
        world = env.env.unwrapped.world
        landmarks, team = (np.stack([x.state.p_pos for x in group]) for group in (world.landmarks, world.agents[1:]))
        goal = landmarks[((landmarks[:, None] - team) ** 2).sum(-1).min(1).argmin()]
        distances.append(np.linalg.norm(world.agents[0].state.p_pos - goal))
    assert np.mean(distances) < 0.05


# --- names that do not open, and settings that do not fit ---


@pytest.mark.parametrize(
    "env_id, words",
    [
        ("mamujoco_ant_2x5", ["mamujoco_ant_2x5", "mamujoco_ant_2x4 or mamujoco_ant_2x4d or mamujoco_ant_4x2"]),
        ("mamujoco_ant", ["mamujoco_ant_2x4"]),
        ("mamujoco_halfcheetah_", ["mamujoco_halfcheetah_2x3"]),
        ("mamujoco_humanoidstandup_2x4", ["did you mean mamujoco_humanoidstandup_9|8?"]),
        ("mamujoco_coupledhalfcheetah_1p1", ["unknown task", "mamujoco_halfcheetah_2x3"]),
        ("mamujoco_spider_2x4", ["unknown task", "did you mean"]),
        ("mamujoco_manysegmentswimmer_10", ["mamujoco_manysegmentswimmer_10x2"]),
        ("mamujoco_manysegmentswimmer_1x1", ["mamujoco_manysegmentswimmer_10x2"]),
        ("mpe_simple\nspread", ["unknown task"]),
        ("mpe_simple_tag", ["unknown task", "omar_simple_tag"]),
        ("mpe_simple_adversry", ["mpe_simple_adversary"]),
        ("ant_2x4", ["mamujoco_ant_2x4"]),
        ("", ["unknown task"]),
    ],
)
def test_tasks_that_cannot_be_opened_say_why(env_id, words):
    with pytest.raises(BadInput) as error:
        make_env(env_id)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), error.value


def test_coupled_half_cheetah_is_still_broken_upstream():
    """If this fails, a newer package can run it: then it should be listed."""
    with pytest.raises(Exception):
        env = mamujoco_v1.parallel_env("CoupledHalfCheetah", "1p1", agent_obsk=0)
        env.reset(seed=0)
        env.step({agent: env.action_space(agent).sample() for agent in env.possible_agents})


@pytest.mark.parametrize(
    "env_id, observation", [("mpe_simple_spread", "full"), ("mamujoco_ant_2x4", "own"), ("mamujoco_ant_2x4", "k")]
)
def test_observation_settings_that_a_task_does_not_have(cli, tmp_path, env_id, observation):
    for opened in (lambda: make_env(env_id, observation), lambda: make_vec(env_id, 2, observation)):
        with pytest.raises(BadInput, match=f"--observation '{observation}': {env_id} offers"):
            opened()
    code, out, err = cli("--env-id", env_id, "--observation", observation)
    assert (
        code == 2 and len(err.splitlines()) == 1 and "--observation" in err and not out and not list(tmp_path.iterdir())
    )


@pytest.mark.parametrize("env_id", MAMUJOCO)
def test_gymnasium_accepts_robots(env_id):
    check_env(make_env(env_id), skip_render_check=True)


# --- training on every task ---


@pytest.mark.parametrize("policy", omad.POLICIES)
@pytest.mark.parametrize("env_id", list_tasks())
def test_every_task_does_real_updates(env_id, policy):
    """On real transitions, with every hyper-parameter of its preset but the widths: all parameters change and stay finite."""
    args = dataclasses.replace(omad.preset(env_id), policy_hidden=16, critic_hidden=16, batch_size=32, policy=policy)
    env, rng = make_env(env_id, args.observation), np.random.default_rng(0)
    torch.manual_seed(0)
    agent, replay = omad.OMAD(env, args, torch.device("cpu")), omad.Replay(env, 64, torch.device("cpu"))
    act = omad.make_act(agent.policy, args)
    obs, info = env.reset(seed=0)
    for step in range(64):
        action = act(obs[None]) if step % 2 else rng.uniform(-1, 1, (1, *env.action_space.shape))
        after, reward, terminated, truncated, next_info = env.step(action[0])
        row = dict(
            obs=obs, next_obs=after, state=info["state"], next_state=next_info["state"], action=action[0], reward=reward
        )
        replay.add(
            **{name: np.asarray(value, np.float32)[None] for name, value in (row | dict(terminated=terminated)).items()}
        )
        obs, info = env.reset() if terminated or truncated else (after, next_info)
    before = {name: p.clone() for name, p in agent.named_parameters()}
    for update in range(6):
        noises = [agent.policy.noise(32) for _ in range(1 + update % 2)]
        assert all(
            value.isfinite() for value in agent.update(replay.sample(torch.randint(64, (32,))), *noises).values()
        )
    for name, p in agent.named_parameters():
        assert p.isfinite().all() and not torch.equal(p, before[name]), name


@pytest.mark.parametrize("env_id", ["mamujoco_ant_2x4", "mamujoco_reacher_2x1", "mpe_simple_adversary"])
def test_a_whole_run_on_it(cli, tmp_path, env_id, monkeypatch):
    """The program, also with several environments (processes, for robots), evaluation, checkpoint and resume."""
    monkeypatch.setattr(common.envs, "cores", lambda: 4 if env_id == "mamujoco_reacher_2x1" else 2)
    horizon = find_task(env_id).horizon
    flags = [*SHORT, "--num-envs", 2, "--eval-episodes", 2, "--updates-per-step", 0.5, "--eval-every", 2 * horizon]
    flags += ["--total-timesteps", 2 * horizon, "--learning-starts", 2 * horizon - 40]
    code, out, err = cli("--env-id", env_id, *flags)
    assert code == 0, err
    (run,) = tmp_path.glob(f"{env_id}__omad__*")
    saved = torch.load(run / "checkpoint.pt", weights_only=True)
    assert saved["updates"] == 19
    assert torch.load(run / "policy.pt", weights_only=True)["args"]["observation"] == omad.preset(env_id).observation
    assert (run / "torso_xy.npy").exists() == (env_id == "mamujoco_ant_2x4")
    code, out, err = cli("--evaluate", run, run_dir=False)
    assert code == 0 and f"{saved['evaluations'][-1]['return_mean']:.2f}" in out


@pytest.mark.parametrize("env_id", list_tasks())
def test_presets_fit_their_tasks(env_id):
    args = omad.parse(["--env-id", env_id])
    assert args.v_min < 0 < args.v_max and args.env_id == env_id
    if env_id.startswith("mamujoco_"):
        wanted = dict(
            observation="motion" if "ant" in env_id.split("_")[1] else "full", policy_hidden=256, critic_hidden=2048,
            updates_per_step=2, n_atoms=100, denoising_steps=8, batch_size=256, policy_lr=3e-4, q_lr=3e-4,
            gamma=0.998 if "mamujoco_swimmer" in env_id else 0.99, buffer_size=1_000_000,
        )  # fmt: skip
        assert {name: getattr(args, name) for name in wanted} == wanted and args.v_min == -args.v_max


@pytest.mark.parametrize(
    "env_id, v_max", [("mamujoco_ant_2x4", 1000), ("mamujoco_ant_2x4d", 1000), ("mamujoco_ant_4x2", 1000), ("mamujoco_walker2d_2x3", 1000),
                      ("mamujoco_halfcheetah_2x3", 2000), ("mamujoco_halfcheetah_6x1", 2000), ("mamujoco_swimmer_2x1", 200),
                      ("mpe_simple_spread", 10), ("mpe_simple_spread_n4", 10), ("mpe_simple_adversary", 30)],
)  # fmt: skip
def test_the_papers_tasks_have_the_supports_that_the_readme_gives(env_id, v_max):
    assert omad.preset(env_id).v_max == v_max
