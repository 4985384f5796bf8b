"""The method itself: each test fails for a wrong algorithm, not only for a crash."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.envs import make_env
from conftest import load
from omad import OMAD, Args, BatchRenorm, Critic, DiffusionPolicy, GaussianPolicy, Replay, main, project

POLICIES = [DiffusionPolicy, GaussianPolicy]
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
    policy = kind(list(obs), list(action), make_args(**dict(denoising_steps=4) | changes), steps)
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
    name = "diffusion" if kind is DiffusionPolicy else "gaussian"
    agent = OMAD(env, make_args(policy=name, denoising_steps=4, alpha=0.7, **changes), torch.device("cpu"))
    agent.policy.load_state_dict(make_policy(kind).state_dict())
    for p in agent.critic.parameters():
        p.data += torch.randn_like(p)
    return agent


def env_and_agent(**changes):
    env = make_env("mpe_simple_speaker_listener")
    torch.manual_seed(0)
    return env, OMAD(env, make_args(**changes), torch.device("cpu"))


def random_batch(env, size=16):
    torch.manual_seed(1)
    obs, action = (size, *env.obs_mask.shape), (size, *env.action_mask.shape)
    batch = dict(obs=torch.randn(obs), next_obs=torch.randn(obs), action=torch.randn(action).tanh())
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


# --- entropy bound ---


def schedule(steps):
    """Step sizes along a chain of so many steps, relative to dt [DIME]."""
    return [0.999 * math.cos(math.pi / 2 * (0.008 + n / steps) / 1.008) ** 2 + 0.001 for n in range(steps)]


def linear_chain(slope, offset, steps, dt, trained_with=0):
    """A diffusion policy whose score network is u(x) = slope x + offset, exactly: the chain is then Gaussian.

    One hidden unit carries the signal far on the positive side of the GELU, where it is the identity.
    """
    policy = make_policy(DiffusionPolicy, [1], [1], steps, denoising_steps=trained_with or steps).double()
    for p in policy.parameters():
        p.data.zero_()
    shift = 1e4
    policy.in_x.weight.data[0, 0, 0] = 1.0
    policy.in_obs.bias.data[0, 0, 0] = shift
    policy.hidden1.weight.data[0, 0, 0] = policy.hidden2.weight.data[0, 0, 0] = 1.0
    policy.out.weight.data[0, 0, 0] = slope
    policy.out.bias.data[0, 0, 0] = offset - slope * shift
    policy.rho_dt.data.fill_(math.log(math.expm1(dt)))
    policy.rho_friction.data.fill_(math.log(math.expm1(1.0)))
    return policy


def bound_and_entropy(slope, offset, steps=8, dt=0.1, samples=50_000):
    """The bound -E[C] and the true entropy of the action, from the same samples and the exact Gaussian of x_K."""
    policy = linear_chain(slope, offset, steps, dt)
    with torch.no_grad():
        noise = normal(steps + 1, samples, 1, 1).double()
        action, run, term = policy(torch.zeros(samples, 1, 1, dtype=torch.float64), noise)
        mean, var = 0.0, 2.5**2
        for part in schedule(steps):
            eta = dt * part
            factor = 1 + eta * (slope - 1 / 2.5**2)
            mean, var = factor * mean + eta * offset, factor**2 * var + 2 * eta
        x = torch.atanh(action.flatten().clamp(-1 + 1e-15, 1 - 1e-15))
        assert x.median().item() == pytest.approx(mean, abs=0.05 * max(1, abs(mean)))
        log_det = 2 * (math.log(2) - x - F.softplus(-2 * x))
        entropy = 0.5 * math.log(2 * math.pi * math.e * var) + log_det.mean().item()
    return -(run + term).mean().item(), entropy


@pytest.mark.parametrize("slope, offset", [(0.0, 0.0), (-0.5, 0.0), (-2.0, 1.0), (-4.0, -2.0), (0.1, 0.5)])
@pytest.mark.parametrize("steps, dt", [(1, 0.1), (8, 0.1), (8, 0.5)])
def test_bound_is_never_above_the_true_entropy(slope, offset, steps, dt):
    bound, entropy = bound_and_entropy(slope, offset, steps, dt)
    assert bound <= entropy + 0.02  # Monte-Carlo error of the difference


def test_bound_is_tight_for_the_equilibrium_gaussian():
    bound, entropy = bound_and_entropy(0.0, 0.0, steps=64, dt=0.002, samples=20_000)
    assert bound == pytest.approx(entropy, abs=0.02)


def test_path_cost_of_the_untrained_chain():
    """u = 0 at the start values: run = 2.853 d, term = -2.335 d (facts of the method, by Monte-Carlo)."""
    torch.manual_seed(0)
    policy = DiffusionPolicy([1], [2], make_args(denoising_steps=8))
    policy.out.weight.data.zero_()
    with torch.no_grad():
        _, run, term = policy(torch.zeros(200_000, 1, 1), policy.noise(200_000))
    assert run.mean().item() == pytest.approx(2 * 2.853, abs=0.03)
    assert term.mean().item() == pytest.approx(-2 * 2.335, abs=0.02)


@pytest.mark.parametrize("steps", [4, 2, 7])
def test_path_cost_equals_the_two_kernels_written_out(steps):
    """C against log densities from torch.distributions, step by step, for each agent of an unequal team. Trained with 4
    steps: with 2 each is twice as long, and the network is told of steps 0 and 2."""
    policy = make_policy(DiffusionPolicy, steps=steps).double()
    obs, noise = normal(6, 3, 5).double() * masks(OBS_SIZES), policy.noise(6).double()
    with torch.no_grad():
        action, run, term = policy(obs, noise)
        for agent, (o, a) in enumerate(zip(OBS_SIZES, ACTION_SIZES)):
            weights = {name: p[agent] for name, p in policy.named_parameters()}
            linear = lambda name, x: x @ weights[f"{name}.weight"] + weights[f"{name}.bias"]
            x = 2.5 * noise[0, :, agent, :a]
            log_w = -torch.distributions.Normal(0.0, 2.5).log_prob(x).sum(-1)
            for n, part in enumerate(schedule(steps)):
                eta = 4 / steps * F.softplus(weights["rho_dt"]) * part / F.softplus(weights["rho_friction"])[:, :a]
                angle = torch.linspace(0.1, 100.0, 8).double() * n * 4 / steps + weights["phase"]
                time = linear("time2", F.gelu(linear("time1", torch.cat([angle.sin(), angle.cos()], -1))))
                wide = F.pad(x, (0, 3 - a))
                h = (
                    linear("in_x", wide)
                    + linear("in_obs", F.pad(obs[:, agent, :o], (0, 5 - o)))
                    + linear("in_time", time)
                )
                u = linear("out", F.gelu(linear("hidden2", F.gelu(linear("hidden1", F.gelu(h))))))[:, :a]
                mean = x + eta * (-x / 2.5**2 + u)
                after = mean + (2 * eta).sqrt() * noise[n + 1, :, agent, :a]
                back = torch.distributions.Normal(after - eta * after / 2.5**2, (2 * eta).sqrt())
                there = torch.distributions.Normal(mean, (2 * eta).sqrt())
                log_w = log_w + (back.log_prob(x) - there.log_prob(after)).sum(-1)
                x = after
            cost = -log_w - torch.log1p(-(torch.tanh(x) ** 2)).sum(-1)
            np.testing.assert_allclose(action[:, agent, :a], torch.tanh(x), atol=1e-6)
            np.testing.assert_allclose((run + term)[:, agent], cost, rtol=1e-4, atol=1e-4)


def test_gaussian_cost_is_the_exact_log_density():
    policy = make_policy(GaussianPolicy).double()
    with torch.no_grad():
        action, run, term = policy(torch.zeros(200_000, 3, 5).double(), policy.noise(200_000).double())
    # The entropy of a squashed Gaussian by histogram, agent 1 has one dimension.
    density, edges = np.histogram(action[:, 1, 0].numpy(), bins=400, range=(-1, 1), density=True)
    entropy = -np.sum(density * np.log(density + 1e-12)) * (edges[1] - edges[0])
    assert -(run + term)[:, 1].mean().item() == pytest.approx(entropy, abs=0.02)


def test_both_policies_are_asked_for_the_same_entropy():
    noise = normal(2, 100_000, 1, 1)
    diffusion, gaussian = (make_policy(kind, [1], [1], denoising_steps=1) for kind in POLICIES)
    with torch.no_grad():
        _, _, term = diffusion(torch.zeros(100_000, 1, 1), noise)
        _, _, constant = gaussian(torch.zeros(1, 1, 1), noise[0, :1])
    assert term.mean().item() == pytest.approx(constant.item(), abs=0.01)


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
                same = all(torch.equal(x[:, mine], y[:, mine]) for x, y in zip(before[:2], after[:2]))
                assert same == (mine != other)


def single_agent(kind, policy, agent):
    """Agent `agent` of `policy` as a policy of its own, without padding."""
    o, a, full = OBS_SIZES[agent], ACTION_SIZES[agent], max(ACTION_SIZES)
    alone = kind([o], [a], make_args(denoising_steps=4))
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
            np.testing.assert_allclose(together[2][:, agent], alone[2][:, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", POLICIES)
def test_padding_never_leaks(kind):
    policy, obs, noise = policy_with_inputs(kind)
    critic, state = Critic(4, list(ACTION_SIZES), make_args()).eval(), torch.zeros(7, 4)
    results = [policy(obs, numbers) for numbers in (noise, noise + 1e3 * ~masks(ACTION_SIZES))]
    for clean, dirty in zip(*results):
        assert torch.equal(clean, dirty)
    action, run, term = results[0]
    assert not action[:, ~masks(ACTION_SIZES)].any()
    assert torch.equal(critic(state, action), critic(state, action + 1e3 * ~masks(ACTION_SIZES)))
    (action.sum() + run.sum() + term.sum()).backward()
    for agent, (o, a) in enumerate(zip(OBS_SIZES, ACTION_SIZES)):
        assert not policy.in_obs.weight.grad[agent, o:].any() and policy.in_obs.weight.grad[agent, :o].any()
        out = policy.out.bias.grad[agent, 0]
        assert not out[a:3].any() and out[:a].all()


def test_fewer_denoising_steps_sample_nearly_the_same_distribution():
    """A chain with a linear score, trained with 200 steps, ends in nearly the same Gaussian with 50; not so if the time
    that it walks were another."""
    ends = []
    for steps, dt in ((200, 0.02), (50, 0.02), (50, 0.005)):
        policy = linear_chain(-1.0, 1.0, steps, dt, trained_with=200)
        with torch.no_grad():
            action = policy(torch.zeros(20_000, 1, 1).double(), normal(steps + 1, 20_000, 1, 1).double())[0]
            x = torch.atanh(action.flatten().clamp(-1 + 1e-12, 1 - 1e-12))
        ends.append((x.mean().item(), x.std().item()))
    assert ends[1] == pytest.approx(ends[0], abs=0.06) != ends[2], ends
    assert (
        ends[0][0] > 0.5 and ends[0][1] < 1.5
    )  # it has gone somewhere: it started from mean 0, standard deviation 2.5


# --- critic ---


@pytest.mark.parametrize("target_networks", [False, True])
def test_critic_loss_equals_the_equation(target_networks):
    """The whole critic loss written out with loops, truncation (bootstraps) and termination (does not) mixed."""
    env, agent = env_and_agent(target_networks=target_networks, alpha=0.3, bn_warmup=10)
    batch, noise = random_batch(env), agent.policy.noise(16)
    batch["terminated"][::3] = 1.0
    loss, logs = agent.critic_loss(batch, noise)
    with torch.no_grad():
        next_action, run, term = agent.policy(batch["next_obs"], noise)
        critic = agent.critic.train()
        if target_networks:
            logits, after = critic(batch["state"], batch["action"]), agent.slow_critic(batch["next_state"], next_action)
        else:
            both = critic(torch.cat([batch["state"], batch["next_state"]]), torch.cat([batch["action"], next_action]))
            logits, after = both[:, :16], both[:, 16:]
        atoms, want = np.linspace(-5, 5, 21), 0.0
        cost = (run + term).sum(1).numpy()
        for k in range(2):
            probs = torch.softmax(logits[k], -1).double().numpy()
            for b in range(16):
                alive = 1 - batch["terminated"][b].item()
                places = batch["reward"][b].item() + 0.9 * alive * (atoms - 0.3 * cost[b])
                masses = [torch.softmax(after[j, b], -1).double().numpy() for j in range(2)]
                goal = sum(brute_force_projection([mass], [places], atoms)[0] for mass in masses) / 2
                want += (-(goal * np.log(probs[b])).sum() + 0.005 * (probs[b] * np.log(probs[b])).sum()) / 16
    assert loss.item() == pytest.approx(want, rel=1e-4) == logs["losses/critic"].item()
    assert not any(value.requires_grad for value in logs.values())  # or every update's graph would stay in memory


def test_termination_does_not_bootstrap_and_truncation_does():
    env, agent = env_and_agent(target_networks=True, alpha=0.3)
    noise = agent.policy.noise(16)

    def loss(terminated, shift):
        batch = random_batch(env)
        batch["terminated"][:] = terminated
        batch["next_state"], batch["next_obs"] = batch["next_state"] + shift, batch["next_obs"] + shift
        return agent.critic_loss(batch, noise)[0].item()

    assert loss(1.0, 0.0) == pytest.approx(loss(1.0, 1.0), abs=1e-5)
    assert abs(loss(0.0, 0.0) - loss(0.0, 1.0)) > 1e-3


def test_no_gradient_reaches_the_target():
    env, agent = env_and_agent()
    agent.critic_loss(random_batch(env), agent.policy.noise(16))[0].backward()
    assert all(p.grad is None for p in agent.policy.parameters()) and agent.log_alpha.grad is None
    assert all(p.grad.abs().sum() > 0 for p in agent.critic.parameters())


def test_batch_renorm():
    x = 2 + 3 * normal(2, 512, 4)
    norm = BatchRenorm(2, 4, momentum=0.9, warmup=2)
    norm.scale.data.uniform_(0.5, 2), norm.shift.data.uniform_(-1, 1)
    flat = lambda p: p.reshape(8)
    mean, var = torch.zeros(8), torch.ones(8)
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
            want = ((columns - m) / s * r + d) * flat(norm.scale) + flat(norm.shift)
        np.testing.assert_allclose(norm(batch).detach().transpose(0, 1).reshape(512, 8), want.detach(), atol=1e-4)
        mean, var = 0.9 * mean + 0.1 * m, 0.9 * var + 0.1 * columns.var(0, correction=0)
    np.testing.assert_allclose(flat(norm.mean), mean, rtol=1e-4)
    columns = x.transpose(0, 1).reshape(512, 8)
    want = F.batch_norm(columns, mean, var, flat(norm.scale), flat(norm.shift), training=False, eps=1e-3)
    np.testing.assert_allclose(norm.eval()(x).detach().transpose(0, 1).reshape(512, 8), want.detach(), atol=1e-4)


def test_renormalisation_corrections_carry_no_gradient():
    """The gradient past the warm-up is batch norm's times r: r and d are constants."""
    norm = BatchRenorm(1, 1, momentum=0.9, warmup=0)
    norm.mean.fill_(0.5), norm.var.fill_(2.0)
    x, weight = normal(1, 8, 1).requires_grad_(), normal(1, 8, 1, seed=1)
    (norm(x) * weight).sum().backward()
    plain = x.detach().clone().requires_grad_()
    s = (plain.var(1, correction=0) + 1e-3).sqrt()
    r = (s / math.sqrt(2.001)).clamp(1 / 3, 3).detach()
    ((plain - plain.mean(1)) / s * r * weight).sum().backward()
    np.testing.assert_allclose(x.grad, plain.grad, atol=1e-5)


