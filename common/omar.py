"""The particle tasks of OMAR (arXiv 2111.11188), in which the offline data of the field were made.

They are MPE's tasks as they were before PettingZoo 1.23, with rewards of OMAR's own. Entities, start states and most
observations are mpe2's classes; this file holds what differs:

    physics  velocity is updated before position, and an action is multiplied by the agent's acceleration twice
    spread   an agent's reward: sum over landmarks of min(1 / distance of the closest agent, 10), -5 per agent touched
    tag      a predator's reward: -0.1 sum over predators of the distance to the prey, +10 per predator touching it
    world    the same with 5; one obstacle, two foods and two forests, which hide nobody
    prey     part of tag and world: a script (`ScriptedPrey`), or a network from a file (`FilePrey`)

Episodes have 25 steps and end by truncation. Positions, velocities and forces are arrays [2] in one copy of a world and
[2, E] in E copies side by side: the same code serves both, so that `ParticleEnv` (with pictures, one copy) and
`ParticleVec` (fast, many copies) cannot differ.
"""

from collections.abc import Callable
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from mpe2._mpe_utils.core import Entity, World
from mpe2._mpe_utils.simple_env import SimpleEnv
from mpe2.simple_spread import simple_spread
from mpe2.simple_tag import simple_tag
from mpe2.simple_world_comm import simple_world_comm

from common import BadInput

HORIZON = 25
Prey = Callable[[np.ndarray], np.ndarray]  # its observations [..., O] -> forces [..., 2] in [-1, 1]


class LegacyWorld(World):
    """mpe2's world with the older order of integration, for one copy or many."""

    def action_force(self, agent):
        # `u` has been multiplied once already: `set_action`, or mpe2
        return agent.mass * (agent.accel or 1.0) * agent.action.u * getattr(agent, "pace", 1.0)

    def set_action(self, agent, action):
        agent.action.u = action * np.float64(agent.accel or 5.0)  # in mpe2's precision, for its very numbers

    def apply_action_force(self, p_force):
        for i, agent in enumerate(self.agents):
            p_force[i] = self.action_force(agent)
        return p_force

    def get_collision_force(self, entity_a, entity_b):
        if not (entity_a.collide and entity_b.collide and (entity_a.movable or entity_b.movable)):
            return [None, None]
        delta, margin = entity_a.state.p_pos - entity_b.state.p_pos, self.contact_margin
        dist = np.sqrt((delta**2).sum(0))
        penetration = np.logaddexp(0, (entity_a.size + entity_b.size - dist) / margin) * margin
        force = self.contact_force * delta / dist * penetration
        return [force if entity_a.movable else None, -force if entity_b.movable else None]

    def next_velocity(self, agent, force):
        velocity = agent.state.p_vel * (1 - self.damping) + force / agent.mass * self.dt
        if agent.max_speed is None:
            return velocity
        speed, top = np.sqrt((velocity**2).sum(0)), agent.max_speed * getattr(agent, "pace", 1.0)
        return np.where(speed > top, velocity / np.maximum(speed, top) * top, velocity)

    def integrate_state(self, p_force):
        for agent, force in zip(self.agents, p_force):  # landmarks stay where they are
            agent.state.p_vel = self.next_velocity(agent, force)  # before the position: mpe2 moves with the old one
            agent.state.p_pos = agent.state.p_pos + agent.state.p_vel * self.dt

    def update_agent_state(self, agent):
        pass  # nobody speaks: what agents hear stays the zeros of the reset


def legacy(world: World) -> LegacyWorld:
    """The same entities in a world with the older physics."""
    result = LegacyWorld()
    result.__dict__.update(world.__dict__)
    return result


def distance(a: Entity, b: Entity) -> np.ndarray:
    """Between two centres: [] or [E]."""
    return np.sqrt(((a.state.p_pos - b.state.p_pos) ** 2).sum(0))


