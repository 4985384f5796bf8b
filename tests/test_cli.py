"""Both programs as a user types them: runs, --resume, --evaluate, --help, bad input, and what goes wrong on the way."""

import csv
import dataclasses
import importlib.util
import json
import math
import os
import re
import runpy
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import common.envs
import dom2
import omad
from common.datasets import NAMES
from common.envs import list_tasks, versions
from conftest import ROOT, SHORT, caller, contents, equal, load, one_line, refusal, rows, wait

AGENT = {"omad": omad.OMAD, "dom2": dom2.DOM2}
OTHER = {"omad": "dom2", "dom2": "omad"}
HEAD = {"omad": "step,wall_time_s,return_mean,return_std,episodes"}
HEAD["dom2"] = HEAD["omad"] + ",normalized_score"


def shown(run, table=None):
    """How a program prints the last evaluation of a run."""
    last = (table or rows(run))[-1]
    return f"{float(last['return_mean']):.2f} ± {float(last['return_std']):.2f} over {last['episodes']} episodes"


def films(monkeypatch, program):
    """The folders into which videos would go from now on; none is made."""
    folders = []
    for module in (program.module, common.envs):
        monkeypatch.setattr(module, "record_video", lambda act, env_id, folder, *_, **__: folders.append(Path(folder)))
    return folders


# --- a whole run ---


def test_a_run_as_it_is_typed(program):
    """What a run prints and leaves behind."""
    run, out = program.whole, program.out
    assert "Traceback" not in out and "Warning" not in out
    for word in ("task ", " on cpu", f"tensorboard --logdir {run.parent.name}", "done in ", str(run)):
        assert word in out
    steps = list(range(0, program.length + 1, program.every))
    assert [f"{step}: return" in out for step in steps] == [True] * 5
    assert re.fullmatch(rf".*__{program.name}__1__\d{{8}}-\d{{6}}-\d{{6}}", run.name)
    files = {path.name for path in run.iterdir() if not path.name.startswith((".", "events.out.tfevents."))}
    assert files == {"config.json", "eval.csv", "policy.pt", "checkpoint.pt", "curve.png"}
    assert (run / "curve.png").read_bytes().startswith(b"\x89PNG") and list(run.glob("events.out.tfevents.*"))
    config = json.loads((run / "config.json").read_text())
    assert config["args"]["policy_hidden"] == 16 and config["packages"]["torch"] and config["git_revision"]
    assert set(config["args"]) == {field.name for field in dataclasses.fields(program.module.Args)}
    assert (run / "eval.csv").read_text().splitlines()[0] == HEAD[program.name]
    table = list(csv.DictReader((run / "eval.csv").open()))
    assert [int(row["step"]) for row in table] == steps
    assert len({row["return_mean"] for row in table}) == 5 and all(float(row["return_std"]) > 0 for row in table)
    times = [float(row["wall_time_s"]) for row in table]
    assert times == sorted(times) and 0 < times[-1] < 60
    if program.name == "dom2":
        score = 100 * (float(table[-1]["return_mean"]) - 159.8) / (516.8 - 159.8)
        assert float(table[-1]["normalized_score"]) == pytest.approx(score)


def test_updates_are_as_many_as_asked_for(program):
    """omad.py: one for every fourth step after the first 84, and the policies with every third."""
    adams = load(program.whole / "checkpoint.pt")["adams"]
    done = [next(iter(adam.get("state", adam).values()))["step"].item() for adam in adams]
    assert sorted(done) == {"omad": [26, 26, 79], "dom2": [40, 40]}[program.name]


def test_tensorboard_has_every_evaluation_and_the_glossary_every_scalar(program):
    events = EventAccumulator(str(program.whole)).Reload()
    written = set(events.Tags()["scalars"])
    assert {tag.split("/")[0] for tag in written} == {"charts", "losses", "diag", "eval"} and len(written) >= 13
    glossary = (ROOT / "runs" / f"{program.name}.md").read_text()
    assert [tag for tag in sorted(written) if f"`{tag}`" not in glossary] == []
    for column in ("return_mean", "return_std", "normalized_score") if program.name == "dom2" else ("return_mean",):
        all_evaluations_are_in_tensorboard(program.whole, column)


