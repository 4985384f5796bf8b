"""DOM2: the solver, the losses, the update and the data against what they should be, and what is special to dom2.py."""

import csv
import dataclasses
import inspect
import json
import math
import operator
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import dom2
import omad
from common.datasets import FOLDERS, SPLITS, load_dataset, normalize, stack_rows
from common.envs import make_env
from conftest import ROOT, caller, the_run

CPU = torch.device("cpu")


def args(**values):
    return dom2.Args(**dict(policy_hidden=16, critic_hidden=32) | values)


def team(obs_sizes, action_sizes):
    """What an agent needs to know of an environment."""
    mask = lambda sizes: np.arange(max(sizes)) < np.array(sizes)[:, None]
    masks = dict(obs_mask=mask(obs_sizes), action_mask=mask(action_sizes))
    return SimpleNamespace(num_agents=len(obs_sizes), obs_sizes=obs_sizes, action_sizes=action_sizes, **masks)


ONE, UNEQUAL = team([1], [1]), team([3, 6, 2], [2, 1, 3])


def make(env=ONE, seed=0, **values):
    torch.manual_seed(seed)
    return dom2.DOM2(env, args(**values), CPU)


def noisy(agent):
    """All weights at random, so that averages differ from what they are of, and nothing is 0 by chance."""
    for p in agent.parameters():
        nn.init.normal_(p, std=0.3)
    return agent


def random_batch(env, rows):
    """A batch as `Data` makes them: padded with zeros."""
    real_obs, real_action = (torch.from_numpy(mask)[:, None].float() for mask in (env.obs_mask, env.action_mask))
    (n, o), a = env.obs_mask.shape, env.action_mask.shape[1]
    obs, next_obs = torch.randn(2, n, rows, o) * real_obs
    action, ended = torch.rand(n, rows, a) * 2 - 1, (torch.rand(n, rows) < 0.3).float()
    return dict(obs=obs, next_obs=next_obs, action=action * real_action, reward=torch.randn(n, rows), terminated=ended)


# --- the solver ---


def test_alpha_and_sigma_are_those_of_the_sde():
    """log alpha_t = -1/2 of the integral of beta(s) = 0.1 + 19.9 s from 0 to t; alpha^2 + sigma^2 = 1."""
    policy, t = make().policy, torch.linspace(0.001, 1, 50)
    alpha, sigma = policy.scales(t)
    for k in range(50):
        s = np.linspace(0, t[k].item(), 10_001)
        assert alpha[k].item() == pytest.approx(math.exp(-0.5 * np.trapezoid(0.1 + 19.9 * s, s)), rel=1e-4)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(50))


