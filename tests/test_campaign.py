"""The experiments, and the runner that makes them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import campaign
import pytest

import dom2
import omad
from conftest import ROOT

FREE = {"seed", "run_dir", "resume", "evaluate", "device", "torch_threads", "cuda_graph", "compile", "capture_video"}
UNUSED = {"cql_weight", "cql_own", "q_lr", "critic_hidden", "gamma"}  # by imitation, which has no critics
GONE = {"network": "unet", "q_scale": "spread"}  # flags of earlier programs, and what is left of them
FREE |= {"list_tasks", "env_id", "dataset", "total_updates", "eval_every"}


def test_what_is_committed_was_made_with_the_flags_and_presets_of_today(tmp_path, monkeypatch):
    """Every run under runs/results belongs to an experiment, and has its arguments."""
    monkeypatch.chdir(tmp_path)
    for source in campaign.SOURCES.values():
        (tmp_path / source["flags"].split()[1]).mkdir(parents=True)  # a preset looks whether it is there
    declared = {(run.place, run.seed): run for run in campaign.declared()}
    found = [path.with_name("config.json") for path in sorted(campaign.RESULTS.rglob("fresh.csv"))]  # finished runs
    assert len(found) > 250
    parsed = {}
    for path in found:
        args = json.loads(path.read_text().replace('"num_atoms"', '"n_atoms"'))["args"]  # as the first runs said
        run = declared.get((path.parent.parent, args["seed"]))
        assert run, f"{path.parent}: no experiment of runs/experiments.toml makes this run"
        assert run.find() == path.parent, "the same seed is there twice"
        program = campaign.PROGRAMS[run.part.program]
        if run.place not in parsed:  # a seed changes nothing else
            parsed[run.place] = vars(program.parse(run.flags))
        wanted = parsed[run.place]
        args = {"without": "", "time_power": 1.0, "act_noise": 1.0} | args if run.part.program == "dom2" else args
        assert all(args.pop(name, value) == value for name, value in GONE.items())
        names = args.keys() - FREE - (UNUSED if args.get("q_weight") == 0 else set())
        names -= {"q_weight", "time_power", "act_noise"} if args["policy"] == "deterministic" else set()
        assert {name: args[name] for name in names} == pytest.approx({name: wanted[name] for name in names}), path
        if run.part.program == "dom2":
            assert args["total_updates"] == pytest.approx(wanted["total_updates"], rel=0.01)
        assert (path.parent / "eval.csv").exists()


TINY = "--learning-starts 20 --eval-every 100 --eval-episodes 2 --policy-hidden 8 --critic-hidden 8 --num-envs 4 "
TINY += "--batch-size 8 --denoising-steps 1 --updates-per-step 0.25"


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """An experiment of two runs a few steps long, whose results go elsewhere; what it is made of can be changed."""
    part = campaign.Part("omad", ["mpe_simple_spread"], {"gaussian": "--policy gaussian"}, [1, 2], TINY, "200 steps")
    monkeypatch.setattr(campaign, "EXPERIMENTS", {"tiny": [part]})
    monkeypatch.setattr(campaign, "where", tmp_path)
    task = SimpleNamespace(horizon=1000, shifts=())  # 50 fresh episodes
    monkeypatch.setattr(campaign, "find_task", lambda env_id: task)
    # In this process, one after the other, instead of in processes of their own.
    monkeypatch.setattr(campaign, "here", lambda todo, jobs: ([(run, campaign.one(run.name))] for run in todo))
    return lambda *flags: campaign.main(["tiny", "--results", str(tmp_path), *flags])


def test_what_is_missing_is_run_and_evaluated_on_fresh_episodes(tiny, tmp_path, capsys):
    assert tiny("--seeds", "1") == 0 and tiny() == 0
    first, second = (run for run in campaign.declared(("tiny",)))
    assert first.share() == second.share() == 1 and len([*tmp_path.rglob("fresh.csv")]) == 2
    assert "finished: tiny/mpe_simple_spread/gaussian/2" in capsys.readouterr().out
    rows = campaign.rows_of(first.find() / "fresh.csv")
    assert [(row["setting"], row["episodes"]) for row in rows] == [("usual", "50")]
    assert omad.main(["--evaluate", str(first.find()), "--seed", "1000", "--eval-episodes", "50"]) == 0
    assert f"return {rows[0]['return_mean']} ± {rows[0]['return_std']} over" in capsys.readouterr().out
    config = json.loads((first.find() / "config.json").read_text())["args"]
    assert config["total_timesteps"] == 200 and config["seed"] == 1
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert tiny() == 0 and before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert campaign.main(["--results", str(tmp_path)]) == 0 and "2 of 2" in capsys.readouterr().out


def test_an_interrupted_run_is_gone_on_with(tiny, tmp_path, monkeypatch):
    run, main, calls = campaign.declared(("tiny",))[0], omad.main, []
    monkeypatch.setattr(omad, "main", lambda flags: calls.append(flags) or main(flags))
    step = omad.OMAD.update
    monkeypatch.setattr(omad.OMAD, "update", counted(step, 30))
    assert "interrupted" in campaign.one(run.name)
    assert 0.4 < run.share() < 0.6 and not (run.find() / "fresh.csv").exists()  # killed after the second evaluation
    monkeypatch.setattr(omad.OMAD, "update", step)
    assert tiny("--only", "gaussian/1") == 0 and run.share() == 1
    assert "--resume" not in calls[0] and calls[1] == ["--resume", str(run.find())] and calls[2][0] == "--evaluate"


def counted(step, most):
    """Is interrupted after so many updates."""
    updates = []

    def update(self, *rest):
        updates.append(1)
        if len(updates) > most:
            raise KeyboardInterrupt
        return step(self, *rest)

    return update


def test_a_failing_run_is_named_and_the_others_go_on(tiny, capsys):
    campaign.EXPERIMENTS["tiny"][0].variants["broken"] = "--v-min 5 --v-max 1"
    campaign.EXPERIMENTS["tiny"][0].variants["unheard"] = "--of 5"
    assert tiny("--seeds", "1") == 1
    out, err = capsys.readouterr()
    assert "failed: tiny/mpe_simple_spread/broken/1: omad.py: error: --v-min must be below --v-max" in out
    assert "failed: tiny/mpe_simple_spread/unheard/1" in out and "2 of 3 runs failed" in err
    assert "unheard/1: Unrecognized options: --of" in out  # not the lower edge of the parser's box
    assert "finished: tiny/mpe_simple_spread/gaussian/1" in out


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {runs!r})
import campaign
broken = campaign.Part("omad", ["mpe_simple_spread"], dict(broken="--v-min 5 --v-max 1"), [1], {tiny!r}, "200 steps")
tiny = "--total-updates 4 --eval-every 2 --eval-episodes 2 --policy-hidden 8 --critic-hidden 8 --batch-size 4"
settings = dict(imitation={{"K = 2": "--solver-steps 2"}})
variants = dict(imitation="--q-weight 0")
good = campaign.Part("dom2", ["my data"], variants, [1], tiny, "", dict(imitation=2.0), settings)
gone = campaign.Part("dom2", ["no data"], variants, [1], tiny)
campaign.EXPERIMENTS = dict(mixed=[broken, gone, good])
source = dict(flags="--dataset {data} --env-id omar_simple_spread", script={maker!r})
campaign.SOURCES = {{"my data": source, "no data": source | dict(script="nothing.py")}}
campaign.__file__ = __file__
sys.exit(campaign.main())
"""


