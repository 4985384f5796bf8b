"""The method itself: each test fails for a wrong algorithm, not only for a crash."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import omad
from common.envs import make_env
from omad import OMAD, Args, BatchRenorm, Critic, DiffusionPolicy, GaussianPolicy, ParallelLinear, critic_loss, policy_loss, project

POLICIES = [DiffusionPolicy, GaussianPolicy]
OBS_SIZES, ACTION_SIZES = (3, 5, 2), (2, 1, 3)  # three unequal agents


def masks(sizes):
    sizes = torch.tensor(sizes)
    return torch.arange(sizes.max()) < sizes[:, None]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def make_policy(kind, steps=4, hidden=8, obs=OBS_SIZES, action=ACTION_SIZES):
    """A policy whose every parameter is away from its special starting value."""
    torch.manual_seed(0)
    policy = kind(masks(obs), masks(action), hidden, steps)
    for p in policy.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return policy


def policy_with_inputs(kind):
    """A policy of three unequal agents, seven observations [7, 3, 5] and the noise of their chains."""
    policy = make_policy(kind)
    return policy, torch.randn(7, 3, 5, generator=generator()), policy.noise(7, generator())


def make_args(**changes):
    small = dict(batch_size=16, policy_hidden=8, critic_hidden=8, n_atoms=21, v_min=-5.0, v_max=5.0, denoising_steps=3, gamma=0.9)
    return Args(**small | changes)


def random_batch(env, size=16, seed=0):
    g = generator(seed)
    obs, action = (size, *env.obs_mask.shape), (size, *env.action_mask.shape)
    normal = lambda *shape: torch.randn(*shape, generator=g)
    return dict(obs=normal(*obs), next_obs=normal(*obs), state=normal(size, env.state_size), next_state=normal(size, env.state_size),
                action=torch.tanh(normal(*action)), reward=normal(size), terminated=torch.zeros(size))  # fmt: skip


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
    probs = torch.softmax(3 * torch.randn(40, 11, generator=generator(), dtype=torch.float64), -1)
    places = 4 * torch.randn(40, 11, generator=generator(1), dtype=torch.float64)
    places[0], places[1] = atoms, atoms[3]  # exactly on atoms
    places[2], places[3] = 100.0, -100.0  # far outside
    got = project(probs, places, atoms)
    np.testing.assert_allclose(got, brute_force_projection(probs.numpy(), places.numpy(), atoms.numpy()), atol=1e-12)
    np.testing.assert_allclose(got.sum(-1), 1.0, atol=1e-12)
    np.testing.assert_allclose(got[0], probs[0], atol=1e-12)
    np.testing.assert_allclose(got @ atoms, (probs * places.clamp(-3, 2)).sum(-1), atol=1e-12)  # the mean survives
    assert got[2, -1] == pytest.approx(1.0) and got[3, 0] == pytest.approx(1.0)


# --- entropy bound ---


def linear_chain(slope, offset, steps, dt):
    """A diffusion policy whose score network is u(x) = slope x + offset, exactly: the chain is then Gaussian.

    One hidden unit carries the signal far on the positive side of the GELU, where it is the identity.
    """
    policy = DiffusionPolicy(torch.ones(1, 1).bool(), torch.ones(1, 1).bool(), 8, steps).double()
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
    """(the bound -E[C], the true entropy of the action), both from the same samples, the latter with the exact Gaussian of x_K."""
    policy = linear_chain(slope, offset, steps, dt)
    with torch.no_grad():
        noise = torch.randn(steps + 1, samples, 1, 1, generator=generator(), dtype=torch.float64)
        action, run, term = policy(torch.zeros(samples, 1, 1, dtype=torch.float64), noise)
        mean, var = 0.0, 2.5**2
        for eta in (dt * policy.schedule).flatten().tolist():
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
    policy = DiffusionPolicy(masks((1,)), masks((2,)), 8, 8)
    policy.out.weight.data.zero_()
    with torch.no_grad():
        _, run, term = policy(torch.zeros(200_000, 1, 1), policy.noise(200_000, generator()))
    assert run.mean().item() == pytest.approx(2 * 2.853, abs=0.03) and term.mean().item() == pytest.approx(-2 * 2.335, abs=0.02)


def test_path_cost_equals_the_two_kernels_written_out():
    """C against log densities from torch.distributions, step by step, for one agent of an unequal team."""
    policy = make_policy(DiffusionPolicy).double()
    obs = torch.randn(6, 3, 5, generator=generator(), dtype=torch.float64)
    noise = policy.noise(6, generator()).double()
    with torch.no_grad():
        action, run, term = policy(obs, noise)
        for agent, (o, a) in enumerate(zip(OBS_SIZES, ACTION_SIZES)):
            weights = {name: p[agent] for name, p in policy.named_parameters()}
            linear = lambda name, x: x @ weights[f"{name}.weight"] + weights[f"{name}.bias"]
            x = 2.5 * noise[0, :, agent, :a]
            log_w = -torch.distributions.Normal(0.0, 2.5).log_prob(x).sum(-1)
            for n in range(policy.steps):
                t = (policy.steps - n) / policy.steps
                schedule = 0.999 * math.cos(math.pi / 2 * (1.008 - t) / 1.008) ** 2 + 0.001
                eta = F.softplus(weights["rho_dt"]) * schedule / F.softplus(weights["rho_friction"])[:, :a]
                angle = torch.linspace(0.1, 100.0, 8).double() * n + weights["phase"]
                time = linear("time2", F.gelu(linear("time1", torch.cat([angle.sin(), angle.cos()], -1))))
                wide = F.pad(x, (0, 3 - a))
                h = linear("in_x", wide) + linear("in_obs", F.pad(obs[:, agent, :o], (0, 5 - o))) + linear("in_time", time)
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
        action, run, term = policy(torch.zeros(200_000, 3, 5).double(), policy.noise(200_000, generator()).double())
    # The entropy of a squashed Gaussian by histogram, agent 1 has one dimension.
    density, edges = np.histogram(action[:, 1, 0].numpy(), bins=400, range=(-1, 1), density=True)
    entropy = -np.sum(density * np.log(density + 1e-12)) * (edges[1] - edges[0])
    assert -(run + term)[:, 1].mean().item() == pytest.approx(entropy, abs=0.02)


def test_both_policies_are_asked_for_the_same_entropy():
    noise = DiffusionPolicy(masks((1,)), masks((1,)), 8, 1).noise(100_000, generator())
    diffusion, gaussian = (kind(masks((1,)), masks((1,)), 8, 1) for kind in POLICIES)
    with torch.no_grad():
        _, _, term = diffusion(torch.zeros(100_000, 1, 1), noise)
        _, _, constant = gaussian(torch.zeros(1, 1, 1), noise[0, :1])
    assert term.mean().item() == pytest.approx(constant.item(), abs=0.01)


# --- gradients, decentralisation, batching ---


@pytest.mark.parametrize("kind", POLICIES)
def test_gradients_through_the_whole_chain(kind):
    """The policy loss's gradient for every parameter of every agent against finite differences, in double precision."""
    policy = make_policy(kind).double()
    critic = Critic(4, masks(ACTION_SIZES), make_args()).double().eval()
    g = generator()
    batch = dict(obs=torch.randn(5, 3, 5, generator=g).double(), state=torch.randn(5, 4, generator=g).double())
    noise, alpha = policy.noise(5, g).double(), torch.tensor(0.7).double()
    loss = lambda: policy_loss(critic, policy, alpha, batch, noise)[0]
    loss().backward()
    for name, p in policy.named_parameters():
        for agent in range(3):
            direction = torch.zeros_like(p)
            direction[agent] = torch.randn(p[agent].shape, generator=g).double()
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
    alone = kind(masks((o,)), masks((a,)), 8, 4)
    own = dict(alone.named_parameters())
    for name, p in policy.named_parameters():
        value = p[agent : agent + 1]
        if name == "out.weight" or name == "out.bias":
            value = torch.cat([part[..., :a] for part in value.split(full, -1)], -1)  # mean and log std for the Gaussian
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
    critic, state = Critic(4, masks(ACTION_SIZES), make_args()).eval(), torch.zeros(7, 4)
    garbage_obs, garbage_noise = obs + 1e3 * ~masks(OBS_SIZES), noise + 1e3 * ~masks(ACTION_SIZES)
    results = [policy(o, n) for o, n in ((obs, noise), (garbage_obs, garbage_noise))]
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