class Told(nn.Module):
    """A stand-in for a network: function(x, condition)."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, condition):
        return self.function(x, condition)


class Exact(dom2.DiffusionPolicy):
    """Whose network, told the time, predicts the noise exactly, for actions ~ N(mean, std^2)."""

    mean, std = 0.2, 0.1

    def __init__(self, steps):
        super().__init__([1], [1], args(solver_steps=2), steps)
        self.double().network = Told(self.exact)

    def run(self, noise):
        return self(torch.zeros(1, noise.shape[1], 1).double(), noise)

    def condition(self, obs, t):
        return t[None, :, :, None].expand(1, -1, obs.shape[1], 1)

    def exact(self, x, t):
        alpha, sigma = self.scales(t)
        return (self.predict(x, alpha, sigma) - sigma * x) / alpha

    def predict(self, x, alpha, sigma):
        return sigma * (x - alpha * self.mean) / (alpha**2 * self.std**2 + sigma**2)

    def flow(self, x):
        """Where the differential equation itself takes x from t = 1 to t = 0.001, where sampling ends."""
        (a1, a0), (s1, s0) = self.scales(torch.tensor([1.0, 1e-3]).double())
        spread = lambda alpha, sigma: (alpha**2 * self.std**2 + sigma**2).sqrt()
        return a0 * self.mean + spread(a0, s0) * (x - a1 * self.mean) / spread(a1, s1)


def gaussian(rows):
    return torch.randn(1, rows, 1, generator=torch.Generator().manual_seed(0)).double()


def test_the_solver_ends_where_the_differential_equation_does():
    """Closed form for a Gaussian with its exact noise, and first-order convergence: twice the steps, half the error."""
    x, errors = torch.linspace(-2.5, 2.5, 101).double().view(1, -1, 1), []
    for steps in (10, 20, 40, 80, 160):
        policy = Exact(steps)
        errors.append((policy.run(x) - policy.flow(x)).abs().max().item())
    ratios = np.divide(errors[:-1], errors[1:])
    assert errors[-1] < 0.005 and (np.abs(ratios[1:] - 2) < 0.35).all(), (errors, ratios)
    samples = Exact(5).run(gaussian(20_000))  # the default: 0.1 must not collapse, as it does to 0.024 with even steps
    assert samples.mean().item() == pytest.approx(0.2, abs=0.01) and 0.05 < samples.std().item() < 0.11


class ExactModes(Exact):
    """The same for actions of which half are -0.6, half 0.6, both ± 0.05."""

    def predict(self, x, alpha, sigma):
        modes = torch.tensor([-0.6, 0.6]).to(x)
        var = alpha**2 * 0.05**2 + sigma**2
        share = torch.softmax(-((x - alpha * modes) ** 2) / (2 * var), -1)
        mean = (share * (modes + alpha * 0.05**2 / var * (x - alpha * modes))).sum(-1, keepdim=True)  # of the action
        return (x - alpha * mean) / sigma


def test_five_steps_keep_two_modes_apart():
    """With the exact noise, 1 % of the samples end between narrow modes; on an even grid of times it were 42 %."""
    samples = ExactModes(5).run(gaussian(20_000))
    assert (samples.abs() < 0.3).double().mean().item() < 0.02 and 0.45 < (samples > 0).double().mean().item() < 0.55


def test_one_step_is_the_formula_of_the_paper():
    """x_t = (alpha_t / alpha_s) x_s - sigma_t (exp(lambda_t - lambda_s) - 1) eps, where nothing is clipped."""
    policy = Exact(7)
    x = torch.linspace(-1, 1, 9).double().view(1, -1, 1)
    want, (alpha, sigma) = x, policy.scales(policy.times)
    lam = (alpha / sigma).log()
    assert len(lam) == 8 and policy.times[0] == 1 and (policy.times.diff() < 0).all()
    for k in range(7):
        eps = policy.predict(want, alpha[k], sigma[k])
        want = alpha[k + 1] / alpha[k] * want - sigma[k + 1] * ((lam[k + 1] - lam[k]).exp() - 1) * eps
    torch.testing.assert_close(policy.run(x), want, rtol=1e-5, atol=1e-6)


def test_the_estimated_action_stays_in_the_box():
    """Where nearly all is noise, a wrong network means an action of ± 150, which later steps must be able to mend."""

    class Wrong(Exact):
        def predict(self, x, alpha, sigma):
            return super().predict(x, alpha, sigma) * (alpha > 0.01)  # at t = 1 there were no noise

    samples = Wrong(5).run(gaussian(2000))
    assert ((samples > -0.1) & (samples < 0.6)).all()
    policy = Exact(5)
    policy.mean = 1.5
    samples = policy.run(gaussian(50))
    assert ((samples > 0.95) & (samples <= 1)).all()


def test_conditions_of_all_steps_at_once_are_those_of_each():
    policy, obs, times = make(UNEQUAL).policy, torch.randn(3, 7, 6), torch.tensor([1.0, 0.4, 0.001])
    together = policy.condition(obs, times[:, None])
    for k, t in enumerate(times):
        torch.testing.assert_close(together[:, k], policy.condition(obs, t.expand(1, 7))[:, 0])
        torch.testing.assert_close(together[1, k, 2], policy.condition(obs[:, 2:3], t.expand(1, 1))[1, 0, 0])
    assert (together[:, 0] != together[:, 1]).any() and (together[:, :, 0] != together[:, :, 1]).any()


@pytest.mark.parametrize("without", ["", "E1", "E2", "E6", "E1,E2,E6"])
def test_a_chain_by_hand(without):
    """The network predicts v at the time of each step, eps = sigma x + alpha v; estimated actions stay in the box.
    Without E1 times are even, without E2 nothing is clipped but the end, without E6 the network predicts eps."""
    policy = noisy(make(UNEQUAL, without=without)).policy
    obs, noise = torch.randn(3, 7, 6), policy.noise(7)
    times = torch.linspace(1.0, 0.001, 6) if "E1" in without else torch.linspace(1.0, 0.1, 6) ** 3
    alpha, sigma = policy.scales(times)
    x, clipped = noise * policy.action_mask, 0
    for k, t in enumerate(times[:5]):
        told = policy.network(x, policy.condition(obs, t.expand(1, 7))[:, 0]) * policy.action_mask
        eps = told if "E6" in without else sigma[k] * x + alpha[k] * told
        action = (x - sigma[k] * eps) / alpha[k]
        clipped += (action.abs() > 1).sum()
        action = action if "E2" in without else action.clamp(-1, 1)
        x = alpha[k + 1] * action + sigma[k + 1] * (x - alpha[k] * action) / sigma[k]
    assert clipped > 50
    torch.testing.assert_close(policy(obs, noise), x.clamp(-1, 1), rtol=1e-3, atol=1e-3)


def test_blocks_of_the_u_net_are_residual_and_told_the_condition_each():
    torch.manual_seed(0)
    net, x = dom2.UNet(2, 3, 16), torch.randn(2, 5, 3)
    condition = torch.randn(2, 5, sum(net.widths))
    ends = np.cumsum([0, *net.widths])
    assert len(net.widths) == 6 and ends[-1] == condition.shape[-1]
    usual = net(x, condition)
    for start, end in zip(ends, ends[1:]):
        changed = condition.clone()
        changed[..., start:end] += 1
        assert (net(x, changed) != usual).all()
    for name, p in net.named_parameters():
        if "layer2" in name:
            nn.init.zeros_(p)
    linear = net(x, condition) - net(0 * x, condition)  # all that is left are the skips
    torch.testing.assert_close(net(2 * x, 0 * condition) - net(0 * x, condition), 2 * linear, rtol=1e-4, atol=1e-5)
    assert linear.abs().min() > 0


# --- imitation and the critic's gradient ---


@pytest.mark.parametrize("without", ["", "E6"])
def test_the_imitation_loss_by_hand(without):
    """The error of the noise predicted over alpha, squared; agents are added, padding is not. Without E6 the network
    predicts the noise, and its error counts as it is."""
    agent, batch = noisy(make(UNEQUAL, without=without)), random_batch(UNEQUAL, 5)
    t, eps = 0.5 * torch.rand(1, 5), torch.randn(3, 5, 3)
    mask, policy = torch.from_numpy(UNEQUAL.action_mask).float()[:, None], agent.policy
    loss, logs = agent.imitation_loss(batch, t, eps)
    torch.testing.assert_close(agent.imitation_loss(batch, t, eps + 5 * (1 - mask))[0], loss)  # noise of padding
    alpha, sigma = policy.scales(t[..., None])
    told = policy.network(alpha * batch["action"] + sigma * eps * mask, policy.condition(batch["obs"], t)[:, 0])
    noise = told if without else sigma * (alpha * batch["action"] + sigma * eps) + alpha * told
    error = ((eps - noise) / (1 if without else alpha)) ** 2
    want = sum(error[j, :, :size].sum(-1).mean() for j, size in enumerate(UNEQUAL.action_sizes))
    torch.testing.assert_close(loss, want, rtol=1e-4, atol=1e-4)
    assert logs["losses/imitation"] == loss


def table(function):
    """A stand-in for a critic: function(obs [N, B], action [N, B]) -> [Q, N, B]."""
    return Told(lambda obs, action: function(obs.squeeze(-1), action.squeeze(-1)))


TWO_MODES = np.concatenate([np.full(500, -0.6), np.full(500, 0.6)]) + np.random.default_rng(0).normal(0, 0.05, 1000)


def fit(agent, updates, critic=None):
    """Trains the policy of one agent on `TWO_MODES`, guided by a critic if given. Returns what it does then."""
    torch.manual_seed(0)
    actions, b = torch.tensor(TWO_MODES, dtype=torch.float32), agent.args.batch_size
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(agent.policy_adam, updates)
    agent.critic = critic
    for _ in range(updates):
        batch = {"obs": torch.zeros(1, b, 1), "action": actions[torch.randint(1000, (1, b, 1))]}
        t = 1e-3 + (1 - 1e-3) * torch.rand(1, b)
        loss, _ = agent.imitation_loss(batch, t, torch.randn(1, b, 1))
        if critic:
            loss = loss + agent.value_loss(batch, agent.policy.noise(agent.q_rows), torch.ones(1))[0]
        agent.policy_adam.zero_grad()
        loss.backward()
        agent.policy_adam.step()
        schedule.step()
    with torch.no_grad():
        return agent.policy(torch.zeros(1, 4000, 1), agent.policy.noise(4000)).flatten().numpy()


def test_imitation_keeps_both_modes():
    """The data never do 0, their mean."""
    samples = fit(make(policy_hidden=32, policy_lr=5e-3, batch_size=128), 600)
    left, right, between = ((samples < -0.4).mean(), (samples > 0.4).mean(), (np.abs(samples) < 0.3).mean())
    assert 0.35 < left < 0.65 and 0.35 < right < 0.65 and between < 0.12, (left, right, between)
    assert np.abs(np.abs(samples) - 0.6).mean() < 0.12


def test_the_critic_s_gradient_moves_mass_to_the_better_mode():
    """The right mode is better by 2. Without a critic the test above finds at most 65 % there."""
    critic = table(lambda obs, action: torch.tanh(5 * action).expand(2, -1, -1))
    after = fit(make(policy_hidden=32, policy_lr=5e-3, q_weight=0.1), 300, critic)
    assert (after > 0.4).mean() > 0.85 and (after < -0.4).mean() < 0.1
    assert np.abs(after[after > 0.4] - 0.6).mean() < 0.25  # still what the data do


def test_modes_close_to_each_other_are_kept_apart():
    """0.4 apart, with a standard deviation of 0.02: with squared times of noise (E9) half as many samples again lie
    within two of it as with even ones."""
    modes, near = torch.tensor([-0.2, 0.2]), []
    for power in (1.0, 2.0):
        agent = make(policy_hidden=32, policy_lr=3e-3, batch_size=256, time_power=power)
        torch.manual_seed(0)
        for step in range(1000):
            agent.policy_adam.param_groups[0]["lr"].fill_(3e-3 * (1 + math.cos(math.pi * step / 1000)) / 2)
            action = modes[torch.randint(2, (1, 256, 1))] + 0.02 * torch.randn(1, 256, 1)
            _, _, t, eps, _ = agent.draw()
            loss, _ = agent.imitation_loss(dict(obs=torch.zeros(1, 256, 1), action=action), t, eps)
            agent.descend(agent.policy_adam, loss)
        with torch.no_grad():
            samples = agent.policy(torch.zeros(1, 4000, 1), agent.policy.noise(4000)).flatten()
        near.append(((samples[:, None] - modes).abs().amin(1) < 0.04).float().mean().item())
    assert near[1] > 0.45 and near[1] > 1.5 * near[0], near


@pytest.mark.parametrize("without, scale", [("", 7.0), ("E4", 6.0)])
def test_the_value_loss_by_hand(without, scale):
    """-eta times the lower critic's value, in units of the spread given or of mean |Q|, on a share of the batch; the
    gradient goes to the action, not to the units."""
    losses = []
    for policy in ("diffusion", "deterministic"):
        agent = make(without=without, q_weight=3.0, q_rows=0.5, batch_size=2, policy=policy)
        agent.critic = table(lambda obs, action: torch.stack([4 * action - 6, 4 * action]))
        seen, action = [], torch.full((1, 1, 1), 0.5, requires_grad=True)
        agent.policy.forward = lambda obs, noise: seen.append(obs.shape[1]) or action
        batch = dict(obs=torch.zeros(1, 2, 1), action=torch.tensor([0.0, 9.0]).view(1, 2, 1))  # 0 is worth -6
        loss, _ = agent.value_loss(batch, torch.zeros(1, 1, 1), torch.tensor([7.0]))
        loss.backward()
        losses.append(loss.item())
        assert seen == [1] and action.grad.item() == pytest.approx(-(3 if policy == "diffusion" else 1) * 4 / scale)
    assert losses == pytest.approx([-3 * (4 * 0.5 - 6) / scale, -(4 * 0.5 - 6) / scale])  # a baseline weighs nothing


def test_the_value_loss_adds_agents_each_in_its_own_units():
    agent = noisy(make(UNEQUAL, q_weight=2.0, batch_size=8, q_rows=0.75))
    batch, noise, spread = random_batch(UNEQUAL, 8), torch.randn(3, 6, 3), torch.tensor([1.0, 5.0, 0.0])
    loss, _ = agent.value_loss(batch, noise, spread)
    value = agent.critic(batch["obs"][:, :6], agent.policy(batch["obs"][:, :6], noise)).min(0)[0].mean(1)
    want = -2.0 * (value / torch.tensor([1.0, 5.0, 1e-6])).sum()  # no division by zero
    torch.testing.assert_close(loss, want)


# --- the critics ---


def one_agent_batch(reward, terminated, action=0.0):
    full = lambda value: torch.as_tensor(value, dtype=torch.float32).expand(1, len(reward))
    batch = {name: full(value) for name, value in dict(reward=reward, terminated=terminated).items()}
    return batch | {"obs": full(0.0)[..., None], "next_obs": full(1.0)[..., None], "action": full(action)[..., None]}


def test_the_critic_s_target_by_hand():
    """r + gamma (1 - terminated) min_k Q'_k(o', b') of the averages: two critics worth 3 and 6 next, gamma 0.5."""
    agent = make(gamma=0.5, cql_weight=0.0)
    agent.slow_policy.forward = lambda obs, noise: 0.25 * obs + noise
    agent.slow_critic = table(lambda obs, action: torch.stack([3.0 * obs, 6.0 * obs]) + action - 0.25)
    agent.critic = table(lambda obs, action: torch.stack([1.0 + 0 * action, 2.0 + 0 * action]))
    batch, noise = one_agent_batch([1.0, 10.0, -2.0], [0.0, 1.0, 0.0]), torch.tensor([0.5, 0.5, -1.0]).view(1, 3, 1)
    loss, logs, _ = agent.critic_loss(batch, torch.zeros(4, 1, 3, 1), noise)
    goals = np.array([1 + 0.5 * 3.5, 10.0, -2 + 0.5 * 2.0])  # where it terminated, nothing follows
    assert logs["losses/td"].item() == pytest.approx(np.mean((1 - goals) ** 2) + np.mean((2 - goals) ** 2), rel=1e-6)
    assert loss == logs["losses/td"]


