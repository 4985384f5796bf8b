"""Multi-agent tasks as ordinary gymnasium environments.

`TeamEnv` turns a PettingZoo parallel environment into a `gymnasium.Env` with one observation array, one action array and one
reward, so that gymnasium's own vector environments, episode statistics and video wrappers work on it unchanged. `find_task`
says what `make_env` opens:

    mpe_<scenario>                        the cooperative scenarios of mpe2, and simple_adversary against a scripted adversary
    mamujoco_<scenario>_<partition>       any partition of any robot that gymnasium-robotics' MaMuJoCo knows
    omar_<scenario>                       the four tasks in which OMAR's offline data were made (`common/omar.py`)

Definitions, used everywhere in this project:
    team reward = mean over the team's agents of the environment's own reward
    return      = sum of the team reward over one episode

Shape letters: N agents, O observation size (of the largest agent), A action size (likewise), S joint state size.
"""

import difflib
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")  # the banner would come before our own first line
if sys.platform == "linux":
    os.environ.setdefault("MUJOCO_GL", "egl")  # videos without a screen; mujoco reads it when it is imported

import farama_notifications
import gymnasium as gym
import mujoco
import numpy as np

farama_notifications.notifications.pop("gymnasium_robotics", None)  # printed at every import, about robots that are not ours
from gymnasium_robotics import mamujoco_v1
from gymnasium_robotics.envs.multiagent_mujoco import many_segment_ant, many_segment_swimmer
from gymnasium_robotics.envs.multiagent_mujoco.obsk import get_parts_and_edges
from mpe2 import (
    collect_treasure_v1, simple_adversary_v3, simple_formation_v1, simple_line_v1, simple_reference_v3,
    simple_speaker_listener_v4, simple_spread_v3, simple_v3,
)  # fmt: skip
from pettingzoo import ParallelEnv
from pettingzoo.utils.conversions import aec_to_parallel

from common import omar

# Without this, mujoco prints that a robot's file uses a deprecated attribute, once per copy, and keeps a log file of it.
mujoco.set_mju_user_warning(lambda message: None if "deprecated" in message else print(f"mujoco: {message}", file=sys.stderr))


class UnknownTask(ValueError):
    """There is no such task, or it cannot run; the message says which, and names the near misses."""


Opponent = Callable[[np.ndarray], np.ndarray]  # own observation -> action in [-1, 1], like a team member's


@dataclass(frozen=True)
class Task:
    """How one task is made, and what stands for it in listings."""

    make: Callable[..., ParallelEnv]  # make(render_mode=..., joints=...), joints only for MaMuJoCo
    description: str
    horizon: int = 25  # steps of the longest episode
    opponents: Mapping[str, Opponent] = field(default_factory=dict)  # agents outside the team, and the script each follows
    own_state: bool = False  # the joint state is the environment's own, not all observations
    terminates: bool = False  # an episode can end before its last step, by a fall


# --- MPE ---


def _mpe(module, **kwargs) -> Callable[..., ParallelEnv]:
    """An MPE scenario: 25 steps, continuous actions. `raw_env` leaves out PettingZoo's call-order checks, a third of the time."""
    return lambda render_mode=None: aec_to_parallel(
        module.raw_env(continuous_actions=True, max_cycles=25, render_mode=render_mode, **kwargs)
    )


def scripted_adversary(obs: np.ndarray) -> np.ndarray:
    """The opponent of simple_adversary, which is not told which of the landmarks is the goal.

    It walks to the landmark that a good agent is closest to: who goes to the goal alone shows it the way, and the team does best
    with one agent on each landmark. Its force is its distance from there, at most 1 on each axis; that gets there soonest, for a
    larger force swings past it. Deterministic.

    obs: relative positions of two landmarks and two good agents [8] -> force [2] in [-1, 1].
    """
    landmarks, team = obs.reshape(2, 2, 2)  # [landmark, xy], [agent, xy]
    nearest = ((landmarks[:, None] - team) ** 2).sum(-1).min(1)  # [landmark] squared distance to the closest agent
    return np.clip(landmarks[nearest.argmin()], -1.0, 1.0)


