"""The method itself: each test fails for a wrong algorithm, not only for a crash."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal

import omad
from common.envs import make_env
from conftest import load
from omad import OMAD, POLICIES, Args, BatchRenorm, Replay, main, make_act, project

CHAINS = ["diffusion", "dime"]
OBS_SIZES, ACTION_SIZES = (3, 5, 2), (2, 1, 3)  # three unequal agents


def masks(sizes):
    sizes = torch.tensor(sizes)
    return torch.arange(sizes.max()) < sizes[:, None]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_args(**changes):
    small = dict(batch_size=16, policy_hidden=8, critic_hidden=8, n_atoms=21, v_min=-5.0, v_max=5.0, denoising_steps=3)
    return Args(**small | dict(gamma=0.9) | changes)


def make_policy(kind, obs=OBS_SIZES, action=ACTION_SIZES, steps=0, **changes):
    """A policy whose every parameter is away from its special starting value, trained with K = 4."""
    torch.manual_seed(0)
    args = make_args(**dict(denoising_steps=4, policy=kind) | changes)
    policy = POLICIES[kind](list(obs), list(action), args, steps)
    for p in policy.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return policy


def policy_with_inputs(kind):
    """A policy of three unequal agents, seven observations [7, 3, 5], padded as `TeamEnv` does, and noise."""
    policy = make_policy(kind)
    return policy, normal(7, 3, 5) * masks(OBS_SIZES), policy.noise(7)


def three_agents(kind, **changes):
    """The agent with that policy, critics that differ, and a temperature of 0.7."""
    env = SimpleNamespace(obs_sizes=list(OBS_SIZES), action_sizes=list(ACTION_SIZES), state_size=4)
    agent = OMAD(env, make_args(policy=kind, denoising_steps=4, alpha=0.7, **changes), torch.device("cpu"))
    agent.policy.load_state_dict(make_policy(kind).state_dict())
    for p in agent.critic.parameters():
        p.data += torch.randn_like(p)
    return agent


def env_and_agent(**changes):
    """An agent whose critics have learned: their last layer is not zero any more."""
    env = make_env("mpe_simple_speaker_listener")
    torch.manual_seed(0)
    agent = OMAD(env, make_args(**changes), torch.device("cpu"))
    agent.critic.out.weight.data.normal_()
    if agent.slow_critic is not None:
        agent.slow_critic.load_state_dict(agent.critic.state_dict())
    return env, agent


def random_batch(env, size=16):
    torch.manual_seed(1)
    obs, action = (size, *env.obs_mask.shape), (size, *env.action_mask.shape)
    batch = dict(obs=torch.randn(obs), next_obs=torch.randn(obs))
    batch |= dict(action=torch.randn(action).tanh() * torch.as_tensor(env.action_mask))
    batch |= dict(state=torch.randn(size, env.state_size), next_state=torch.randn(size, env.state_size))
    return batch | dict(reward=torch.randn(size), terminated=torch.zeros(size))


# --- projection ---


def brute_force_projection(probs, places, atoms):
    out = np.zeros((len(probs), len(atoms)))
    for b in range(len(probs)):
        for mass, place in zip(probs[b], places[b]):
            place = min(max(place, atoms[0]), atoms[-1])
            for z in range(len(atoms)):
                out[b, z] += mass * max(0.0, 1 - abs(place - atoms[z]) / (atoms[1] - atoms[0]))
    return out


def test_projection_equals_brute_force_and_conserves_mass():
    atoms = torch.linspace(-3, 2, 11, dtype=torch.float64)
    probs = torch.softmax(3 * normal(40, 11).double(), -1)
    places = 4 * normal(40, 11, seed=1).double()
    places[0], places[1] = atoms, atoms[3]  # exactly on atoms
    places[2], places[3] = 100.0, -100.0  # far outside
    got = project(probs, places, atoms)
    np.testing.assert_allclose(got, brute_force_projection(probs.numpy(), places.numpy(), atoms.numpy()), atol=1e-12)
    np.testing.assert_allclose(got.sum(-1), 1.0, atol=1e-12)
    np.testing.assert_allclose(got[0], probs[0], atol=1e-12)
    np.testing.assert_allclose(got @ atoms, (probs * places.clamp(-3, 2)).sum(-1), atol=1e-12)  # the mean survives
    assert got[2, -1] == pytest.approx(1.0) and got[3, 0] == pytest.approx(1.0)


# --- the chain and its entropy bound ---


def two_kernels(kind, n, steps, size, stretch=1.0, power=1.0):
    """Step n of a chain, from its definition: x_n, u -> distribution of x_{n+1}, and x_{n+1} -> that on the way back.

    DDPM: x_K ~ N(u, size^2) is pushed back by the noising kernels to x_{n+1}; conditioned on x_n that is the step, in
    terms of precisions. DIME: both kernels have the variance 2 eta, with eta = size schedule."""
    if kind == "dime":
        eta = stretch * size * (0.999 * math.cos(math.pi / 2 * (0.008 + n / steps) / 1.008) ** 2 + 0.001)
        std = (2 * eta) ** 0.5
        return lambda x, u: Normal(x + eta * (u - x / 2.5**2), std), lambda x: Normal(x - eta * x / 2.5**2, std)
    signal = [math.cos(0.97 * math.pi / 2 * (1 - k / steps) ** power) for k in range(steps + 1)]
    backs = [before / after for before, after in zip(signal, signal[1:])]
    share, var = 1.0, size**2  # of what comes next: its mean is share * u
    for back in reversed(backs[n + 1 :]):
        share, var = back * share, back**2 * var + 2.5**2 * (1 - back**2)
    back, wide = backs[n], 2.5**2 * (1 - backs[n] ** 2)
    precision = 1 / var + back**2 / wide
    step = lambda x, u: Normal((share * u / var + back * x / wide) / precision, precision**-0.5)
    return step, lambda x: Normal(back * x, wide**0.5)


def network(policy, agent, obs, index):
    """The function u of one agent, from x [B, A] without padding, by matrix products, in the given step of training."""
    part = {name: p[agent] for name, p in policy.named_parameters()}
    linear = lambda name, x: x @ part[f"{name}.weight"][: x.shape[-1]] + part[f"{name}.bias"]

    def u(x):
        h = F.gelu(linear("in_x", x) + linear("in_obs", obs) + part["in_step"][index])
        return linear("out", F.gelu(linear("hidden2", F.gelu(linear("hidden1", h)))))[:, : x.shape[-1]]

    return u


def size_of(policy, agent, a):
    """What `two_kernels` calls size, of each of an agent's actions."""
    part = {name: p[agent].detach()[..., :a] for name, p in policy.named_parameters()}
    if policy.dime:
        return F.softplus(part["rho_dt"]) / F.softplus(part["rho_friction"])
    return (5 * part["log_s"]).exp()