@pytest.mark.slow
def test_processes_of_their_own(tmp_path, data):
    """A run fails, the data of another cannot be made, and a third goes on: with fresh episodes, settings and shifts."""
    (tmp_path / "maker.py").write_text(f"open({str(tmp_path / 'made')!r}, 'w')")
    words = dict(runs=str(ROOT / "runs"), tiny=TINY, data=data, maker=str(tmp_path / "maker.py"))
    (tmp_path / "script.py").write_text(SCRIPT.format(**words))
    command = [sys.executable, str(tmp_path / "script.py"), "mixed", "--results", str(tmp_path), "--jobs", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "2 of 3 runs failed" in done.stderr
    assert "failed: mixed/mpe_simple_spread/broken/1: omad.py: error:" in done.stdout
    assert "failed: mixed/no data" in done.stdout and "nothing.py" in done.stdout and (tmp_path / "made").exists()
    (fresh,) = (tmp_path / "mixed").rglob("fresh.csv")
    rows = campaign.rows_of(fresh)
    assert [(row["setting"], row["episodes"]) for row in rows] == [(x, "1000") for x in ("usual", "K = 2", "speed")]
    assert len({row["return_mean"] for row in rows}) == 3 and not (fresh.parent / "curve.png").exists()
    assert json.loads((fresh.parent / "config.json").read_text())["args"]["total_updates"] == 8


def test_flags_are_relative_or_times_as_many():
    find = lambda experiment, on, variant: next(
        run for run in campaign.declared((experiment,)) if (run.on, run.variant) == (on, variant)
    )
    parse = lambda run: campaign.PROGRAMS[run.part.program].parse(run.flags)
    usual, more = (parse(find("search", "omar_simple_tag-medium", name)) for name in ("dom2", "dom2 zeta 4"))
    assert more.cql_weight == 4 * usual.cql_weight and more.q_weight == usual.q_weight and usual.seed == 101
    rate = parse(find("search", "omar_simple_tag-medium", "deterministic rate 3"))
    assert rate.policy_lr == pytest.approx(9e-3) and rate.policy == "deterministic"  # the baseline's own is 3e-3
    ours, others = (parse(find("offline", "omar_simple_spread-random", m)) for m in ("dom2", "deterministic"))
    assert others.total_updates == 3 * ours.total_updates and others.eval_every == 3 * ours.eval_every
    assert others.thresholds == 8 and others.policy_lr == 1e-3
    half = parse(find("ablations", "mamujoco_halfcheetah_2x3", "half the support"))
    assert (half.v_min, half.v_max, half.total_timesteps) == (-500.0, 500.0, 30_000)


def test_flags_beside_relative_ones_stay():
    variants = {"more": "--thresholds *2 --no-reweight --q-weight *0.5"}
    part = campaign.Part("dom2", ["omar_simple_tag-medium"], variants, [1], length="40 updates")
    args = dom2.parse(campaign.Run("x", part, "omar_simple_tag-medium", "more", 1).flags)
    usual = dom2.preset("omar_simple_tag-medium")
    assert (args.thresholds, args.q_weight) == (2 * usual.thresholds, 0.5 * usual.q_weight)
    assert not args.reweight and args.total_updates == 40


def test_a_run_of_an_older_format_does_not_stop_the_others(tiny, capsys):
    old = campaign.declared(("tiny",))[0].place / "mpe_simple_spread__omad__1__20200101-000000-000000"
    old.mkdir(parents=True)
    (old / "config.json").write_text(json.dumps({"format": "omad-0", "args": {"total_timesteps": 200}}))
    (old / "eval.csv").write_text("step,wall_time_s,return_mean\n0,0,0\n100,1,0\n")
    assert tiny() == 1
    out = capsys.readouterr().out
    assert "failed: tiny/mpe_simple_spread/gaussian/1: omad.py: error:" in out
    assert "finished: tiny/mpe_simple_spread/gaussian/2" in out


def test_minutes_become_steps(tiny, monkeypatch):
    """By the time between the last two evaluations of a short run, in which learning goes on."""
    part = campaign.Part("omad", ["mpe_simple_spread"], {"gaussian": "--policy gaussian"}, [1], TINY, "0.05 minutes")
    monkeypatch.setattr(campaign, "EXPERIMENTS", {"tiny": [part]})
    run, flags = campaign.declared(("tiny",))[0], []

    def pretend(program, words):
        flags.append(words)
        folder = Path(words[words.index("--run-dir") + 1], "run")
        folder.mkdir()
        (folder / "eval.csv").write_text("step,wall_time_s\n0,1\n1000,2\n2000,6\n")

    monkeypatch.setattr(campaign, "call", pretend)
    assert campaign.probe(run) == 750  # three seconds at 250 steps a second
    assert omad.parse(flags[0][:-2]).learning_starts == 1000 and omad.parse(flags[0][:-2]).total_timesteps == 2000


def test_seed_by_seed_and_all_words(tiny, tmp_path, capsys):
    campaign.EXPERIMENTS["tiny"][0].variants["diffusion"] = ""
    assert [run.seed for run in campaign.declared(("tiny",))] == [1, 1, 2, 2]
    assert tiny("--only", "gaussian", "/2") == 0 and [p.parts[-3] for p in tmp_path.rglob("fresh.csv")] == ["gaussian"]
    assert tiny("--only", "gaussian", "nosuch") == 2 and "0 runs" in capsys.readouterr().out


def test_places_can_stand_on_a_command_line():
    """A program takes what follows = for a value."""
    places = {(run.place, run.part) for run in campaign.declared()}
    assert not [place for place, _ in places if re.search(r"[\s=,()/]", place.name)]
    assert len({place for place, _ in places}) == len(
        {(run.experiment, run.on, run.variant) for run in campaign.declared()}
    )


def test_names_are_checked(capsys):
    assert campaign.main(["sprad"]) == 2 and "there are smoke, spread" in capsys.readouterr().err
    assert campaign.main(["--one", "spread/x/y/1"]) == 1 and "no such run" in capsys.readouterr().err
    assert campaign.main(["spread", "--jobs", "0"]) == 2 and "--jobs must be" in capsys.readouterr().err


def smoke(folder, *flags):
    """The experiment of that name, as a user would start it."""
    command = [sys.executable, str(ROOT / "runs" / "campaign.py"), "smoke", "--results", str(folder), *flags]
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL)