def all_evaluations_are_in_tensorboard(run, column="return_mean"):
    curve = {event.step: event.value for event in EventAccumulator(str(run)).Reload().Scalars(f"eval/{column}")}
    want = {int(row["step"]): float(row[column]) for row in rows(run)}
    assert {step: curve.get(step) for step in want} == pytest.approx(want, rel=1e-5)


def test_the_same_seed_is_the_same_run_and_another_seed_another(program):
    assert program.call(*program.flags)[0] == 0 and program.call(*program.flags, "--seed", 2)[0] == 0
    same, other = program.runs()
    assert rows(same) == rows(program.whole) != rows(other)
    (a, b, c) = (load(run / "checkpoint.pt") for run in (same, program.whole, other))
    assert equal(a, b) and not equal(a["agent"], c["agent"])


def test_evaluation_does_not_disturb_training(program):
    assert program.call(*program.flags, "--eval-episodes", 1)[0] == 0
    (run,) = program.runs()
    assert rows(run) != rows(program.whole)
    assert equal(*(load(path / "checkpoint.pt")["agent"] for path in (run, program.whole)))


def test_a_machine_without_git(tmp_path, monkeypatch):
    assert versions()["git_revision"] != "unknown" or not (ROOT / ".git").exists()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert versions()["git_revision"] == "unknown"


# --- resume ---


MOMENTS = (  # where a run dies, and how many rows of eval.csv it has by then; each time it is then resumed
    ("evaluate 1", 0),
    ("write policy.pt 1", 0),
    ("write checkpoint.pt 1", 0),  # there is a policy, but no checkpoint
    ("write eval.csv 1", 0),  # there is a checkpoint, but no evaluation
    ("update 3", 1),
    ("save checkpoint.pt 2", 1),  # in the middle of that file
    ("write checkpoint.pt 3", 2),  # the policy is newer than the checkpoint
    ("update 5", 2),
    ("evaluate 2", 3),
    ("write curve.png 1", 5),
)


def test_a_run_killed_again_and_again_is_the_uninterrupted_one(program, start, monkeypatch):
    """SIGKILL at every kind of moment: exactly the same evaluations, networks, replay and random state in the end."""
    flags = [*program.flags, *(["--buffer-size", "150", "--tau", "0.01"] if program.name == "omad" else [])]
    videos = films(monkeypatch, program)
    assert program.call(*flags, "--capture-video")[0] == 0
    (whole,) = program.runs()
    command = [*flags, "--capture-video", "--run-dir", program.folder]
    for moment, count in MOMENTS:
        process = start(program.name, command, moment)
        process.join(60)
        assert process.exitcode == -signal.SIGKILL, (moment, (process.folder / "err").read_text())
        (run,) = (path for path in program.runs() if path != whole)
        assert (len(rows(run)) if (run / "eval.csv").exists() else 0) == count, moment
        command = ["--resume", run]
    assert not (run / "curve.png").exists()
    code, _, err = program.call("--resume", run, run_dir=False)
    assert code == 0, err
    assert rows(run) == rows(whole) and equal(*(load(path / "checkpoint.pt") for path in (run, whole)))
    assert equal(*(load(path / "policy.pt")["policy"] for path in (run, whole)))
    all_evaluations_are_in_tensorboard(run)
    assert (run / "curve.png").exists() and not list(run.glob("unfinished*"))
    assert videos == [whole / "videos", run / "videos"]  # it is still wanted


def test_evaluations_are_in_tensorboard_before_a_checkpoint_has_them(program, monkeypatch):
    """Else a run killed right after the checkpoint would never write them: TensorBoard's writer works in a thread."""
    order, write, writer = [], program.module.write, program.module.SummaryWriter
    monkeypatch.setattr(program.module, "write", lambda path, dump: order.append(path.name) or write(path, dump))
    for name in ("add_scalar", "flush"):
        own = getattr(writer, name)
        monkeypatch.setattr(writer, name, lambda *args, own=own: order.append((own.__name__, *args[1:2])) or own(*args))
    assert program.call(*program.flags)[0] == 0
    waiting, saved = set(), 0
    for what in order:
        waiting = set() if what == ("flush",) else waiting | {what[1]} if what[0] == "add_scalar" else waiting
        saved += what == "checkpoint.pt"
        assert what != "checkpoint.pt" or not {name for name in waiting if name.startswith("eval/")}
    assert saved == 5 and any(what[1].startswith("eval/") for what in order if what[0] == "add_scalar")