def touching(a: Entity, b: Entity) -> np.ndarray:
    return distance(a, b) < a.size + b.size


class Paced:
    """What the shift "speed" does: everybody, the prey too, has a pace of its own in each episode, a factor on
    acceleration and greatest speed, drawn evenly from [`SLOWEST`, 1] after all else, so that the starts stay those of
    the usual environment."""

    shifted = False

    def reset_world(self, world, np_random):
        super().reset_world(world, np_random)
        for agent in world.agents:
            agent.pace = np_random.uniform(self.SLOWEST, 1.0) if self.shifted else 1.0


class Spread(Paced, simple_spread.Scenario):
    """Three agents cover three landmarks. Observation [18]: velocity, position, landmarks, others, four zeros."""

    SLOWEST = 0.3

    def make_world(self):
        return legacy(super().make_world(N=3))

    def reward(self, agent, world):
        near = sum(self.nearness(landmark, world) for landmark in world.landmarks)
        return near - 5.0 * sum(touching(agent, other) for other in world.agents if other is not agent)

    def nearness(self, landmark, world):
        return 1 / np.maximum(np.min([distance(agent, landmark) for agent in world.agents], axis=0), 0.1)


class Choice(simple_spread.Scenario):
    """spread with six landmarks, of which three agents can cover any three. Not one of OMAR's, but by their rules.
    Observation [24]: as in spread, but with the landmarks nearest first, lest a policy learn their usual directions.

    The landmarks stand on a ring of radius 0.6, 60 degrees apart, turned by up to 30 degrees either way; agents start
    in the middle, so that they have several good ways to go. They are small, lest contacts choose the way, and slow,
    so that it takes half of an episode. The shift "fewer" takes three landmarks away in each episode; for each of them
    agents see one of those left once more.
    """

    shifted = False

    def make_world(self):
        world = legacy(super().make_world(N=6))
        world.agents = world.agents[:3]
        for agent in world.agents:
            agent.size, agent.max_speed = 0.05, 0.4
        return world

    def reset_world(self, world, np_random):
        super().reset_world(world, np_random)
        angles = np.pi / 3 * (np.arange(6) + np_random.uniform(-0.5, 0.5))
        for landmark, angle in zip(world.landmarks, angles):
            landmark.state.p_pos = 0.6 * np.array([np.cos(angle), np.sin(angle)])
        for agent in world.agents:
            agent.state.p_pos = agent.state.p_pos * 0.3
        order = np_random.permutation(6) if self.shifted else np.arange(6)
        for left, gone in zip(order[:3], order[3:]):
            world.landmarks[left].counts, world.landmarks[gone].counts = 1.0, 1.0 - self.shifted
            if self.shifted:
                world.landmarks[gone].state.p_pos = world.landmarks[left].state.p_pos.copy()

    reward = Spread.reward

    def observation(self, agent, world):
        seen = super().observation(agent, world)  # [24] or, of E copies, [24, E]
        places = seen[4:16].reshape(6, 2, *seen.shape[1:])
        order = np.argsort((places**2).sum(1), 0)
        seen[4:16] = np.take_along_axis(places, order[:, None], 0).reshape(seen[4:16].shape)
        return seen

    def mismatch(self, seen, expected):
        """How far observations [24, E] are off; which of two equally near landmarks comes first, rounding decides."""
        off = np.abs(seen - expected)
        listed, known = (x[4:16].reshape(6, 2, -1) for x in (seen, expected))
        apart = np.abs(listed[:, None] - known).max(2)  # [6, 6, E]
        far = np.sqrt((listed**2).sum(1))  # [6, E], should not fall
        falls = np.maximum(np.maximum.accumulate(far, 0) - far, 0)
        off[4:16] = np.repeat(np.maximum(apart.min(0), apart.min(1)) + falls, 2, 0)
        return off

    def nearness(self, landmark, world):
        return getattr(landmark, "counts", 1.0) * Spread.nearness(self, landmark, world)


