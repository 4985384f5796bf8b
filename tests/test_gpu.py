"""CUDA graphs: what they need of the update can be tested anywhere; the graphs themselves need a GPU, and are skipped without one."""

import dataclasses
import functools
from types import SimpleNamespace

import collect
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dom2
import omad
from common.envs import make_env
from conftest import SHORT, caller

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: CUDA graphs are NOT tested on this machine")
CPU = torch.device("cpu")


def make_learner(device=CPU, env_id="mamujoco_halfcheetah_2x3", program=omad, **changes):
    """A small agent, and 500 random transitions of which every third ends an episode."""
    if program is dom2:
        return make_dom2_learner(device, **changes)
    small = dict(policy_hidden=32, critic_hidden=32, batch_size=32, n_atoms=21, v_min=-10.0, v_max=10.0, buffer_size=600, alpha=0.1)
    args, env = dataclasses.replace(omad.preset(env_id), **small | changes), make_env(env_id)
    torch.manual_seed(0)
    agent, replay = omad.OMAD(env, args, device), omad.Replay(env, args.buffer_size, device)
    replay.added = 500
    replay.rows[:500] = torch.randn(replay.rows[:500].shape, generator=torch.Generator().manual_seed(0)).to(device)
    replay.data["terminated"][:500] = (torch.arange(500) % 3 == 0).float().to(device)
    learner = omad.Learner(agent, replay, args)
    learner.to_check = False
    return learner


def make_dom2_learner(device=CPU, **changes):
    small = dict(policy_hidden=16, critic_hidden=32, batch_size=32, cql_actions=3)
    args, env = dataclasses.replace(dom2.Args(), **small | changes), make_env("mamujoco_halfcheetah_2x3")
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal((500, 2, *shape)).astype(np.float32)
    episodes = np.stack([np.arange(0, 500, 25), np.arange(25, 501, 25)], 1)
    source = SimpleNamespace(
        obs=normal(19), next_obs=normal(19), actions=np.tanh(normal(3)), rewards=normal(), terminations=np.arange(500) % 3 == 0,
        next_known=np.ones(500, bool), episodes=episodes, returns=rng.standard_normal(20),
    )  # fmt: skip
    torch.manual_seed(0)
    agent = dom2.DOM2(env, args, torch.device("cpu"))  # the same weights on every device
    if device.type != "cpu":
        weights, agent = agent.state_dict(), dom2.DOM2(env, args, device)
        agent.load_state_dict(weights)
    learner = dom2.Learner(agent, dom2.Data(source, env, args, device), args)
    learner.to_check = False
    return learner


def draws(learner, policies=True):
    g, batch = torch.Generator(learner.agent.device).manual_seed(1), learner.args.batch_size
    if isinstance(learner, dom2.Learner):
        return learner.data.draw(batch, g), *learner.agent.draw(g)
    return learner.replay.draw(batch, g), *(learner.agent.policy.noise(batch, g) for _ in range(1 + policies))


VARIANTS = [dict(), dict(policy="gaussian"), dict(target_networks=True), dict(autotune=False)]
VARIANTS += [
    dict(program=dom2, **x)
    for x in (
        dict(),
        dict(network="mlp"),
        dict(policy="deterministic"),
        dict(q_weight=0.0),
        dict(q_scale="mean"),
        dict(cql_own=True),
    )
]


def chain_inputs(learner, batch):
    """What the policies' chain takes in acting: observations and noise."""
    noise = learner.agent.policy.noise(batch, torch.Generator())
    if isinstance(learner, dom2.Learner):
        return torch.zeros(2, batch, 19), *([] if noise is None else [noise])
    return torch.zeros(batch, 2, 19), noise


class Watch(TorchDispatchMode):
    """Operators that make the host wait for a value, or draw a random number: a CUDA graph can hold neither."""

    WAIT = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "item", "unique")
    DRAW = ("rand", "normal", "bernoulli", "dropout", "multinomial", "uniform", "random_")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        bool_index = name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1])
        if name in self.WAIT or any(name.startswith(word) for word in self.DRAW) or bool_index:
            self.found.append(name)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("changes", VARIANTS)