def test_the_cql_term_by_hand():
    """log sum exp over the M actions, minus the value of the data's action, in each critic; on the first rows only."""
    batch = one_agent_batch([0.0, 0.0], [1.0, 1.0], action=[0.5, 0.9])
    uniform, noise = torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1, 1), torch.tensor([0.1, 7.0]).view(1, 2, 1)  # one row
    for own in (False, True):
        agent = make(cql_weight=2.0, cql_own=own)
        agent.critic = agent.slow_critic = table(lambda obs, action: torch.stack([2 * action, 3 * action]))
        agent.slow_policy.forward = lambda obs, noise: torch.where(obs == 0, 0.25, -0.75) + noise
        loss, logs, spread = agent.critic_loss(batch, uniform, noise)
        others = [-1.0, 0.0, 1.0] + own * [0.35]  # its own where it was, with the noise of that row
        gap = sum(np.log(np.exp(np.multiply(k, others)).sum()) - 0.5 * k for k in (2, 3))
        td = sum(np.mean([(k * 0.5) ** 2, (k * 0.9) ** 2]) for k in (2, 3))
        assert logs["losses/cql"].item() == pytest.approx(gap, rel=1e-5)
        assert loss.item() == pytest.approx(td + 2 * gap, rel=1e-5)
        assert spread.item() == pytest.approx(np.std([-2, 0, 2], ddof=1))  # of the uniform ones, in the first critic