def test_target_network_is_a_slow_average():
    env, agent = env_and_agent(target_networks=True, tau=0.25)
    before = {name: value.clone() for name, value in agent.slow_critic.state_dict().items()}
    agent.update(random_batch(env), agent.policy.noise(16))
    for name, fast in agent.critic.state_dict().items():
        want = 0.75 * before[name] + 0.25 * fast if fast.is_floating_point() else fast
        torch.testing.assert_close(agent.slow_critic.state_dict()[name], want)
    assert not torch.equal(agent.slow_critic.state_dict()["norm1.mean"], before["norm1.mean"])  # statistics too


# --- policies, temperature and updates ---


@pytest.mark.parametrize("kind", POLICIES)
def test_policy_loss_equals_the_equation(kind):
    """E[-mean_k E[Z_k] + alpha sum_i C_i] written out with loops; the temperature gets sum_i run_i, not C."""
    agent = three_agents(kind)
    batch, noise = dict(obs=normal(6, 3, 5), state=normal(6, 4, seed=1)), agent.policy.noise(6)
    loss, logs, run_sum = agent.policy_loss(batch, noise)
    with torch.no_grad():
        action, run, term = agent.policy(batch["obs"], noise)
        probs = torch.softmax(agent.critic.eval()(batch["state"], action), -1)
        atoms, want = np.linspace(-5, 5, 21), 0.0
        for b in range(6):
            value = sum(float((probs[k, b].numpy() * atoms).sum()) for k in range(2)) / 2
            cost = sum(run[b, i].item() + term[b, i].item() for i in range(3))
            want += (0.7 * cost - value) / 6
    assert loss.item() == pytest.approx(want, rel=1e-4) == logs["losses/policy"].item()
    assert logs["diag/entropy_bound"].item() == pytest.approx(-(run + term).sum(1).mean().item(), rel=1e-5)
    np.testing.assert_allclose(run_sum, run.sum(1), rtol=1e-5)
    assert not run_sum.requires_grad and not any(value.requires_grad for value in logs.values())


