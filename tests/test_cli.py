"""The program as a user types it: runs, resume, evaluate, bad input."""

import copy
import csv
import dataclasses
import json
import os
import re
import resource
import signal
import time

import numpy as np
import pytest
import torch

import omad
from common.envs import list_tasks
from conftest import SHORT


def run_dirs(path):
    return sorted(path.glob("*__omad__*"))


def rows(run_dir, wall_time=False):
    table = list(csv.DictReader((run_dir / "eval.csv").open()))
    return [{key: value for key, value in row.items() if wall_time or key != "wall_time_s"} for row in table]


def weights(run_dir):
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)["agent"]


def one_line(err):
    lines = err.strip().splitlines()
    return len(lines) == 1 and lines[0].startswith("omad.py: ") and len(lines[0]) < 400 and not re.search("[╭│]|helptext|\x1b", err)


# --- a whole run ---


def test_the_default_command_shortened(start, tmp_path):
    """`python omad.py --env-id mpe_simple_spread`, with the numbers that make it short: everything a run leaves behind."""
    process = start("--env-id", "mpe_simple_spread", *SHORT, "--run-dir", tmp_path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    for word in ("task ", "sizes ", "device ", "parameters", "expected ", "logs ", "eval at step 400"):
        assert word in out
    assert "Traceback" not in err and "Warning" not in err
    (run,) = run_dirs(tmp_path)
    assert re.fullmatch(r"mpe_simple_spread__omad__1__\d{8}-\d{6}", run.name)
    assert {"config.json", "eval.csv", "checkpoint.pt", "curve.png"} <= {p.name for p in run.iterdir()}
    assert not list(run.glob("*.tmp")) and list(run.glob("events.out.tfevents.*"))
    assert (run / "curve.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((run / "config.json").read_text())
    assert config["args"]["policy_hidden"] == 16 and config["packages"]["torch"] and config["git_revision"]
    assert (run / "eval.csv").read_text().splitlines()[0] == "step,wall_time_s,return_mean,return_std,episodes"
    table = rows(run, wall_time=True)
    assert [row["step"] for row in table] == ["0", "100", "200", "300", "400"] and {row["episodes"] for row in table} == {"3"}
    assert all(-200 < float(row["return_mean"]) < 0 for row in table)
    saved = torch.load(run / "checkpoint.pt", weights_only=True)
    assert saved["updates"] == 80 and saved["replay"]["added"] == 400
    assert [saved["optimizers"][name]["state"][0]["step"].item() for name in ("critic", "policy", "alpha")] == [80, 26, 26]


def test_every_scalar_is_in_the_glossary(cli, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert cli(*SHORT, "--target-networks")[0] == 0
    events = EventAccumulator(str(run_dirs(tmp_path)[0])).Reload()
    written = set(events.Tags()["scalars"]) | {"charts/steps_per_second"}  # written only by longer runs
    assert {tag.split("/")[0] for tag in written} == {"charts", "losses", "diag", "eval"}
    readme = (omad.Path(omad.__file__).parent / "README.md").read_text()
    assert [tag for tag in sorted(written) if f"`{tag}`" not in readme] == []


def test_replay_holds_true_final_observations_and_no_terminations(cli, tmp_path):
    assert cli(*SHORT, "--eval-every", "200")[0] == 0
    data = torch.load(run_dirs(tmp_path)[0] / "checkpoint.pt", weights_only=True)["replay"]["data"]
    assert not data["terminated"].any()  # this task only ever truncates
    assert torch.equal(data["state"], data["obs"].flatten(1)) and torch.equal(data["next_state"], data["next_obs"].flatten(1))
    follows = (data["next_obs"][:-4] == data["obs"][4:]).flatten(1).all(1)  # with 4 environments, row t + 4 comes after row t
    breaks = (~follows).nonzero().flatten() // 4 + 1
    assert set(breaks.tolist()) == {25, 50, 75}  # the episode's last row does not lead to the next episode's first
    moved = data["next_obs"] - data["obs"]
    np.testing.assert_allclose(moved[..., 2:4], 0.1 * data["obs"][..., :2], atol=1e-5)  # position after = position + 0.1 velocity


def test_same_seed_same_run_and_another_seed_another(cli, tmp_path):
    for seed in (3, 3, 4):
        assert cli(*SHORT, "--seed", seed)[0] == 0
    one, two, other = run_dirs(tmp_path)
    assert rows(one) == rows(two) != rows(other)
    assert all(torch.equal(value, weights(two)[name]) for name, value in weights(one).items())


def test_evaluation_does_not_disturb_training(cli, tmp_path, monkeypatch):
    """Other evaluation episodes, or none at all: the same networks at the end."""
    for episodes in (1, 5):
        assert cli(*SHORT, "--eval-episodes", episodes)[0] == 0
    monkeypatch.setattr(omad, "evaluate", lambda agent, envs, seed: np.zeros(1))
    assert cli(*SHORT)[0] == 0
    first, *others = (weights(run) for run in run_dirs(tmp_path))
    assert all(torch.equal(value, other[name]) for other in others for name, value in first.items())


@pytest.mark.parametrize("flags", [("--policy", "gaussian"), ("--env-id", "mpe_simple_speaker_listener"), ("--no-autotune",)])
def test_variants_learn_and_stay_finite(cli, tmp_path, flags):
    assert cli(*SHORT, *flags)[0] == 0
    assert all(value.isfinite().all() for value in weights(run_dirs(tmp_path)[0]).values())


# --- resume and evaluate ---


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """An uninterrupted run of 1200 steps, with a replay that overflows, to compare killed ones with."""
    folder = tmp_path_factory.mktemp("whole")
    assert omad.main([*LONGER, "--run-dir", str(folder)]) == 0
    return run_dirs(folder)[0]


LONGER = [*SHORT, "--total-timesteps", "1200", "--buffer-size", "500"]


@pytest.mark.parametrize("rows_before", [1, 5])
def test_resume_after_sigkill_equals_the_uninterrupted_run(start, cli, tmp_path, whole_run, rows_before):
    process = start(*LONGER, "--run-dir", tmp_path)
    deadline = time.time() + 60
    while time.time() < deadline and not (any(tmp_path.glob("*/eval.csv")) and len(rows(run_dirs(tmp_path)[0])) >= rows_before):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    (run,) = run_dirs(tmp_path)
    assert rows_before <= len(rows(run)) < len(rows(whole_run))  # it was killed in the middle
    code, _, err = cli("--resume", run, run_dir=False)
    assert code == 0, err
    assert rows(run) == rows(whole_run)
    a, b = (torch.load(path / "checkpoint.pt", weights_only=True) for path in (run, whole_run))
    for part in ("agent", "replay"):
        pairs = (a[part], b[part]) if part == "agent" else (a[part]["data"], b[part]["data"])
        assert all(torch.equal(value, pairs[1][name]) for name, value in pairs[0].items())
    assert a["updates"] == b["updates"] and torch.equal(a["generator"], b["generator"])


@pytest.mark.parametrize("flags", [("--target-networks",), ("--policy", "gaussian")])
def test_resume_from_every_checkpoint_equals_the_uninterrupted_run(cli, tmp_path, monkeypatch, flags):
    """Interrupted right after each checkpoint in turn, within one process."""
    assert cli(*SHORT, *flags)[0] == 0
    (whole,) = run_dirs(tmp_path)
    finish, count = omad.Run.evaluate_and_save, 0

    def then_stop(self, envs):
        finish(self, envs)
        raise KeyboardInterrupt

    monkeypatch.setattr(omad.Run, "evaluate_and_save", then_stop)
    assert cli(*SHORT, *flags)[0] == 130
    run = next(path for path in run_dirs(tmp_path) if path != whole)
    while len(rows(run)) < len(rows(whole)):
        code, _, err = cli("--resume", run, run_dir=False)
        assert code == 130, err
        count += 1
    assert count == 4 and rows(run) == rows(whole)
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(run).items())


def test_resume_of_a_run_killed_before_its_first_checkpoint(cli, tmp_path):
    assert cli(*SHORT)[0] == 0
    (run,) = run_dirs(tmp_path)
    want = rows(run)
    for path in run.iterdir():
        if path.name != "config.json":
            path.unlink()
    code, _, err = cli("--resume", run, run_dir=False)
    assert code == 0, err
    assert rows(run) == want


def test_a_finished_run_can_be_made_longer(cli, tmp_path):
    assert cli(*SHORT)[0] == 0
    (run,) = run_dirs(tmp_path)
    assert cli("--resume", run, "--total-timesteps", "600", run_dir=False)[0] == 0
    assert [row["step"] for row in rows(run)] == ["0", "100", "200", "300", "400", "500", "600"]


def test_a_run_killed_while_finishing_is_finished_by_resume(cli, tmp_path):
    """Also when the last step is beyond the total, because 4 environments step together; and the video is still wanted."""
    pytest.importorskip("moviepy")
    assert cli(*SHORT, "--total-timesteps", "398", "--capture-video")[0] == 0
    (run,) = run_dirs(tmp_path)
    (run / "curve.png").unlink()
    for video in (run / "videos").iterdir():
        video.unlink()
    code, _, err = cli("--resume", run, run_dir=False)
    assert code == 0, err
    assert (run / "curve.png").exists() and len(list((run / "videos").glob("*.mp4"))) == 4
    for video in (run / "videos").iterdir():
        video.unlink()
    assert cli("--evaluate", run, run_dir=False)[0] == 0
    assert not list((run / "videos").iterdir())  # this command did not ask for one
    assert [row["step"] for row in rows(run)] == ["0", "100", "200", "300", "400"]


def test_evaluate_repeats_the_last_evaluation(cli, tmp_path):
    assert cli(*SHORT)[0] == 0
    (run,) = run_dirs(tmp_path)
    before = sorted((p.name, p.stat().st_mtime_ns) for p in run.iterdir())
    code, out, _ = cli("--evaluate", run, run_dir=False)
    last = rows(run)[-1]
    assert code == 0 and f"{float(last['return_mean']):.2f} ± {float(last['return_std']):.2f} over 3 episodes" in out
    assert before == sorted((p.name, p.stat().st_mtime_ns) for p in run.iterdir())  # nothing is written
    assert cli("--evaluate", run, "--seed", "9", "--eval-episodes", "7", run_dir=False)[1] != out


def test_evaluate_with_fewer_denoising_steps(cli, tmp_path):
    assert cli(*SHORT)[0] == 0
    (run,) = run_dirs(tmp_path)
    shown = [cli("--evaluate", run, "--denoising-steps", k, run_dir=False)[1] for k in (3, 2, 1)]
    assert [f"{k} denoising steps" in out for k, out in zip((3, 2, 1), shown)] == [True] * 3
    assert shown[0] == cli("--evaluate", run, run_dir=False)[1]  # 3 is what it was trained with
    assert len({out.partition("return")[2] for out in shown}) == 3
    code, _, err = cli("--resume", run, "--denoising-steps", 2, run_dir=False)
    assert code == 2 and "--denoising-steps" in err
    assert cli(*SHORT, "--policy", "gaussian")[0] == 0
    code, _, err = cli("--evaluate", run_dirs(tmp_path)[1], "--denoising-steps", 2, run_dir=False)
    assert code == 2 and one_line(err) and "--denoising-steps" in err


def test_video(cli, tmp_path):
    imageio = pytest.importorskip("imageio")
    assert cli(*SHORT)[0] == 0
    (run,) = run_dirs(tmp_path)
    assert cli("--evaluate", run, "--capture-video", run_dir=False)[0] == 0
    videos = sorted((run / "videos").glob("*.mp4"))
    frames = np.stack([frame for frame in imageio.get_reader(videos[0]).iter_data()])
    assert len(videos) == 4 and frames.shape == (26, 700, 700, 3)
    assert frames.std() > 5 and np.abs(frames[0].astype(int) - frames[-1]).max() > 50  # something is drawn, and it moves


@pytest.mark.slow
def test_video_of_a_robot(cli, tmp_path):
    """Without a screen: mujoco renders through EGL, in software if it must."""
    imageio = pytest.importorskip("imageio")
    flags = [*SHORT, "--env-id", "mamujoco_reacher_2x1", "--eval-every", "200", "--capture-video"]
    code, out, err = cli(*flags)
    assert code == 0, err
    videos = sorted((run_dirs(tmp_path)[0] / "videos").glob("*.mp4"))
    frames = np.stack([frame for frame in imageio.get_reader(videos[0]).iter_data()])
    assert len(videos) == 4 and len(frames) == 51 and frames.std() > 5 and np.abs(frames[0].astype(int) - frames[-1]).max() > 50


def test_resume_and_evaluate_refuse_what_would_change_the_run(cli, tmp_path):
    assert cli(*SHORT)[0] == 0
    (run,) = run_dirs(tmp_path)
    files = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    for flags in (
        ("--resume", run, "--gamma", "0.5"),
        ("--evaluate", run, "--policy", "gaussian"),
        ("--resume", run, "--total-timesteps", "200"),
        ("--resume", run, "--evaluate", run),
    ):
        code, _, err = cli(*flags, run_dir=False)
        assert code == 2 and one_line(err) and flags[2] in err
    assert files == {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}


# --- help and bad input ---


def help_entries(capsys, *flags):
    """--help as {flag: its text}."""
    with pytest.raises(SystemExit) as stop:
        omad.main(["--help", *flags])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    names = [omad._flag(field.name) for field in dataclasses.fields(omad.Args)]
    starts = sorted((re.search(rf" {name}(,| (?=[A-Z{{]))", text).end(), name) for name in names)  # not where a text mentions it
    return {name: text[at:end] for (at, name), (end, _) in zip(starts, [*starts[1:], (None, "")])}


@pytest.mark.parametrize("env_id", list_tasks())
def test_help_shows_the_task_s_defaults(capsys, env_id):
    shown = help_entries(capsys, "--env-id", env_id)
    args = dataclasses.asdict(omad.preset(env_id))
    assert args["env_id"] == env_id
    for name, value in args.items():
        entry = shown[omad._flag(name)].replace("'", "")  # some words stand in quotes
        assert f"(default: {value})" in entry, name


def test_every_flag_is_documented(capsys):
    for name, entry in help_entries(capsys).items():
        words = re.sub(r"\(default.*?\)|\{.*?\}|--\S+|[A-Z_]{3,}", "", entry).split()
        assert len(words) >= 2, (name, entry)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--env-id", "mpe_simple_spred"], ["mpe_simple_spred", "mpe_simple_spread"]),
        (["--env-id"], ["--env-id"]),
        (["--total-timestep", "5"], ["--total-timestep", "--total-timesteps"]),
        (["spread"], ["spread"]),
        (["--seed", "x"], ["--seed", "x"]),
        (["--policy", "gausian"], ["gausian", "gaussian"]),
        (["--gamma", "1.5"], ["--gamma", "1.5"]),
        (["--gamma", "nan"], ["--gamma", "nan"]),
        (["--seed", "-1"], ["--seed", "-1"]),
        (["--batch-size", "0"], ["--batch-size", "0"]),
        (["--v-min", "5", "--v-max", "5"], ["--v-min", "--v-max"]),
        (["--updates-per-step", "0.3"], ["--updates-per-step", "whole"]),
        (["--learning-starts", "100000"], ["--learning-starts", "--total-timesteps"]),
        (["--buffer-size", "4"], ["--buffer-size", "--num-envs"]),
        (["--device", "tpu"], ["--device", "tpu"]),
        (["--eval-every", "100"], ["--eval-every", "200", "episode"]),
        (["--policy-lr", "inf"], ["--policy-lr", "inf"]),
        (["--batch-size", "1000000000000"], ["--batch-size"]),
        (["--run-dir", ""], ["--run-dir"]),
        (["--run-dir="], ["--run-dir"]),
        (["--buffer-size", "100000000000", "--total-timesteps", "100000000000"], ["replay", "cannot be made"]),
        (["--list-tasks", "--bogus", "3"], ["--bogus"]),
        (["--list-tasks", "--env-id", "nope"], ["nope"]),
        (["--observation", ""], ["--observation"]),
        (["--observation", "k\n1"], ["--observation"]),
        (["--resume", "nowhere"], ["nowhere"]),
        (["--resume", ""], ["--resume"]),
        (["--evaluate", "nowhere"], ["nowhere"]),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(cli, tmp_path, flags, words):
    code, out, err = cli(*flags, run_dir="--run-dir" not in flags[0])
    assert code == 2 and one_line(err) and not out, err
    assert all(word in err for word in words), err
    assert list(tmp_path.iterdir()) == []


def test_errors_are_plain_where_the_terminal_could_show_boxes(start):
    for flags in (("--seed", "x"), ("--policy", "gausian")):
        process = start(*flags, env=os.environ | {"PYTHONIOENCODING": "utf-8", "FORCE_COLOR": "1"})
        out, err = process.communicate(timeout=60)
        assert process.returncode == 2 and one_line(err) and flags[1] in err and not out


def test_a_machine_without_git(cli, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert cli(*SHORT)[0] == 0
    assert json.loads((run_dirs(tmp_path)[0] / "config.json").read_text())["git_revision"] == "unknown"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_where_there_is_none(cli, tmp_path):
    code, _, err = cli(*SHORT[:-2], "--device", "cuda")
    assert code == 2 and one_line(err) and "CUDA" in err and list(tmp_path.iterdir()) == []


def test_a_run_dir_that_cannot_be_written(cli, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", "/proc/nothing"):
        code, out, err = cli(*SHORT, "--run-dir", folder, run_dir=False)
        assert code == 2 and one_line(err) and str(folder) in err


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_bad_checkpoints(cli, tmp_path):
    assert cli(*SHORT)[0] == 0
    (run,) = run_dirs(tmp_path)
    path, proof = run / "checkpoint.pt", tmp_path / "executed"
    good = torch.load(path, weights_only=True)
    content = path.read_bytes()
    assert len(content) > 2000

    def bad(change, commands=("--evaluate", "--resume")):
        change()
        for command in commands:
            code, _, err = cli(command, run, run_dir=False)
            assert code == 2 and one_line(err) and "checkpoint.pt" in err, err

    bad(lambda: path.write_bytes(content[: len(content) // 2]))
    bad(lambda: path.write_bytes(b""))
    bad(lambda: path.write_bytes(b"not a checkpoint"))
    bad(lambda: torch.save({"model": torch.zeros(3)}, path))
    bad(lambda: torch.save([1, 2], path))
    bad(lambda: torch.save(Hostile(proof), path))
    bad(lambda: torch.save(good | {"args": good["args"] | {"policy_hidden": 32}}, path))
    bad(lambda: torch.save(good | {"args": good["args"] | {"env_id": "elsewhere"}}, path))
    bad(lambda: torch.save(good | {"args": good["args"] | {"gamma": "high"}}, path))
    bad(lambda: torch.save(good | {"args": {"speed": 3}}, path))
    bad(lambda: torch.save(good | {"args": good["args"] | {"num_envs": 4.0}}, path))
    bad(lambda: torch.save(good | {"args": good["args"] | {"device": "tpu"}}, path))
    bad(lambda: torch.save(good | {"step": "abc"}, path))
    bad(lambda: torch.save(good | {"step": -50}, path))
    bad(lambda: torch.save(good | {"args": good["args"] | {"policy_hidden": 10**6}}, path), ["--evaluate"])
    bad(lambda: torch.save({k: v for k, v in good.items() if k != "agent"}, path))
    bad(lambda: torch.save(good | {"format": "omad-1"}, path))
    momenta = copy.deepcopy(good["optimizers"])
    next(iter(momenta["policy"]["state"].values()))["exp_avg"] = torch.zeros(2)  # fused Adam would write out of bounds
    partial = copy.deepcopy(good["optimizers"])
    del next(iter(partial["critic"]["state"].values()))["exp_avg"]
    for change in ({"optimizers": momenta}, {"optimizers": partial}, {"optimizers": {}}, {"rows": [1]}, {"rows": [{"x": 1}]}, {"seconds": "x"}, {"updates": None},
                   {"replay": good["replay"] | {"added": 10**18}}, {"replay": good["replay"] | {"added": "x"}}):  # fmt: skip
        bad(lambda: torch.save(good | change, path), ["--resume"])
    assert not proof.exists()
    path.unlink()
    (run / "config.json").write_text("{}")
    assert cli("--resume", run, run_dir=False)[0] == 2


def test_full_disk_keeps_the_last_good_checkpoint(start, cli, tmp_path):
    """A file-size limit between the size of the first checkpoint and that of a later one, whose replay has grown."""
    longer = [*SHORT, "--total-timesteps", "4000", "--eval-every", "1000"]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_200_000, 1_200_000))
    process = start(*longer, "--run-dir", tmp_path, preexec_fn=limit)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 3 and one_line(err) and "checkpoint.pt" in err and "File too large" in err and "kept" in err, err
    (run,) = run_dirs(tmp_path)
    assert torch.load(run / "checkpoint.pt", weights_only=True)["step"] >= 0 and not list(run.glob("*.tmp"))
    code, _, err = cli("--resume", run, run_dir=False)  # with space again it goes on
    assert code == 0, err
    assert [row["step"] for row in rows(run)] == ["0", "1000", "2000", "3000", "4000"]


def test_non_finite_loss_stops_and_saves(cli, tmp_path):
    code, _, err = cli(*SHORT, "--q-lr", "1e12")
    (run,) = run_dirs(tmp_path)
    assert code == 3 and one_line(err) and re.search(r"step \d+: losses/critic is (nan|inf)", err), err
    assert torch.load(run / "failed.pt", weights_only=True)["step"] > 0
    saved = torch.load(run / "checkpoint.pt", weights_only=True)
    assert all(value.isfinite().all() for value in saved["agent"].values())  # the last good one


def test_non_finite_action_stops_and_saves(cli, tmp_path, monkeypatch):
    act = omad.OMAD.act
    monkeypatch.setattr(omad.OMAD, "act", lambda self, obs, g: act(self, obs, g) * (np.nan if len(obs) == 4 else 1))
    code, _, err = cli(*SHORT)  # 4 environments in training, 3 in evaluation
    assert code == 3 and one_line(err) and re.search(r"step 80: action is not finite", err), err
    assert (run_dirs(tmp_path)[0] / "failed.pt").exists()


def test_non_finite_action_in_evaluation(cli, tmp_path, monkeypatch):
    assert cli(*SHORT)[0] == 0
    (run,) = run_dirs(tmp_path)
    monkeypatch.setattr(omad.OMAD, "act", lambda self, obs, g: np.full((len(obs), 3, 2), np.nan))
    code, _, err = cli("--evaluate", run, run_dir=False)
    assert code == 3 and one_line(err) and "action in evaluation is not finite" in err
    code, _, err = cli(*SHORT)
    assert code == 3 and one_line(err) and "step 0: action in evaluation is not finite" in err and "last good" not in err


def test_non_finite_networks_do_not_replace_the_last_good_checkpoint(cli, tmp_path, monkeypatch):
    evaluate, calls = omad.evaluate, []

    def then_break(agent, envs, seed):
        returns = evaluate(agent, envs, seed)
        calls.append(seed)
        if len(calls) == 3:
            agent.critic.out.weight.data[0, 0, 0] = torch.nan  # as a bad last optimiser step would leave it
        return returns

    monkeypatch.setattr(omad, "evaluate", then_break)
    code, _, err = cli(*SHORT)
    assert code == 3 and one_line(err) and "step 200: a parameter" in err
    assert torch.load(run_dirs(tmp_path)[0] / "checkpoint.pt", weights_only=True)["step"] == 100


def test_interrupt_says_how_to_go_on(cli, tmp_path, monkeypatch):
    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(omad.Run, "progress", interrupt)
    code, out, err = cli(*SHORT)
    assert code == 130 and "--resume" in err and str(run_dirs(tmp_path)[0]) in out