@pytest.mark.parametrize("own", [False, True])
def test_the_critic_s_loss_action_by_action(own):
    """Three agents, five rows of which two are in the CQL term: against a loop over actions, with the gradients."""
    agent = noisy(make(UNEQUAL, cql_own=own, cql_weight=3.0, batch_size=5, cql_rows=0.4))
    batch, (uniform, noise, *_) = random_batch(UNEQUAL, 5), agent.draw()
    loss, logs, spread = agent.critic_loss(batch, uniform, noise)
    obs = batch["obs"][:, :2]
    assert uniform.shape == (10, 3, 2, 3)
    values = torch.stack([agent.critic(obs, actions) for actions in uniform])  # [M, Q, N, rows]
    torch.testing.assert_close(spread, values[:, 0].std(0).mean(-1))
    if own:
        values = torch.cat([values, agent.critic(obs, agent.slow_policy(obs, noise[:, :2]))[None]])
    gap = (values.logsumexp(0) - agent.critic(obs, batch["action"][:, :2])).mean(-1).sum(0)  # [N]
    next_value = agent.slow_critic(batch["next_obs"], agent.slow_policy(batch["next_obs"], noise)).amin(0)
    goal = (batch["reward"] + agent.args.gamma * (1 - batch["terminated"]) * next_value).detach()
    td = ((agent.critic(batch["obs"], batch["action"]) - goal) ** 2).mean(-1).sum(0)  # [N]
    torch.testing.assert_close(loss, (td + 3.0 * gap).sum())
    torch.testing.assert_close(torch.stack([logs["losses/td"], logs["losses/cql"]]), torch.stack([td, gap]).sum(1))
    first, second = agent.critic(batch["obs"], batch["action"]).detach()
    wanted = torch.stack([(first + second).mean() / 2, (first - second).abs().mean(), spread.mean()])
    torch.testing.assert_close(
        torch.stack([logs[f"diag/{name}"] for name in ("value", "critic_disagreement", "q_std")]), wanted
    )
    parameters = list(agent.critic.parameters())
    for a, b in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad((td + 3.0 * gap).sum(), parameters)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_several_actions_for_an_observation_are_valued_one_by_one():
    critic = noisy(make(UNEQUAL)).critic
    obs, action = torch.randn(3, 5, 6), torch.randn(4, 3, 5, 3)
    together = critic(obs, action.transpose(0, 1).reshape(3, 20, 3)).unflatten(2, (4, 5))
    torch.testing.assert_close(together, torch.stack([critic(obs, a) for a in action], 2))
    assert (together[0] - together[1]).abs().min() > 0  # twins, not copies
    other = torch.tensor([0.0, 1.0, 0.0])[:, None, None]  # what agent 1 sees and does reaches its own twins only
    for changed in (critic(obs + other, action[0]), critic(obs, action[0] + other)):
        same = (changed == critic(obs, action[0])).all(2)
        assert same.tolist() == [[True, False, True]] * 2


def test_cql_is_pessimistic_outside_the_data_and_keeps_the_ranking_inside():
    """A bandit whose data have the actions -0.5, 0 and 0.5 only, worth 1, 2 and 3."""
    agent, rng = make(cql_weight=0.5, policy="deterministic", batch_size=64, cql_rows=1.0), np.random.default_rng(0)
    for _ in range(500):
        pick = rng.integers(3, size=64)
        batch = one_agent_batch((1.0 + pick).tolist(), [1.0] * 64, action=(0.5 * pick - 0.5).tolist())
        loss, _, _ = agent.critic_loss(batch, *agent.draw()[:2])
        agent.critic_adam.zero_grad()
        loss.backward()
        agent.critic_adam.step()
    grid = torch.tensor([-0.5, 0.0, 0.5, -1.0, 1.0]).view(1, 5, 1)
    low, middle, high, far_left, far_right = agent.critic(torch.zeros(1, 5, 1), grid).mean(0).flatten().tolist()
    assert low < middle < high and far_left < low and far_right < high


# --- the data ---


def test_weights_of_trajectories():
    even = [0.0, 1.0, 2.0, 3.0, 4.0]
    for returns, count, top, want in (
        (even, 2, 1.0, [1, 1, 2, 2, 3]),  # thresholds at the mean, 2, and at the best, 4
        (even, 3, 1.0, [1, 1, 2, 3, 4]),
        (even, 2, 0.75, [1, 1, 2, 3, 3]),
        (even, 0, 1.0, [1] * 5),
        ([7.0] * 4, 2, 0.98, [3] * 4),  # all alike: weights of no effect
        ([9.0, 0.0, 0.0, 0.0, 0.0], 3, 0.5, [4, 1, 1, 1, 1]),  # a mean above that quantile
    ):
        both = np.stack([returns, np.multiply(returns, -10)], 1)  # [K, N], an agent's weights are its own
        assert dom2.trajectory_weights(both, count, top)[:, 0].tolist() == want
        other = dom2.trajectory_weights(both[:, 1:], count, top)
        assert (dom2.trajectory_weights(both, count, top)[:, 1:] == other).all()


@pytest.fixture(scope="module")
def spread():
    return make_env("omar_simple_spread")


