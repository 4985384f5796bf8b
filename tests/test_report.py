"""The statistics, verdicts and pictures of runs/report.py, on results whose outcome is known."""

import re

import numpy as np
import pytest
import report

from conftest import ROOT

ARRAY = lambda *values: np.array(values, float)


def test_interquartile_mean_and_interval():
    assert report.iqm(ARRAY(1, 2, 3, 100)) == 2.5 and report.iqm(ARRAY(0, 1), ARRAY(2, 30)) == 1.5
    assert report.interval(ARRAY(1, 2, 6)) == (1, 6)  # of so few the lowest and the highest
    low, high = report.interval(*[ARRAY(0, 10)] * 50)  # seeds are drawn within each cell, not cells
    assert 2 < low < 5 < high < 8
    assert report.interval(*[ARRAY(5, 5), ARRAY(1, 1)] * 9) == (3, 3)
    many = np.random.default_rng(0).normal(size=200)
    low, high = report.interval(many)
    assert high - low == pytest.approx(2 * 1.96 * 1.09 / 200**0.5, rel=0.2)  # 1.09: efficiency of the statistic


def test_probability_of_improvement_counts_ties_by_half_and_cells_alike():
    assert report.improvement(ARRAY(1, 2), ARRAY(1, 2)) == 0.5
    assert report.improvement(ARRAY(3, 3), ARRAY(0, 4), ARRAY(1, 2, 3), ARRAY(4, 4)) == pytest.approx(
        (5 / 6 + 1 / 4) / 2
    )
    low, high = report.interval(ARRAY(1, 2, 3, 4), ARRAY(3, 4, 5, 6), statistic=report.improvement)
    assert low < report.improvement(ARRAY(1, 2, 3, 4), ARRAY(3, 4, 5, 6)) < high


def test_welch():
    assert (
        report.welch(ARRAY(1, 2, 3), ARRAY(7, 8, 9)) == "loss" and report.welch(ARRAY(7, 8, 9), ARRAY(1, 2, 3)) == "win"
    )
    # Unequal spreads: Student's test, which assumes equal ones, would call this a win (p 0.03 against 0.09).
    assert report.welch(ARRAY(0, 10, 20), np.linspace(-1, 1, 20) - 3) == "tie"
    assert report.welch(ARRAY(5, 5), ARRAY(5, 5)) == "tie" and report.welch(ARRAY(9), ARRAY(1, 2)) == ""


def test_numbers_and_cells():
    assert report.number(-0.2, 0) == "0" and report.number(-1234.56) == "−1,234.6"
    assert report.cell(ARRAY(), 0) == "–" and report.cell(ARRAY(3), 0) == "3 (1)"
    assert report.cell(ARRAY(1, 2, 6)) == "3.0 [1.0, 6.0] (3)"
    assert report.tally(["win", "", "loss", "win", "tie"]) == "2 – 1 – 1"


@pytest.fixture
def results(monkeypatch):
    """Results in the place of those that are committed: fresh returns by experiment, task, variant and setting."""
    known = {}

    def read(experiment, on, variant):
        values = known.get((experiment, variant), {"usual": []})
        curve = lambda x: {"step": ARRAY(0, 10), "wall_time_s": ARRAY(0, 60), "return_mean": ARRAY(0, x)}
        make = lambda i, x: report.Result(
            f"x__omad__{i}__20260101-000000", {"args": {"seed": i}}, curve(x), {s: v[i] for s, v in values.items()}
        )
        return [make(i, x) for i, x in enumerate(values["usual"])]

    monkeypatch.setattr(report, "read", read)
    return known


def offline(results, dom2, imitation, baseline, shifted=None):
    for name, values in zip(report.METHODS, (dom2, imitation, baseline)):
        there = {s: [x - 1 for x in (shifted or {}).get(name, values)] for s in ("speed", "random", "extreme")}
        results["offline", name] = {"usual": list(values)} | there
        results["shares", f"{name}-5"] = {"usual": list(values)}


def verdict(claim):
    row = next(line for line in report.verdicts().splitlines() if claim in line)
    return row.split("**")[1]


