"""DOM2: the solver, the losses and the reweighting against what they should do, and the program as a user types it."""

import csv
import dataclasses
import inspect
import json
import math
import shutil
import subprocess
import sys
from types import SimpleNamespace

import collect
import numpy as np
import pytest
import torch
from torch import nn

import dom2
import omad
from common.datasets import SPLITS, load_dataset
from common.envs import make_env
from conftest import ROOT, caller
from test_omar_tasks import checkpoint

ONE = torch.ones(1, 1, dtype=torch.bool)  # one agent that sees one number and does one thing


def args(**values):
    return dataclasses.replace(dom2.Args(), **dict(policy_hidden=16, critic_hidden=32, network="mlp") | values)


def agent(**values):
    """One agent, one observation, one action."""
    torch.manual_seed(0)
    space = type("Space", (), dict(obs_mask=np.ones((1, 1), bool), action_mask=np.ones((1, 1), bool), num_agents=1))
    return dom2.DOM2(space, args(**values), torch.device("cpu"))


# --- the policy ---


def test_alpha_and_sigma_are_those_of_the_sde():
    """log alpha_t = -1/2 of the integral of beta(s) = 0.1 + 19.9 s from 0 to t; alpha^2 + sigma^2 = 1."""
    policy, t = agent().policy, torch.linspace(0.001, 1, 50)
    alpha, sigma = policy.scales(t)
    for k in range(50):
        s = np.linspace(0, t[k].item(), 10_001)
        assert alpha[k].item() == pytest.approx(math.exp(-0.5 * np.trapezoid(0.1 + 19.9 * s, s)), rel=1e-4)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(50))


class Exact(dom2.DiffusionPolicy):
    """Predicts the noise exactly, for actions ~ N(mean, std^2)."""

    mean, std = 0.2, 0.1

    def predict(self, x, condition, alpha, sigma):
        return sigma * (x - alpha * self.mean) / (alpha**2 * self.std**2 + sigma**2)

    def flow(self, x):
        """Where the differential equation itself takes x from t = 1 to its end."""
        (a1, a0), (s1, s0) = (scale[[0, -1]] for scale in self.scales(self.times))
        spread = lambda alpha, sigma: (alpha**2 * self.std**2 + sigma**2).sqrt()
        return a0 * self.mean + spread(a0, s0) * (x - a1 * self.mean) / spread(a1, s1)


def test_the_solver_ends_where_the_differential_equation_does():
    """Closed form for a Gaussian with its exact noise, and first-order convergence: twice the steps, half the error."""
    noise = torch.linspace(-2.5, 2.5, 101).view(1, -1, 1)
    errors = []
    for steps in (10, 20, 40, 80, 160):
        policy = Exact(ONE, ONE, args(solver_steps=steps)).double()
        policy.set_steps(steps)
        errors.append((policy(torch.zeros(1, 101, 1).double(), noise.double()) - policy.flow(noise.double())).abs().max().item())
    ratios = np.divide(errors[:-1], errors[1:])
    assert errors[-1] < 0.005 and (np.abs(ratios[1:] - 2) < 0.35).all(), (errors, ratios)
    policy.set_steps(5)  # the default: a standard deviation of 0.1 must not collapse, as it does to 0.024 with uniform steps
    samples = policy(
        torch.zeros(1, 20_000, 1).double(), torch.randn(1, 20_000, 1, generator=torch.Generator().manual_seed(0)).double()
    )
    assert samples.mean().item() == pytest.approx(0.2, abs=0.01) and 0.05 < samples.std().item() < 0.11


class ExactModes(Exact):
    """The same for actions of which half are -0.6, half 0.6, both ± 0.05."""

    def predict(self, x, condition, alpha, sigma):
        modes = torch.tensor([-0.6, 0.6]).to(x)
        var = alpha**2 * 0.05**2 + sigma**2
        share = torch.softmax(-((x - alpha * modes) ** 2) / (2 * var), -1)
        return (x - alpha * (share * (modes + alpha * 0.05**2 / var * (x - alpha * modes))).sum(-1, keepdim=True)) / sigma


def test_five_steps_keep_two_modes_apart():
    """With the exact noise, 1 % of the samples end between narrow modes on the cubic grid, 42 % on an even one."""
    policy, between = ExactModes(ONE, ONE, args(solver_steps=5)), []
    noise = torch.randn(1, 20_000, 1, generator=torch.Generator().manual_seed(0))
    for even in (False, True):
        if even:
            policy.times = torch.linspace(1.0, policy.END, 6)
            policy.alpha, policy.sigma = (scale.tolist() for scale in policy.scales(policy.times))
        between.append((policy(torch.zeros(1, 20_000, 1), noise).abs() < 0.3).float().mean().item())
    assert between[0] < 0.02 and 0.35 < between[1] < 0.5, between