def test_reweighting_is_as_if_good_trajectories_were_in_the_data_several_times(data, spread):
    source = load_dataset(data)
    table = dom2.Data(source, spread, args(thresholds=2), CPU)
    returns = np.asarray(source.rewards).reshape(80, 25, 3).sum(1)  # each agent's own
    assert (np.abs(returns - returns.mean(1, keepdims=True)) > 1).any()
    torch.manual_seed(0)
    drawn = table.draw(200_000).numpy()
    for j in range(3):
        weights = dom2.trajectory_weights(returns[:, j, None], 2, 0.98)[:, 0]
        assert set(weights) == {1, 2, 3}
        np.testing.assert_allclose(
            np.bincount(drawn[j] // 25, minlength=80) / 200_000, weights / weights.sum(), rtol=0.1
        )
        np.testing.assert_allclose(np.bincount(drawn[j] % 25) / 200_000, 1 / 25, rtol=0.1)  # rows of a trajectory alike
        copies = np.repeat(np.arange(2000), np.repeat(weights, 25))  # the data with good trajectories several times
        np.testing.assert_array_equal(np.diff(table.cumsum[j].numpy(), prepend=0), np.bincount(copies))
    assert drawn.max() == 1999 and drawn.min() == 0 and (drawn[0] != drawn[1]).any()
    plain = dom2.Data(source, spread, args(reweight=False), CPU)
    np.testing.assert_array_equal(plain.cumsum.numpy(), np.tile(np.arange(1, 2001), (3, 1)))
    assert (plain.draw(1000).diff(dim=0) == 0).float().mean() < 0.01  # each agent its own rows
    unknown = dataclasses.replace(source, next_known=~source.truncations)  # rows without a next observation: not drawn
    rows = dom2.Data(unknown, spread, args(), CPU).draw(10_000).numpy()
    assert not (rows % 25 == 24).any() and (rows % 25 == 23).any()


def test_a_batch_is_rows_of_the_data_in_units_of_what_was_seen(data, spread, monkeypatch):
    source = load_dataset(data)
    wide = {name: np.array(getattr(source, name)) for name in ("obs", "next_obs")}
    for seen in wide.values():
        seen[:, 1, :2] *= 50.0  # agent 1's velocity varies by more than 1, all else by less
    source = dataclasses.replace(source, **wide, terminations=np.arange(2000) % 7 == 0)
    table = dom2.Data(source, spread, args(), CPU)
    rows = torch.tensor([[3, 1999, 14], [0, 7, 8], [5, 6, 21]])  # of each agent
    batch, agent, index = table.sample(rows), np.arange(3)[:, None], rows.numpy()
    mean, std = wide["obs"].mean(0, np.float64), np.maximum(wide["obs"].std(0, np.float64), 1.0)
    for name in ("obs", "next_obs"):
        want = (wide[name][index, agent] - mean[agent]) / std[agent]
        np.testing.assert_allclose(batch[name].numpy(), want, rtol=1e-3, atol=1e-4)
    assert std.max() > 5 and batch["obs"].abs().max() < 6
    np.testing.assert_array_equal(batch["action"].numpy(), np.asarray(source.actions)[index, agent])
    np.testing.assert_array_equal(batch["reward"].numpy(), np.asarray(source.rewards)[index, agent])
    np.testing.assert_array_equal(batch["terminated"].numpy(), [[0, 0, 1], [1, 1, 0], [0, 0, 1]])

    learner = make(spread, policy="deterministic")
    table.set_units(learner, args())
    raw = wide["obs"][[3, 1999]]  # [E, N, O]: acting is told them as the environment gives them
    for policy in (learner.policy, learner.slow_policy):
        with torch.no_grad():
            want = policy(table.sample(torch.tensor([[3, 1999]] * 3))["obs"], policy.noise(2)).transpose(0, 1)
        np.testing.assert_allclose(dom2.make_act(policy, args())(raw), want, rtol=1e-4, atol=1e-5)


def test_data_of_more_rows_than_are_read_at_once():
    rows = 70_000
    number = np.arange(rows, dtype=np.float32)[:, None, None] % 1000  # [T, N, O]
    numbers = dict(obs=number, next_obs=number + 1, actions=number / 1000, rewards=number[..., 0])
    known = dict(episodes=np.array([[0, rows]]), terminations=np.zeros(rows, bool), next_known=np.ones(rows, bool))
    source = SimpleNamespace(**numbers, **known)
    table = dom2.Data(source, ONE, args(without="E8"), CPU).table
    torch.testing.assert_close(table, torch.from_numpy(stack_rows(source, slice(None))))


def test_critics_start_where_the_data_are(data, spread):
    """Worth the mean reward forever, each agent its own; and their outputs count in the spread of the rewards."""
    source = load_dataset(data)
    rewards = np.array(source.rewards) * [1.0, 2.0, 0.0] + [0.0, 0.0, 3.0]  # agent 2 earns the same all the time
    table = dom2.Data(dataclasses.replace(source, rewards=rewards), spread, args(), CPU)
    for gamma, horizon in ((0.9, 10), (1.0, 1000)):
        agent, (obs, action) = make(spread), (torch.randn(3, 5, 18), torch.randn(3, 5, 2))
        before = agent.critic(obs, action)  # [Q, N, B]
        table.set_units(agent, args(gamma=gamma))
        for critic in (agent.critic, agent.slow_critic):
            scale = torch.tensor([*rewards.std(0)[:2], 1e-3])[:, None]  # no division by zero
            want = horizon * torch.tensor(rewards.mean(0))[:, None] + scale * before
            torch.testing.assert_close(critic(obs, action), want.float(), rtol=1e-3, atol=1e-2)
            assert critic(obs, action)[:, 2].std() > 0
    agent = make(spread)
    before = agent.critic(obs, action)
    table.set_units(agent, args(without="E7"))
    for critic in (agent.critic, agent.slow_critic):  # and without E7 where they are
        torch.testing.assert_close(critic(obs, action), before)
    ended = dataclasses.replace(source, terminations=np.ones(2000, bool))
    dom2.Data(ended, spread, args(), CPU).set_units(agent, args(gamma=0.9))  # episodes of one step: no more than that
    mean = torch.tensor(np.array(source.rewards).mean(0), dtype=torch.float32)[:, None]
    torch.testing.assert_close(agent.slow_critic.shift, mean, rtol=1e-4, atol=1e-4)


def test_without_e8_observations_are_as_they_are(data, spread):
    source = load_dataset(data)
    rows, table = torch.tensor([[3, 1999]] * 3), dom2.Data(source, spread, args(without="E8"), CPU)
    agent = make(spread)
    table.set_units(agent, args(without="E8"))
    for name in ("obs", "next_obs"):
        want = np.array(getattr(source, name))[[3, 1999]].transpose(1, 0, 2)
        np.testing.assert_allclose(table.sample(rows)[name].numpy(), want, rtol=1e-6)
    assert (agent.slow_policy.obs_mean == 0).all() and (agent.slow_policy.obs_std == 1).all()


def test_the_times_of_noise():
    """0.001 + 0.999 u^p: of u^p a share (0.25)^(1 / p) lies below a quarter."""
    for power in (1.0, 2.0, 3.0):
        t = make(batch_size=100_000, time_power=power).draw()[2]
        assert t.shape == (1, 100_000) and 0.001 <= t.min() < 0.0011 + 1e-4 * (power == 1.0) and 0.999 < t.max() <= 1.0
        assert ((t - 0.001) / 0.999 < 0.25).float().mean().item() == pytest.approx(0.25 ** (1 / power), abs=0.01)


@pytest.mark.parametrize("act_noise", [1.0, 0.5, 0.0])
def test_policies_act_from_as_much_noise_as_is_asked_for(act_noise):
    policy = noisy(make(UNEQUAL)).policy
    obs = torch.randn(5, 3, 6)
    torch.manual_seed(3)
    want = policy(obs.transpose(0, 1), act_noise * policy.noise(5)).transpose(0, 1)
    torch.manual_seed(3)
    acted = dom2.make_act(policy, args(act_noise=act_noise))(obs.numpy())
    np.testing.assert_allclose(acted, want.detach().numpy(), rtol=1e-5, atol=1e-6)


# --- the update ---


def gradients(agent):
    """[N, ...] of the last update: the policies' and, of two critics side by side, the critics'."""
    n = len(agent.policy.action_mask)
    join = lambda network: torch.cat([p.grad.reshape(n, -1) for p in network.parameters()], 1)
    return join(agent.policy), join(agent.critic) if agent.args.q_weight else None


@pytest.mark.parametrize("q_weight", [0.0, 1.0])
def test_the_norm_of_each_agent_s_gradient_is_bounded_by_itself(q_weight):
    found, clip = [], 1e9
    for _ in range(2):
        agent = make(UNEQUAL, grad_clip=clip, batch_size=16, q_weight=q_weight)
        batch = random_batch(UNEQUAL, 16)
        for name in ("reward", "action"):
            batch[name] = batch[name] * torch.tensor([0.01, 1.0, 100.0]).view(3, 1, *[1] * (batch[name].dim() - 2))
        agent.update(batch, *agent.draw())
        found.append(gradients(agent)[bool(q_weight)])  # the policies' depend on the critics' step
        norms = found[0].norm(dim=1)
        clip = 1.2 * norms.min().item()
    assert norms.max() > 10 * clip and found[1].norm(dim=1).max() < 1.001 * clip
    torch.testing.assert_close(found[1], found[0] * (clip / norms).clamp(max=1.0)[:, None], rtol=1e-4, atol=1e-6)


VARIANTS = {
    "method": dict(),
    "baseline": dict(policy="deterministic"),
    "imitation": dict(q_weight=0.0),
    "as the paper": dict(without="E1,E2,E4,E6,E7,E8"),
    "own actions": dict(cql_own=True),
}
variants = pytest.mark.parametrize("values", VARIANTS.values(), ids=VARIANTS)


@variants
def test_an_agent_among_others_learns_what_it_learns_alone(values):
    """Neither other agents nor padding up to their sizes make a difference, and what is of padding stays as it was."""
    setting = dict(batch_size=8, critic_hidden=20, policy_hidden=20, grad_clip=0.5) | values
    agent, batches, drawn = make(UNEQUAL, **setting), [], []
    for _ in range(4):
        batches.append(random_batch(UNEQUAL, 8))
        drawn.append(agent.draw())
    start = {name: x.clone() for name, x in agent.state_dict().items()}
    for batch, random in zip(batches, drawn):
        agent.update(batch, *random)
    after, moved = agent.state_dict(), 0
    for j, (o, a) in enumerate(zip(UNEQUAL.obs_sizes, UNEQUAL.action_sizes)):
        alone = make(team([o], [a]), **setting)
        own = lambda x, like: (
            x.unflatten(0, (3, -1))[j][tuple(slice(size) for size in like.shape)] if x.dim() > 1 else x
        )
        alone.load_state_dict({name: own(start[name], x) for name, x in alone.state_dict().items()})
        for batch, (uniform, next_noise, t, eps, noise) in zip(batches, drawn):
            mine = {name: x[j : j + 1] for name, x in batch.items()}
            mine |= {name: mine[name][..., :o] for name in ("obs", "next_obs")} | {"action": mine["action"][..., :a]}
            t = t if setting.get("policy") != "deterministic" else t[j : j + 1]
            next_noise, eps, noise = (x[j : j + 1, ..., :a] for x in (next_noise, eps, noise))
            alone.update(mine, uniform[:, j : j + 1, :, :a], next_noise, t, eps, noise)
        for name, x in alone.state_dict().items():
            torch.testing.assert_close(own(after[name], x), x, rtol=1e-4, atol=1e-5, msg=name)
            if x.dim() > 1:
                padding = torch.ones_like(after[name].unflatten(0, (3, -1))[j], dtype=torch.bool)
                padding[tuple(slice(size) for size in x.shape)] = False
                still, here = (values[name].unflatten(0, (3, -1))[j][padding] for values in (start, after))
                assert torch.equal(still, here), name
                moved += padding.any().item()
    assert moved > 4  # some agent's weights were padded


@variants
def test_agents_do_not_learn_from_each_other(values):
    """Fully decentralised: other data of agent 2 change nothing in agents 0 and 1, not even by rounding."""
    agents = []
    for other in (False, True):
        agent = make(UNEQUAL, batch_size=8, grad_clip=0.5, **values)
        for _ in range(3):
            batch, drawn = random_batch(UNEQUAL, 8), agent.draw()
            for x in batch.values():
                x[2] *= 1 - 0.5 * other
            agent.update(batch, *drawn)
        agents.append(agent)
    changed = 0
    for (name, a), b in zip(agents[0].named_parameters(), agents[1].parameters()):
        a, b = a.unflatten(0, (3, -1)), b.unflatten(0, (3, -1))  # critics: [N * Q, ...]
        torch.testing.assert_close(a[:2], b[:2], rtol=0, atol=0, msg=name)
        changed += not torch.equal(a[2], b[2])
    assert changed > 10


@variants
def test_an_update_moves_everything_that_learns_and_its_average(values):
    agent = make(UNEQUAL, batch_size=8, tau=0.1, **values)
    for _ in range(3):
        before = {name: p.detach().clone() for name, p in agent.named_parameters()}
        logs = agent.update(random_batch(UNEQUAL, 8), *agent.draw())
    after = dict(agent.named_parameters())
    still = [name for name, p in after.items() if torch.equal(p, before[name])]
    critics = [name for name in before if "critic" in name]
    assert still == (critics if values.get("q_weight") == 0 else [])  # imitation alone has no use for them
    for name in (name for name in after if name.startswith("slow_")):
        want = 0.9 * before[name] + 0.1 * after[name.removeprefix("slow_")]
        torch.testing.assert_close(after[name], want, rtol=1e-4, atol=1e-6, msg=name)
    kinds = {"losses/value": not still, "losses/td": not still, "losses/imitation": "policy" not in values}
    assert all(x.isfinite() for x in logs.values()) and {name: name in logs for name in kinds} == kinds


def test_an_update_is_a_step_of_the_critics_and_then_one_of_the_policies_by_both_losses():
    for values in (dict(), dict(policy="deterministic")):
        agent, other = (make(UNEQUAL, batch_size=8, grad_clip=1e9, q_weight=3.0, tau=0.0, **values) for _ in range(2))
        for _ in range(3):
            batch, drawn = random_batch(UNEQUAL, 8), agent.draw()
            agent.update(batch, *drawn)
            loss, _, spread = other.critic_loss(batch, *drawn[:2])
            other.critic.zero_grad()
            loss.backward()
            other.critic_adam.step()
            loss, _ = other.value_loss(batch, drawn[4], spread)
            loss = loss + (0 if values else other.imitation_loss(batch, *drawn[2:4])[0])
            other.policy.zero_grad()
            loss.backward()
            other.policy_adam.step()
        for (name, p), q in zip(agent.named_parameters(), other.parameters()):
            torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4, msg=name)