@pytest.mark.parametrize("ours, learns, better", [((-9, -10, -11), "yes", "yes"), ((-20, -9, -10), "no", None)])
def test_verdicts_online(results, ours, learns, better):
    offline(results, (1, 2), (1, 2), (1, 2))
    results["spread", "diffusion"], results["spread", "gaussian"] = {"usual": ours}, {"usual": (-15, -15.5, -16)}
    results["robots", "diffusion"], results["robots", "gaussian"] = {"usual": (900, 5000)}, {"usual": (9000, 9001)}
    assert verdict("OMAD learns spread") == learns
    rows = report.verdicts().splitlines()
    following = rows[next(i for i, row in enumerate(rows) if "learns spread" in row) + 1]
    assert ("beats" in following) == bool(better) and (not better or "**yes**" in following)
    assert verdict("OMAD learns Ant") == "no" and verdict("OMAD learns HalfCheetah") == "no"  # its worst seed counts
    results["robots", "diffusion"] = {"usual": (5000, 5001)}
    rows = report.verdicts().splitlines()
    assert verdict("OMAD learns Ant") == "yes" and "**no, it is behind**" in next(row for row in rows if "9,000" in row)


def test_verdicts_offline(results, monkeypatch):
    for name in ("diffusion", "gaussian"):
        results["spread", name] = results["robots", name] = {"usual": (1, 2)}
    offline(results, (9000, 9001), (8000, 8001), (10, 11))
    claims = ["more than its data", "more than imitation", "more than the baseline", "environment shifts", "5 %"]
    assert [verdict(claim) for claim in claims] == ["mostly", "mostly", "mostly", "yes", "yes"]
    offline(results, (-900, -901), (-900, -901), (9000, 9001))
    assert [verdict(claim) for claim in claims] == ["no"] * 5
    worse = lambda dataset: dataset.endswith("-random")  # four data sets of 24
    monkeypatch.setattr(report, "against", lambda dataset, *_: ["loss", "loss"] if worse(dataset) else ["win", "tie"])
    assert [verdict(claim) for claim in claims[1:3]] == ["mostly", "no"]
    worse = lambda dataset: "random" in dataset  # eight: twice as many wins, not more
    assert verdict(claims[1]) == "no"
    monkeypatch.setattr(report, "data_return", lambda dataset: 0.0 if "expert" in dataset else 9999.0)  # 8 of 24 above
    offline(results, (9000, 9001), (8000, 8001), (10, 11))
    assert verdict(claims[0]) == "no"
    offline(results, (9000, 9001), (9, 10), (9, 10), shifted={"imitation": (9999, 9999)})
    assert [verdict(claim) for claim in claims][3] == "no"
    results["modes", "dom2"], results["modes", "deterministic"] = {"usual": (0.8, 0.81)}, {"usual": (0.5, 0.51)}
    assert verdict("keeps several ways") == "yes"


def test_every_variant_with_runs_has_a_row(results):
    results["longer", "diffusion"], results["longer", "OMAD_support_1000"] = {"usual": (1, 3)}, {"usual": (5,)}
    rows = [line.split(" | ")[1:4] for line in report.TABLES["omad-longer"]().partition("\n\n")[0].splitlines()[2:]]
    assert rows == [["OMAD", "10", "2 [1, 3] (2)"], ["OMAD, support ±1000", "10", "5 (1)"]]


def test_variants_are_compared_with_the_default_after_the_same_number_of_steps(monkeypatch):
    known = {("spread", report.MPE, "diffusion"): (-9.0, -10.0, -11.0)}

    def read(*where):
        steps, scale = ARRAY(0, 30_000, 200_000), 1 if where[1] == report.MPE else 100
        curve = lambda x: {"step": steps, "wall_time_s": 60 * steps / 1000, "return_mean": ARRAY(0, x + scale, 0)}
        short = lambda known: {key: values[: 2 + (where[2] != "K_8")] for key, values in known.items()}
        make = lambda i, x: report.Result(f"x__omad__{i}__2026010{i}-000000", {}, short(curve(x)), {"usual": x})
        return [make(i, x) for i, x in enumerate(known.get(where, ()), 1)]

    monkeypatch.setattr(report, "read", read)
    assert report.TABLES["omad-ablations"]() == "Not run yet."  # the default alone compares nothing
    known["robots", report.CHEETAH, "gaussian"] = (5000.0,)  # which goes on after the 30,000 steps that are compared
    known["ablations", report.MPE, "K_1"] = (-20.0, -24.0)
    known["ablations", report.CHEETAH, "K_8"] = (3000.0,)  # and ends there
    head, _, *lines = report.TABLES["omad-ablations"]().partition("\n\n")[0].splitlines()
    assert head == "| variant | HalfCheetah 2x3, 30,000 steps | spread, 200,000 steps |"
    rows = {cells[1]: cells[2:-1] for cells in (re.split(r" ?\| ?", line) for line in lines)}
    assert (
        [*rows][:3] == ["OMAD", "Gaussian ablation", "K = 1"] and [*rows][-1] == "target networks" and len(rows) == 13
    )
    assert rows["OMAD"] == ["–", "−10.00 [−11.00, −9.00] (3)"] and rows["Gaussian ablation"] == ["5,100 (1)", "–"]
    assert rows["K = 8"] == ["3,100 (1)", "–"]
    assert rows["K = 1"] == ["–", "−22.00 [−24.00, −20.00] (2)"] and rows["K = 2"] == ["–", "–"]