def log_det(x):
    """log(1 - tanh(x)^2), also where the square is 1 but for rounding."""
    return 2 * (math.log(2) - x - F.softplus(-2 * x))


@pytest.mark.parametrize("steps, power", [(4, 1.0), (2, 1.0), (7, 1.0), (4, 1.5), (2, 1.5)])
@pytest.mark.parametrize("kind", CHAINS)
def test_path_cost_equals_the_two_kernels_written_out(kind, steps, power):
    """C against log densities from torch.distributions, step by step, for each agent of an unequal team. Trained with 4
    steps: with 2 each is twice as long, and the network is told of steps 0 and 2."""
    policy = make_policy(kind, steps=steps, time_power=power).double()
    obs, noise = normal(6, 3, 5).double() * masks(OBS_SIZES), policy.noise(6).double()
    with torch.no_grad():
        action, path_cost = policy(obs, noise)
        for agent, (o, a) in enumerate(zip(OBS_SIZES, ACTION_SIZES)):
            x, size = 2.5 * noise[0, :, agent, :a], size_of(policy, agent, a)
            cost = Normal(0.0, 2.5).log_prob(x).sum(-1)
            for n in range(steps):
                there, back = two_kernels(kind, n, steps, size, 4 / steps, power)
                there = there(x, network(policy, agent, obs[:, agent, :o], n * 4 // steps)(x))
                after = there.mean + there.stddev * noise[n + 1, :, agent, :a]
                cost += (there.log_prob(after) - back(after).log_prob(x)).sum(-1)
                x = after
            cost -= log_det(x).sum(-1)
            np.testing.assert_allclose(action[:, agent, :a], torch.tanh(x), atol=1e-6)
            np.testing.assert_allclose(path_cost[:, agent], cost, rtol=1e-4, atol=1e-4)


FAR = 1e4  # on that side of the GELU it is the identity


def written_chain(kind, steps, size, trained_with=0):
    """A policy of one agent with one action and zeros for all else but `size`, whose two later layers hand on their
    inputs, shifted: u(x) = out of in_x + in_obs after one GELU."""
    policy = make_policy(kind, [1], [1], steps, denoising_steps=trained_with or steps).double()
    for p in policy.parameters():
        p.data.zero_()
    if policy.dime:
        policy.rho_dt.data.fill_(math.log(math.expm1(size)))
        policy.rho_friction.data.fill_(math.log(math.expm1(1.0)))
    else:
        policy.log_s.data.fill_(math.log(size) / 5)
    for layer in (policy.hidden1, policy.hidden2):
        layer.weight.data.copy_(torch.eye(8))
    policy.hidden1.bias.data.fill_(FAR)
    return policy


def linear_chain(kind, slope, offset, steps, size, trained_with=0):
    """That with u(x) = slope x + offset, exactly: the chain is then Gaussian."""
    policy = written_chain(kind, steps, size, trained_with)
    policy.in_x.weight.data[0, 0, 0] = 1.0
    policy.in_obs.bias.data[0, 0, 0] = FAR
    policy.out.weight.data[0, 0, 0] = slope
    policy.out.bias.data.fill_(offset - 2 * slope * FAR)
    return policy


def bound_and_entropy(kind, slope, offset, steps, size, samples=50_000):
    """The bound -E[C], the true entropy from the same samples and the exact Gaussian of x_K, and its mean and std."""
    with torch.no_grad():
        noise = normal(steps + 1, samples, 1, 1).double()
        chain = linear_chain(kind, slope, offset, steps, size)
        action, path_cost = chain(torch.zeros(samples, 1, 1, dtype=torch.float64), noise)
        mean, var = 0.0, 2.5**2
        for n in range(steps):
            step = lambda x: two_kernels(kind, n, steps, torch.tensor(size).double())[0](x, slope * x + offset)
            factor = step(1.0).mean - step(0.0).mean
            mean, var = step(mean).mean, factor**2 * var + step(0.0).variance
        x = torch.atanh(action.flatten().clamp(-1 + 1e-15, 1 - 1e-15))
        # By the median and quartiles, because an action very near 1 does not tell its x.
        quartiles = Normal(mean, var.sqrt()).icdf(torch.tensor([0.25, 0.5, 0.75]).double())
        inside = quartiles.abs() < 15
        found = x.quantile(torch.tensor([0.25, 0.5, 0.75]).double())
        assert (found - quartiles)[inside].abs().max() < 0.03 * max(1, var.sqrt()) and inside.any()
        entropy = 0.5 * math.log(2 * math.pi * math.e * var) + log_det(x).mean().item()
    return -path_cost.mean().item(), entropy, mean.item(), var.sqrt().item()


@pytest.mark.parametrize("slope, offset", [(0.0, 0.0), (-0.5, 0.0), (-2.0, 1.0), (-4.0, -2.0), (0.1, 0.5), (0.9, 0.2)])
@pytest.mark.parametrize("steps", [1, 4, 8])
@pytest.mark.parametrize("kind, size", [("diffusion", 0.2), ("diffusion", 1.0), ("dime", 0.1), ("dime", 0.5)])
def test_bound_is_never_above_the_true_entropy(kind, slope, offset, steps, size):
    bound, entropy, *_ = bound_and_entropy(kind, slope, offset, steps, size)
    assert bound <= entropy + 0.02  # Monte-Carlo error of the difference


def squashed_entropy(mean, std):
    """Of tanh(N(mean, std^2)), by quadrature."""
    grid = torch.linspace(-9, 9, 2001, dtype=torch.float64)
    mass = torch.exp(Normal(0.0, 1.0).log_prob(grid)) * (grid[1] - grid[0])
    return Normal(0.0, std).entropy().item() + (mass * log_det(mean + std * grid)).sum().item()


@pytest.mark.parametrize("u, s", [(0.0, 0.2), (0.7, 0.5), (-1.5, 0.05), (0.3, 2.0)])
@pytest.mark.parametrize("steps", [1, 4, 8])
def test_bound_of_ddpm_is_tight_where_it_predicts_one_gaussian(u, s, steps):
    bound, entropy, mean, std = bound_and_entropy("diffusion", 0.0, u, steps, s)
    assert bound == pytest.approx(squashed_entropy(u, s), abs=0.02)
    assert entropy == pytest.approx(squashed_entropy(u, s), abs=0.02)
    assert (mean, std) == pytest.approx((u, s), abs=0.01)


@pytest.mark.parametrize("slope, offset", [(-4.0, 0.0), (-2.0, 2.0), (-0.5, -2.5)])
@pytest.mark.parametrize("steps", [4, 8])
def test_bound_of_dime_is_not_tight_for_a_gaussian_for_which_that_of_ddpm_is(slope, offset, steps):
    bound, entropy, mean, std = bound_and_entropy("dime", slope, offset, steps, 0.3)
    assert entropy == pytest.approx(squashed_entropy(mean, std), abs=0.05)  # of wide Gaussians, by samples
    assert bound_and_entropy("diffusion", 0.0, mean, steps, std)[0] == pytest.approx(entropy, abs=0.02)
    assert bound < entropy - 0.1


def test_bound_of_dime_is_tight_for_the_equilibrium_gaussian():
    bound, entropy, *_ = bound_and_entropy("dime", 0.0, 0.0, steps=64, size=0.002, samples=20_000)
    assert bound == pytest.approx(entropy, abs=0.02)


@pytest.mark.parametrize("steps", [2, 3])
@pytest.mark.parametrize("kind", CHAINS)
def test_bound_of_a_curved_chain_against_numerical_integration(kind, steps):
    """With a u that is -1.5 on the left and 1.5 on the right: the density of x_K is that of x_0, pushed through the
    steps on a grid. Its entropy is above the bound, whose every term is an integral over two neighbours; the policy's
    own samples have both."""
    policy = written_chain(kind, steps, 0.4)
    policy.in_x.weight.data[0, 0, :2] = 2.0  # u is the difference of two GELUs, one a little to the right of the other
    policy.in_obs.bias.data[0, 0, :2] = torch.tensor([1.0, -1.0])
    policy.in_step.data[0, 1:, :2] = 0.3  # and is another in each step
    policy.out.weight.data[0, :2, 0] = torch.tensor([1.5, -1.5])
    policy.out.bias.data.fill_(-1.5)
    grid = torch.linspace(-15, 15, 1501, dtype=torch.float64)
    width = grid[1] - grid[0]
    integral = lambda values: (values.sum() * width ** values.dim()).item()
    with torch.no_grad():
        size, obs = size_of(policy, 0, 1), torch.zeros(1, 1).double()
        density = Normal(0.0, 2.5).log_prob(grid).exp()  # of x_0
        cost = integral(density * density.log())
        for n in range(steps):
            there, back = two_kernels(kind, n, steps, size)
            u = network(policy, 0, obs, n)(grid[:, None])
            log_there, log_back = (
                there(grid[:, None], u).log_prob(grid),
                back(grid).log_prob(grid[:, None]),
            )  # x_n, next
            both = density[:, None] * log_there.exp()
            cost += integral(both * (log_there - log_back))
            density = both.sum(0) * width
        assert integral(density) == pytest.approx(1.0, abs=1e-6)  # the grid is fine and wide enough
        cost -= integral(density * log_det(grid))
        entropy = integral(density * (log_det(grid) - density.clamp(min=1e-300).log()))
        action, path_cost = policy(obs.expand(200_000, 1, 1), normal(steps + 1, 200_000, 1, 1).double())
    assert path_cost.mean().item() == pytest.approx(cost, abs=0.02)
    assert -cost <= entropy and -cost < entropy - 0.02  # and not equal: nothing is tight here
    places = torch.tensor([-1.0, -0.3, 0.0, 0.3, 1.0]).double()  # of x_K
    below = torch.stack([(action < place.tanh()).double().mean() for place in places])
    exact = (
        torch.stack([(density * (grid < place)).sum() + density[grid == place].sum() / 2 for place in places]) * width
    )
    np.testing.assert_allclose(below, exact, atol=0.01)
    ends = network(policy, 0, obs, 0)(torch.tensor([[-9.0], [-0.5], [0.5], [9.0]]).double()).flatten()
    np.testing.assert_allclose(ends.detach()[[0, 3]], [-1.5, 1.5], atol=1e-6)
    assert ends[2] - ends[1] > 0.9 and density[len(grid) // 2] < 0.9 * density.max()  # two modes


@pytest.mark.parametrize("kind, cost", [("dime", 0.518), ("diffusion", 0.229)])
def test_path_cost_of_the_untrained_chain(kind, cost):
    """Nearly u = 0 at the start: 2.853 - 2.335 of DIME's chain, by Monte-Carlo; DDPM's is tanh(N(0, 0.2^2))."""
    torch.manual_seed(0)
    policy = POLICIES[kind]([1], [2], make_args(policy=kind, denoising_steps=8))
    with torch.no_grad():
        action, path_cost = policy(torch.zeros(200_000, 1, 1), policy.noise(200_000))
    assert path_cost.mean().item() == pytest.approx(2 * cost, abs=0.03)
    if kind == "diffusion":
        assert torch.atanh(action.clamp(-0.999, 0.999)).std().item() == pytest.approx(0.2, abs=0.01)


def test_gaussian_cost_is_the_exact_log_density():
    """Of tanh(N(mean, std^2)), whose mean and std are read off without noise and with a little."""
    policy = make_policy("gaussian").double()
    obs = normal(7, 3, 5).double() * masks(OBS_SIZES)
    with torch.no_grad():
        ask = lambda noise: policy(obs, torch.as_tensor(noise).double().expand(1, 7, 3, 3))
        mean, little = torch.atanh(ask(0.0)[0]), torch.atanh(ask(1e-3)[0])
        noise = normal(1, 7, 3, 3, seed=1).double()
        action, path_cost = ask(noise)
        for agent, a in enumerate(ACTION_SIZES):
            law = Normal(mean[:, agent, :a], 1e3 * (little - mean)[:, agent, :a])
            x = law.mean + law.stddev * noise[0, :, agent, :a]
            np.testing.assert_allclose(action[:, agent, :a], torch.tanh(x), atol=1e-6)
            np.testing.assert_allclose(path_cost[:, agent], (law.log_prob(x) - log_det(x)).sum(-1), atol=1e-5)
        assert 0.02 < law.stddev.min() and law.mean.std() > 0.1  # of some width, and not the same for all


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 16])
def test_ddpm_with_any_number_of_steps_samples_the_same_distribution(steps):
    """Exactly, where u is constant: the end is then linear in the noise, whose part in it is read off one by one. It is
    what x_K ~ N(u, s^2) is if x_0 ~ N(0, 2.5^2) was seen: the noise of the whole way is one kernel."""
    u, s, first = 0.6, 0.4, math.cos(0.97 * math.pi / 2)
    policy = linear_chain("diffusion", 0.0, u, steps, s, trained_with=8)
    noise = torch.cat([torch.zeros(1, steps + 1), 0.1 * torch.eye(steps + 1)]).double()  # [1 + K + 1, K + 1]
    with torch.no_grad():
        action = policy(torch.zeros(len(noise), 1, 1).double(), noise.T[:, :, None, None])[0]
    mean, *moved = torch.atanh(action.flatten())
    precision = 1 / s**2 + first**2 / (2.5**2 * (1 - first**2))
    weight = first / (2.5**2 * (1 - first**2)) / precision  # of x_0
    assert mean.item() == pytest.approx(u / s**2 / precision, abs=1e-6)
    var = sum(((x - mean).item() / 0.1) ** 2 for x in moved)
    assert var == pytest.approx(1 / precision + weight**2 * 2.5**2, abs=1e-6)
    assert (mean.item(), var) == pytest.approx((u, s**2), abs=0.002)


def test_dime_with_fewer_steps_samples_nearly_the_same_distribution():
    """A chain with a linear score, trained with 200 steps, ends in nearly the same Gaussian with 50; not so if the time
    that it walks were another."""
    ends = []
    for steps, dt in ((200, 0.02), (50, 0.02), (50, 0.005)):
        policy = linear_chain("dime", -1.0, 1.0, steps, dt, trained_with=200)
        with torch.no_grad():
            action = policy(torch.zeros(20_000, 1, 1).double(), normal(steps + 1, 20_000, 1, 1).double())[0]
            x = torch.atanh(action.flatten().clamp(-1 + 1e-12, 1 - 1e-12))
        ends.append((x.mean().item(), x.std().item()))
    assert ends[1] == pytest.approx(ends[0], abs=0.06) != ends[2], ends
    assert (
        ends[0][0] > 0.5 and ends[0][1] < 1.5
    )  # it has gone somewhere: it started from mean 0, standard deviation 2.5


@pytest.mark.parametrize("kind", POLICIES)
def test_acting_without_the_last_noise(kind):
    """Then an action is the mean of the last step. With the same random numbers, the usual one is that and this step's
    own noise, from the start of the learning to its end the only difference."""
    policy, obs, _ = policy_with_inputs(kind)
    actions, alone = [], masks(ACTION_SIZES)
    for last_noise in (True, False):
        torch.manual_seed(3)
        actions.append(torch.from_numpy(make_act(policy, make_args(last_noise=last_noise))(obs.numpy())))
    torch.manual_seed(3)
    noise = policy.noise(7)
    assert torch.equal(actions[0], policy(obs, noise)[0].detach())
    usual, mean = (torch.atanh(action.double()) for action in actions)
    step = (usual - mean)[:, alone] / noise[-1][:, alone]
    if kind in CHAINS:
        sizes = [size_of(policy, agent, a).flatten() for agent, a in enumerate(ACTION_SIZES)]
        std = torch.cat([two_kernels(kind, 3, 4, size)[0](0.0, 0.0).stddev.expand(len(size)) for size in sizes])
        clear = (actions[0].abs() < 0.99)[:, alone] & (actions[1].abs() < 0.99)[:, alone]
        close = (step / std - 1).abs() < 1e-2
        assert close[clear].all() and clear.any(0).all()
    else:
        torch.manual_seed(4)  # nothing is left to chance
        assert np.array_equal(make_act(policy, make_args(last_noise=False))(obs.numpy()), actions[1].numpy())
        assert (step > 0).all()


# --- gradients, decentralisation, batching ---


@pytest.mark.parametrize("kind", POLICIES)
def test_gradients_through_the_whole_chain(kind):
    """The policy loss's gradient for every parameter of every agent against finite differences, in double precision."""
    learner = three_agents(kind).double()
    policy, batch = learner.policy, dict(obs=normal(5, 3, 5).double(), state=normal(5, 4, seed=1).double())
    noise = policy.noise(5).double()
    loss = lambda: learner.policy_loss(batch, noise)[0]
    loss().backward()
    for name, p in policy.named_parameters():
        for agent in range(3):
            direction = torch.zeros_like(p)
            direction[agent] = torch.randn_like(p[agent])
            with torch.no_grad():
                h = 1e-6
                p += h * direction
                up = loss()
                p -= 2 * h * direction
                slope = (up - loss()) / (2 * h)
                p += h * direction
            assert (p.grad * direction).sum().item() == pytest.approx(slope.item(), rel=1e-5, abs=1e-7), (name, agent)
            assert p.grad[agent].any(), f"no gradient reaches {name} of agent {agent}"


@pytest.mark.parametrize("kind", POLICIES)
def test_another_agents_observation_cannot_change_my_action(kind):
    policy, obs, noise = policy_with_inputs(kind)
    with torch.no_grad():
        before = policy(obs, noise)
        for other in range(3):
            changed = obs.clone()
            changed[:, other] += 1.0
            after = policy(changed, noise)
            for mine in range(3):
                same = all(torch.equal(x[:, mine], y[:, mine]) for x, y in zip(before, after))
                assert same == (mine != other)


def single_agent(kind, policy, agent):
    """Agent `agent` of `policy` as a policy of its own, without padding."""
    o, a, full = OBS_SIZES[agent], ACTION_SIZES[agent], max(ACTION_SIZES)
    alone = POLICIES[kind]([o], [a], make_args(policy=kind, denoising_steps=4))
    own = dict(alone.named_parameters())
    for name, p in policy.named_parameters():
        value = p[agent : agent + 1]
        if name == "out.weight" or name == "out.bias":
            value = torch.cat(
                [part[..., :a] for part in value.split(full, -1)], -1
            )  # mean and log std for the Gaussian
        own[name].data.copy_(value[tuple(slice(0, n) for n in own[name].shape)])
    return alone


@pytest.mark.parametrize("kind", POLICIES)
def test_batched_agents_equal_separate_networks(kind):
    policy, obs, noise = policy_with_inputs(kind)
    with torch.no_grad():
        together = policy(obs, noise)
        for agent, (o, a) in enumerate(zip(OBS_SIZES, ACTION_SIZES)):
            alone = single_agent(kind, policy, agent)(obs[:, agent : agent + 1, :o], noise[..., agent : agent + 1, :a])
            np.testing.assert_allclose(together[0][:, agent, :a], alone[0][:, 0], atol=1e-5)
            np.testing.assert_allclose(together[1][:, agent], alone[1][:, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", POLICIES)
def test_padding_never_leaks(kind):
    """Padded actions are exactly zero, which is what the critics rely on, and the rest does not see the padding."""
    policy, obs, noise = policy_with_inputs(kind)
    results = [policy(obs, numbers) for numbers in (noise, noise + 1e3 * ~masks(ACTION_SIZES))]
    for clean, dirty in zip(*results):
        assert torch.equal(clean, dirty)
    action, path_cost = results[0]
    assert not action[:, ~masks(ACTION_SIZES)].any()
    (action.sum() + path_cost.sum()).backward()
    for agent, (o, a) in enumerate(zip(OBS_SIZES, ACTION_SIZES)):
        assert not policy.in_obs.weight.grad[agent, o:].any() and policy.in_obs.weight.grad[agent, :o].any()
        out = policy.out.bias.grad[agent, 0]
        assert not out[a:3].any() and out[:a].all()


# --- critic ---


@pytest.mark.parametrize("tau, lower_critic", [(0.0, False), (0.005, False), (0.0, True)])
def test_critic_loss_equals_the_equation(tau, lower_critic):
    """The whole critic loss written out with loops, truncation (bootstraps) and termination (does not) mixed."""
    env, agent = env_and_agent(tau=tau, alpha=0.3, bn_warmup=10, random_critics=True, lower_critic=lower_critic)
    batch, noise = random_batch(env), agent.policy.noise(16)
    batch["terminated"][::3] = 1.0
    loss, logs = agent.critic_loss(batch, noise)
    with torch.no_grad():
        next_action, path_cost = agent.policy(batch["next_obs"], noise)
        critic = agent.critic.train()
        if tau:
            logits, after = critic(batch["state"], batch["action"]), agent.slow_critic(batch["next_state"], next_action)
        else:
            both = critic(torch.cat([batch["state"], batch["next_state"]]), torch.cat([batch["action"], next_action]))
            logits, after = both[:, :16], both[:, 16:]
        atoms, want, at_ends = np.linspace(-5, 5, 21), 0.0, 0.0
        cost = path_cost.sum(1).numpy()
        for k in range(2):
            probs = torch.softmax(logits[k], -1).double().numpy()
            for b in range(16):
                alive = 1 - batch["terminated"][b].item()
                places = batch["reward"][b].item() + 0.9 * alive * (atoms - 0.3 * cost[b])
                masses = [torch.softmax(after[j, b], -1).double().numpy() for j in range(2)]
                masses = [min(masses, key=lambda mass: mass @ atoms)] if lower_critic else masses
                goal = sum(brute_force_projection([mass], [places], atoms)[0] for mass in masses) / len(masses)
                want += (-(goal * np.log(probs[b])).sum() + 0.005 * (probs[b] * np.log(probs[b])).sum()) / 16
                at_ends += (goal[0] + goal[-1]) / 32  # of both critics the same target
        value = torch.softmax(logits, -1) @ critic.atoms
    assert loss.item() == pytest.approx(want, rel=1e-4) == logs["losses/critic"].item()
    assert 0 < logs["diag/target_mass_at_ends"].item() == pytest.approx(at_ends, rel=1e-4)
    assert logs["diag/value"].item() == pytest.approx(value.mean().item(), rel=1e-4)
    assert logs["diag/critic_disagreement"].item() == pytest.approx((value[0] - value[1]).abs().mean().item(), rel=1e-4)
    assert not any(value.requires_grad for value in logs.values())  # or every update's graph would stay in memory


def test_termination_does_not_bootstrap_and_truncation_does():
    env, agent = env_and_agent(tau=0.005, alpha=0.3)
    noise = agent.policy.noise(16)

    def loss(terminated, shift):
        batch = random_batch(env)
        batch["terminated"][:] = terminated
        batch["next_state"], batch["next_obs"] = batch["next_state"] + shift, batch["next_obs"] + shift
        return agent.critic_loss(batch, noise)[0].item()

    assert loss(1.0, 0.0) == pytest.approx(loss(1.0, 1.0), abs=1e-5)
    assert abs(loss(0.0, 0.0) - loss(0.0, 1.0)) > 1e-3


def test_no_gradient_reaches_the_target(monkeypatch):
    env, agent = env_and_agent()
    targets = []
    monkeypatch.setattr(omad, "project", lambda *given: targets.append(project(*given)) or targets[-1])
    agent.critic_loss(random_batch(env), agent.policy.noise(16))[0].backward()
    assert len(targets) == 1 and not targets[0].requires_grad
    assert all(p.grad is None for p in agent.policy.parameters()) and agent.log_alpha.grad is None
    assert all(p.grad.abs().sum() > 0 for p in agent.critic.parameters())


def test_batch_renorm():
    """Features that both limits of r and of d cut, and one that they leave."""
    x = torch.tensor([9.0, 2.0, -9.0, 2.0]) + torch.tensor([12.0, 3.0, 1.0, 0.1]) * normal(2, 512, 4)
    norm = BatchRenorm(2, 4, warmup=2)
    norm.scale.data.uniform_(0.5, 2), norm.shift.data.uniform_(-1, 1)
    flat = lambda p: p.reshape(8)
    mean, var, limits = torch.zeros(8), torch.ones(8), set()
    for call in range(4):
        batch = x + call
        columns = batch.transpose(0, 1).reshape(512, 8)  # every network's every feature is a channel of its own
        m, s = columns.mean(0), (columns.var(0, correction=0) + 1e-3).sqrt()
        r = d = None
        if call < 2:
            want = F.batch_norm(columns, None, None, flat(norm.scale), flat(norm.shift), training=True, eps=1e-3)
        else:
            running = (var + 1e-3).sqrt()
            r, d = (s / running).clamp(1 / 3, 3), ((m - mean) / running).clamp(-5, 5)
            limits |= {round(value, 3) for value in [*r.tolist(), *d.tolist()]} & {3, 0.333, 5, -5}
            want = ((columns - m) / s * r + d) * flat(norm.scale) + flat(norm.shift)
        np.testing.assert_allclose(norm(batch).detach().transpose(0, 1).reshape(512, 8), want.detach(), atol=1e-4)
        mean, var = 0.99 * mean + 0.01 * m, 0.99 * var + 0.01 * columns.var(0, correction=0)
    assert limits == {3, 0.333, 5, -5}
    np.testing.assert_allclose(flat(norm.mean), mean, rtol=1e-4)
    columns = x.transpose(0, 1).reshape(512, 8)
    want = F.batch_norm(columns, mean, var, flat(norm.scale), flat(norm.shift), training=False, eps=1e-3)
    np.testing.assert_allclose(norm.eval()(x).detach().transpose(0, 1).reshape(512, 8), want.detach(), atol=1e-4)


def test_renormalisation_corrections_carry_no_gradient():
    """The gradient past the warm-up is batch norm's times r: r and d are constants."""
    norm = BatchRenorm(1, 1, warmup=0)
    norm.mean.fill_(0.5), norm.var.fill_(2.0)
    x, weight = normal(1, 8, 1).requires_grad_(), normal(1, 8, 1, seed=1)
    (norm(x) * weight).sum().backward()
    plain = x.detach().clone().requires_grad_()
    s = (plain.var(1, correction=0) + 1e-3).sqrt()
    r = (s / math.sqrt(2.001)).clamp(1 / 3, 3).detach()
    ((plain - plain.mean(1)) / s * r * weight).sum().backward()
    np.testing.assert_allclose(x.grad, plain.grad, atol=1e-5)


def test_target_network_is_a_slow_average():
    env, agent = env_and_agent(tau=0.25)
    before = {name: value.clone() for name, value in agent.slow_critic.state_dict().items()}
    agent.update(random_batch(env), agent.policy.noise(16))
    for name, fast in agent.critic.state_dict().items():
        want = 0.75 * before[name] + 0.25 * fast if fast.is_floating_point() else fast
        torch.testing.assert_close(agent.slow_critic.state_dict()[name], want)
    assert not torch.equal(agent.slow_critic.state_dict()["norm1.mean"], before["norm1.mean"])  # statistics too


def test_untrained_critics_say_the_same_everywhere():
    """Every mass alike, so the value is the middle of the support; and that is left after some updates."""
    env, _ = env_and_agent()
    agent, batch = OMAD(env, make_args(v_min=-3.0, v_max=7.0, q_lr=1e-2), torch.device("cpu")), random_batch(env)
    masses = lambda: torch.softmax(agent.critic.eval()(batch["state"], batch["action"]), -1)
    np.testing.assert_allclose(masses().detach(), 1 / 21, rtol=1e-6)
    np.testing.assert_allclose((masses() @ agent.critic.atoms).detach(), 2.0, atol=1e-6)
    assert agent.critic.layer1.weight.std() > 0 and not torch.equal(*agent.critic.layer1.weight)  # only the last is 0
    start = {name: p.clone() for name, p in agent.critic.named_parameters()}
    for _ in range(3):
        agent.update(batch, agent.policy.noise(16))
    assert not any(torch.equal(p, start[name]) for name, p in agent.critic.named_parameters())
    assert (masses() @ agent.critic.atoms).std() > 1e-3
    agent = OMAD(env, make_args(random_critics=True), torch.device("cpu"))
    assert agent.critic.out.weight.std().item() == pytest.approx(8**-0.5, rel=0.1)


# --- policies, temperature and updates ---


@pytest.mark.parametrize("kind", POLICIES)
def test_policy_loss_equals_the_equation(kind):
    """E[-mean_k E[Z_k] + alpha sum_i C_i] written out with loops; the temperature gets E[sum_i C_i]."""
    agent = three_agents(kind)
    batch, noise = dict(obs=normal(6, 3, 5), state=normal(6, 4, seed=1)), agent.policy.noise(6)
    loss, logs, mean_cost = agent.policy_loss(batch, noise)
    with torch.no_grad():
        action, path_cost = agent.policy(batch["obs"], noise)
        probs = torch.softmax(agent.critic.eval()(batch["state"], action), -1)
        atoms, want = np.linspace(-5, 5, 21), 0.0
        for b in range(6):
            value = sum(float((probs[k, b].numpy() * atoms).sum()) for k in range(2)) / 2
            cost = sum(path_cost[b, i].item() for i in range(3))
            want += (0.7 * cost - value) / 6
    assert loss.item() == pytest.approx(want, rel=1e-4) == logs["losses/policy"].item()
    assert logs["diag/entropy_bound"].item() == pytest.approx(-path_cost.sum(1).mean().item(), rel=1e-5)
    assert mean_cost.item() == pytest.approx(path_cost.sum(1).mean().item(), rel=1e-5)
    assert logs["diag/action_saturation"].item() == pytest.approx(np.mean(np.abs(action.numpy()) > 0.99))
    assert not mean_cost.requires_grad and not any(value.requires_grad for value in logs.values())


def test_optimisers():
    env, agent = env_and_agent(policy_lr=1e-3, q_lr=2e-3, alpha_lr=3e-3)
    settings = [(adam.param_groups[0]["lr"], adam.param_groups[0]["betas"][0]) for adam in agent.adams]
    assert settings == [(1e-3, 0.5), (2e-3, 0.5), (3e-3, 0.9)]
    logs = agent.update(random_batch(env), agent.policy.noise(16), agent.policy.noise(16))
    assert not any(value.requires_grad for value in logs.values())
    env, agent = env_and_agent(alpha=1e6)
    agent.update(random_batch(env), agent.policy.noise(16), agent.policy.noise(16))
    assert max(p.grad.abs().max() for p in agent.policy.parameters()) == 1.0  # clipped, element by element


@pytest.mark.parametrize("scale, direction", [(100.0, -1), (-100.0, 1)])
def test_alpha_moves_the_right_way(scale, direction):
    """A path cost below its target means more noise than asked for: alpha falls. Above: it rises."""
    env, agent = env_and_agent(target_entropy_scale=scale)
    before = agent.log_alpha.item()
    agent.update(random_batch(env), agent.policy.noise(16), agent.policy.noise(16))
    assert (agent.log_alpha.item() - before) * direction > 0


@pytest.mark.parametrize("kind", POLICIES)
def test_the_temperature_target_counts_real_dimensions_and_starts_from_the_noise(kind):
    """For each of speaker's 3 and listener's 2, whatever the policies: 4, less the entropy of x_0, as x_0's density is
    a part of C. The gradient of log alpha is alpha (target - mean)."""
    env, agent = env_and_agent(policy=kind, alpha=2.0)
    target = 5 * (4 - Normal(0.0, 2.5).entropy().item())
    loss, logs = agent.temperature_loss(torch.tensor(target + 0.5))
    loss.backward()
    assert agent.log_alpha.grad.item() == pytest.approx(-2.0 * 0.5, abs=1e-5) == loss.item()
    assert logs["diag/alpha"].item() == pytest.approx(2.0)


def test_fixed_temperature_stays():
    env, agent = env_and_agent(alpha_lr=0.0, alpha=0.2)
    agent.update(random_batch(env), agent.policy.noise(16), agent.policy.noise(16))
    assert agent.log_alpha.exp().item() == pytest.approx(0.2)


@pytest.mark.parametrize("policy", POLICIES)
def test_an_update_changes_what_it_should(policy):
    """Of critics alone, and with the policies': these see the critics' new state, and leave it as it is."""
    env, agent = env_and_agent(policy=policy)
    copy = lambda module: {name: value.clone() for name, value in module.state_dict().items()}
    batch, noise = random_batch(env), agent.policy.noise(16)
    start = copy(agent)
    agent.update(batch, noise)
    alone = copy(agent)
    for name, value in alone.items():
        moves = name.startswith("critic.")
        assert moves != torch.equal(value, start[name]), name
    _, agent = env_and_agent(policy=policy)
    logs = agent.update(batch, noise, agent.policy.noise(16))
    for name, value in agent.state_dict().items():
        if name.startswith("critic."):  # statistics too
            assert torch.equal(value, alone[name]), name
        elif name.startswith("policy."):  # every agent moves in the one step
            assert (value != start[name]).flatten(1).any(1).all(), name
    assert agent.log_alpha != start["log_alpha"]
    assert {"losses/critic", "losses/policy", "losses/temperature"} <= set(logs)


def test_updates_are_steps_of_the_critics_and_then_of_policies_and_temperature():
    """Six, the policies' in every third: each from a gradient of its own, and policies see the critics' new state."""
    (env, agent), (_, other) = (env_and_agent(alpha=0.3) for _ in range(2))
    whole, start = random_batch(env, 96), agent.policy.out.weight.clone()

    def step(adam, loss, limit=math.inf):
        parameters = adam.param_groups[0]["params"]
        for p, grad in zip(parameters, torch.autograd.grad(loss, parameters)):
            p.grad = grad.clamp(-limit, limit)
        adam.step()

    for number in range(6):
        batch = {name: x[16 * number : 16 * number + 16] for name, x in whole.items()}
        noises = [agent.policy.noise(16) for _ in range(1 + (number % 3 == 2))]
        agent.update(batch, *noises)
        step(other.critic_adam, other.critic_loss(batch, noises[0])[0])
        for noise in noises[1:]:
            loss, _, cost = other.policy_loss(batch, noise)
            step(other.policy_adam, loss, 1.0)
            step(other.alpha_adam, other.temperature_loss(cost)[0])
    for (name, value), want in zip(agent.state_dict().items(), other.state_dict().values()):
        torch.testing.assert_close(value, want, rtol=1e-5, atol=1e-6, msg=name)
    assert not torch.equal(agent.policy.out.weight, start) and agent.log_alpha != math.log(0.3)


@pytest.mark.parametrize("kind, x_scale", [*((kind, 1.0) for kind in POLICIES), ("diffusion", 8.0)])
def test_policies_start_as_those_of_dime(kind, x_scale):
    """One first layer over x, o and H embedded steps, whose inputs are all as large; u is nearly 0 at the start."""
    torch.manual_seed(0)
    policy = POLICIES[kind]([300] * 3, [100] * 3, make_args(policy=kind, policy_hidden=200, x_scale=x_scale))
    std = lambda name: dict(policy.named_parameters())[name].std().item()
    inputs = 600 if kind in CHAINS else 300
    wanted = {"in_obs.weight": inputs**-0.5, "hidden1.weight": 200**-0.5, "hidden2.weight": 200**-0.5}
    wanted |= {"out.weight": 1e-3 * 200**-0.5} | ({"in_x.weight": x_scale * inputs**-0.5} if kind in CHAINS else {})
    assert {name: std(name) for name in wanted} == pytest.approx(wanted, rel=0.02)
    assert not any(p.any() for name, p in policy.named_parameters() if name.endswith("bias"))


# --- replay ---


def test_replay_is_a_ring():
    env = make_env("mpe_simple_spread")
    replay = Replay(env, 10, torch.device("cpu"))
    shapes = dict(obs=(3, 18), next_obs=(3, 18), state=(54,), next_state=(54,), action=(3, 2), reward=(), terminated=())
    for start in range(0, 24, 4):
        number = np.arange(start, start + 4, dtype=np.float32)
        new = {name: np.stack([np.full(shape, k) for k in number]) for name, shape in shapes.items()}
        replay.add(**new | {"terminated": number % 2 == 0, "next_obs": new["next_obs"] + 0.5})
        count = min(start + 4, 10)
        batch = replay.sample(torch.arange(count))
        assert sorted(batch["reward"].tolist()) == list(range(max(0, start + 4 - 10), start + 4))
        assert replay.added == start + 4
    number = batch["reward"]
    want = dict.fromkeys(shapes, number) | {"terminated": number % 2 == 0, "next_obs": number + 0.5}
    for name, shape in shapes.items():  # every part of a row is of the same transition
        assert batch[name].shape == (10, *shape) and (batch[name].reshape(10, -1) == want[name][:, None]).all(), name


@pytest.fixture
def kept(monkeypatch):
    """What goes into a replay, step by step: arrays [E, ...] by name."""
    steps, add = [], Replay.add

    def spy(self, **new):
        steps.append({name: np.copy(value) for name, value in new.items()})
        add(self, **new)

    monkeypatch.setattr(Replay, "add", spy)
    return steps


def test_what_is_kept_of_an_episode(tmp_path, kept):
    """True final observations, no terminations, and nothing across the border of two episodes."""
    short = "--total-timesteps 400 --num-envs 4 --eval-every 200 --eval-episodes 1 --learning-starts 399 --device cpu"
    assert main([*short.split(), "--updates-per-step", "0.25", "--run-dir", str(tmp_path)]) == 0
    data = {name: np.stack([new[name] for new in kept]) for name in kept[0]}  # [steps, E, ...]
    assert len(kept) == 100 and not data["terminated"].any()  # this task only ever truncates
    for state, obs in (("state", "obs"), ("next_state", "next_obs")):
        assert np.array_equal(data[state], data[obs].reshape(100, 4, -1))
    follows = (data["next_obs"][:-1] == data["obs"][1:]).all((2, 3))  # [99, E]
    assert [set(np.flatnonzero(~column) + 1) for column in follows.T] == [{25, 50, 75}] * 4
    moved = data["next_obs"] - data["obs"]  # the position after is that before + 0.1 velocity
    np.testing.assert_allclose(moved[..., 2:4], 0.1 * data["obs"][..., :2], atol=1e-5)
    assert np.abs(data["action"]).max() <= 1 and data["action"].std() == pytest.approx(3**-0.5, abs=0.02)  # uniform


def test_copies_go_on_where_they_are_when_others_start_again(tmp_path, kept):
    """Blind doors end at different times in each copy; the joint state says which one of four is open."""
    short = "--env-id doors_blind --total-timesteps 800 --num-envs 4 --eval-every 400 --learning-starts 799"
    short += " --eval-episodes 1 --updates-per-step 0.25 --device cpu --run-dir"
    assert main([*short.split(), str(tmp_path)]) == 0
    state, after, ended = (np.stack([new[name] for new in kept]) for name in ("state", "next_state", "terminated"))
    assert set(ended.sum(1)) >= {0, 1, 2} and (state.sum(2) == 1).all()  # [steps, E], [steps, E, S]
    ended[99] = True  # an evaluation, after which all start again
    same = (state[1:] == after[:-1]).all(2)
    assert same[~ended[:-1]].all() and not same[ended[:-1]].all()


def test_padding_in_the_replay_is_zero(tmp_path, kept):
    """Also that of the uniform actions at the start: the critics read padded actions as they are."""
    short = "--total-timesteps 200 --num-envs 2 --eval-every 100 --eval-episodes 1 --learning-starts 100 --device cpu"
    sizes = "--env-id mpe_simple_speaker_listener --updates-per-step 0.5 --policy-hidden 8 --critic-hidden 8"
    assert main([*short.split(), *sizes.split(), "--run-dir", str(tmp_path)]) == 0
    actions = np.stack([new["action"] for new in kept])  # [steps, E, N, A]
    for action in (actions[:50], actions[50:]):  # drawn uniformly, then by the policies
        assert action.shape == (50, 2, 2, 3) and action[:, :, 0].all() and action[:, :, 1, :2].all()
        assert not action[:, :, 1, 2].any()


def test_a_checkpoint_holds_what_is_in_the_replay_and_not_its_empty_rest(tmp_path, monkeypatch):
    """Else every run writes its whole replay from the start: 3 GB for a robot."""

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(OMAD, "update", interrupt)
    short = "--total-timesteps 50000 --num-envs 4 --eval-every 100 --eval-episodes 1 --learning-starts 100 --device cpu"
    sizes = "--updates-per-step 0.25 --policy-hidden 8 --critic-hidden 8"
    assert main([*short.split(), *sizes.split(), "--run-dir", str(tmp_path)]) == 130
    (path,) = tmp_path.glob("*/checkpoint.pt")
    assert load(path)["step"] == 100 and path.stat().st_size < 1_000_000