def test_what_an_update_draws():
    agent = make(UNEQUAL, batch_size=4000, cql_actions=3, q_rows=0.5, cql_rows=0.25)
    torch.manual_seed(0)
    uniform, next_noise, t, eps, noise = agent.draw()
    mask = torch.from_numpy(UNEQUAL.action_mask)
    assert uniform.shape == (3, 3, 1000, 3) and t.shape == (1, 4000) and noise.shape == (3, 2000, 3)
    assert next_noise.shape == eps.shape == (3, 4000, 3)
    shares = uniform.transpose(1, 2)[..., mask]  # [M, rows, real actions]
    assert (uniform.transpose(1, 2)[..., ~mask] == 0).all() and shares.abs().max() <= 1
    assert shares.mean().item() == pytest.approx(0, abs=0.03) and shares.std().item() == pytest.approx(
        3**-0.5, rel=0.03
    )
    assert t.min() >= 1e-3 and t.max() <= 1 and t.mean().item() == pytest.approx(0.5, abs=0.02)
    for x in (next_noise, eps, noise):
        assert x.mean().item() == pytest.approx(0, abs=0.03) and x.std().item() == pytest.approx(1, rel=0.03)
    assert (next_noise != eps).any()


@pytest.mark.parametrize("policy", dom2.POLICIES)
def test_actions_of_padding_are_zero_and_others_in_the_box(policy):
    agent = noisy(make(UNEQUAL, policy=policy)).policy
    action = agent(torch.randn(3, 50, 6), agent.noise(50))
    assert (action.abs() <= 1).all() and (action.transpose(0, 1)[:, ~UNEQUAL.action_mask] == 0).all()
    assert (action.transpose(0, 1)[:, UNEQUAL.action_mask].std(0) > 0.01).all()


def test_layers_side_by_side():
    """Each one linear layer, whose weights start by the inputs that are not padding."""
    torch.manual_seed(0)
    layer, x = dom2.ParallelLinear(2, 100, 50, torch.tensor([100, 4])), torch.randn(2, 7, 100)
    nn.init.normal_(layer.bias)
    assert layer.weight.std((1, 2)).tolist() == pytest.approx([0.1, 0.5], rel=0.05)
    for j in range(2):
        torch.testing.assert_close(layer(x)[j], x[j] @ layer.weight[j] + layer.bias[j])
    env = team([2, 200], [1, 50])
    agent = make(env)
    spread = lambda layer: layer.weight.std((1, 2)).tolist()
    assert spread(agent.policy.obs1) == pytest.approx([2**-0.5, 200**-0.5], rel=0.2)
    critics = pytest.approx([3**-0.5] * 2 + [250**-0.5] * 2, rel=0.2)
    assert spread(agent.critic.in_obs) == critics and spread(agent.critic.in_action) == critics