def test_every_data_set_counts_alike_however_many_seeds_it_has(monkeypatch):
    seeds = lambda dataset: ARRAY(*[3568.8] * 30) if dataset == report.DATA[-1] else ARRAY(0, 0)
    monkeypatch.setattr(report, "fresh", lambda experiment, dataset, method: seeds(dataset))
    assert {len(own) for own in report.normalised("dom2")} == {2} and report.normalised("dom2")[-1][0] > 99


def test_times_are_said_once_in_plain_words():
    head, _, *lines = report.speed().splitlines()
    keys = [tuple(line.split(" | ")[:4]) for line in lines]
    assert len(set(keys)) == len(keys) and "| OMAD | spread | K = 4 | one decision | 88 | 0.699 | 1% |" in lines
    assert not re.search("eager|_|omad|dom2|unet", " ".join(lines))


def test_every_ablation_has_a_curve_as_long_as_it_and_the_preset_are(results, monkeypatch):
    results["spread", "diffusion"] = results["robots", "diffusion"] = {"usual": (1, 2, 3)}
    variants = report.folders("ablations")
    results |= {("ablations", place): {"usual": (i, i, i)} for i, place in enumerate(variants.values())}
    read = report.read

    def longer(experiment, on, variant):
        runs = read(experiment, on, variant)
        for run in runs if variant == "diffusion" else ():
            run.curve.update(step=ARRAY(0, 10, 20), return_mean=np.append(run.curve["return_mean"], 99))
        return runs

    monkeypatch.setattr(report, "read", longer)
    axes = report.ablation_curves().axes
    for task in (axes[:4], axes[4:]):
        curves = [line for axis in task for line in axis.lines if "n = 3" in line.get_label()]
        presets, others = curves[0].get_label(), [line for line in curves if not line.get_label().startswith("preset")]
        assert presets == "preset, n = 3" and len(curves) == len(others) + 4
        assert [line.get_label() for line in others] == [f"{name}, n = 3" for name in variants]
        assert [line.get_ydata().tolist() for line in others] == [[0, i] for i in range(len(variants))]
        assert curves[0].get_ydata().tolist() == [0, 2] and curves[0].get_xdata().tolist() == [0, 0.01]


def test_pictures_show_what_is_there(results):
    results["spread", "diffusion"], results["spread", "gaussian"] = {"usual": (1, 2, 3)}, {"usual": (7, 8, 9)}
    left, right = report.curves("spread", report.MPE).axes
    for axis, end in ((left, 0.01), (right, 1)):
        ours, other = axis.lines[:2]
        assert (
            ours.get_xdata().tolist() == [0, end] and ours.get_ydata().tolist() == [0, 2] and other.get_ydata()[1] == 8
        )
        box = axis.collections[0].get_paths()[0].get_extents()
        assert (box.y0, box.y1, box.x1) == (0, 3, end)
        words = {text.get_text(): text.xy[1] for text in axis.texts}
        assert words["HATD3 after 200k steps"] == -13 and {"random", "scripted", "standing still"} < words.keys()
    offline(results, (10, 20), (30, 40), (50, 60))
    first = report.offline_figure().axes[0]
    assert [line.get_ydata().tolist() for line in first.lines[1:4]] == [[10, 20], [30, 40], [50, 60]]
    assert first.lines[0].get_ydata().tolist() == [report.data_return("omar_simple_spread-random")] * 2
    bar, usual, there = report.shift_figure().axes[0].lines[:3]
    assert list(bar.get_xdata()) == [15, 14] and usual.get_markerfacecolor() == "white"
    assert (usual.get_xdata()[0], there.get_xdata()[0]) == (15, 14)