class Pursuit:
    """What tag and world share: three predators, the team, and a prey that is part of the environment."""

    contact: float  # reward of a contact
    edge: float  # weight of the prey's penalty for leaving the square

    def reward(self, agent, world):
        *predators, prey = world.agents
        far = sum(distance(predator, prey) for predator in predators)
        touches = sum(touching(predator, prey) for predator in predators)
        if agent is prey:
            x = np.abs(prey.state.p_pos)
            beyond = np.exp(np.minimum(2 * x - 2, np.log(10)))
            outside = np.where(x < 0.9, 0.0, np.where(x < 1.0, (x - 0.9) * 10, beyond))
            return 0.1 * far - self.contact * touches - self.edge * outside.sum(0)
        return self.contact * touches - 0.1 * far


class Tag(Paced, Pursuit, simple_tag.Scenario):
    """Among two obstacles. Observation [16]: velocity, position, obstacles, others, the prey's velocity; its: [14]."""

    SLOWEST = 0.4
    contact, edge = 10.0, 1.0

    def make_world(self):
        return legacy(super().make_world(num_good=1, num_adversaries=3, num_obstacles=2))


class Wood(Paced, Pursuit, simple_world_comm.Scenario):
    """simple_world: an obstacle, two foods, two forests. Observation [24]: velocity, position, landmarks, others,
    velocity of the prey, then 1 or -1 for inside or outside each forest; the prey's [22]."""

    SLOWEST = 0.5
    contact, edge = 5.0, 2.0

    def make_world(self):
        count = dict(num_good_agents=1, num_adversaries=3, num_landmarks=1, num_food=2, num_forests=2)
        world = legacy(super().make_world(**count))
        for i, agent in enumerate(world.agents[:3]):
            agent.name, agent.leader, agent.silent = f"adversary_{i}", False, True
        return world

    def reward(self, agent, world):
        reward = super().reward(agent, world)
        if agent is world.agents[-1]:
            eaten = sum(touching(agent, food) for food in world.food)
            return reward + 2.0 * eaten + 0.05 * np.min([distance(agent, food) for food in world.food], axis=0)
        return reward

    def observation(self, agent, world):
        others = [other for other in world.agents if other is not agent]
        parts = [entity.state.p_pos - agent.state.p_pos for entity in world.landmarks + others]
        parts += [other.state.p_vel for other in others if not other.adversary]
        inside = [np.where(touching(agent, forest), 1.0, -1.0)[None] for forest in world.forests]
        return np.concatenate([agent.state.p_vel, agent.state.p_pos, *parts, *inside])


SCENARIOS = {"simple_spread": Spread, "simple_tag": Tag, "simple_world": Wood, "simple_spread_6": Choice}
PREY_SIZES = {"simple_tag": 14, "simple_world": 22}  # of its observation


class ParticleEnv(SimpleEnv):
    """One copy of a scenario as mpe2's own environment, which also draws it."""

    def __init__(self, scenario: str, render_mode: str | None = None, shift: str = ""):
        rules = SCENARIOS[scenario]()
        rules.shifted = bool(shift)
        super().__init__(rules, rules.make_world(), HORIZON, render_mode, continuous_actions=True)


