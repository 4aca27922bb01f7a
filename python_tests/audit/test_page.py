"""The plan as a page: one file, readable on a phone, its figures by matplotlib; and the terminal's
plan, which needs none of that."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from moekernels import cli
from moekernels.audit import figures, report
from moekernels.audit.page import page
from moekernels.plan import problem as asked
from moekernels.run import files as cfg

ROOT = Path(__file__).parents[2]
NUMBER = r"(-?\d+(?:\.\d+)?)"


@pytest.fixture(scope="module")
def made():
    """A plan of the document on 64 cards."""
    run = cfg.resolve("spec-30b", None, {})
    run.hardware.gpus = 64
    return report.make(run, asked.problem_of(run), asked.Space(), ["--preset spec-30b"], "spec")


@pytest.fixture(scope="module")
def text(made):
    return page(made)


class Elements(HTMLParser):
    """Every element, its attributes, and whether all that is opened is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def drawings(text: str, kind: str) -> list[str]:
    return re.findall(rf'<div class="{kind}">(<svg.*?</svg>)</div>', text, re.DOTALL)


def test_a_page_is_one_file_and_fits_a_phone(text):
    found = Elements(text)
    assert not found.open
    assert not {"script", "link", "iframe", "img"} & {tag for tag, _ in found.seen}
    links = [v for _, a in found.seen for k, v in a.items() if k.endswith("href") or k == "src"]
    assert all(link.startswith(("#", "data:")) for link in links)
    assert 'name="viewport" content="width=device-width, initial-scale=1"' in text
    assert "<pre" not in text  # whose lines do not break
    names = [a["id"] for _, a in found.seen if "id" in a]
    assert len(names) == len(set(names)), "a reference would mean another figure's"


@pytest.mark.parametrize("kind, across", [("narrow", 358), ("wide", 820)])
def test_a_figures_text_has_its_size_at_its_screen(text, kind, across):
    """A length of the viewBox is a CSS pixel: at 390 of them less two margins of 16."""
    assert "padding: 0 16px" in text
    shown = drawings(text, kind)
    assert len(shown) == 4
    for drawing in shown:
        box = re.search(rf'viewBox="0 0 {NUMBER} {NUMBER}"', drawing)
        assert float(box[1]) == pytest.approx(across, abs=0.5)
        sizes = [float(size) for size in re.findall(rf"font: {NUMBER}px", drawing)]
        sizes += [float(size) for size in re.findall(rf"font-size: {NUMBER}px", drawing)]
        assert sizes and min(sizes) >= 12
        words = drawing.count("<text")
        assert words == len(re.findall("<text[^>]*style=.*?font", drawing)) >= 8


@pytest.mark.parametrize("across", [figures.NARROW, figures.WIDE])
@pytest.mark.parametrize("name", figures.FIGURES)
def test_nothing_is_cut_off_and_no_labels_overlap(made, name, across):
    from matplotlib import style
    from matplotlib.text import Annotation, Text

    with style.context(["default", {"font.size": figures.TEXT}]):
        figure = figures.FIGURES[name][1](made, across)
        figure.draw_without_rendering()
    frame, axes = figure.bbox.padded(1), figure.axes[0]
    labels = [x for x in axes.get_children() if isinstance(x, Annotation)]
    boxes = [Text.get_window_extent(x) for x in labels]  # without lines to points
    others = [axes.xaxis.label.get_window_extent(), axes.yaxis.label.get_window_extent()]
    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
        others += [tick.label1.get_window_extent() for tick in ticks]
    for box in boxes + others:
        assert frame.x0 <= box.x0 and box.x1 <= frame.x1
        assert frame.y0 <= box.y0 and box.y1 <= frame.y1
    for i, one in enumerate(boxes):
        assert not any(one.overlaps(other) for other in boxes[:i]), labels[i].get_text()
    low, high = axes.get_xlim()
    marks = [x for x in axes.get_xticks() if low <= x <= high]
    if axes.get_xscale() == "linear":
        marks = [b - a for a, b in zip(marks, marks[1:])]
    assert marks and all(
        f"{mark:.6e}"[:8] in ("1.000000", "2.000000", "5.000000") for mark in marks
    )


def test_colours_keep_their_meaning(made):
    """Of every bar in every figure: the hue of what its name stands for, each name its own in its
    figure."""
    for names in (names for kinds in figures.HUE_OF.values() for names in kinds):
        assert len({figures.COLOURS[name] for name in names}) == len(names)
    hue = {c: kind for kind, (_, shades) in figures.HUES.items() for c in shades.split()}
    assert hue[figures.COLOURS["optimizer"]] == hue[figures.COLOURS["weights"]] == "green"
    assert hue[figures.COLOURS["expert exchange"]] == hue[figures.COLOURS["messages"]] == "orange"
    parts = {name for name in made.result.best.parts} | set(made.result.best.stages[0].parts())
    assert parts <= figures.COLOURS.keys()


def test_limits_are_named_and_strategies_stand_on_points(made, text):
    best = made.result.best
    memory, step, points, flush = drawings(text, "wide")
    narrow = drawings(text, "narrow")[2]
    assert "62 of 64 GB to use" in memory
    assert "at 100 % of the FLOP/s" in step and f"step {1e3 * best.step:.3g} ms" in step
    assert "62 GB to use" in points
    for p in made.result.pareto:
        layout = p.strategy.layout
        assert f"TP{layout.tp} DP{layout.dp} PP{layout.pp} EP{layout.ep}" in points
        assert re.search(rf"{layout.world}: [^<]*EP{layout.ep}", narrow)
    assert "time in the flush, " in flush and "the busiest stage alone" in flush
    for name in ("forward", "backward", "idle"):
        assert name in flush
    assert "recommended" in points and "as written" in points


def test_tables_carry_their_names_into_blocks(made, text):
    cells = re.findall(r'<td[^>]*data-name="([^"]*)"', text)
    assert {"cards", "s per step", "strategy"} <= set(cells)
    assert made.launch.replace("'", "&#x27;") in text
    assert "[bold]" not in text and "[/]" not in text


# --- the terminal's

BLOCKED = """
import sys
class Nowhere:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1].split(","):
            raise ModuleNotFoundError("No module named " + repr(name), name=name)
sys.meta_path.insert(0, Nowhere())
from moekernels import cli
cli.find_spec = lambda name: None if name in sys.argv[1].split(",") else object()
print(cli.main(["plan", "--gpus", "2", "--memory-gb", "400", "--json"]))
print(cli.main(["plan", "--gpus", "2", "--memory-gb", "400"]))
print(cli.main(["plan", "--gpus", "2", "--memory-gb", "400", "--html", "/dev/null"]))
"""


def test_a_plan_needs_no_package_that_it_does_not_use():
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    without = "matplotlib,tokenizers,safetensors,transformers"
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, without], capture_output=True, text=True, env=env
    )
    assert re.findall(r"^\d$", done.stdout, re.M) == ["0", "0", "2"], done.stderr
    assert done.stderr == (
        "moekernels: plan --html needs packages that are not here: pip install matplotlib\n"
    )


def test_no_line_of_a_pipe_is_broken(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    assert cli.main(["plan", "--gpus", "64", "--memory-gb", "80"]) == 0
    lines = capsys.readouterr().out.splitlines()
    strategy = next(line for line in lines if line.startswith("recommended"))
    assert "checkpointed" in strategy and strategy.endswith("all_to_all")
    assert max(map(len, lines)) > 150