def test_optimisers():
    env, agent = env_and_agent(policy_lr=1e-3, q_lr=2e-3, alpha_lr=3e-3, adam_beta1=0.6)
    settings = [(adam.param_groups[0]["lr"], adam.param_groups[0]["betas"][0]) for adam in agent.adams]
    assert settings == [(1e-3, 0.6), (2e-3, 0.6), (3e-3, 0.9)]
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


def test_the_temperature_target_counts_real_dimensions_and_the_run_only():
    """4 for each of speaker's 3 and listener's 2; the gradient of log alpha is -alpha (mean - target)."""
    env, agent = env_and_agent(alpha=2.0)
    loss, logs = agent.temperature_loss(torch.tensor([19.0, 22.0]))
    loss.backward()
    assert agent.log_alpha.grad.item() == pytest.approx(-2.0 * 0.5) == loss.item()
    assert (logs["diag/running_cost"].item(), logs["diag/alpha"].item()) == pytest.approx((20.5, 2.0))


def test_fixed_temperature_stays():
    env, agent = env_and_agent(autotune=False, alpha=0.2)
    agent.update(random_batch(env), agent.policy.noise(16), agent.policy.noise(16))
    assert agent.log_alpha.exp().item() == pytest.approx(0.2)


@pytest.mark.parametrize("policy", ["diffusion", "gaussian"])
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


@pytest.mark.parametrize("kind", POLICIES)
def test_initialisation_uses_the_true_number_of_inputs(kind):
    """Not that of the largest agent: the first layer's weights are as large as its own inputs ask for."""
    torch.manual_seed(0)
    policy = kind([100, 400], [2, 2], make_args(policy_hidden=400))
    inputs = np.array([100, 400]) + (402 if kind is DiffusionPolicy else 0)  # actions and the embedded step
    np.testing.assert_allclose(policy.in_obs.weight.detach().std(dim=(1, 2)), inputs**-0.5, rtol=0.02)


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


def test_what_is_kept_of_an_episode(tmp_path, monkeypatch):
    """True final observations, no terminations, and nothing across the border of two episodes."""
    kept, add = [], Replay.add

    def spy(self, **new):
        kept.append({name: np.copy(value) for name, value in new.items()})
        add(self, **new)

    monkeypatch.setattr(Replay, "add", spy)
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