@pytest.mark.parametrize("decay", [True, False])
def test_learning_rates_fall_along_half_a_cosine(decay, program, monkeypatch):
    rates, learner = [], omad.OMAD if program.name == "omad" else dom2.DOM2
    update = learner.update

    def spy(self, *drawn):
        rates.append([adam.param_groups[0]["lr"].item() for adam in (self.policy_adam, self.critic_adam)])
        before = [p.clone() for p in self.critic.parameters()]
        logs = update(self, *drawn)
        moved = max((p - q).abs().max().item() for p, q in zip(self.critic.parameters(), before))
        assert 0.1 < moved / rates[-1][1] < 10  # the optimiser does use them
        return logs

    monkeypatch.setattr(learner, "update", spy)
    word = "--lr-decay" if decay else "--no-lr-decay"
    code, _, err = program.call(*program.flags, "--policy-lr", 0.01, "--q-lr", 0.02, word)
    steps = np.arange(84, 400, 4) if program.name == "omad" else np.arange(40)  # OMAD updates once in four steps
    shares = (1 + np.cos(np.pi * steps / program.length)) / 2 if decay else np.ones(len(steps))
    assert code == 0 and np.array(rates) == pytest.approx(np.outer(shares, [0.01, 0.02])), err


def test_a_finished_run_can_be_made_longer(program):
    """And is what it would have been with constant rates, also if its last step went beyond its total, for four
    environments step at once."""
    length = program.length + 2 * program.every
    flags = [*program.flags, *(["--no-lr-decay"] if program.name == "dom2" else [])]
    assert program.call(*flags, program.total, length)[0] == 0
    assert program.call(*flags, program.total, program.length - 2 * (program.name == "omad"))[0] == 0
    long, run = program.runs()
    code, _, err = program.call("--resume", run, program.total, length, run_dir=False)
    assert code == 0, err
    assert rows(run) == rows(long) and equal(*(load(path / "checkpoint.pt")["agent"] for path in (run, long)))
    assert json.loads((run / "config.json").read_text())["args"][program.total[2:].replace("-", "_")] == length


def test_a_directory_has_one_trainer_at_a_time(program, start):
    """Neither a run that still trains nor one that is being resumed can be resumed beside it; a killed one can."""
    command = [*program.flags, "--run-dir", program.folder]
    for _ in range(2):
        process = start(program.name, command, "update 5", wait)
        deadline = time.time() + 60
        while time.time() < deadline and process.is_alive() and not (process.folder / "waiting").exists():
            time.sleep(0.01)
        assert (process.folder / "waiting").exists(), (process.folder / "err").read_text()
        (run,) = program.runs()
        before = contents(run)
        assert refusal(program.call("--resume", run, run_dir=False), run)
        assert process.is_alive() and contents(run) == before
        assert program.call("--evaluate", run, run_dir=False)[0] == 0  # it only reads
        process.kill()
        process.join()
        command = ["--resume", run]
    code, _, err = program.call("--resume", run, run_dir=False)
    assert code == 0, err
    assert rows(run) == rows(program.whole)
    longer = program.length + program.every
    assert program.call("--resume", run, program.total, longer, run_dir=False)[0] == 0  # again, in the same process