TASKS: dict[str, Task] = {
    "mpe_simple_spread": Task(_mpe(simple_spread_v3, N=3, local_ratio=0.5), "three agents cover three landmarks without colliding"),
    "mpe_simple_spread_n4": Task(
        _mpe(simple_spread_v3, N=4, local_ratio=0.5), "four agents cover four landmarks without colliding"
    ),
    "mpe_simple_adversary": Task(
        _mpe(simple_adversary_v3, N=2),
        "two agents reach the goal and keep a scripted adversary guessing which landmark it is",
        opponents={"adversary_0": scripted_adversary},
    ),
    "mpe_simple": Task(_mpe(simple_v3), "one agent goes to a landmark"),
    "mpe_simple_reference": Task(_mpe(simple_reference_v3, local_ratio=0.5), "two agents tell each other where to go"),
    "mpe_simple_speaker_listener": Task(
        _mpe(simple_speaker_listener_v4), "one agent sees the goal, the other can move: unequal agents"
    ),
    "mpe_simple_formation": Task(_mpe(simple_formation_v1, N=4), "four agents form a circle around a landmark"),
    "mpe_simple_line": Task(_mpe(simple_line_v1, N=4), "four agents line up between two landmarks"),
    "mpe_collect_treasure": Task(_mpe(collect_treasure_v1), "six collectors bring treasures to two movable deposits"),
}
COMPETITIVE = ("mpe_simple_crypto", "mpe_simple_push", "mpe_simple_tag", "mpe_simple_world_comm")


# --- OMAR's tasks ---


def _omar(scenario: str, description: str) -> Task:
    return Task(
        lambda render_mode=None, shift="": aec_to_parallel(omar.ParticleEnv(scenario, render_mode, shift)),
        f"{description}; OMAR's rewards and physics",
        opponents=omar.make_prey(scenario),
    )


TASKS |= {
    "omar_simple_spread": _omar("simple_spread", "three agents cover three landmarks"),
    "omar_simple_tag": _omar("simple_tag", "three predators keep touching a prey among obstacles"),
    "omar_simple_world": _omar("simple_world", "three predators keep touching a prey in a wood"),
    "omar_simple_spread_6": _omar("simple_spread_6", "three agents cover any three of six landmarks"),
    "omar_halfcheetah_2x3": Task(
        partial(mamujoco_v1.parallel_env, "HalfCheetah", "2x3", agent_obsk=0, global_categories=()),
        "HalfCheetah-v5, 6 actuators shared by 2 agents, each of which sees its own joints only",
        horizon=1000,
        own_state=True,
    ),
}

# --- Multi-Agent MuJoCo ---

ROBOTS = {  # in task names -> in gymnasium-robotics, and the partitions that listings show
    "ant": ("Ant", ("2x4", "2x4d", "4x2")),
    "halfcheetah": ("HalfCheetah", ("2x3", "6x1")),
    "walker2d": ("Walker2d", ("2x3",)),
    "swimmer": ("Swimmer", ("2x1",)),
    "hopper": ("Hopper", ("3x1",)),
    "humanoid": ("Humanoid", ("9|8",)),
    "humanoidstandup": ("HumanoidStandup", ("9|8",)),
    "reacher": ("Reacher", ("2x1",)),
    "pusher": ("Pusher", ("3p",)),
    "manysegmentswimmer": ("ManySegmentSwimmer", ("10x2",)),  # any AxB: A agents with B segments each
    "manysegmentant": ("ManySegmentAnt", ("2x3",)),  # likewise
}


def _many_segments(kind: str, segments: int, render_mode: str | None) -> gym.Env:
    """A robot of many segments. Upstream writes its description into the installed package, where two processes collide."""
    generator = {"Ant": many_segment_ant, "Swimmer": many_segment_swimmer}[kind]
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "robot.xml")
        generator.gen_asset(n_segs=segments, asset_path=path)
        return gym.make(f"{kind}-v5", xml_file=path, render_mode=render_mode)