def curves(folder):
    """All that is measured but the time."""
    rows = {
        path.parents[1].name + path.parent.name.split("__")[2]: campaign.rows_of(path)
        for path in folder.rglob("eval.csv")
    }
    return {name: [[row["step"], row["return_mean"], row["return_std"]] for row in run] for name, run in rows.items()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert smoke(folder, "--jobs", "2").wait() == 0
    assert len(curves(folder)) == 4
    return folder


@pytest.mark.slow
def test_a_killed_campaign_goes_on(undisturbed, tmp_path):
    for sign in (signal.SIGKILL, signal.SIGTERM):
        written = lambda: {path: path.stat().st_mtime_ns for path in tmp_path.rglob("eval.csv")}
        before, process = written(), smoke(tmp_path, "--jobs", "2")
        while written() == before:
            time.sleep(0.2)
        os.killpg(process.pid, sign) if sign == signal.SIGKILL else process.terminate()
        assert process.wait() == (-9 if sign == signal.SIGKILL else 130)
    time.sleep(2)  # a run that outlives its runner would hold the lock
    assert not list(tmp_path.rglob("fresh.csv"))
    assert smoke(tmp_path, "--jobs", "2").wait() == 0
    assert curves(tmp_path) == curves(undisturbed)


@pytest.mark.slow
def test_on_a_cluster_that_loses_a_worker_and_a_node(undisturbed, tmp_path):
    """Two nodes on this host."""
    pytest.importorskip("ray", reason="needs Ray: pip install -r runs/requirements-ray.txt")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=1))
    other = cluster.add_node(num_cpus=1)
    process = smoke(tmp_path, "--address", cluster.address)
    try:
        while len(list(tmp_path.rglob("eval.csv"))) < 2:
            time.sleep(0.2)
        worker = subprocess.run(["pgrep", "-f", "ray::remote"], capture_output=True, text=True).stdout.split()[0]
        os.kill(int(worker), signal.SIGKILL)
        while len(list(tmp_path.rglob("fresh.csv"))) < 1:
            time.sleep(0.2)
        cluster.remove_node(other, allow_graceful=False)
        assert process.wait(timeout=600) == 0
    finally:
        process.kill()
        cluster.shutdown()
    assert curves(tmp_path) == curves(undisturbed)