def test_another_number_of_denoising_steps_walks_the_same_time():
    """Same total step size, embedding index over the same range, and nothing changes if the number does not."""
    policy, obs, noise = policy_with_inputs(DiffusionPolicy)
    with torch.no_grad():
        want = policy(obs, noise)
    policy.set_steps(4)
    with torch.no_grad():
        assert all(torch.equal(x, y) for x, y in zip(want, policy(obs, noise)))
    fine = DiffusionPolicy(masks((1,)), masks((1,)), 8, 400)
    for steps in (200, 100):
        total = fine.schedule.sum().item()
        fine.set_steps(steps)
        assert fine.schedule.sum().item() == pytest.approx(total, rel=0.02) and fine.noise(5, generator()).shape[0] == steps + 1
        assert fine.index.flatten().tolist() == list(range(0, 400, 400 // steps))


def test_fewer_denoising_steps_sample_nearly_the_same_distribution():
    """A chain with a linear score, trained with 200 steps: with 50 it ends in nearly the same Gaussian, with other steps' times in another."""
    ends = []
    for steps in (200, 50):
        policy = linear_chain(-1.0, 1.0, 200, dt=0.02)
        policy.schedule = policy.schedule.double()
        policy.set_steps(steps)
        with torch.no_grad():
            noise = torch.randn(steps + 1, 20_000, 1, 1, generator=generator(), dtype=torch.float64)
            x = torch.atanh(policy(torch.zeros(20_000, 1, 1, dtype=torch.float64), noise)[0].flatten().clamp(-1 + 1e-12, 1 - 1e-12))
        ends.append((x.mean().item(), x.std().item()))
    assert ends[1] == pytest.approx(ends[0], abs=0.06), ends
    assert ends[0][0] > 0.5 and ends[0][1] < 1.5  # it has gone somewhere: it started from mean 0, standard deviation 2.5


# --- critic ---


def env_and_agent(**changes):
    env = make_env("mpe_simple_speaker_listener")
    torch.manual_seed(0)
    return env, OMAD(env, make_args(**changes), torch.device("cpu"))


@pytest.mark.parametrize("target_networks", [False, True])
def test_critic_loss_equals_the_equation(target_networks):
    """The whole critic loss written out with loops, truncation (bootstraps) and termination (does not) mixed."""
    env, agent = env_and_agent(target_networks=target_networks)
    args, batch = agent.args, random_batch(env)
    batch["terminated"][::3] = 1.0
    noise, alpha = agent.policy.noise(16, generator()), torch.tensor(0.3)
    loss, _ = critic_loss(agent.critic.train(), agent.target, agent.policy, alpha, batch, noise, args)
    with torch.no_grad():
        next_action, run, term = agent.policy(batch["next_obs"], noise)
        critic = agent.critic.train()
        if target_networks:
            logits, after = critic(batch["state"], batch["action"]), agent.target(batch["next_state"], next_action)
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
                goals = [
                    brute_force_projection([torch.softmax(after[j, b], -1).double().numpy()], [places], atoms)[0] for j in range(2)
                ]
                goal = (goals[0] + goals[1]) / 2
                want += (-(goal * np.log(probs[b])).sum() + 0.005 * (probs[b] * np.log(probs[b])).sum()) / 16
    assert loss.item() == pytest.approx(want, rel=1e-4)


def test_termination_does_not_bootstrap_and_truncation_does():
    env, agent = env_and_agent(target_networks=True)
    noise, alpha = agent.policy.noise(16, generator()), torch.tensor(0.3)

    def loss(terminated, shift):
        batch = random_batch(env)
        batch["terminated"][:] = terminated
        batch["next_state"], batch["next_obs"] = batch["next_state"] + shift, batch["next_obs"] + shift
        return critic_loss(agent.critic.train(), agent.target, agent.policy, alpha, batch, noise, agent.args)[0].item()

    assert loss(1.0, 0.0) == pytest.approx(loss(1.0, 1.0), abs=1e-5)
    assert abs(loss(0.0, 0.0) - loss(0.0, 1.0)) > 1e-3


def test_no_gradient_reaches_the_target():
    env, agent = env_and_agent()
    batch, noise = random_batch(env), agent.policy.noise(16, generator())
    critic_loss(agent.critic.train(), None, agent.policy, torch.tensor(0.3), batch, noise, agent.args)[0].backward()
    assert all(p.grad is None for p in agent.policy.parameters())
    assert all(p.grad.abs().sum() > 0 for p in agent.critic.parameters())


def test_batch_renorm():
    x = 2 + 3 * torch.randn(2, 512, 4, generator=generator())
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
    x = torch.randn(1, 8, 1, generator=generator()).requires_grad_()
    weight = torch.randn(1, 8, 1, generator=generator(1))
    (norm(x) * weight).sum().backward()
    plain = x.detach().clone().requires_grad_()
    s = (plain.var(1, correction=0) + 1e-3).sqrt()
    r = (s / math.sqrt(2.001)).clamp(1 / 3, 3).detach()
    ((plain - plain.mean(1)) / s * r * weight).sum().backward()
    np.testing.assert_allclose(x.grad, plain.grad, atol=1e-5)


def test_target_network_is_a_slow_average():
    env, agent = env_and_agent(target_networks=True, tau=0.25)
    before = agent.target.layer1.weight.clone()
    agent.update_critic(random_batch(env), agent.policy.noise(16, generator()))
    np.testing.assert_allclose(agent.target.layer1.weight, 0.75 * before + 0.25 * agent.critic.layer1.weight.detach(), atol=1e-6)


# --- policies, temperature and updates ---


@pytest.mark.parametrize("kind", POLICIES)
def test_policy_loss_equals_the_equation(kind):
    """E[-mean_k E[Z_k] + alpha sum_i C_i] written out with loops; the temperature gets sum_i run_i, not C."""
    policy, critic = make_policy(kind), Critic(4, masks(ACTION_SIZES), make_args()).eval()
    for p in critic.parameters():
        p.data += torch.randn_like(p)  # so that the two critics differ
    batch = dict(obs=torch.randn(6, 3, 5, generator=generator()), state=torch.randn(6, 4, generator=generator(1)))
    noise = policy.noise(6, generator(2))
    loss, logs, run_sum = policy_loss(critic, policy, torch.tensor(0.7), batch, noise)
    with torch.no_grad():
        action, run, term = policy(batch["obs"], noise)
        probs = torch.softmax(critic(batch["state"], action), -1)
        atoms, want = np.linspace(-5, 5, 21), 0.0
        for b in range(6):
            value = sum(float((probs[k, b].numpy() * atoms).sum()) for k in range(2)) / 2
            cost = sum(run[b, i].item() + term[b, i].item() for i in range(3))
            want += (0.7 * cost - value) / 6
    assert loss.item() == pytest.approx(want, rel=1e-4)
    np.testing.assert_allclose(run_sum, run.sum(1), rtol=1e-5)
    assert not run_sum.requires_grad and not any(value.requires_grad for value in logs.values())


def test_optimisers_and_logs():
    env, agent = env_and_agent(policy_lr=1e-3, q_lr=2e-3, alpha_lr=3e-3, adam_beta1=0.6)
    settings = {name: (o.param_groups[0]["lr"], o.param_groups[0]["betas"][0]) for name, o in agent.optimizers.items()}
    assert settings == {"policy": (1e-3, 0.6), "critic": (2e-3, 0.6), "alpha": (3e-3, 0.9)}
    logs = agent.update_critic(random_batch(env), agent.policy.noise(16, generator())) | agent.update_policies(
        random_batch(env), agent.policy.noise(16, generator())
    )
    assert not any(value.requires_grad for value in logs.values())  # or every update's graph would stay in memory
    env, agent = env_and_agent(alpha=1e6)
    agent.update_policies(random_batch(env), agent.policy.noise(16, generator()))
    assert max(p.grad.abs().max() for p in agent.policy.parameters()) == 1.0  # clipped, element by element


@pytest.mark.parametrize("scale, direction", [(100.0, -1), (-100.0, 1)])
def test_alpha_moves_the_right_way(scale, direction):
    """A path cost below its target means more noise than asked for: alpha falls. Above: it rises."""
    env, agent = env_and_agent(target_entropy_scale=scale)
    before = agent.log_alpha.item()
    agent.update_policies(random_batch(env), agent.policy.noise(16, generator()))
    assert (agent.log_alpha.item() - before) * direction > 0


def test_the_temperature_target_counts_real_dimensions_and_the_run_only():
    env, agent = env_and_agent()
    assert agent.entropy_target == 4 * 5  # speaker 3, listener 2
    log_alpha = torch.tensor(0.0, requires_grad=True)
    loss, _ = omad.temperature_loss(log_alpha, torch.tensor([19.0, 22.0]), 20.0)
    loss.backward()
    assert log_alpha.grad.item() == pytest.approx(-0.5)


def test_fixed_temperature_stays():
    env, agent = env_and_agent(autotune=False, alpha=0.2)
    agent.update_policies(random_batch(env), agent.policy.noise(16, generator()))
    assert agent.log_alpha.exp().item() == pytest.approx(0.2)


@pytest.mark.parametrize("policy", ["diffusion", "gaussian"])
def test_an_update_changes_what_it_should(policy):
    env, agent = env_and_agent(policy=policy)
    copy = lambda module: {name: value.clone() for name, value in module.named_parameters()}
    batch = random_batch(env)
    policy_before, critic_before = copy(agent.policy), copy(agent.critic)
    agent.update_critic(batch, agent.policy.noise(16, generator()))
    assert all(torch.equal(value, policy_before[name]) for name, value in agent.policy.named_parameters())
    assert all(not torch.equal(value, critic_before[name]) for name, value in agent.critic.named_parameters())
    critic_before = copy(agent.critic)
    buffers = {name: value.clone() for name, value in agent.critic.named_buffers()}
    agent.update_policies(batch, agent.policy.noise(16, generator()))
    assert all(torch.equal(value, critic_before[name]) for name, value in agent.critic.named_parameters())
    assert all(torch.equal(value, buffers[name]) for name, value in agent.critic.named_buffers())  # statistics too
    for name, value in agent.policy.named_parameters():  # every agent moves in the one step
        moved = (value != policy_before[name]).flatten(1).any(1)
        assert moved.all(), name


def test_initialisation_uses_the_true_number_of_inputs():
    torch.manual_seed(0)
    layer = ParallelLinear(2, 400, 400, torch.tensor([100, 400]))
    np.testing.assert_allclose(layer.weight.detach().std(dim=(1, 2)), [0.1, 0.05], rtol=0.02)


def test_replay_is_a_ring():
    env = make_env("mpe_simple_spread")
    replay = omad.Replay(env, 10, torch.device("cpu"))
    for start in range(0, 24, 4):
        rows = {name: np.zeros((4, *values.shape[1:]), np.float32) for name, values in replay.data.items()}
        replay.add(**rows | {"reward": np.arange(start, start + 4)})
        last = range(max(0, start + 4 - 10), start + 4)
        assert sorted(replay.data["reward"][: len(last)].tolist()) == list(last)
    assert sorted(replay.data["reward"].tolist()) == list(range(14, 24))
    counts = np.bincount(replay.sample(replay.draw(20_000, generator()))["reward"].int(), minlength=24)
    assert counts[:14].sum() == 0 and counts[14:].min() > 1800