def _mamujoco(robot: str, partition: str) -> Task:
    """A robot whose actuators are shared out among agents. Raises `UnknownTask` for a partition it does not have."""
    scenario, listed = ROBOTS[robot]
    name = f"mamujoco_{robot}_{partition}"
    kind = scenario.removeprefix("ManySegment")  # Ant or Swimmer
    if scenario != kind:
        known = re.fullmatch(r"[1-9]\d?x[1-9]\d?", partition) and partition != "1x1"
    else:
        known = partition in listed
    if not known:
        raise UnknownTask(
            f"unknown task {name!r}; {scenario} has the partition{'s'[: len(listed) > 1]} {' and '.join(listed)}"
            + f", as in mamujoco_{robot}_{listed[0]}"
            + (", or any other number of agents x segments each" if scenario != kind else "")
        )

    def make(render_mode=None, joints=None):
        """joints: how far each agent sees. None: agents see nothing, for callers that hand them the state (a third faster)."""
        options = dict(local_categories=[[]], global_categories=()) if joints is None else {}
        if scenario != kind:
            options["gym_env"] = _many_segments(kind, math.prod(map(int, partition.split("x"))), render_mode)
        return mamujoco_v1.parallel_env(scenario, partition, agent_obsk=joints or 0, render_mode=render_mode, **options)

    parts = [len(part) for part in get_parts_and_edges(scenario, partition)[0]]
    share = f"{parts[0]} each" if len(set(parts)) == 1 else " + ".join(map(str, parts))
    description = f"{scenario}-v5, {sum(parts)} actuators shared by {len(parts)} agents ({share})"
    falls = kind in ("Ant", "Walker2d", "Hopper", "Humanoid")
    return Task(make, description, gym.spec(f"{kind}-v5").max_episode_steps, own_state=True, terminates=falls)


def list_tasks() -> list[str]:
    """Every task by name; those of MaMuJoCo's many-segment robots are examples of any number of segments."""
    return [*TASKS, *(f"mamujoco_{robot}_{partition}" for robot, (_, listed) in ROBOTS.items() for partition in listed)]


def find_task(env_id: str) -> Task:
    """The task of that name. Raises `UnknownTask` with the reason or the closest names."""
    if env_id in TASKS:
        return TASKS[env_id]
    suite, _, rest = env_id.partition("_")
    robot, _, partition = rest.partition("_")
    if suite == "mamujoco" and robot == "coupledhalfcheetah":
        raise UnknownTask(f"{env_id!r} cannot run: gymnasium-robotics' CoupledHalfCheetah does not load in the installed mujoco")
    if suite == "mamujoco" and robot in ROBOTS:
        return _mamujoco(robot, partition)
    if env_id in COMPETITIVE:
        raise UnknownTask(f"{env_id!r} has two teams and mpe2 ships no opponent for either; --list-tasks shows what there is")
    near = difflib.get_close_matches(env_id, list_tasks(), n=3, cutoff=0.5) or ["mpe_simple_spread", "mamujoco_ant_2x4"]
    raise UnknownTask(f"unknown task {env_id!r}; did you mean {' or '.join(near)}? --list-tasks shows all")


# --- environments ---


def make_env(env_id: str, observation: str = "", render_mode: str | None = None, prey: str = "", shift: str = "") -> gym.Env:
    """Opens one task.

    Args:
        env_id: a name that `find_task` knows; else it raises `UnknownTask`.
        observation: what each agent sees. "own": what the environment gives it, the only setting of MPE. MaMuJoCo: "full" is the
            whole state and a one-hot agent id (HARL's setting), "k0", "k1", ... its own joints and those at most k joints away.
            "" stands for "own" in MPE and for "full" in MaMuJoCo. Raises `ValueError` for what the task does not have.
        render_mode: None or "rgb_array".
        prey: a file with the prey's network, for OMAR's tag and world; "" for the project's own. Raises `ValueError` for a file
            that is not one, and for other tasks.
        shift: one of `SHIFTS`, an environment that differs from the one policies were trained for; "" for none. Raises
            `ValueError` for what the task does not have.
    """
    task = find_task(env_id)
    check_observation(env_id, observation)
    check_shift(env_id, shift)
    if env_id.startswith("mamujoco_"):
        joints = int(observation[1:]) if observation.startswith("k") else None
        env = TeamEnv(task.make(render_mode=render_mode, joints=joints), own_state=True, observe_state=joints is None)
    else:
        opponents = find_prey(env_id, prey) if prey else task.opponents
        inside = {} if shift in ("", *ROBOT_SHIFTS) else {"shift": shift}
        env = TeamEnv(task.make(render_mode=render_mode, **inside), opponents, own_state=task.own_state)
    return ShiftedRobot(env, shift) if shift in ROBOT_SHIFTS else env