def test_an_update_neither_waits_nor_draws(changes):
    learner = make_learner(**changes)
    inputs, chain = draws(learner), chain_inputs(learner, 4)
    with Watch() as watch:
        learner.update(*inputs), learner.agent.chain(*chain)
    assert watch.found == []
    with Watch() as watch:
        torch.ones(2).sum().item(), torch.randn(2), torch.ones(2)[torch.ones(2) > 0]
    assert {"_local_scalar_dense", "randn"} <= set(watch.found)  # the watch does see them


@pytest.mark.parametrize("changes", VARIANTS)
def test_an_update_changes_its_tensors_in_place_and_no_others(changes):
    """A graph replays on fixed addresses, and what it changes must be known, to be restored after the check."""
    learner = make_learner(**changes)
    agent = learner.agent
    addresses, values = [x.data_ptr() for x in agent.tensors()], [x.clone() for x in agent.tensors()]
    rows = learner.data.table if isinstance(learner, dom2.Learner) else learner.replay.rows
    untouched = [rows.clone(), *(x.clone() for x in agent.policy.buffers())]
    with omad.unchanged(agent.tensors()):
        first = {name: value.clone() for name, value in learner.update(*draws(learner)).items()}
        learner.update(*draws(learner))
        assert sum(not torch.equal(x, y) for x, y in zip(agent.tensors(), values)) > 0.9 * len(values) * (
            set(changes) <= {"program"}
        )
    assert [x.data_ptr() for x in agent.tensors()] == addresses
    assert all(torch.equal(x, y) for x, y in zip(agent.tensors(), values))
    assert all(torch.equal(x, y) for x, y in zip([rows, *agent.policy.buffers()], untouched))
    again = learner.update(*draws(learner))  # nothing else remembers the two updates
    assert all(torch.equal(value, again[name]) for name, value in first.items())


# --- the check before graphs are trusted, with capturing replaced by something that runs on a CPU ---


class FakeGraph:
    def __init__(self, function, places, result, spoil):
        self.function, self.places, self.result, self.spoil = function, places, result, spoil

    def replay(self):
        """What a replay does: the same work on the same places, results written over the old ones."""
        new = self.function(*self.places)
        pairs = [(self.result, new)] if isinstance(new, torch.Tensor) else [(self.result[name], new[name]) for name in new]
        for old, value in pairs:
            old.copy_(value * self.spoil)


def fake_capture(monkeypatch, spoil=1.0, error=None):
    def capture(self, places):
        if error:
            raise RuntimeError(error)
        with omad.unchanged(self.state()):
            result = self.function(*places)
        copies = result.clone() if isinstance(result, torch.Tensor) else {name: value.clone() for name, value in result.items()}
        return FakeGraph(self.function, places, copies, spoil), places, copies

    for program in (omad, dom2):
        monkeypatch.setattr(program.Captured, "_capture", capture)


@pytest.mark.parametrize("program", [omad, dom2])
def test_graphs_are_trusted_if_they_repeat_the_losses(program, monkeypatch):
    fake_capture(monkeypatch)
    plain, captured = make_learner(program=program), make_learner(program=program)
    before = [x.clone() for x in captured.agent.tensors()]
    assert captured.capture().startswith("graphs    on: losses of 200 updates differ by at most 0.0e+00")
    assert captured.update.enabled and captured.agent.chain.enabled
    assert all(torch.equal(x, y) for x, y in zip(captured.agent.tensors(), before))
    if program is omad:
        assert captured.updates == 0
        assert sorted(len(shapes) for shapes in captured.update.graphs) == [2, 3]  # one with, one without the policies
    g, h = torch.Generator().manual_seed(2), torch.Generator().manual_seed(2)
    for _ in range(6):
        want = {name: value.clone() for name, value in plain.step(g).items()}
        got = captured.step(h)
        assert want.keys() == got.keys() and all(torch.equal(value, got[name]) for name, value in want.items())
    assert all(torch.equal(x, y) for x, y in zip(captured.agent.tensors(), plain.agent.tensors()))
    obs = np.random.default_rng(0).standard_normal((3, 2, 19)).astype(np.float32)
    np.testing.assert_array_equal(captured.agent.act(obs, g), plain.agent.act(obs, h))
    np.testing.assert_array_equal(captured.agent.act(obs[:1], g), plain.agent.act(obs[:1], h))  # another shape, another graph