def test_the_baseline_is_as_wide_as_what_sees_in_the_method():
    for hidden, wide in ((16, 128), (200, 200)):
        ours, baseline = (make(policy_hidden=hidden, policy=kind).policy for kind in ("diffusion", "deterministic"))
        assert ours.obs2.weight.shape[1:] == (wide, wide) == baseline.layer2.weight.shape[1:]


# --- the program ---

SHORT = (
    "--total-updates 8 --eval-every 4 --eval-episodes 3 --batch-size 16 --policy-hidden 16 --critic-hidden 16 "
    "--solver-steps 3 --device cpu"
).split()


@pytest.fixture
def cli(tmp_path, capsys, data, monkeypatch):
    """Runs dom2.main in this process: cli("--seed", "1") -> (exit code, stdout, stderr). Runs land in tmp_path/runs."""
    monkeypatch.setattr("common.datasets.DATA", data.parents[2])
    return caller(dom2.main, tmp_path / "runs", capsys)


def curve(run):
    return list(csv.DictReader((run / "eval.csv").open()))


def test_a_run_starts_in_the_units_of_its_data_and_scores(cli, tmp_path):
    code, out, err = cli("--dataset", "omar_simple_spread-random", *SHORT)
    assert code == 0 and "data " in out and "2,000 transitions" in out, err
    run = the_run(tmp_path)
    assert re.fullmatch(r"omar_simple_spread-random__dom2__1__\d{8}-\d{6}-\d{6}", run.name)
    assert [row["step"] for row in curve(run)] == ["0", "4", "8"]
    for row in curve(run):
        score = 100 * (float(row["return_mean"]) - 159.8) / (516.8 - 159.8)
        assert (
            float(row["normalized_score"])
            == pytest.approx(score)
            == normalize("omar_simple_spread", float(row["return_mean"]))
        )
    assert f"normalised {float(row['normalized_score']):.1f}" in out
    weights = torch.load(run / "checkpoint.pt", weights_only=True)["agent"]
    for critic in ("critic", "slow_critic"):  # random play earns 160 in 25 steps, at gamma 0.9 worth about 64
        assert weights[f"{critic}.shift"].flatten().tolist() == pytest.approx([64] * 3, abs=8)
        assert weights[f"{critic}.scale"].min() > 1.5
    assert dom2.load(run / "config.json")["data_return"] == pytest.approx(
        load_dataset("omar_simple_spread-random").returns.mean()
    )
    policy, saved = dom2.load_policy(run)
    assert saved["step"] == 8 and saved["env_id"] == "omar_simple_spread" and saved["args"]["q_weight"] == 480.0
    for name, x in policy.state_dict().items():  # the averaged policies act, and are saved
        assert torch.equal(x, weights[f"slow_policy.{name}"]), name
    for steps, count in ((0, 3), (2, 2)):
        assert len(dom2.load_policy(run, steps)[0].times) == count + 1


def test_shifted_tasks_and_other_solvers_in_an_evaluation(cli, tmp_path):
    assert cli("--dataset", "omar_simple_spread-random", *SHORT)[0] == 0
    run, said = the_run(tmp_path), set()
    for flags in ((), ("--shift", "speed"), ("--solver-steps", 1), ("--seed", 5), ("--act-noise", 0)):
        code, out, err = cli("--evaluate", run, *flags, run_dir=False)
        assert code == 0 and ("omar_simple_spread, shift speed: " in out) == ("--shift" in flags), err
        said.add(out.partition("return ")[2])
    assert len(said) == 5 and f"{float(curve(run)[-1]['return_mean']):.2f}" in cli("--evaluate", run, run_dir=False)[1]
    for flags, reason in ((("--shift", "extreme"), "by 'speed' only"), (("--prey", "nothing.pt"), "has no prey")):
        code, out, err = cli("--evaluate", run, *flags, run_dir=False)
        assert code == 2 and reason in err and len(err.splitlines()) == 1 and not out


def test_data_that_are_missing_are_made(cli, tmp_path, monkeypatch):
    calls = []
    run = lambda command, **_: calls.append(command) or SimpleNamespace(returncode=1)
    monkeypatch.setattr("common.datasets.subprocess.run", run)
    code, out, err = cli(*SHORT, "--data-seed", 3)  # the default data
    assert code == 2 and "omar_simple_spread-medium is not there yet: making it" in out and "could not be made" in err
    script = str(ROOT / "datasets" / "collect.py")
    assert calls[0] == [sys.executable, script, "--dataset", "omar_simple_spread-medium", "--seed", "3"]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "argv, reason",
    [
        (["--dataset", "omar_simple_spred-medium"], "did you mean omar_simple_spread-medium"),
        (["--dataset", "nowhere/at/all"], "nowhere/at/all: there is no such folder"),
        (["--dataset", "FOLDER", "--observation", "k9"], "--observation 'k9'"),
        (["--dataset", "FOLDER", "--prey", "nothing.pt"], "has no prey"),
        (["--dataset", "FOLDER", "--env-id", "omar_simple_tag"], "says omar_simple_spread, not omar_simple_tag"),
        (["--dataset", "FOLDER", "--data-fraction", "0"], "--data-fraction"),
        (["--dataset", "omar_simple_spread-random", "--env-id", "omar_simple_tag"], "is of omar_simple_spread"),
        (["--policy", "deterministic", "--q-weight", "0"], "needs a --q-weight"),
        (["--shift", "speed"], "--shift goes with --evaluate"),
        (["--q-rows", "1.5"], "--q-rows"),
        (["--cql-rows", "0"], "--cql-rows"),
        (["--tau", "2"], "--tau"),
        (["--q-lr", "0"], "--q-lr"),
        (["--solver-steps", "0"], "solver-steps"),
        (["--without", "E1,E3"], "--without: of E1,E2,E4,E6,E7,E8"),
    ],
)
def test_bad_input_is_one_line(argv, reason, cli, tmp_path, data, monkeypatch):
    monkeypatch.setattr("common.datasets.subprocess.run", lambda *_, **__: SimpleNamespace(returncode=1))
    code, out, err = cli(*SHORT, *(data if part == "FOLDER" else part for part in argv))
    assert code == 2 and reason in err and err.startswith("dom2.py: error: ") and len(err.splitlines()) == 1 and not out
    assert not list(tmp_path.iterdir())


def test_data_of_another_observation_are_refused(cli, tmp_path):
    rng, folder = np.random.default_rng(0), tmp_path / "things"
    folder.mkdir()
    for i in range(2):  # HalfCheetah as seen by agents that see themselves only: 11 numbers, not 19
        for name, shape in dict(obs=(11,), next_obs=(11,), acs=(3,), rews=(), dones=()).items():
            array = rng.uniform(-1, 1, (1000, *shape)).astype(np.float32)
            np.save(folder / f"{name}_{i}.npy", array * (name != "dones"))
        seen = np.load(folder / f"obs_{i}.npy")
        np.save(folder / f"next_obs_{i}.npy", np.roll(seen, -1, 0))
        np.save(folder / f"rews_{i}.npy", np.ones(1000, np.float32))
    flags = ["--dataset", folder, "--env-id", "mamujoco_halfcheetah_2x3", *SHORT]
    code, _, err = cli(*flags)
    assert code == 2 and "--observation says what agents see" in err and len(err.splitlines()) == 1
    assert not (tmp_path / "runs").exists()
    code, _, err = cli(*flags, "--observation", "k0", "--total-updates", 1, "--eval-episodes", 1)
    assert code == 0 and "nan" in (the_run(tmp_path) / "eval.csv").read_text(), err  # no scores to normalise by