def test_a_finished_trial_is_a_row_of_the_search(tmp_path, monkeypatch):
    """Once, whatever else is there; without reweighting it counts as one with no thresholds."""
    monkeypatch.setattr(campaign, "where", tmp_path)
    for seed, reweight in ((101, True), (102, False), (101, True)):
        args = vars(dom2.preset("omar_simple_tag-medium")) | dict(seed=seed, reweight=reweight)
        (tmp_path / "config.json").write_text(json.dumps({"format": dom2.FORMAT, "args": args}))
        (tmp_path / "eval.csv").write_text("step,wall_time_s\n0,1.5\n500,77.25\n")
        campaign.keep_trial(args, tmp_path, f"{80 + seed},7.5,1000")
    first, second = campaign.rows_of(tmp_path / "search.csv")
    assert first["return_mean"] == "181" and first["seconds"] == "77.25" and first["episodes"] == "1000"
    assert first["q_weight"] == "0.2" and first["cql_weight"] == "16.0" and first["policy_hidden"] == "32"
    assert second["thresholds"] == "0" and first["thresholds"] == "3" and second["seed"] == "102"


def test_a_finished_trial_goes_to_older_ones(tmp_path, monkeypatch):
    """Whose rows are as long, but say something else; nothing of them is lost."""
    monkeypatch.setattr(campaign, "where", tmp_path)
    (tmp_path / "eval.csv").write_text("step,wall_time_s\n500,77.25\n")
    args = vars(dom2.preset("omar_simple_tag-medium"))
    campaign.keep_trial(args | dict(seed=9), tmp_path, "80,7.5,1000")
    file = tmp_path / "search.csv"
    file.write_text(file.read_text().replace("fresh_seed", "git_revision").replace(",2000\n", ",abc\n"))
    (before,) = campaign.rows_of(file)
    campaign.keep_trial(args | dict(seed=10), tmp_path, "81,7.5,1000")
    old, new = campaign.rows_of(file)
    assert old == before | {"fresh_seed": ""} and before["git_revision"] == "abc" and before["return_mean"] == "80"
    assert new["fresh_seed"] == "2000" and new["return_mean"] == "81" and not new["git_revision"]