@pytest.mark.parametrize("program", [omad, dom2])
@pytest.mark.parametrize("spoil, error", [(1.05, None), (float("nan"), None), (1.0, "operation not permitted\nwhile capturing")])
def test_graphs_that_do_not_repeat_the_losses_are_left_off(program, monkeypatch, spoil, error):
    fake_capture(monkeypatch, spoil, error)
    learner, plain = make_learner(program=program), make_learner(program=program)
    message = learner.capture()
    assert message.startswith("graphs    off: ") and "\n" not in message and (not error or "not permitted" in message)
    assert not learner.update.enabled and not learner.agent.chain.enabled and getattr(learner, "updates", 0) == 0
    g, h = torch.Generator().manual_seed(2), torch.Generator().manual_seed(2)
    for _ in range(3):
        got, want = learner.step(g), plain.step(h)
        assert all(torch.equal(value, got[name]) for name, value in want.items())


@pytest.mark.parametrize("program", [omad, dom2])
def test_the_check_runs_once_before_the_first_update(program, monkeypatch, capsys):
    steps, calls = [], []
    monkeypatch.setattr(program.Learner, "capture", lambda self: calls.append(len(steps)) or "graphs    on: ...")
    learner = make_learner(program=program)
    learner.to_check = True
    for _ in range(3):
        learner.step(torch.Generator().manual_seed(0))
        steps.append(1)
    assert calls == [0] and "graphs" in capsys.readouterr().out


def test_no_graphs_on_the_cpu():
    for learner in (
        omad.Learner(make_learner().agent, None, omad.preset("mamujoco_ant_2x4")),
        dom2.Learner(make_learner(program=dom2).agent, None, dom2.Args()),
    ):
        assert not learner.to_check and not learner.update.enabled


def test_learning_while_the_environments_step(cli, tmp_path, monkeypatch):
    """The order of a GPU, on the CPU: as many updates, each without the newest transitions; another order, another run."""
    sizes, step, init = [], omad.Learner.step, omad.Learner.__init__

    def overlapping(self, *args):
        init(self, *args)
        self.overlap = True

    def spy(self, generator):
        sizes.append(self.replay.added)
        return step(self, generator)

    monkeypatch.setattr(omad.Learner, "step", spy)
    assert cli(*SHORT)[0] == 0
    serial = sizes.copy()
    sizes.clear()
    monkeypatch.setattr(omad.Learner, "__init__", overlapping)
    assert cli(*SHORT)[0] == 0
    assert serial == list(range(84, 404, 4)) and sizes == list(range(84, 400, 4))
    one, other = sorted(tmp_path.glob("*__omad__*"))
    assert (one / "eval.csv").read_text() != (other / "eval.csv").read_text()


# --- on a GPU ---


@pytest.fixture
def precision():
    """In training products are TF32 (`pick_device`); whatever a test sets, the next one finds what this one did."""
    before = torch.get_float32_matmul_precision()
    omad.pick_device("cuda")
    yield
    torch.set_float32_matmul_precision(before)


@gpu
@pytest.mark.parametrize("changes", VARIANTS)
def test_captured_updates_equal_eager_ones(changes, precision):
    """200 updates within `Learner.TOLERANCE`, in the precision of training; and the next ten much closer."""
    learner = make_learner(torch.device("cuda"), **changes)
    message = learner.capture()
    assert message.startswith("graphs    on"), message
    eager, captured = make_learner(torch.device("cuda"), **changes), learner
    g, h = (torch.Generator("cuda").manual_seed(2) for _ in range(2))
    for _ in range(10):
        want, got = eager.step(g), captured.step(h)
        for name in (name for name in want if name.startswith("losses/")):
            assert got[name].item() == pytest.approx(want[name].item(), rel=2e-3, abs=2e-3), name


@gpu
@pytest.mark.parametrize("program", [omad, dom2])
def test_an_update_on_a_gpu_never_waits(program, precision):
    learner = make_learner(torch.device("cuda"), program=program)
    learner.capture()
    g = torch.Generator("cuda").manual_seed(0)
    for enabled in (False, True):
        learner.update.enabled = enabled
        for _ in range(3):
            learner.step(g)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(6):
                learner.step(g)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@gpu
def test_a_captured_update_reads_the_learning_rates_of_the_moment(precision):
    """A graph into which the first rate was burnt would go on at full speed at the end of the training."""
    learner = make_learner(torch.device("cuda"), program=dom2)
    assert learner.capture().startswith("graphs    on")
    g, moved = torch.Generator("cuda").manual_seed(0), []
    for done in (0.0, 0.9, 1.0):
        before = [p.clone() for p in learner.agent.critic.parameters()]
        learner.step(g, done)
        moved.append(max((p - q).abs().max().item() for p, q in zip(learner.agent.critic.parameters(), before)))
    assert moved[0] > 10 * moved[1] > 0 and moved[2] == 0