def test_resume_and_evaluate_refuse_what_would_change_the_run(program):
    run = program.copy()
    before = contents(run)
    for *flags, word in (
        ("--resume", run, "--gamma", 0.5, "--gamma"),
        ("--resume", run, program.steps, 2, program.steps),
        ("--resume", run, "--seed", 2, "--seed"),
        ("--resume", run, program.total, program.length // 2, program.total),
        ("--resume", run, "--evaluate", run, "--evaluate"),
        ("--evaluate", run, "--policy-hidden", 32, "--policy-hidden"),
        ("--evaluate", run / "policy.pt", "--gamma", 0.5, "--gamma"),
    ):
        assert refusal(program.call(*flags, run_dir=False), word), flags
    assert contents(run) == before


def test_a_run_that_has_lost_its_checkpoint_is_not_run_over(program):
    """Its evaluations would be gone."""
    run = program.copy()
    (run / "checkpoint.pt").unlink()
    before = contents(run)
    assert refusal(program.call("--resume", run, run_dir=False), run, "checkpoint.pt")
    assert contents(run) == before


@pytest.mark.parametrize(
    "path",
    [
        "spread/mpe_simple_spread/gaussian/*__1__*",
        "robots/mamujoco_halfcheetah_2x3/diffusion/*__1__*",
        "offline/omar_simple_spread-medium/dom2/*__1__*",
    ],
)
def test_committed_results_are_not_run_over(path, tmp_path, capsys):
    """They have neither checkpoint.pt nor policy.pt. Today's flags or yesterday's: nothing there is touched."""
    (committed,) = (ROOT / "runs" / "results").glob(path)
    ignored = shutil.ignore_patterns("*.pt", ".lock", "events*")  # on the disk on which it was made
    run = shutil.copytree(committed, tmp_path / committed.name, ignore=ignored)
    before, module = contents(run), dom2 if "__dom2__" in run.name else omad
    for flag in ("--evaluate", "--resume"):
        assert refusal(caller(module.main, tmp_path, capsys)(flag, run, run_dir=False), run)
    (run / ".lock").unlink(missing_ok=True)  # all that --resume may leave
    assert contents(run) == before


@pytest.mark.parametrize("parts", ["all", "config.json", "policy.pt"])
def test_a_run_of_the_other_program(program, finished, tmp_path, parts):
    run = shutil.copytree(finished[OTHER[program.name]][0], tmp_path / "other")
    for path in run.iterdir() if parts != "all" else ():
        if path.name != parts:
            path.unlink()
    before = contents(run)
    for flag in ("--evaluate", "--resume"):
        assert refusal(program.call(flag, run, run_dir=False), run), flag
    assert contents(run) == before


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("flag, name", [("--resume", "checkpoint.pt"), ("--evaluate", "policy.pt")])
def test_damaged_files_are_refused_and_nothing_in_them_is_executed(program, tmp_path, flag, name):
    run, proof = program.copy(), tmp_path / "executed"
    path = run / name
    good, content = load(path), path.read_bytes()
    save = partial(torch.save, f=path)
    for damage in (
        lambda: path.write_bytes(content[: len(content) // 2]),
        lambda: path.write_bytes(b""),
        lambda: path.write_bytes(b"not a checkpoint"),
        lambda: save({"model": torch.zeros(3)}),
        lambda: save([1, 2]),
        lambda: save(Hostile(proof)),
        lambda: save(good | {"step": Hostile(proof)}),
        lambda: save(good | {"format": f"{program.name}-1"}),
        path.unlink,
    ):
        damage()
        before = contents(run)
        assert refusal(program.call(flag, run, run_dir=False), path)
        assert not proof.exists() and contents(run) == before
    torch.load(save(Hostile(proof)) or path, weights_only=False)
    assert proof.exists()  # it would have been executed


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"args": {"speed": 3}}', "\xff"])
def test_a_damaged_config(program, text):
    run = program.copy()
    (run / "config.json").write_text(text, "latin-1")
    before = contents(run)
    assert refusal(program.call("--resume", run, run_dir=False), run / "config.json")
    assert contents(run) == before


# --- evaluate ---


def test_evaluate_repeats_the_last_evaluation(program, tmp_path):
    """Of a run's directory, and of its policy.pt alone, wherever it lies; nothing is written."""
    run, moved = program.copy(), tmp_path / "else=where" / "best.pt"
    moved.parent.mkdir()
    shutil.copy(run / "policy.pt", moved)
    before = contents(tmp_path)
    alone = program.call("--evaluate", moved, run_dir=False)
    assert alone[0] == 0 and shown(run) in alone[1], alone[2]
    assert program.call("--evaluate", run, run_dir=False) == alone
    assert program.call("--evaluate", moved, program.steps, 3, run_dir=False) == alone  # K as trained
    assert contents(tmp_path) == before
    other, changes = {alone[1]}, [["--seed", 9], ["--eval-episodes", 7], [program.steps, 1], [program.steps, 5]]
    changes += [["--no-last-noise"]] if program.name == "omad" else []
    for flags in changes:
        code, out, err = program.call("--evaluate", moved, *flags, run_dir=False)
        assert code == 0 and (flags[0] != "--eval-episodes" or "over 7 episodes" in out), err
        other.add(out)
    assert len(other) == 1 + len(changes)


def test_videos(program, tmp_path):
    """Beside the policy, and only if asked for: four short episodes in which something moves."""
    imageio = pytest.importorskip("imageio")
    (tmp_path / "elsewhere").mkdir()
    policy = tmp_path / "elsewhere" / "policy.pt"
    shutil.copy(program.whole / "policy.pt", policy)
    assert program.call("--evaluate", policy, run_dir=False)[0] == 0
    assert [path.name for path in policy.parent.iterdir()] == ["policy.pt"]
    code, out, err = program.call("--evaluate", policy, "--capture-video", run_dir=False)
    assert code == 0 and shown(program.whole) in out, err
    videos = sorted((policy.parent / "videos").glob("*.mp4"))
    frames = np.stack([frame for frame in imageio.get_reader(videos[0]).iter_data()])
    assert len(videos) == 4 and frames.shape == (26, 700, 700, 3)
    assert frames.std() > 5 and np.abs(frames[0].astype(int) - frames[-1]).max() > 50


def test_videos_go_into_the_run_and_a_run_that_was_filmed_is_not_filmed_again(program, monkeypatch):
    folders = films(monkeypatch, program)
    assert program.call(*program.flags, program.total, program.every, "--capture-video")[0] == 0
    (run,) = program.runs()
    assert program.call("--evaluate", run, run_dir=False)[0] == 0 and folders == [run / "videos"]
    assert program.call("--evaluate", run, "--capture-video", run_dir=False)[0] == 0
    assert folders == [run / "videos"] * 2


def test_videos_without_moviepy_are_refused_before_the_run(program, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "moviepy" else find(name))
    assert refusal(program.call(*program.flags, "--capture-video"), "--capture-video", "moviepy")
    assert not program.folder.exists()


@pytest.mark.slow
def test_video_of_a_robot(cli, tmp_path):
    """Without a screen: mujoco renders through EGL, in software if it must."""
    imageio = pytest.importorskip("imageio")
    flags = (
        "--total-timesteps 400 --num-envs 4 --eval-every 200 --eval-episodes 3 --learning-starts 300 --batch-size 32"
    )
    small = "--updates-per-step 0.25 --policy-hidden 16 --critic-hidden 16 --device cpu --capture-video"
    code, _, err = cli("--env-id", "mamujoco_reacher_2x1", *flags.split(), *small.split())
    assert code == 0, err
    videos = sorted(tmp_path.glob("*__omad__*/videos/*.mp4"))
    frames = np.stack([frame for frame in imageio.get_reader(videos[0]).iter_data()])
    assert len(videos) == 4 and len(frames) == 51
    assert frames.std() > 5 and np.abs(frames[0].astype(int) - frames[-1]).max() > 50


# --- help and lists ---


def help_entries(call, module, *flags):
    """--help as {flag: its text}."""
    code, out, _ = call("--help", *flags, run_dir=False)
    assert code == 0
    text = " ".join(out.replace("│", " ").split())
    names = ["--" + field.name.replace("_", "-") for field in dataclasses.fields(module.Args)]
    starts = sorted((re.search(rf" {name}(,| (?=[A-Z{{]))", text).end(), name) for name in names)  # not in a text
    return {name: text[at:end] for (at, name), (end, _) in zip(starts, [*starts[1:], (None, "")])}


def test_help_shows_the_defaults_of_each_task_or_data_set(program, data):
    flag, names = "--env-id", list_tasks()
    if program.name == "dom2":
        flag, names = "--dataset", [str(data), *NAMES]
    seen = set()
    for name in names:
        args = program.module.preset(name)
        if str(args).replace(name, "") in seen:
            continue
        entries = help_entries(program.call, program.module, flag, name)
        for key, value in dataclasses.asdict(args).items():
            entry = entries["--" + key.replace("_", "-")].replace("'", "").replace(" ", "")  # paths are broken at will
            assert f"(default:{value})".replace(" ", "") in entry, (name, key)
        assert getattr(args, flag[2:].replace("-", "_")) == name
        seen.add(str(args).replace(name, ""))
    assert len(seen) >= 10  # they do differ


def test_every_flag_is_documented(program):
    for name, entry in help_entries(program.call, program.module).items():
        words = re.sub(r"\(default.*?\)|\{.*?\}|--\S+|[A-Z_]{3,}", "", entry).split()
        assert len(words) >= 2, (name, entry)


def test_the_list_of_tasks(cli, tmp_path):
    code, out, err = cli("--list-tasks")
    assert code == 0 and not err and list(tmp_path.iterdir()) == []
    assert {line.split()[0] for line in out.splitlines()} >= set(list_tasks())


def test_the_citation_file_has_the_papers_of_both_programs():
    text = (ROOT / "CITATION.cff").read_text()
    assert "Improving Generalization and Data Efficiency with Diffusion in Offline Multi-agent RL" in text
    assert all(f"https://arxiv.org/abs/{number}" in text for number in ("2602.18291", "2502.02316", "2307.01472"))


# --- how a command line is read ---


@pytest.fixture
def parsed(program, monkeypatch, tmp_path):
    """parsed("--seed", "1"): the `Args` that would be trained with."""
    given = []
    monkeypatch.setattr(program.module, "train", lambda args, *_: given.append(args))

    def read(*argv):
        given.clear()
        code, _, err = program.call(*argv, run_dir=False)
        assert code == 0, err
        return given[0]

    return read


def test_flags_are_over_the_preset_however_they_are_written(program, parsed, data):
    flag, name = ("--env-id", "mpe_simple_line") if program.name == "omad" else ("--dataset", str(data))
    preset = program.module.preset(name)
    for argv in ([flag, name], [f"{flag}={name}"], [f"--{flag[2:].replace('-', '_')}", name]):
        assert parsed(*argv) == preset
        assert parsed(*argv, "--gamma", "0.5") == dataclasses.replace(preset, gamma=0.5) == parsed("--gamma=0.5", *argv)


def test_numbers_with_an_exponent(program, parsed):
    """A whole number is written out; the message names the flag and the value."""
    code, _, err = program.call(*program.flags, program.total, "1e6")
    assert code == 2 and program.total in err and "1e6" in err and not program.runs()
    for word in ("1.5e-3", "2.5e0", "1e1"):
        assert parsed(*program.flags, "--policy-lr", word).policy_lr == float(word)


@pytest.mark.parametrize("folder", ["2026-results", "1e6", "3e"])
def test_names_that_look_like_numbers_stay_names(parsed, program, folder):
    assert parsed(*program.flags, "--run-dir", folder).run_dir == folder


# --- bad input ---


BAD_INPUT = {
    "both": [
        (["--seed", "x"], ["--seed", "'x'"]),
        (["--seed", "-1"], ["--seed"]),
        (["--seed"], ["--seed"]),
        (["--device", "tpu"], ["--device", "tpu"]),
        (["--gamma", "1.5"], ["--gamma"]),
        (["--gamma", "-0.1"], ["--gamma"]),
        (["--gamma", "nan"], ["--gamma"]),
        (["--batch-size", "0"], ["batch-size"]),
        (["--batch-siz", "8"], ["--batch-siz", "--batch-size"]),
        (["--eval-every", "0"], ["eval-every"]),
        (["--policy-lr", "inf"], ["--policy-lr"]),
        (["--q-lr", "nan"], ["--q-lr"]),
        (["--q-lr", "0"], ["--q-lr"]),
        (["--torch-threads", "-1"], ["--torch-threads"]),
        (["--tau", "5"], ["--tau"]),
        (["--observation", "k9"], ["--observation", "k9"]),
        (["--prey", "nothing.pt"], ["--prey", "has no prey"]),
        (["--resume", "nowhere"], ["nowhere"]),
        (["--resume", "nowhere/a=b"], ["nowhere/a=b"]),
        (["--resume", ""], ["--resume"]),
        (["--resume="], ["--resume"]),
        (["--evaluate="], ["--evaluate"]),
        (["--evaluate", "nowhere"], ["nowhere"]),
        (["--evaluate", ""], ["--evaluate"]),
    ],
    "omad": [
        (["--env-id", "mpe_simple_spred"], ["mpe_simple_spred", "mpe_simple_spread"]),
        (["--env-id", "mamujoco_halfcheetah_"], ["mamujoco_halfcheetah_2x3"]),
        (["--env-id", "mamujoco_ant"], ["mamujoco_ant_2x4"]),
        (["--env-id", "mamujoco_manysegmentswimmer_"], ["mamujoco_manysegmentswimmer_10x2"]),
        (["--total-timestep", "5"], ["--total-timestep", "--total-timesteps"]),
        (["--policy", "gausian"], ["gausian", "gaussian"]),
        (["--v-min", "5", "--v-max", "5"], ["--v-min", "--v-max"]),
        (["--v-max", "inf"], ["--v-max"]),
        (["--n-atoms", "1"], ["n-atoms"]),
        (["--alpha", "0"], ["--alpha"]),
        (["--time-power", "0"], ["--time-power"]),
        (["--alpha-lr", "nan"], ["--alpha-lr"]),
        (["--alpha-lr", "-0.001"], ["--alpha-lr"]),
        (["--target-networks"], ["--target-networks"]),
        (["--target-entropy-scale", "inf"], ["--target-entropy-scale"]),
        (["--updates-per-step", "0.3"], ["--updates-per-step", "whole"]),
        (["--updates-per-step", "nan"], ["--updates-per-step"]),
        (["--updates-per-step", "-0.25"], ["--updates-per-step"]),
        (["--learning-starts", "100000"], ["--learning-starts", "--total-timesteps"]),
        (["--buffer-size", "3"], ["--buffer-size", "--num-envs"]),
        (["--eval-every", "50"], ["--eval-every", "100", "episode"]),
        (["--list-tasks", "--bogus", "3"], ["--bogus"]),
        (["--list-tasks", "--env-id", "nope"], ["nope"]),
    ],
    "dom2": [
        (["--dataset", "omar_simple_spred-medium"], ["did you mean omar_simple_spread-medium"]),
        (["--dataset", "nowhere/at/all"], ["nowhere/at/all", "no such folder"]),
        (["--total-update", "5"], ["--total-update", "--total-updates"]),
        (["--policy", "determinstic"], ["determinstic", "deterministic"]),
        (["--policy", "deterministic", "--q-weight", "0"], ["--policy deterministic", "--q-weight"]),
        (["--q-weight", "nan"], ["--q-weight"]),
        (["--data-fraction", "0"], ["--data-fraction"]),
        (["--shift", "speed"], ["--shift", "--evaluate"]),
        (["--top-quantile", "2"], ["--top-quantile"]),
        (["--thresholds", "-1"], ["thresholds"]),
        (["--cql-actions", "1"], ["--cql-actions"]),
    ],
}


@pytest.mark.parametrize(
    "program, flags, words",
    [(name, *case) for name in ("omad", "dom2") for case in [*BAD_INPUT["both"], *BAD_INPUT[name]]],
    indirect=["program"],
)
def test_bad_input_is_refused_and_nothing_is_written(program, tmp_path, monkeypatch, flags, words):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert refusal(program.call(*program.flags, *flags), *words)
    assert [path.name for path in tmp_path.rglob("*")] == ["here"]


def test_words_that_are_not_numbers(program):
    for word in ("1.5", "inf", "nan", "1e-3", "x"):
        assert refusal(program.call(*program.flags, program.total, word), program.total, f"'{word}'"), word


@pytest.mark.parametrize("name, flag", [("mpe_simple_spread", "--env-id"), ("omar_simple_spread-medium", "--dataset")])
def test_a_task_or_a_data_set_without_its_flag(name, flag, tmp_path, capsys):
    module = {"--env-id": omad, "--dataset": dom2}[flag]
    code, out, err = caller(module.main, tmp_path, capsys)(name)
    assert code == 2 and one_line(err, module.__name__) and f"{flag} {name}" in err and not out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_where_there_is_none(program):
    run = program.copy()
    for flags in (program.flags, ["--resume", run], ["--evaluate", run]):
        code, _, err = program.call(*flags, "--device", "cuda", run_dir=False)
        assert code == 2 and one_line(err, program.name) and "--device cuda" in err
    assert program.runs() == [run]


def test_a_run_dir_that_cannot_be_written(program, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", "/proc/nothing"):
        code, _, err = program.call(*program.flags, "--run-dir", folder, run_dir=False)
        assert code == 2 and one_line(err, program.name) and str(folder) in err


# --- what goes wrong on the way ---


def spoil(monkeypatch, program, part, count):
    """After the `count`-th update, one number of that part of the agent is not finite."""
    update, calls = AGENT[program.name].update, []

    def instead(self, *args):
        logs = update(self, *args)
        calls.append(1)
        if len(calls) == count:
            next(getattr(self, part).parameters()).data.flatten()[0] = torch.nan
        return logs

    monkeypatch.setattr(AGENT[program.name], "update", instead)


@pytest.mark.parametrize("part", ["policy", "critic"])
def test_numbers_that_are_not_finite_stop_a_run_and_the_last_good_checkpoint_stays(program, monkeypatch, part):
    """Policies at the next action, critics at the next checkpoint: the second, by the very last update before it."""
    with monkeypatch.context() as patch:
        spoil(patch, program, part, {"omad": 29, "dom2": 20}[program.name])
        code, _, err = program.call(*program.flags)
    (run,) = program.runs()
    assert code == 3 and err.startswith(f"{program.name}.py: failed: ") and len(err.splitlines()) == 1
    assert "finite" in err or "diverged" in err
    for name in ("checkpoint.pt", "policy.pt"):
        assert load(run / name)["step"] == program.every
    assert program.call("--resume", run, run_dir=False)[0] == 0
    assert rows(run) == rows(program.whole)


def test_an_environment_s_number_that_is_not_finite_is_not_learned_from(cli, tmp_path, monkeypatch):
    """It stops the run at once, after 100 steps of training and twice 75 of evaluation, and what is resumed is sound."""
    step, calls = common.envs.TeamEnv.step, []

    def spoiled(self, action):
        result = step(self, action)
        calls.append(1)
        return (result[0], math.nan, *result[2:]) if len(calls) == 300 else result

    with monkeypatch.context() as patch:
        patch.setattr(common.envs.TeamEnv, "step", spoiled)
        code, _, err = cli(*SHORT)
    (run,) = tmp_path.glob("*__omad__*")
    assert code == 3 and "reward" in err and len(err.splitlines()) == 1
    assert load(run / "checkpoint.pt")["replay"].isfinite().all() and cli("--resume", run, run_dir=False)[0] == 0


def test_a_run_that_diverges_by_itself(cli, tmp_path):
    """From learning rates that are far too high."""
    flags = "--total-timesteps 400 --num-envs 4 --eval-every 100 --eval-episodes 1 --learning-starts 100 --batch-size 8"
    sizes = "--updates-per-step 0.25 --policy-hidden 16 --critic-hidden 16 --device cpu --q-lr 1e9 --policy-lr 1e9"
    code, _, err = cli(*flags.split(), *sizes.split())
    assert code == 3 and err.startswith("omad.py: failed: ") and len(err.splitlines()) == 1, err
    (run,) = tmp_path.glob("*__omad__*")
    assert all(value.isfinite().all() for value in load(run / "checkpoint.pt")["agent"].values())


def test_a_policy_that_is_not_finite_cannot_be_evaluated(program):
    run = program.copy()
    saved = load(run / "policy.pt")
    saved["policy"]["out.bias" if program.name == "omad" else "obs2.bias"] += torch.nan
    torch.save(saved, run / "policy.pt")
    code, out, err = program.call("--evaluate", run, run_dir=False)
    assert code == 3 and err.startswith(f"{program.name}.py: failed: ") and "finite" in err and "return" not in out


def test_a_full_disk_keeps_the_last_good_checkpoint(program, start):
    """Files of at most half of what a checkpoint needs."""
    run = program.copy()
    before, length = contents(run), program.length + program.every
    limit = len(before["checkpoint.pt"]) // 2
    process = start(program.name, ["--resume", run, program.total, length], f"limit {limit}")
    process.join(60)
    err = (process.folder / "err").read_text()
    assert process.exitcode == 3 and err.startswith(f"{program.name}.py: failed: ") and "checkpoint.pt" in err, err
    assert len(err.splitlines()) == 1
    assert contents(run)["checkpoint.pt"] == before["checkpoint.pt"]
    code, _, err = program.call("--resume", run, run_dir=False)  # with space again it goes on, as far as was asked for
    assert code == 0, err
    assert rows(run)[:5] == rows(program.whole) and int(rows(run)[-1]["step"]) == length
    assert not list(run.glob("unfinished*"))


def test_an_interrupt_says_how_to_go_on(program, monkeypatch):
    def interrupt(self, *_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(AGENT[program.name], "update", interrupt)
        code, out, err = program.call(*program.flags)
    (run,) = program.runs()
    assert code == 130 and "--resume" in err and str(run) in out and "Traceback" not in err
    assert program.call("--resume", run, run_dir=False)[0] == 0 and rows(run) == rows(program.whole)


@pytest.mark.parametrize("name, flag", [("omad", "--env-id"), ("dom2", "--dataset")])
def test_an_exit_code_reaches_the_shell(name, flag, tmp_path, monkeypatch, capsys):
    """That of a run as it is typed is 0, see `finished`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", flag, "nowhere/at/all"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
    assert stop.value.code == 2 and one_line(capsys.readouterr().err, name) and not list(tmp_path.iterdir())