# The shifted environments of DOM2 (arXiv 2307.01472): what is drawn evenly, from which intervals, at each start of an episode.
ROBOT_SHIFTS = {
    "random": {"power": [(0.8, 1.2)], "density": [(750.0, 1250.0)], "friction": [(0.25, 0.55)]},
    "extreme": {
        "power": [(0.6, 0.8), (1.2, 1.4)], "density": [(500.0, 750.0), (1250.0, 1500.0)], "friction": [(0.1, 0.25), (0.55, 0.7)],
    },
}  # fmt: skip
SHIFTS = {
    "speed": "OMAR's particle tasks: every agent has a pace of its own in each episode, a factor on acceleration and greatest speed",
    "fewer": "omar_simple_spread_6: three of the six landmarks are taken away in each episode",
    "random": "HalfCheetah: power of the motors, density of the torso and friction are drawn around the usual ones in each episode",
    "extreme": "HalfCheetah: the same, drawn from farther away on both sides, never close to the usual ones",
}


def check_shift(env_id: str, shift: str) -> None:
    """Raises `ValueError` unless the task can be shifted so."""
    offered = ["", *(shift for name, shift in omar.SHIFTS.items() if env_id == f"omar_{name}")]
    if env_id.startswith(("omar_halfcheetah", "mamujoco_halfcheetah")):
        offered += [*ROBOT_SHIFTS]
    if shift not in offered:
        raise ValueError(
            f"{shift!r}: {env_id} "
            + (f"can be shifted by {' or '.join(map(repr, offered[1:]))} only" if offered[1:] else "cannot be shifted")
        )


class ShiftedRobot(gym.Wrapper):
    """HalfCheetah whose body is redrawn at each reset, see `ROBOT_SHIFTS`: the factor on all motors' gears, the density of the torso
    (usually 1000: mass and inertia follow; the other parts keep theirs, so that the whole weighs more or less), and the sliding
    friction of all surfaces (usually 0.4)."""

    def __init__(self, env: gym.Env, shift: str):
        super().__init__(env)
        robot = env.env.single_agent_env.unwrapped
        self.ranges, self.model, self.data = ROBOT_SHIFTS[shift], robot.model, robot.data
        self.torso, self.generator = self.model.body("torso").id, np.random.default_rng()
        self.usual = [x.copy() for x in (self.model.actuator_gear, self.model.body_mass, self.model.body_inertia)]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        if seed is not None:
            self.generator = np.random.default_rng([seed, 1])  # its own, so that the starts are those of the usual environment
        draws = {}
        for name, intervals in self.ranges.items():
            sizes = np.array([high - low for low, high in intervals])
            low, high = intervals[self.generator.choice(len(intervals), p=sizes / sizes.sum())]
            draws[name] = self.generator.uniform(low, high)
        gear, mass, inertia = self.usual
        heavier = draws["density"] / 1000.0
        self.model.actuator_gear[:] = gear * draws["power"]
        self.model.body_mass[self.torso] = mass[self.torso] * heavier
        self.model.body_inertia[self.torso] = inertia[self.torso] * heavier
        self.model.geom_friction[:, 0] = draws["friction"]
        mujoco.mj_setConst(self.model, self.data)  # what follows from the masses
        return self.env.reset(seed=seed, options=options)