@gpu
@pytest.mark.parametrize("program", [omad, dom2])
def test_captured_actions_equal_eager_ones(program, precision):
    learner = make_learner(torch.device("cuda"), program=program)
    obs = np.random.default_rng(0).standard_normal((5, 2, 19)).astype(np.float32)
    actions = []
    for learner.agent.chain.enabled in (False, True, True):
        actions.append(learner.agent.act(obs, torch.Generator("cuda").manual_seed(3)))
    np.testing.assert_allclose(actions[1], actions[0], atol=1e-4)
    np.testing.assert_array_equal(actions[1], actions[2])


@gpu
@pytest.mark.parametrize("program", [omad, dom2])
def test_gpu_equals_cpu(program, precision):
    """The same updates from the same state and draws, in full float32, on both devices."""
    torch.set_float32_matmul_precision("highest")
    here, there = make_learner(program=program), make_learner(torch.device("cuda"), program=program)
    there.agent.load_state_dict(here.agent.state_dict())
    inputs = draws(here)
    for _ in range(3):
        a, b = here.update(*inputs), there.update(*(x.cuda() for x in inputs))
        for name in (name for name in a if name.startswith("losses/")):
            assert b[name].item() == pytest.approx(a[name].item(), rel=2e-3, abs=2e-3), name


@gpu
@pytest.mark.slow
@pytest.mark.parametrize("program", [omad, dom2])
def test_compiled_losses_in_graphs(program, precision):
    learner = make_learner(torch.device("cuda"), program=program, compile=True)
    message = learner.capture()
    assert message.startswith("graphs    on"), message


@gpu
def test_a_run_on_a_gpu_and_its_checkpoint_elsewhere(cli, tmp_path):
    flags = [*SHORT[:-2], "--device", "cuda", "--env-id", "mpe_simple_spread"]
    code, out, err = cli(*flags)
    assert code == 0 and "graphs    on" in out, (out, err)
    (run,) = tmp_path.glob("*__omad__*")
    assert cli("--resume", run, "--total-timesteps", 600, run_dir=False)[0] == 0
    code, out, err = cli("--resume", run, "--total-timesteps", 800, "--device", "cpu", run_dir=False)
    assert code == 0 and "random numbers go on differently" in out, err


@gpu
def test_an_offline_run_on_a_gpu_and_its_checkpoint_elsewhere(tmp_path, capsys):
    folder = collect.collect(collect.Options("omar_simple_spread-random", 500, out=tmp_path / "data"))
    run = caller(dom2.main, tmp_path, capsys)
    flags = ["--dataset", folder, "--batch-size", 32, "--total-updates", 40, "--eval-every", 20, "--eval-episodes", 2]
    code, out, err = run(*flags, "--device", "cuda")
    assert code == 0 and "graphs    on" in out, (out, err)
    (path,) = tmp_path.glob("*__dom2__*")
    code, out, err = run("--resume", path, "--total-updates", 60, "--device", "cpu", run_dir=False)
    assert code == 0 and "random numbers go on differently" in out, err


# --- compiling ---


@pytest.mark.parametrize("program", [omad, dom2])
def test_compiled_losses_equal_plain_ones(program, monkeypatch):
    """Traced and differentiated as for a compiler, but run by torch's own operators: generating code takes minutes on a CPU."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True))
    plain, compiled = make_learner(program=program), make_learner(program=program, compile=True)
    g, h = (torch.Generator().manual_seed(2) for _ in range(2))
    for _ in range(6):
        want, got = plain.step(g), compiled.step(h)
        for name in want:
            assert got[name].item() == pytest.approx(want[name].item(), rel=1e-3, abs=1e-3), name
    obs = np.random.default_rng(0).standard_normal((3, 2, 19)).astype(np.float32)
    np.testing.assert_allclose(compiled.agent.act(obs, g), plain.agent.act(obs, h), atol=1e-3)
    with omad.unchanged(compiled.agent.tensors()):
        compiled.update(*draws(compiled))
    assert all(p.grad is None or p.grad.isfinite().all() for p in compiled.agent.parameters())