def test_one_step_is_the_formula_of_the_paper():
    """x_t = (alpha_t / alpha_s) x_s - sigma_t (exp(lambda_t - lambda_s) - 1) eps, where nothing is clipped."""
    policy = Exact(ONE, ONE, args(solver_steps=7)).double()
    policy.set_steps(7)
    x = torch.linspace(-1, 1, 9).double().view(1, -1, 1)
    want, (alpha, sigma) = x, policy.scales(policy.times)
    lam = (alpha / sigma).log()
    for k in range(7):
        eps = policy.predict(want, None, alpha[k], sigma[k])
        want = alpha[k + 1] / alpha[k] * want - sigma[k + 1] * ((lam[k + 1] - lam[k]).exp() - 1) * eps
    torch.testing.assert_close(policy(torch.zeros(1, 9, 1).double(), x), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("network", ["mlp", "unet"])
def test_conditions_of_all_steps_at_once_are_those_of_each(network):
    """And the noise predicted is sigma x + alpha times the network's: at t = 1, nearly x itself."""
    env = make_env("omar_simple_spread")
    torch.manual_seed(0)
    policy = dom2.DOM2(env, args(network=network), torch.device("cpu")).policy
    obs, x, times = torch.randn(3, 7, 18), torch.randn(3, 7, 2), torch.tensor([1.0, 0.4, 0.001])
    together = policy.condition(obs, times[:, None])
    for k, t in enumerate(times):
        alone = policy.condition(obs, t.expand(1, 7))[:, 0]
        torch.testing.assert_close(together[:, k], alone)
        torch.testing.assert_close(together[1, k, 2], policy.condition(obs[:, 2:3], t.expand(1, 1))[1, 0, 0])
        scales = policy.scales(t)
        torch.testing.assert_close(policy.predict(x, alone, *scales), scales[1] * x + scales[0] * policy.network(x, alone))
    first = policy.predict(x, together[:, 0], *policy.scales(times[0]))
    assert (first - x).abs().max() < 0.1


def fit(learner, actions, updates, critic=None, obs=None):
    """Trains the policy of one agent on these actions [B]; `critic` stands in for the learned one."""
    generator = torch.Generator().manual_seed(0)
    actions = torch.tensor(actions, dtype=torch.float32)
    optimizer = torch.optim.Adam(learner.policy.parameters(), 3e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    for _ in range(updates):
        pick = actions[torch.randint(len(actions), (256,), generator=generator)].view(1, -1, 1)
        batch = {"obs": torch.zeros(1, 256, 1), "action": pick}
        t = 1e-3 + (1 - 1e-3) * torch.rand(1, 256, generator=generator)
        loss, _ = dom2.imitation_loss(learner.policy, batch, t, torch.randn(1, 256, 1, generator=generator))
        if critic:
            noise = learner.policy.noise(128, generator)
            loss = loss + dom2.value_loss(learner.policy, critic, batch, noise, torch.ones(1), learner.args)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    with torch.no_grad():
        return learner.policy(torch.zeros(1, 4000, 1), learner.policy.noise(4000, generator)).flatten().numpy()


def test_the_imitation_loss_by_hand():
    """|| alpha eps - sigma a - network ||^2: the error of the noise over alpha; agents are added, and padding does not count."""
    masks = np.ones((2, 4), bool), np.array([[True, True], [True, False]])
    torch.manual_seed(0)
    policy = dom2.DOM2(SimpleNamespace(obs_mask=masks[0], action_mask=masks[1]), args(), torch.device("cpu")).policy
    batch = dict(obs=torch.randn(2, 5, 4), action=torch.rand(2, 5, 2) * 2 - 1)
    batch["action"][1, :, 1] = 0.0
    t, eps = torch.rand(1, 5), torch.randn(2, 5, 2)
    loss, _ = dom2.imitation_loss(policy, batch, t, eps)
    alpha, sigma = policy.scales(t[..., None])
    assert loss == dom2.imitation_loss(policy, batch, t, eps + 5 * torch.tensor([[[0.0, 0.0]], [[0.0, 1.0]]]))[0]
    eps[1, :, 1] = 0.0
    x = alpha * batch["action"] + sigma * eps
    output = policy.network(x, policy.condition(batch["obs"], t)[:, 0])
    error = (alpha * eps - sigma * batch["action"] - output) ** 2 * torch.from_numpy(masks[1])[:, None]
    want = error[0].sum(-1).mean() + error[1, :, 0].mean()
    torch.testing.assert_close(loss, want, rtol=1e-4, atol=1e-4)


TWO_MODES = np.concatenate([np.full(500, -0.6), np.full(500, 0.6)]) + np.random.default_rng(0).normal(0, 0.05, 1000)


@pytest.mark.parametrize("network", ["mlp", "unet"])
def test_imitation_keeps_both_modes(network):
    """The data never do 0, their mean."""
    samples = fit(agent(policy_hidden=32, network=network), TWO_MODES, 1500)
    left, right, between = ((samples < -0.4).mean(), (samples > 0.4).mean(), (np.abs(samples) < 0.3).mean())
    assert 0.35 < left < 0.65 and 0.35 < right < 0.65 and between < 0.12, (left, right, between)
    assert np.abs(np.abs(samples) - 0.6).mean() < 0.12


def test_the_critic_s_gradient_moves_mass_to_the_better_mode():
    value = lambda obs, action: torch.tanh(5 * action.squeeze(-1)).expand(2, -1, -1)  # the right mode is better by 2
    before, after = (fit(agent(policy_hidden=32, q_weight=q), TWO_MODES, 1500, value if q else None) for q in (0.0, 0.1))
    assert (before > 0.4).mean() < 0.65 and (after > 0.4).mean() > 0.85 and (after < -0.4).mean() < 0.1
    assert np.abs(after[after > 0.4] - 0.6).mean() < 0.25  # still what the data do


# --- the losses ---


class Table(nn.Module):
    """A stand-in for a critic: value(obs, action) -> [Q, N, B]."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, obs, action):
        return self.function(obs.squeeze(-1), action.squeeze(-1))


def batch_of(reward, terminated, obs=0.0, next_obs=0.0, action=0.0):
    full = lambda value: torch.as_tensor(value, dtype=torch.float32).expand(1, len(reward))
    return {
        "obs": full(obs)[..., None], "next_obs": full(next_obs)[..., None], "action": full(action)[..., None],
        "reward": full(reward), "terminated": full(terminated),
    }  # fmt: skip


def test_the_critic_s_target_by_hand():
    """r + gamma (1 - terminated) min_k Q'_k(o', b'): two critics worth 3 and 6 next, gamma 0.5."""
    policy = lambda obs, noise: torch.full((1, 3, 1), 0.25)
    slow = Table(lambda obs, action: torch.stack([3.0 + 0 * action, 6.0 + 0 * action]) + action - 0.25)
    now = Table(lambda obs, action: torch.stack([1.0 + 0 * action, 2.0 + 0 * action]))
    batch = batch_of([1.0, 10.0, -2.0], [0.0, 1.0, 0.0])
    uniform = torch.zeros(4, 1, 3, 1)
    _, logs, _ = dom2.critic_loss(now, slow, policy, batch, None, uniform, args(gamma=0.5, cql_weight=0.0))
    goals = np.array([1 + 1.5, 10.0, -2 + 1.5])  # where it terminated, nothing follows
    assert logs["losses/td"].item() == pytest.approx(np.mean((1 - goals) ** 2) + np.mean((2 - goals) ** 2), rel=1e-6)


def test_the_cql_term_by_hand():
    """log sum exp over the M actions, minus the value of the action in the data, in each critic; on the first rows only."""
    critic = Table(lambda obs, action: torch.stack([2 * action, 3 * action]))
    batch = batch_of([0.0, 0.0], [1.0, 1.0], action=[0.5, 0.9])
    uniform = torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1, 1)  # one row
    loss, logs, spread = dom2.critic_loss(critic, critic, lambda obs, noise: obs, batch, None, uniform, args(cql_weight=2.0))
    gap = [np.log(np.exp([-k, 0.0, k]).sum()) - 0.5 * k for k in (2, 3)]
    assert logs["losses/cql"].item() == pytest.approx(sum(gap), rel=1e-6)
    assert loss.item() == pytest.approx(sum(np.mean([(k * 0.5) ** 2, (k * 0.9) ** 2]) for k in (2, 3)) + 2 * sum(gap), rel=1e-6)
    assert spread.item() == pytest.approx(np.std([-2, 0, 2], ddof=1))

    def policy(obs, noise):
        """0.25 where it was seen, with the noise of that row; -0.75 in what comes next."""
        return torch.where(obs == 0, 0.25, -0.75) + (0 if noise is None else noise)

    noise = torch.tensor([0.1, 7.0]).view(1, 2, 1)
    batch["next_obs"] = batch["next_obs"] + 1
    _, logs, same = dom2.critic_loss(critic, critic, policy, batch, noise, uniform, args(cql_weight=2.0, cql_own=True))
    gap = [np.log(np.exp([-k, 0.0, k, 0.35 * k]).sum()) - 0.5 * k for k in (2, 3)]
    assert logs["losses/cql"].item() == pytest.approx(sum(gap), rel=1e-5) and same == spread


@pytest.mark.parametrize("own", [False, True])
def test_the_cql_term_action_by_action(own):
    """Two agents, three rows of which two are used, a target that is another network: against a loop over actions."""
    env = SimpleNamespace(obs_mask=np.ones((2, 4), bool), action_mask=np.ones((2, 2), bool), num_agents=2)
    torch.manual_seed(0)
    learner = dom2.DOM2(env, args(policy="deterministic", cql_own=own, cql_weight=3.0), torch.device("cpu"))
    torch.nn.init.normal_(learner.slow_critic.out.weight)
    torch.nn.init.normal_(learner.slow_policy.out.weight)
    random = torch.randn
    batch = dict(
        obs=random(2, 3, 4), next_obs=random(2, 3, 4), action=random(2, 3, 2), reward=random(2, 3), terminated=random(2, 3)
    )
    uniform = random(5, 2, 2, 2)  # [M, N, rows, A]
    loss, logs, spread = dom2.critic_loss(
        learner.critic, learner.slow_critic, learner.slow_policy, batch, None, uniform, learner.args
    )
    obs = batch["obs"][:, :2]
    values = torch.stack([learner.critic(obs, actions) for actions in uniform])  # [M, Q, N, rows]
    torch.testing.assert_close(spread, values[:, 0].std(0).mean(-1))
    if own:
        values = torch.cat([values, learner.critic(obs, learner.slow_policy(obs))[None]])
    gap = (values.logsumexp(0) - learner.critic(obs, batch["action"][:, :2])).mean(-1).sum(0)  # [N]
    torch.testing.assert_close(logs["losses/cql"], gap.mean())
    parameters = list(learner.critic.parameters())
    td = loss - 3.0 * gap.sum()  # what is left must not depend on the actions of the CQL term
    next_value = learner.slow_critic(batch["next_obs"], learner.slow_policy(batch["next_obs"])).amin(0)
    goal = (batch["reward"] + learner.args.gamma * (1 - batch["terminated"]) * next_value).detach()
    want = ((learner.critic(batch["obs"], batch["action"]) - goal) ** 2).mean(-1).sum()
    torch.testing.assert_close(td, want)
    for a, b in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(want + 3.0 * gap.sum(), parameters)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_several_actions_for_an_observation_are_valued_one_by_one():
    torch.manual_seed(0)
    critic = dom2.DOM2(make_env("omar_simple_spread"), args(), torch.device("cpu")).critic
    obs, action = torch.randn(3, 5, 18), torch.randn(4, 3, 5, 2)
    together = critic(obs, action.transpose(0, 1).reshape(3, 20, 2)).unflatten(2, (4, 5))
    torch.testing.assert_close(together, torch.stack([critic(obs, a) for a in action], 2))
    assert (together[0] - together[1]).abs().min() > 0  # twins, not copies
    changed = obs.clone()
    changed[1] += 1  # what agent 1 sees reaches agent 1 only
    same = (critic(changed, action[0]) == critic(obs, action[0])).all(2)
    assert same.tolist() == [[True, False, True]] * 2


def test_critics_start_where_the_data_are():
    """Worth the mean reward forever, each agent its own; and their outputs count in the spread of the rewards."""
    critic = agent(gamma=0.9).critic
    before = critic(torch.zeros(1, 5, 1), torch.ones(1, 5, 1))
    critic.set_units(torch.tensor([[3.0, 5.0, 7.0]]), 0.9)
    torch.testing.assert_close(critic(torch.zeros(1, 5, 1), torch.ones(1, 5, 1)), 50 + before * 2)
    critic.set_units(torch.tensor([[3.0, 3.0]]), 1.0)  # no division by zero
    assert critic.shift.item() == pytest.approx(3000) and critic.scale.item() == pytest.approx(1e-3)


def test_cql_is_pessimistic_outside_the_data_and_keeps_the_ranking_inside():
    """A bandit whose data have the actions -0.5, 0 and 0.5 only, worth 1, 2 and 3."""
    learner = agent(cql_weight=0.5, policy="deterministic")
    rng, optimizer = np.random.default_rng(0), torch.optim.Adam(learner.critic.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(1500):
        pick = rng.integers(3, size=128)
        batch = batch_of((1.0 + pick).tolist(), [1.0] * 128, action=(0.5 * pick - 0.5).tolist())
        uniform = torch.rand(10, 1, 128, 1, generator=generator) * 2 - 1
        loss, _, _ = dom2.critic_loss(learner.critic, learner.slow_critic, learner.slow_policy, batch, None, uniform, learner.args)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    grid = torch.tensor([-0.5, 0.0, 0.5, -1.0, 1.0]).view(1, 5, 1)
    low, middle, high, far_left, far_right = learner.critic(torch.zeros(1, 5, 1), grid).mean(0).flatten().tolist()
    assert low < middle < high and far_left < low and far_right < high


@pytest.mark.parametrize("form, scale", [("spread", 7.0), ("mean", 6.0)])
def test_the_value_loss_by_hand(form, scale):
    """-eta times the lower critic's value, in units of the spread given or of mean |Q|, on a share of the batch; no gradient through the units."""
    critic = Table(lambda obs, action: torch.stack([4 * action - 6, 4 * action]))
    seen, action = [], torch.full((1, 2, 1), 0.5, requires_grad=True)
    policy = lambda obs, noise: seen.append(obs.shape[1]) or action[:, : obs.shape[1]]
    batch = batch_of([0.0, 0.0], [0.0, 0.0])  # where the data's action 0 is worth -6
    loss, _ = dom2.value_loss(policy, critic, batch, None, torch.tensor([7.0]), args(q_scale=form, q_weight=3.0, q_rows=0.5))
    assert loss.item() == pytest.approx(-3 * (4 * 0.5 - 6) / scale) and seen == [1]
    loss.backward()
    assert action.grad.flatten().tolist() == pytest.approx([-3 * 4 / scale, 0.0])
    baseline = args(policy="deterministic", q_scale=form, q_weight=3.0, q_rows=0.5)  # has nothing to weigh the critic against
    again, _ = dom2.value_loss(policy, critic, batch, None, torch.tensor([7.0]), baseline)
    assert again.item() == pytest.approx(loss.item() / 3)


# --- reweighting ---


def test_weights_of_trajectories():
    returns = np.array([0.0, 1.0, 2.0, 3.0, 4.0])
    assert dom2.trajectory_weights(returns, 2, 1.0).tolist() == [1, 1, 2, 2, 3]  # thresholds at the mean, 2, and the best, 4
    assert dom2.trajectory_weights(returns, 3, 1.0).tolist() == [1, 1, 2, 3, 4]
    assert dom2.trajectory_weights(returns, 0, 1.0).tolist() == [1] * 5
    assert dom2.trajectory_weights(np.full(4, 7.0), 2, 0.98).tolist() == [3] * 4  # all alike: weights of no effect


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    return collect.collect(collect.Options("omar_simple_spread-random", 2000, out=root))


def test_reweighting_is_as_if_good_trajectories_were_in_the_data_several_times(folder):
    data, env = load_dataset(folder), make_env("omar_simple_spread")
    table = dom2.Data(data, env, args(thresholds=2), torch.device("cpu"))
    returns = np.asarray(data.rewards).reshape(80, 25, 3).sum(1)  # each agent's own
    assert (np.abs(returns - returns.mean(1, keepdims=True)) > 1).any()
    drawn = table.draw(200_000, torch.Generator().manual_seed(0)).numpy()
    for j in range(3):
        weights = dom2.trajectory_weights(returns[:, j], 2, 0.98)
        assert set(weights) == {1, 2, 3}
        copies = np.repeat(np.arange(2000), np.repeat(weights, 25))  # the data with good trajectories several times
        np.testing.assert_array_equal(np.diff(table.upto[j].numpy(), prepend=0), np.bincount(copies))
        np.testing.assert_allclose(np.bincount(drawn[j] // 25, minlength=80) / 200_000, weights / weights.sum(), rtol=0.2)
    assert drawn.max() == 1999 and drawn.min() == 0 and (drawn[0] != drawn[1]).any()
    plain = dom2.Data(data, env, args(reweight=False), torch.device("cpu"))
    np.testing.assert_array_equal(plain.upto.numpy(), np.tile(np.arange(1, 2001), (3, 1)))
    unknown = dataclasses.replace(data, next_known=~data.truncations)  # rows without a next observation are never drawn
    rows = dom2.Data(unknown, env, args(), torch.device("cpu")).draw(10_000, torch.Generator().manual_seed(0)).numpy()
    assert not (rows % 25 == 24).any() and (rows % 25 == 23).any()


def test_a_batch_is_rows_of_the_data(folder):
    data = load_dataset(folder)
    wide = {name: np.array(getattr(data, name)) for name in ("obs", "next_obs")}
    for seen in wide.values():
        seen[:, 1, :2] *= 50.0  # agent 1's velocity varies by more than 1, all else by less
    data = dataclasses.replace(data, **wide)
    ended = dataclasses.replace(data, terminations=np.arange(2000) % 7 == 0)
    table = dom2.Data(ended, make_env("omar_simple_spread"), args(), torch.device("cpu"))
    index = torch.tensor([[3, 1999, 14], [0, 7, 8], [5, 6, 21]])  # rows of each agent
    batch = table.sample(index)
    agent = np.arange(3)[:, None]
    for name, source in (("obs", data.obs), ("next_obs", data.next_obs)):  # in units of what the agent saw
        seen = np.asarray(data.obs, np.float64)
        std = np.maximum(seen.std(0), 1.0)[agent]  # [3, 1, 18]
        want = (np.asarray(source)[index.numpy(), agent] - seen.mean(0)[agent]) / std
        np.testing.assert_allclose(batch[name].numpy(), want, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(batch["action"].numpy(), np.asarray(data.actions)[index.numpy(), agent])
    np.testing.assert_array_equal(batch["reward"].numpy(), np.asarray(data.rewards)[index.numpy(), agent])
    np.testing.assert_array_equal(batch["terminated"].numpy(), [[0, 0, 1], [1, 1, 0], [0, 0, 1]])

    learner = dom2.DOM2(make_env("omar_simple_spread"), args(policy="deterministic"), torch.device("cpu"))
    learner.set_units(table)
    for critic in (learner.critic, learner.slow_critic):
        assert critic.scale.flatten().tolist() == pytest.approx(np.std(data.rewards, 0).tolist(), rel=1e-3)
    raw = np.stack([np.asarray(data.obs)[row] for row in (3, 1999)])  # [E, N, O]
    with torch.no_grad():  # acting sees the same units
        want = learner.slow_policy(table.sample(torch.tensor([[3, 1999]] * 3))["obs"]).transpose(0, 1)
    np.testing.assert_allclose(learner.act(raw, torch.Generator()), want, rtol=1e-4, atol=1e-5)


# --- the update ---


@pytest.mark.parametrize("policy", ["diffusion", "deterministic"])
def test_agents_do_not_learn_from_each_other(policy, folder):
    """Fully decentralised: other data of agent 2, its rewards too, change nothing in agents 0 and 1, not even by rounding."""
    env, setting = make_env("omar_simple_spread"), args(policy=policy, batch_size=32, network="unet", grad_clip=0.5)
    learners = []
    for other in (False, True):
        torch.manual_seed(0)
        learner = dom2.DOM2(env, setting, torch.device("cpu"))
        data = load_dataset(folder)
        if other:
            arrays = {name: np.array(getattr(data, name)) for name in ("obs", "next_obs", "actions", "rewards")}
            for array in arrays.values():
                array[:, 2] = np.roll(array[:, 2], 5 * 25, 0) * 0.5
            data = dataclasses.replace(data, **arrays)
        table = dom2.Data(data, env, setting, torch.device("cpu"))
        learner.set_units(table)
        generator = torch.Generator().manual_seed(1)
        for _ in range(5):
            learner.update(table.sample(table.draw(32, generator)), *learner.draw(generator))
        learners.append(learner)
    changed = 0
    for (name, a), b in zip(learners[0].named_parameters(), learners[1].parameters()):
        a, b = a.unflatten(0, (3, -1)), b.unflatten(0, (3, -1))  # critics: [N * Q, ...]
        torch.testing.assert_close(a[:2], b[:2], rtol=0, atol=0, msg=name)
        changed += not torch.equal(a[2], b[2])
    assert changed > 10


@pytest.mark.parametrize(
    "values",
    [dict(), dict(policy="deterministic"), dict(q_weight=0.0), dict(network="unet"), dict(q_scale="mean"), dict(cql_own=True)],
)
def test_an_update_moves_everything_that_learns(values, folder):
    env, setting = make_env("omar_simple_spread"), args(batch_size=32, **values)
    learner, table = (
        dom2.DOM2(env, setting, torch.device("cpu")),
        dom2.Data(load_dataset(folder), env, setting, torch.device("cpu")),
    )
    before = {name: p.detach().clone() for name, p in learner.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        logs = learner.update(table.sample(table.draw(32, generator)), *learner.draw(generator))
    still = [name for name, p in learner.named_parameters() if torch.equal(p, before[name])]
    critics = [name for name in before if "critic" in name]
    assert still == (critics if values.get("q_weight") == 0 else [])  # imitation alone has no use for them
    assert all(value.isfinite() for value in logs.values()) and ("losses/td" in logs) == (not still)
    pairs = ((learner.slow_policy, learner.policy), (learner.slow_critic, learner.critic))
    for slow, fast in pairs[:1] if still else pairs:
        for (name, s), f in zip(slow.named_parameters(), fast.parameters()):
            assert (s - f).abs().max() > 0, name


# --- the program ---

SHORT = (
    "--total-updates 40 --eval-every 10 --eval-episodes 3 --batch-size 32 --policy-hidden 16 --critic-hidden 16 --network mlp "
    "--solver-steps 3 --device cpu"
).split()


@pytest.fixture
def cli(tmp_path, capsys, folder, monkeypatch):
    """Runs dom2.main in this process: cli("--seed", "1") -> (exit code, stdout, stderr). Runs land in tmp_path."""
    monkeypatch.setattr("common.datasets.DATA", folder.parents[2])

    return caller(dom2.main, tmp_path, capsys)


def curve(run):
    return [{k: v for k, v in row.items() if k != "wall_time_s"} for row in csv.DictReader((run / "eval.csv").open())]


def test_a_whole_run(cli, tmp_path):
    code, out, err = cli("--dataset", "omar_simple_spread-random", *SHORT)
    assert code == 0, err
    for word in (
        "task ",
        "data ",
        "2,000 transitions",
        "sizes ",
        "device ",
        "parameters",
        "expected ",
        "logs ",
        "eval at update 40",
    ):
        assert word in out, word
    (run,) = tmp_path.glob("omar_simple_spread-random__dom2__1__*")
    assert {"config.json", "eval.csv", "checkpoint.pt", "curve.png"} <= {p.name for p in run.iterdir()} and not list(
        run.glob("*.tmp")
    )
    assert [row["step"] for row in curve(run)] == ["0", "10", "20", "30", "40"]
    row = curve(run)[-1]
    assert float(row["normalized_score"]) == pytest.approx(100 * (float(row["return_mean"]) - 159.8) / (516.8 - 159.8))
    assert json.loads((run / "config.json").read_bytes())["args"]["policy_hidden"] == 16
    weights = torch.load(run / "checkpoint.pt", weights_only=True)["agent"]
    for critic in ("critic", "slow_critic"):  # random play earns 160 in 25 steps, at gamma 0.9 worth about 64
        assert (
            weights[f"{critic}.shift"].flatten().tolist() == pytest.approx([64] * 3, abs=8)
            and weights[f"{critic}.scale"].min() > 1.5
        )
    last = out.splitlines()[-2].split("return ")[1].split(" over")[0]
    code, out, err = cli("--evaluate", run, run_dir=False)
    assert code == 0 and last in out and "3 solver steps" in out, err
    for flag, value in (("--solver-steps", 1), ("--seed", 5)):
        code, out, err = cli("--evaluate", run, flag, value, run_dir=False)
        assert code == 0 and f"{1 if value == 1 else 3} solver steps" in out and last not in out, err


def test_the_same_seed_is_the_same_run_and_a_resumed_one_too(cli, tmp_path, monkeypatch):
    argv = ["--dataset", "omar_simple_spread-random", *SHORT]
    for seed in (3, 3, 4):
        assert cli(*argv, "--seed", seed)[0] == 0
    one, two, other = sorted(tmp_path.glob("*__dom2__*"), key=lambda path: (path.name.split("__")[2], path.name))
    assert curve(one) == curve(two) != curve(other)
    with monkeypatch.context() as patch:
        calls = iter(range(10**6))
        step = dom2.Learner.step

        def stop(self, generator, done):
            if next(calls) == 27:
                raise KeyboardInterrupt
            return step(self, generator, done)

        patch.setattr(dom2.Learner, "step", stop)
        assert cli(*argv, "--seed", 3)[0] == 130
    cut = max(tmp_path.glob("*__dom2__3__*"), key=lambda path: path.stat().st_mtime)
    assert len(curve(cut)) == 3
    code, _, err = cli("--resume", cut, run_dir=False)
    assert code == 0 and curve(cut) == curve(one), err
    same = [torch.load(run / "checkpoint.pt", weights_only=True)["agent"] for run in (cut, one)]
    assert all(torch.equal(same[0][name], same[1][name]) for name in same[0])


@pytest.mark.slow
def test_the_default_command_as_a_user_types_it(tmp_path):
    """On a fresh checkout: the default data are made, a million transitions, and learned from; here for one minute, not two."""
    for name in ("dom2.py", "omad.py", "common", "datasets"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name, **(dict(ignore=shutil.ignore_patterns("data")) if copy is shutil.copytree else {}))
    command = [sys.executable, "dom2.py", "--total-updates", "2000"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    assert "omar_simple_spread-medium is not there yet: making it" in done.stdout and "1,000,000 transitions" in done.stdout
    (run,) = (tmp_path / "runs").glob("omar_simple_spread-medium__dom2__1__*")
    rows = list(csv.DictReader((run / "eval.csv").open()))
    assert float(rows[-1]["return_mean"]) > 340 and float(rows[0]["return_mean"]) < 250  # the data: 267
    assert {"config.json", "eval.csv", "checkpoint.pt", "curve.png"} <= {path.name for path in run.iterdir()}


def test_learning_rates_fall_along_half_a_cosine(folder):
    env, setting = make_env("omar_simple_spread"), args(batch_size=32, policy_lr=0.1, q_lr=0.2)
    for decay, early, halfway in ((True, 0.5 + 0.125**0.5, 0.5), (False, 1.0, 1.0)):
        setting = dataclasses.replace(setting, lr_decay=decay)
        learner = dom2.DOM2(env, setting, torch.device("cpu"))
        learner = dom2.Learner(learner, dom2.Data(load_dataset(folder), env, setting, torch.device("cpu")), setting)
        for done, share in ((0.0, 1.0), (0.25, early), (0.5, halfway), (1.0, 0.0 if decay else 1.0)):
            before = [p.clone() for p in learner.agent.critic.parameters()]
            learner.step(torch.Generator().manual_seed(0), done)
            rates = [learner.agent.optimizers[name].param_groups[0]["lr"].item() for name in ("policy", "critic")]
            assert rates == pytest.approx([0.1 * share, 0.2 * share], abs=1e-7)
            moved = max((p - q).abs().max().item() for p, q in zip(learner.agent.critic.parameters(), before))
            assert moved == pytest.approx(0.2 * share, rel=0.5, abs=1e-8) or 0 < done < 1  # the optimiser does use them


def test_data_that_are_missing_are_made(tmp_path, cli, monkeypatch):
    calls = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: calls.append(command) or type("Done", (), dict(returncode=1)))
    code, out, err = cli(*SHORT)  # the default
    assert code == 2 and "omar_simple_spread-medium is not there yet: making it" in out and "could not be made" in err
    assert calls[0][1:] == [
        str(dom2.Path(dom2.__file__).parent / "datasets/collect.py"),
        "--dataset",
        "omar_simple_spread-medium",
        "--seed",
        "0",
    ]


@pytest.mark.parametrize(
    "argv, reason",
    [
        (["--dataset", "omar_simple_spred-medium"], "did you mean omar_simple_spread-medium"),
        (["--q-wieght", "1"], "did you mean --q-weight"),
        (["--gamma", "1.5"], "--gamma 1.5 is out of range"),
        (["--dataset", "nowhere/at/all"], "--dataset nowhere/at/all: there is no such folder"),
        (["--dataset", "FOLDER", "--observation", "k9"], "--observation 'k9'"),
        (["--dataset", "FOLDER", "--prey", "nothing.pt"], "has no prey"),
        (["--dataset", "FOLDER", "--data-seed", "3"], "--data-seed goes with the name"),
        (["--env-id", "omar_simple_tag"], "--env-id omar_simple_tag: omar_simple_spread-medium is of omar_simple_spread"),
        (["--observation", "full"], "--observation"),
        (["--prey", "prey.pt"], "has no prey"),
        (["--resume", "nowhere"], "no run there"),
        (["--policy", "deterministic", "--q-weight", "0"], "nothing to learn from"),
        (["--shift", "speed"], "--shift goes with --evaluate"),
    ],
)
def test_bad_input_is_one_line(argv, reason, cli, tmp_path, folder):
    code, out, err = cli(*(folder if part == "FOLDER" else part for part in argv))
    assert code == 2 and reason in err and err.startswith("dom2.py: error: ") and len(err.splitlines()) == 1 and not out
    assert not list(tmp_path.iterdir())


def test_a_run_on_other_data_is_not_gone_on_with(cli, tmp_path, folder):
    other = tmp_path / "own" / "simple_spread"
    shutil.copytree(folder, other)
    code, _, err = cli("--dataset", other, *SHORT)
    assert code == 0, err
    (run,) = tmp_path.glob("*__dom2__*")
    (other / "card.json").unlink()
    for path in other.glob("*.npy"):
        np.save(path, np.load(path)[:1000])
    code, _, err = cli("--resume", run, run_dir=False)
    assert code == 2 and "trained on other data" in err and len(err.splitlines()) == 1


def test_an_evaluation_needs_no_data_and_a_resumed_run_says_what_it_misses(cli, tmp_path, folder):
    other = tmp_path / "own" / "simple_spread"
    shutil.copytree(folder, other)
    assert cli("--dataset", other, *SHORT)[0] == 0
    (run,) = tmp_path.glob("*__dom2__*")
    moved = other.rename(tmp_path / "own" / "moved")
    assert cli("--evaluate", run, run_dir=False)[0] == 0
    code, _, err = cli("--resume", run, "--total-updates", 50, run_dir=False)
    assert code == 2 and "--dataset says where they are now" in err and len(err.splitlines()) == 1
    code, _, err = cli("--resume", run, "--total-updates", 50, "--dataset", moved, run_dir=False)
    assert code == 0, err
    code, _, err = cli("--evaluate", run, "--prey", "nothing.pt", run_dir=False)
    assert code == 2 and "has no prey" in err
    (code, usual, _), (_, shifted, _) = (cli("--evaluate", run, *flags, run_dir=False) for flags in ((), ("--shift", "speed")))
    assert (
        code == 0 and "omar_simple_spread, shifted: speed, diffusion policy" in shifted and usual.split("return")[1] not in shifted
    )
    code, _, err = cli("--evaluate", run, "--shift", "extreme", run_dir=False)
    assert code == 2 and "can be shifted by 'speed' only" in err and len(err.splitlines()) == 1


def test_a_run_knows_its_prey(cli, tmp_path):
    data = collect.collect(collect.Options("omar_simple_tag-random", 500, out=tmp_path / "data"))
    prey, other = tmp_path / "prey.pt", tmp_path / "other.pt"
    checkpoint(prey, 14), checkpoint(other, 14, lambda policy: {name: 2 * value for name, value in policy.items()})
    code, out, err = cli("--dataset", data, "--prey", prey, *SHORT)
    assert code == 0 and f"prey      {prey}" in out and "note      the data are of another prey" in out, err
    (run,) = tmp_path.glob("*__dom2__*")
    for file in (other, ""):
        code, _, err = cli("--resume", run, "--prey", file, "--total-updates", 50, run_dir=False)
        assert code == 2 and "is not the prey that the run in" in err and len(err.splitlines()) == 1
        code, out, err = cli("--evaluate", run, "--prey", file, run_dir=False)
        assert code == 0 and "note      not the prey that the run in" in err
    code, out, err = cli("--evaluate", run, "--prey", prey.rename(tmp_path / "moved.pt"), run_dir=False)
    assert code == 0 and "note" not in err
    code, out, err = cli("--dataset", data, *SHORT)
    assert code == 0 and "note" not in out


def test_presets_follow_the_task(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "cheetah" / "things")
    assert dom2.preset(str(tmp_path / "cheetah" / "things")).gamma == 0.9  # its card says what it is
    assert (
        dom2.preset("omar_halfcheetah_2x3-expert").gamma == 0.99 == dom2.preset(str(tmp_path / "cheetah"), "mamujoco_ant_2x4").gamma
    )


def test_every_preset_can_be_used():
    for task, splits in dom2.SPLIT_PRESETS.items():
        assert set(splits) <= set(SPLITS)
        for split, values in splits.items():
            found = dom2.preset(f"{task}-{split}")
            dom2.validate(found)
            assert all(getattr(found, name) == value for name, value in values.items())
    assert dom2.preset("omar_simple_tag-expert").policy_lr > dom2.preset("omar_simple_spread-expert").policy_lr
    assert dom2.preset("omar_halfcheetah_2x3-random").cql_own and not dom2.preset("omar_simple_spread-random").cql_own
    assert dom2.preset("omar_simple_spread-medium") == dataclasses.replace(dom2.Args(), gamma=0.9, q_weight=8.0)


def test_the_baseline_is_as_wide_as_what_sees_in_the_method():
    for hidden, wide in ((16, 128), (200, 200)):
        ours, baseline = (agent(policy_hidden=hidden, policy=kind).policy for kind in ("diffusion", "deterministic"))
        assert ours.obs2.weight.shape[1:] == (wide, wide) == baseline.layer2.weight.shape[1:]


def test_what_both_files_hold_is_the_same():
    """The two methods share no code, so that each can be read and forked alone; but plumbing that is the same must stay so."""
    same = ("ParallelLinear", "Captured", "unchanged", "pick_device", "write", "write_config", "checksum", "read_flags", "mix_seed",
            "evaluation_seed", "_duration", "_flag", "_first_line", "BadInput", "FailedRun", "check_task", "has_results", "claim")  # fmt: skip
    for name in same:
        assert inspect.getsource(getattr(omad, name)) == inspect.getsource(getattr(dom2, name)), name
    for one, other in ((omad.Run.log, dom2.Run.log), (omad.Run.flush, dom2.Run.flush), (omad.OMAD.tensors, dom2.DOM2.tensors)):
        assert inspect.getsource(one) == inspect.getsource(other), one
    one, other = (inspect.getsource(module.evaluate).replace(kind, "") for module, kind in ((omad, "OMAD"), (dom2, "DOM2")))
    assert one == other
