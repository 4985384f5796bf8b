"""What the documents say is so: tables and figures, commands, links, labels, sizes."""

import contextlib
import importlib
import re
import shlex
import shutil
import subprocess
import sys

import campaign
import pytest
import report
import tyro
from matplotlib.figure import Figure

import dom2
import omad
from conftest import ROOT, SHORT, caller

DOCUMENTS = sorted(path for path in ROOT.rglob("*.md") if not {".venv", "venv", ".git"} & set(path.parts))
TEXTS = {path: path.read_text() for path in DOCUMENTS}
FENCED = re.compile(r"^ {4,}(python .+?)(?<!\\)$", re.MULTILINE | re.DOTALL)


def commands() -> set[str]:
    """Every `python ...` of the documents: in indented blocks, where a line may go on behind a backslash, and in text."""
    found = set()
    for text in TEXTS.values():
        blocks = [match[1].replace("\\\n", " ") for match in FENCED.finditer(text)]
        blocks += re.findall(r"`(python [^`]+)`", text)
        found |= {" ".join(part.split()) for block in blocks for part in re.split(r"\s+#|&&", block)[:1]}
    return found


def test_there_are_documents_and_commands():
    assert len(DOCUMENTS) >= 7 and len(commands()) > 40


def test_tables_and_figures_are_those_of_the_raw_files(capsys):
    code = report.main(check=True)
    assert code == 0, capsys.readouterr().out


def test_a_table_that_differs_is_found(tmp_path, monkeypatch, capsys):
    for name in report.DOCUMENTS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(TEXTS[ROOT / name])
    text = TEXTS[ROOT / "runs/omad.md"]
    (tmp_path / "runs/omad.md").write_text(
        text.replace("| spread | OMAD | 200,000 |", "| spread | OMAD | 300,000 |", 1)
    )
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "FIGURES", {"x.png": (("runs/*.md",), Figure)})
    monkeypatch.setattr(report, "data_return", lambda dataset: 0.0)  # lies elsewhere, and is not what is looked at here
    monkeypatch.setattr(report, "DOCUMENTS", ("runs/omad.md",))
    assert report.main(check=True) == 1
    assert capsys.readouterr().out == "differs: runs/omad.md\ndiffers: x.png\n"
    assert report.main() == 0 and (tmp_path / "runs/omad.md").read_text() == text
    capsys.readouterr()
    monkeypatch.setattr(report, "FIGURES", {"x.png": (("runs/nothing",), Figure)})
    assert report.main() == 0 and report.main(check=True) == 0  # a picture knows what it shows
    (tmp_path / "runs" / "nothing").write_text("something")
    assert report.main(check=True) == 1


PROGRAMS = {"omad.py": omad, "dom2.py": dom2, "runs/campaign.py": campaign}


@pytest.mark.parametrize("command", sorted(commands()))
def test_every_command_parses(command, finished, monkeypatch):
    words = shlex.split(command)[1:]
    if words[0] in ("omad.py", "dom2.py"):
        run, _ = finished[words[0].removesuffix(".py")]
        words = [str(run) if "RUN" in word else word for word in words]
        monkeypatch.chdir(ROOT)
        with contextlib.suppress(SystemExit) if "--help" in words else contextlib.nullcontext():
            PROGRAMS[words[0]].parse(words[1:])
    elif words[0] == "-m":
        assert words[1] == "pytest" and all((ROOT / word).exists() for word in words[2:] if word.startswith("tests/"))
    elif words[0].endswith(".py"):
        assert (ROOT / words[0]).exists()
        module = importlib.import_module((ROOT / words[0]).stem)
        if hasattr(module, "Options"):
            options = tyro.cli(module.Options, args=words[1:])
            if names := getattr(options, "experiments", ()):
                assert any(all(word in run.name for word in options.only) for run in module.declared(names))
    else:
        raise AssertionError(f"what is {command}?")