@pytest.mark.parametrize(
    "program, on, experiment, count",
    [
        ("omad", "mpe_simple_spread", "smoke", 3),
        ("dom2", "omar_halfcheetah_2x3-expert", "smoke", 6),
        ("dom2", "omar_halfcheetah_2x3-expert", "search", 5),
    ],
)
def test_a_copied_file_gets_what_its_original_gets(program, on, experiment, count, tmp_path, monkeypatch):
    """Flags, data, a length in minutes, fresh episodes, trials: as README.md says, it only has to be in PROGRAMS."""
    monkeypatch.setattr(campaign, "where", tmp_path)
    monkeypatch.setattr(campaign, "make_data", lambda on: calls.append([on]))
    monkeypatch.setattr(campaign, "keep_trial", lambda args, *_: calls.append([args["env_id"]]))
    monkeypatch.setattr(campaign.Run, "find", lambda self: folder if len(calls) > 1 + (program == "dom2") else None)

    def call(name, flags):
        calls.append(flags[: flags.index("--run-dir")] if "--run-dir" in flags else flags[2:])
        if "--run-dir" in flags and {"200", "2000"} & {*flags}:  # to see how fast it is
            there = Path(flags[-1], "run")
            there.mkdir()
            (there / "eval.csv").write_text("step,wall_time_s\n0,0\n10,1\n20,3\n")
        return "return 5.0 ± 1.0 over"

    monkeypatch.setattr(campaign, "call", call)
    done = {}
    for name in (program, "copy"):
        original = vars(campaign.PROGRAMS[program])
        own = dict(load=lambda path: {"args": {"env_id": on.partition("-")[0]}}, write=lambda path, dump: None)
        monkeypatch.setitem(campaign.PROGRAMS, name, SimpleNamespace(**original | own))
        calls, folder = [], tmp_path / name
        folder.mkdir()
        campaign.work(
            campaign.Run(experiment, campaign.Part(name, [on], {"x": ""}, [3], length="1 minutes"), on, "x", 3)
        )
        done[name] = calls
    assert done["copy"] == done[program] and len(calls) == count and "300" in calls[1 + (program == "dom2")]


def test_a_search_plays_other_fresh_episodes_and_no_shifts(tmp_path, monkeypatch):
    part = campaign.Part("dom2", ["omar_simple_tag-medium"], {"x": ""}, [101])
    calls, run = [], campaign.Run("search", part, "omar_simple_tag-medium", "x", 101)
    monkeypatch.setattr(campaign, "where", tmp_path)
    folder = run.place / "omar_simple_tag-medium__dom2__101__20260101-000000-000000"
    monkeypatch.setattr(campaign, "make_data", lambda on: None)
    monkeypatch.setattr(campaign.Run, "find", lambda self: folder)
    monkeypatch.setattr(
        dom2, "load", lambda path: {"args": vars(dom2.preset(part.on[0])) | {"env_id": "omar_simple_tag"}}
    )
    monkeypatch.setattr(campaign, "rows_of", lambda path: [{"wall_time_s": "1"}])
    monkeypatch.setattr(campaign, "record", lambda path, key, **numbers: calls.append(numbers))
    monkeypatch.setattr(campaign, "call", lambda program, flags: calls.append(flags) or "return 5.0 ± 1.0 over")
    monkeypatch.setattr(dom2, "write", lambda path, dump: None)
    (folder / "curve.png").parent.mkdir(parents=True)
    campaign.work(run)
    _, played, kept = calls
    assert played[played.index("--seed") + 1] == "2000" and kept["fresh_seed"] == 2000


def test_trials_differ_in_what_their_rows_say():
    """So that none takes the place of another."""
    keys = {}
    for run in campaign.declared(("search",)):
        if run.seed == 101 and run.on in ("omar_simple_spread-medium", "omar_simple_tag-random"):
            args = vars(dom2.parse(run.flags))
            args["thresholds"] *= args["reweight"]
            keys.setdefault(tuple(args[name] for name in ("dataset", "policy", *campaign.TRIED.split())), []).append(
                args
            )
    for same in keys.values():  # variants that say what is the preset anyway
        assert all(
            {**args, "total_updates": 0, "eval_every": 0} == {**same[0], "total_updates": 0, "eval_every": 0}
            for args in same
        )