def check_observation(env_id: str, observation: str) -> None:
    """Raises `ValueError` unless the task offers this observation setting."""
    offered = r"full|k\d" if env_id.startswith("mamujoco_") else "own"
    if observation and not re.fullmatch(offered, observation):
        offer = "'full', 'k0', 'k1' ... 'k9'" if env_id.startswith("mamujoco_") else "'own' only"
        raise ValueError(f"{observation!r}: {env_id} offers {offer}")


def find_prey(env_id: str, path: str) -> Mapping[str, Opponent]:
    """The prey in that file, by its agent's name. Raises `ValueError` for a file that is not one, and for a task without prey."""
    scenario = env_id.removeprefix("omar_")
    if not env_id.startswith("omar_") or scenario not in omar.PREY_SIZES:
        raise ValueError(f"{path}: {env_id} has no prey, only omar_simple_tag and omar_simple_world have")
    return omar.make_prey(scenario, path)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_vec(
    env_id: str, num_envs: int, observation: str = "", processes: bool | None = None, prey: str = "", shift: str = ""
) -> gym.vector.VectorEnv:
    """`num_envs` copies in one of gymnasium's vector environments, each with episode statistics in `info["episode"]`.

    With `processes` every copy has a process of its own, as many at work at a time as there are cores. By default 2 to 64 MuJoCo
    robots have, where there are four cores or more: on two,
    measured, what the processes tell each other costs more than they gain.
    Autoreset is off: `step` returns the true final observation and state at the end of an episode, and the caller restarts
    the finished copies with `reset(options={"reset_mask": done})`. Nothing is hidden, no step is spent on a reset.
    OMAR's particle tasks are arrays of all copies, with the same numbers: 30 times as fast with 32 copies.
    """
    scenario = env_id.removeprefix("omar_")
    if env_id.startswith("omar_") and scenario in omar.SCENARIOS:
        if prey:
            find_prey(env_id, prey)  # complains
        check_shift(env_id, shift)
        return gym.wrappers.vector.RecordEpisodeStatistics(omar.ParticleVec(scenario, num_envs, prey, shift))
    env_fns = [lambda: gym.wrappers.RecordEpisodeStatistics(make_env(env_id, observation, prey=prey, shift=shift))] * num_envs
    disabled = gym.vector.AutoresetMode.DISABLED
    if processes is None:
        processes = env_id.startswith(("mamujoco_", "omar_halfcheetah")) and 1 < num_envs <= 64 and cores() >= 4
    if processes:
        return gym.vector.AsyncVectorEnv(env_fns, autoreset_mode=disabled, max_concurrency=cores())
    return gym.vector.SyncVectorEnv(env_fns, autoreset_mode=disabled)