SECONDS = [command for command in commands() if re.search("--(help|list-tasks|evaluate|resume)", command)]
SECONDS += ["python runs/campaign.py"]
A_MINUTE = [  # or less; not datasets/convert.py, which needs others' data or packages, and controllers.py takes longer
    "python omad.py --total-timesteps 3000 --learning-starts 400 --eval-every 1000 --eval-episodes 10 --policy-hidden 16",
    "python datasets/collect.py --dataset omar_simple_spread-medium",
    "python datasets/assignments.py",
    "python runs/look.py runs/RUN1 runs/RUN2",
    "python runs/speed.py",
    "python runs/speed.py --tables update --turns 5",
]


@pytest.mark.parametrize("command", [*sorted(SECONDS), *(pytest.param(x, marks=pytest.mark.slow) for x in A_MINUTE)])
def test_commands_that_take_less_than_a_minute_run(command, finished, tmp_path, monkeypatch, capsys):
    """In a copy, so that nothing here is written to."""
    assert command in commands()
    program, *flags = shlex.split(command)[1:]
    ignored = shutil.ignore_patterns(".*", "*venv*", "__pycache__", "data", "*__omad__*", "*__dom2__*")
    shutil.copytree(ROOT, tmp_path, ignore=ignored, dirs_exist_ok=True)
    for run in re.findall(r"runs/RUN\d?", command):
        shutil.copytree(finished["omad" if program == "omad.py" else "dom2"][0], tmp_path / run)
    monkeypatch.chdir(tmp_path)
    if program in PROGRAMS:
        code, _, error = caller(PROGRAMS[program].main, tmp_path, capsys)(*flags, run_dir=False)
    else:
        done = subprocess.run([sys.executable, program, *flags], capture_output=True, text=True)
        code, error = done.returncode, done.stderr
    assert code == 0, error


def test_the_readmes_python_runs(tmp_path, monkeypatch):
    """A new environment without editing files here, shortened, and a policy that is a file."""
    blocks = re.findall(r"\n\n((?: {6}.*\n| *\n)+)", TEXTS[ROOT / "README.md"])
    fork, policy = (re.sub(r"^ {6}", "", block, flags=re.MULTILINE) for block in blocks)
    monkeypatch.chdir(ROOT)
    exec(policy, {})
    main = omad.main
    monkeypatch.setattr(omad, "main", lambda flags: main([*flags, *SHORT, "--run-dir", str(tmp_path)]))
    monkeypatch.setattr(sys, "argv", ["mine.py"])
    from common.envs import TASKS

    try:
        exec(fork, {})
    finally:
        task = TASKS.pop("mpe_mine")
    assert task.horizon == 25 and next(tmp_path.glob("mpe_mine__omad__*/eval.csv")).read_text().count("\n") > 2


def slugs(text: str) -> list[str]:
    heads = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_anchors_resolve(path):
    assert len(set(slugs(TEXTS[path]))) == len(slugs(TEXTS[path])), "two headings have one address"
    for link in re.findall(r"\]\(([^)\s]+)\)", TEXTS[path]):
        if not link.startswith("http"):
            file, _, anchor = link.partition("#")
            target = (path.parent / file).resolve() if file else path
            assert target.exists(), link
            assert not anchor or anchor in slugs(target.read_text()), link


@pytest.mark.parametrize(
    "program, document, letter", [("omad.py", "runs/omad.md", "D"), ("dom2.py", "runs/dom2.md", "E")]
)
def test_every_deviation_is_listed_and_every_one_listed_is_there(program, document, letter):
    labels = lambda text: set(re.findall(rf"\[deviation ({letter}\d)\]", text))
    assert labels((ROOT / program).read_text()) == labels(TEXTS[ROOT / document]) != set()


def test_budgets():
    lines = lambda path: len((ROOT / path).read_text().splitlines())
    assert lines("README.md") <= 150 and len(TEXTS[ROOT / "README.md"].split()) <= 1500
    assert lines("datasets/README.md") <= 150
    assert sum(map(lines, (ROOT / "runs").glob("*.py"))) <= 1300
    pictures = [path for path in (ROOT / "runs" / "results").glob("*.*") if path.suffix in (".png", ".gif")]
    assert len(pictures) >= 6 and all(path.stat().st_size < 300_000 for path in pictures)