def test_a_run_on_other_data_is_not_gone_on_with(cli, tmp_path, data):
    other = shutil.copytree(data, tmp_path / "own" / "simple_spread")
    code, _, err = cli("--dataset", other, *SHORT)
    assert code == 0, err
    run = the_run(tmp_path)
    assert run.name.startswith(f"{tmp_path.name}-own-simple_spread__dom2__1__")
    (other / "card.json").unlink()
    for path in other.glob("*.npy"):
        np.save(path, np.load(path)[:1000])
    config, files = (run / "config.json").read_bytes(), {path.name for path in run.iterdir()}
    code, _, err = cli("--resume", run, "--total-updates", 12, run_dir=False)
    assert code == 2 and "trained on other data" in err and len(err.splitlines()) == 1
    assert (run / "config.json").read_bytes() == config and {path.name for path in run.iterdir()} == files


def test_an_evaluation_needs_no_data_and_a_resumed_run_is_told_where_they_are_now(cli, tmp_path, data):
    other = shutil.copytree(data, tmp_path / "own" / "simple_spread")
    assert cli("--dataset", other, "--data-fraction", 0.5, *SHORT)[0] == 0
    half = load_dataset(other, 0.5, seed=1).returns.mean()  # drawn with the run's seed
    assert json.loads((the_run(tmp_path) / "config.json").read_text())["data_return"] == half
    run, moved = the_run(tmp_path), other.rename(tmp_path / "own" / "moved")
    assert cli("--evaluate", run, run_dir=False)[0] == 0
    code, _, err = cli("--resume", run, "--total-updates", 12, run_dir=False)
    assert code == 2 and f"{other}: there is no such folder" in err and len(err.splitlines()) == 1
    code, out, err = cli("--resume", run, "--total-updates", 12, "--dataset", moved, run_dir=False)
    assert code == 0 and len(curve(run)) == 4 and "1,000 transitions" in out, err
    code, _, err = cli("--resume", run, "--data-fraction", 0.25, run_dir=False)
    assert code == 2 and "--data-fraction" in err and len(err.splitlines()) == 1


def test_data_of_another_seed_may_move_too(cli, tmp_path, data):
    named = shutil.copytree(data, data.parent / "seed_3_data")
    card = json.loads((named / "card.json").read_text())
    (named / "card.json").write_text(json.dumps(card | {"seed": 3}))
    assert cli("--dataset", "omar_simple_spread-random", "--data-seed", 3, *SHORT)[0] == 0
    run, moved = the_run(tmp_path), shutil.move(named, tmp_path / "moved")
    code, _, err = cli("--resume", run, "--total-updates", 12, "--dataset", moved, "--data-seed", 0, run_dir=False)
    assert code == 0 and len(curve(run)) == 4, err


# --- presets ---


def test_presets_follow_task_and_split(data, tmp_path):
    robot = dict(gamma=0.99, tau=0.005, q_lr=1e-3, total_updates=3_000, eval_episodes=10, policy_hidden=64)
    chase = dict(policy_lr=1e-2, cql_weight=16.0, cql_own=True)
    spread = dict(gamma=0.9, policy_lr=3e-3, q_lr=1e-2, q_weight=8.0, cql_weight=0.25, time_power=2.0, act_noise=0.5)
    for name, values in {
        **dict.fromkeys(("omar_simple_spread-medium", "omar_simple_spread-adaptive"), spread),
        "omar_simple_spread-random": dict(
            gamma=0.9, q_weight=480.0, cql_weight=0.5, total_updates=16_000, eval_every=2_000
        ),
        "omar_simple_tag-medium-expert": chase | dict(q_weight=0.0125),
        "omar_simple_tag-medium-replay": chase | dict(q_weight=0.4, thresholds=8),
        "omar_simple_world-random": dict(policy_lr=3e-3, total_updates=8_000, q_weight=4.0, cql_weight=0.25),
        "omar_halfcheetah_2x3-medium": robot | dict(cql_own=True, cql_weight=8.0, thresholds=8),
        "omar_halfcheetah_2x3-expert": robot | dict(cql_own=True, cql_weight=8.0, q_weight=0.05, act_noise=0.5),
    }.items():
        assert dom2.preset(name) == dom2.Args(name, **values)
    folder = shutil.copytree(data, tmp_path / "cheetah" / "things")
    assert dom2.preset(str(folder)) == dom2.Args(str(folder), **spread)  # its card says the task
    robot = dom2.preset(str(tmp_path / "cheetah"), "mamujoco_ant_2x4")
    assert robot.gamma == 0.99 == dom2.preset("omar_halfcheetah_2x3-medium").gamma and robot.eval_episodes == 10
    with pytest.raises(dom2.BadInput, match="did you mean"):
        dom2.preset("omar_simple_tag-medum")


@pytest.mark.parametrize("task, count", [*zip(FOLDERS, (2, 4, 4, 4))])
def test_every_data_set_has_defaults_that_can_be_used(task, count):
    found = [dom2.preset(f"{task}-{split}") for split in SPLITS]
    assert len({dataclasses.replace(preset, dataset="") for preset in found}) >= count  # splits their own, but spread's
    for preset in found:
        assert dom2.parse(["--dataset", preset.dataset]) == preset


# --- the file, and the other one ---


def test_what_both_files_need_is_the_same_in_both():
    """The two methods share no code, so that each can be read and forked alone."""
    for name in ("ParallelLinear.forward", "graphed", "pick_device", "write", "load"):
        source = lambda module: inspect.getsource(operator.attrgetter(name)(module))
        assert source(omad) == source(dom2), name


def test_both_files_are_short_and_have_the_same_sections():
    texts = [Path(program.__file__).read_text() for program in (omad, dom2)]
    found = [re.findall(r"^# (\d)\. (.*?) =+$", text, re.M) for text in texts]
    assert [number for number, _ in found[0]] == list("123456") and found[0][4] == ("5", "Replay and training")
    assert found[1] == [*found[0][:4], ("5", "Data and training"), found[0][5]]
    for program, text in zip(("omad.py", "dom2.py"), texts):
        lines = text.splitlines()
        assert max(map(len, lines)) <= 120, f"{program}: line {max(range(len(lines)), key=lambda i: len(lines[i])) + 1}"
        assert len(lines) <= 680, f"{program} has {len(lines)} lines"


@pytest.mark.slow
def test_the_default_command_as_a_user_types_it(tmp_path):
    """On a fresh checkout: the default data are made, a million transitions, and learned from; here for one minute."""
    for name in ("dom2.py", "omad.py", "common", "datasets"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("data"))
        else:
            shutil.copy(ROOT / name, tmp_path / name)
    command = [sys.executable, "dom2.py", "--total-updates", "2000"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    assert "omar_simple_spread-medium is not there yet: making it" in done.stdout
    assert "1,000,000 transitions" in done.stdout
    rows = curve(the_run(tmp_path))
    assert float(rows[-1]["return_mean"]) > 340 and float(rows[0]["return_mean"]) < 250  # the data: 267