def test_every_table_stands_in_one_document():
    found = [name for path in report.DOCUMENTS for _, name, _, _ in report.MARKS.findall((ROOT / path).read_text())]
    assert sorted(found) == sorted(report.TABLES)


def test_runs_on_unequal_data_are_not_compared(results, monkeypatch):
    known = {
        "offline": {"data_return": 206.004},
        "updates": {"data_return": 206.0},
        "deviations": {},
        "offline_long": {},
    }
    monkeypatch.setattr(
        report, "read", lambda of, on, method: [report.Result("x", known[of], {}, {})] * bool(known[of])
    )
    assert report.data_return("omar_simple_world-medium-replay") == 206.0
    for of in known:
        with monkeypatch.context() as patch:
            patch.setitem(known, of, {"data_return": 198.2})
            with pytest.raises(SystemExit, match="medium-replay: .*unequal data do not compare: .198.2, 206.0"):
                report.data_return("omar_simple_world-medium-replay")
    card = report.cards.read_cards()["omar_simple_world-medium-replay"]["return"]["mean"]
    known["updates"] = {"an older run": "whose data are the card's"}
    with pytest.raises(SystemExit, match=f"{card:.0f}"):
        report.data_return("omar_simple_world-medium-replay")
    known.update({of: {} for of in known})
    assert report.data_return("omar_simple_world-medium-replay") == card


def test_deviations_are_compared_with_the_default(results):
    assert report.TABLES["dom2-deviations"]() == "Not run yet."
    results["offline", "dom2"], results["deviations", "E4"] = {"usual": (10, 11, 12)}, {"usual": (1, 2, 3)}
    results["deviations", "E10"], results["deviations", "E6"] = {"usual": (20, 21, 22)}, {"usual": (10, 12)}
    head, _, *lines = report.TABLES["dom2-deviations"]().partition("\n\n")[0].splitlines()
    rows = {line.split(" | ")[0][2:]: line.split(" | ")[1] for line in lines}
    assert "| spread, medium | tag, expert |" in head and rows["none: DOM2"] == "11 [10, 12] (3)"
    assert rows["E4"] == "2 [1, 3] (3) worse" and rows["E10"] == "21 [20, 22] (3) better"
    assert rows["E6"] == "11 [10, 12] (2)" and rows["E1"] == "–"


def test_longer_runs_are_compared_with_each_other(results):
    assert report.TABLES["dom2-long"]() == "Not run yet."
    results["offline", "dom2"], results["offline_long", "dom2"] = {"usual": (1, 2, 3)}, {"usual": (10, 11, 12)}
    results["offline", "deterministic"], results["offline_long", "deterministic"] = (
        {"usual": (4,)},
        {"usual": (20, 21, 22)},
    )
    results["offline_long", "baseline_as_many_updates"] = {"usual": (1, 2, 3)}
    lines = report.TABLES["dom2-long"]().partition("\n\n")[0].splitlines()[2:]
    assert [line.split(" | ")[:2] for line in lines] == [
        ["| DOM2, preset", "2 [1, 3] (3)"],
        ["| baseline, preset", "4 (1)"],
        ["| DOM2", "11 [10, 12] (3)"],
        ["| baseline", "21 [20, 22] (3) better"],
        ["| baseline, as many updates", "2 [1, 3] (3) worse"],
    ]


def test_several_ways_have_their_scripts_beside_them(results):
    results["assignments", "imitation"] = {"usual": (600, 602), "fewer": (300, 300)}
    results["modes", "deterministic"], results["modes", "dom2_eta_1"] = {"usual": (0.5,)}, {"usual": (0.25, 0.75)}
    rows = [line.split(" | ") for line in report.TABLES["dom2-modes"]().splitlines()[2:6]]
    assert [row[0] for row in rows] == [
        "| six landmarks",
        "| three of them gone",
        "| blind doors",
        "| blind doors, η 1",
    ]
    assert [row[2] for row in rows[:3]] == ["601 [600, 602] (2)", "300 [300, 300] (2)", "–"]
    assert rows[2][3] == "0.50 (1)" and rows[3][1] == "0.50 [0.25, 0.75] (2)"
    assert "shortest way: 759" in rows[0][4] and "one window each: 0.5" in rows[2][4] and "shortest" not in rows[2][4]