class ParticleVec(gym.vector.VectorEnv):
    """E copies of a scenario in one world of arrays; otherwise what gymnasium's SyncVectorEnv of E `TeamEnv`s is:
    number for number, but for the rounding of a prey network from a file.

    Args:
        scenario: a name in `SCENARIOS`.
        num_envs: E.
        prey: a file with the prey's network; "" for the project's own.
        shift: "" for the usual environment; anything else for the scenario's shifted one, see `Paced` and `Choice`.

    `info` also has what the prey saw, did and got in this step, if there is one: "prey_obs" (before it), "prey_action",
    "prey_next_obs" and "prey_reward".
    """

    metadata = {"autoreset_mode": gym.vector.AutoresetMode.DISABLED}

    def __init__(self, scenario: str, num_envs: int, prey: str = "", shift: str = ""):
        self.rules, self.num_envs = SCENARIOS[scenario](), num_envs
        self.rules.shifted, self.policy = bool(shift), make_prey(scenario, prey).get("agent_0")
        self.world, self.start = self.rules.make_world(), self.rules.make_world()  # of all, and one to draw starts in
        for entity in self.world.entities:
            entity.state.p_pos, entity.state.p_vel = np.zeros((2, num_envs)), np.zeros((2, num_envs))
        for agent in self.world.agents:
            agent.state.c = np.zeros((self.world.dim_c, num_envs))
        self.team, self.prey = self.world.agents[:3], self.world.agents[3:]
        self.steps = np.zeros(num_envs, int)
        self.generators = [gym.utils.seeding.np_random()[0] for _ in range(num_envs)]
        obs = self._observe(self.team)
        self.single_observation_space = gym.spaces.Box(-np.inf, np.inf, obs.shape[1:], np.float32)
        self.single_action_space = gym.spaces.Box(-1.0, 1.0, (len(self.team), 2), np.float32)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)

    def reset(self, *, seed=None, options=None):
        """Starts the copies marked in `options["reset_mask"]`, or all. `seed`: one for each copy, or the first's."""
        mask = (options or {}).get("reset_mask", np.ones(self.num_envs, bool))
        if seed is None or np.ndim(seed) == 0:
            seed = [None if seed is None else int(seed) + i for i in range(self.num_envs)]
        for i in np.flatnonzero(mask):
            if seed[i] is not None:
                self.generators[i], _ = gym.utils.seeding.np_random(int(seed[i]))
            self.rules.reset_world(self.start, self.generators[i])
            for entity, drawn in zip(self.world.entities, self.start.entities):
                entity.state.p_pos[:, i], entity.state.p_vel[:, i] = drawn.state.p_pos, drawn.state.p_vel
                for name in ("pace", "counts"):  # what else a scenario draws
                    if hasattr(drawn, name):
                        vars(entity).setdefault(name, np.ones(self.num_envs))[i] = getattr(drawn, name)
        self.steps[mask] = 0
        return self._observed(np.zeros((self.num_envs, len(self.team)), np.float32))

    def step(self, actions):
        actions, about = np.clip(actions, -1.0, 1.0).astype(np.float32), {}  # [E, N, 2]
        if self.prey:
            seen = self._observe(self.prey)[:, 0]  # [E, O]
            about = {"prey_obs": seen, "prey_action": self.policy(seen).astype(np.float32)}
            actions = np.concatenate([actions, about["prey_action"][:, None]], 1)
        for agent, action in zip(self.world.agents, actions.transpose(1, 2, 0)):  # [2, E]
            self.world.set_action(agent, action)
        self.world.step()
        self.steps += 1
        rewards = self._rewards(self.team)
        obs, info = self._observed(rewards)
        if self.prey:
            about |= {"prey_next_obs": self._observe(self.prey)[:, 0], "prey_reward": self._rewards(self.prey)[:, 0]}
        team, falls = rewards.mean(1).astype(np.float64), np.zeros(self.num_envs, bool)
        return obs, team, falls, self.steps >= HORIZON, info | about

    def _observed(self, rewards: np.ndarray) -> tuple[np.ndarray, dict]:
        obs = self._observe(self.team)
        return obs, {"state": obs.reshape(self.num_envs, -1).copy(), "agent_rewards": rewards}

    def _observe(self, agents) -> np.ndarray:
        """[E, agents, O]"""
        obs = [self.rules.observation(agent, self.world) for agent in agents]
        return np.stack(obs, dtype=np.float32).transpose(2, 0, 1).copy()

    def _rewards(self, agents) -> np.ndarray:
        """[E, agents]"""
        return np.stack([self.rules.reward(agent, self.world) for agent in agents], 1, dtype=np.float32)