class TeamEnv(gym.Env):
    """A team of N agents behind the interface of a single-agent environment.

    observation  [N, O] float32; agent i's own numbers first, then zeros (`obs_mask` marks the real ones)
    action       [N, A] in [-1, 1]; entries outside `action_mask` are ignored, values beyond the box are clipped
    reward       the team reward (module docstring)
    info         "state" [S]: the joint state, without padding;
                 "agent_rewards" [N]: what the environment gave each agent (zeros on reset);
                 "torso_xy" [2]: where the robot is, in metres, after a step (only robots that move in a plane)

    Args:
        env: the environment.
        opponents: the agents that are not of the team, and the script each follows. They earn nothing that is counted here.
        own_state: the joint state is the environment's `state()`; otherwise it is every team member's observation, one after
            the other.
        observe_state: every agent observes the joint state, followed by its own one-hot id.

    Attributes: `num_agents` N, `obs_sizes` and `action_sizes` per agent, `obs_mask` [N, O], `action_mask` [N, A], `state_size` S.
    The final observation and state of an episode are returned by `step` like any other.
    """

    def __init__(
        self, env: ParallelEnv, opponents: Mapping[str, Opponent] = {}, own_state: bool = False, observe_state: bool = False
    ):
        self.env, self.opponents, self.own_state, self.observe_state = env, opponents, own_state, observe_state
        self.agents = [agent for agent in env.possible_agents if agent not in opponents]
        self.num_agents = len(self.agents)
        inner = getattr(env, "single_agent_env", env)  # of MaMuJoCo
        self.render_mode = inner.render_mode
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": inner.metadata.get("render_fps", 10)}
        self._converters = {agent: _action_converter(env, agent) for agent in env.possible_agents}
        self._opponent_obs: dict[str, np.ndarray] = {}
        self.obs_sizes = [env.observation_space(agent).shape[0] for agent in self.agents]
        self.state_size = inner.observation_space.shape[0] if own_state else sum(self.obs_sizes)
        if observe_state:
            self.obs_sizes = [self.state_size + self.num_agents] * self.num_agents
        self.action_sizes = [self._converters[agent][0] for agent in self.agents]
        self.obs_mask = np.arange(max(self.obs_sizes)) < np.array(self.obs_sizes)[:, None]  # [N, O]
        self.action_mask = np.arange(max(self.action_sizes)) < np.array(self.action_sizes)[:, None]  # [N, A]
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, self.obs_mask.shape, np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, self.action_mask.shape, np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        observations, _ = self.env.reset(seed=seed)
        return self._gather(observations, np.zeros(self.num_agents, np.float32))

    def step(self, action: np.ndarray):
        action = np.clip(action, -1.0, 1.0).astype(np.float32)
        own = dict(zip(self.agents, action)) | {name: script(self._opponent_obs[name]) for name, script in self.opponents.items()}
        moves = {agent: self._converters[agent][1](numbers) for agent, numbers in own.items()}
        observations, rewards, terminations, truncations, infos = self.env.step(moves)
        terminated = all(terminations[agent] for agent in self.agents)
        truncated = not terminated and all(terminations[agent] or truncations[agent] for agent in self.agents)
        obs, info = self._gather(observations, np.array([rewards[agent] for agent in self.agents], np.float32))
        about = infos.get(self.agents[0], {})
        if "x_position" in about and "y_position" in about:
            info["torso_xy"] = np.array([about["x_position"], about["y_position"]], np.float32)
        return obs, float(info["agent_rewards"].mean()), terminated, truncated, info

    def _gather(self, observations: dict[str, np.ndarray], agent_rewards: np.ndarray):
        self._opponent_obs = {name: observations[name] for name in self.opponents}
        if not self.observe_state:
            every = np.concatenate([observations[agent] for agent in self.agents], dtype=np.float32)
        state = self.env.state().astype(np.float32) if self.own_state else every  # [S]
        obs = np.zeros(self.obs_mask.shape, np.float32)  # [N, O]
        if self.observe_state:
            obs[:, : self.state_size], obs[:, self.state_size :] = state, np.eye(self.num_agents)
        else:
            obs[self.obs_mask] = every  # row by row: agent after agent, padding stays zero
        return obs, {"state": state, "agent_rewards": agent_rewards}

    def render(self):
        return self.env.render()

    def close(self):
        self.env.close()


def _action_converter(env: ParallelEnv, agent: str) -> tuple[int, Callable[[np.ndarray], np.ndarray]]:
    """Size of an agent's action in [-1, 1], and the function that turns it into the environment's own (float32).

    In general [-1, 1] is stretched onto the action space. MPE moves an agent by the force [a2 - a1, a4 - a3], four numbers for
    two: the exact two-number form puts each sign in its own slot. Communication numbers follow, from [-1, 1] onto [0, 1].
    """
    space = env.action_space(agent)
    size, low, high = space.shape[0], space.low, space.high

    def stretch(action: np.ndarray) -> np.ndarray:
        return low + (action[:size] + 1) / 2 * (high - low)

    def force(action: np.ndarray) -> np.ndarray:
        fx, fy, *message = action[: size - 3].tolist()
        own = [0.0, max(-fx, 0.0), max(fx, 0.0), max(-fy, 0.0), max(fy, 0.0), *((m + 1) / 2 for m in message)]
        return np.array(own, np.float32)

    if (low == -1).all() and (high == 1).all():
        return size, lambda action: action[:size]
    bodies = getattr(getattr(env.unwrapped, "world", None), "agents", None)  # MPE only
    movable = bodies is not None and bodies[env.possible_agents.index(agent)].movable
    return (size - 3, force) if movable else (size, stretch)