# --- the prey ---


class ScriptedPrey:
    """The project's own prey: it stands still until something comes near, then goes where the sum of all pushes points.

    Predators and obstacles within `SIGHT` push it away with 1 / distance^2, and so does, linearly, the border of the
    square [-1, 1]^2 from `EDGE` on. `PACE` is the size of its force, which takes it to 0.9 of the predators' greatest
    speed. Deterministic, no memory.

    Args:
        landmarks: how many landmarks its observation holds; of these the first `solid` are obstacles.
    """

    SIGHT, EDGE, BORDER, PACE = 0.5, 0.8, 30.0, 0.14

    def __init__(self, landmarks: int, solid: int):
        self.landmarks, self.solid = landmarks, solid

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        """Its observations [..., O] -> forces [..., 2]."""
        position, places = obs[..., 2:4], obs[..., 4 : 10 + 2 * self.landmarks]
        places = places.reshape(*obs.shape[:-1], -1, 2)  # [..., landmarks + 3, xy], relative
        dangers = np.concatenate([places[..., : self.solid, :], places[..., self.landmarks :, :]], -2)
        square = (dangers**2).sum(-1, keepdims=True)
        away = np.where(square < self.SIGHT**2, -dangers / np.maximum(square, 1e-4) ** 1.5, 0.0)  # 1 / distance^2
        outside = np.sign(position) * np.maximum(np.abs(position) - self.EDGE, 0.0)
        push = away.sum(-2) - self.BORDER * outside
        return self.PACE * push / np.maximum(np.sqrt((push**2).sum(-1, keepdims=True)), 1e-6)


def make_prey(scenario: str, path: str = "") -> dict[str, Prey]:
    """The prey of a scenario by its name in the world: from a file, or the project's own. Spread has none."""
    if scenario not in PREY_SIZES:
        return {}
    own = ScriptedPrey(landmarks=2, solid=2) if scenario == "simple_tag" else ScriptedPrey(landmarks=5, solid=1)
    return {"agent_0": FilePrey(path, PREY_SIZES[scenario]) if path else own}


class FilePrey:
    """A prey network as OMAR publishes it: normalisation by fixed statistics, two hidden layers of 64 (ReLU), tanh.

    Computed in numpy and single precision. `path`: a `pretrained_adv_model.pt`, in which nothing is executed; it must
    take the `obs_size` numbers that the prey of `Tag` or `Wood` sees.
    """

    def __init__(self, path: str, obs_size: int):
        if not Path(path).is_file():
            raise BadInput(f"--prey {path}: there is no such file")
        try:
            policy = torch.load(path, map_location="cpu", weights_only=True)["agent_params"][3]["policy"]
            self.w = {name: value.numpy().astype(np.float32) for name, value in policy.items()}
            with np.errstate(all="ignore"):
                action = self(np.ones(obs_size, np.float32))
        except Exception as error:  # anything, in a file that is damaged or another task's
            layers = f"agent_params[3]['policy'] with in_fn, fc1, fc2 and fc3 that takes {obs_size} numbers"
            raise BadInput(f"--prey {path}: no plain weights of {layers}; code in a file is never run") from error
        if action.shape != (2,) or not np.isfinite(action).all():
            raise BadInput(f"--prey {path}: its actions are not two finite numbers")

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        w = self.w
        x = (obs - w["in_fn.running_mean"]) / np.sqrt(w["in_fn.running_var"] + 1e-5)
        x = x * w["in_fn.weight"] + w["in_fn.bias"]
        for layer in ("fc1", "fc2"):
            x = np.maximum(x @ w[f"{layer}.weight"].T + w[f"{layer}.bias"], 0.0)
        return np.tanh(x @ w["fc3.weight"].T + w["fc3.bias"])
