"""The HTML report: one file, nothing fetched, nothing of a candidate's text taken as markup, small, and complete."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import numpy
import pytest
import torch
import typer
from judging import Run, prepare

from moeref.commands import html as option
from moeref.diagnose.explain.result import Explanation, Suspect
from moeref.diagnose.faults import STAGES
from moeref.diagnose.result import Finding
from moeref.judge.detail import Detail, TokenWeights, detail
from moeref.judge.noise import Fit, Gate
from moeref.judge.verdict import Figures, Known, Verdict, judge
from moeref.report import html
from moeref.report.page import MOST_SECTIONS, MOST_TEXT, collect
from moeref.verify import Diagnosis, Outcome

NAME = "small-t64-o8-iid-model_like-s0"
EVIL = "<script>alert('x')</script><img src=http://evil.test/a.png>"
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Parsed(HTMLParser):
    """A page's elements, ids, references and text; raises AssertionError for an element that is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.ids: list[str] = []
        self.references: list[str] = []
        self.labels: list[str] = []  # of what stands for a picture
        self.headings: list[int] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        given = {name: value or "" for name, value in attributes}
        assert not [name for name in given if name.startswith("on")], f"a script in {tag}"
        self.ids += [given["id"]] if "id" in given else []
        self.references += [given[name] for name in ("src", "href", "xlink:href", "action", "data") if name in given]
        if given.get("role") == "img":
            self.labels.append(given["aria-label"])
        if tag in ("h1", "h2", "h3", "h4"):
            self.headings.append(int(tag[1]))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open[-1] == tag, f"</{tag}> closes {self._open[-1:]}"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.text += data


def parsed(text: str) -> Parsed:
    """The page, held to what every page must keep: well-formed, self-contained, no script, each picture described."""
    page = Parsed(text)
    for reference in page.references:
        assert reference.startswith(("#", "data:image/png;base64,")), f"refers to {reference[:80]}"
    for part in ("@import", "url(http", "url(//", "url('"):
        assert part not in text
    assert not page.tags["script"] and not page.tags["iframe"] and not page.tags["link"] and not page.tags["img"]
    assert len(page.ids) == len(set(page.ids)), Counter(page.ids).most_common(1)
    assert page.tags["figure"] == page.tags["svg"] == len(page.labels) and all(page.labels)
    inside = {reference[1:] for reference in page.references if reference.startswith("#")}
    assert inside <= set(page.ids), inside - set(page.ids)
    assert page.headings[0] == 1 and page.headings.count(1) == 1
    assert all(b - a <= 1 for a, b in zip(page.headings, page.headings[1:], strict=False)), page.headings
    assert text.startswith("<!DOCTYPE html>") and 'name="viewport"' in text and "prefers-color-scheme: dark" in text
    return page


@cache
def outcome(kind: str) -> Outcome:
    """'right', 'weights' (reversed routing weights), 'nan', or 'idle' (no token has a local expert)."""
    name = NAME if kind != "idle" else "small-t7-o8-no_local_work-model_like-s0"
    inputs, trace = prepare(name)
    output = trace.output.clone()
    if kind == "weights":
        output = (output.float() * torch.linspace(0.5, 2, len(output))[:, None]).to(torch.bfloat16)
    if kind == "nan":
        output[:] = math.nan
    kept: list[Detail] = []

    def look(seen: torch.Tensor, known: Known, recipe: str, fit: Fit | None) -> None:
        kept.append(detail(seen, known, recipe, fit))

    verdict = judge(name, inputs, trace, Run([output]), look=look)
    return Outcome(name, verdict, "published", 1.0, (0.5,), f"moeref verify kernel.py --problem {name}", detail=kept[0])


def error(label: str, message: str, traceback: str = "") -> Outcome:
    verdict = Verdict(NAME, "ERROR", (), "", False, Figures(64, 8, 29, 56, 8), message)
    return Outcome(label, verdict, "published", 1.0, (), f"moeref verify --problem {label}", traceback)


def finding(name: str, passed: bool | None, detail: str = "", suspects: tuple[str, ...] = ()) -> Diagnosis:
    return Diagnosis("law", Finding(name, passed, detail, suspects), "moeref verify --diagnose")


EXPLANATION = Explanation(
    problem=NAME,
    candidate="kernel.py:run",
    correct=False,
    recipe="exact",
    suspects=(
        Suspect("weights", "biased_weights", "16 of 16 rows fit", 0.9987, "vLLM #12002", "moeref verify a"),
        Suspect("combine", None, "the sum is short", None, None, "moeref verify b"),
    ),
    facts=("all 16 rows are wrong",),
    ruled_out=("scale_off_by_one lies 9 units off",),
    shrunk="e2l1h128i128k2g1t1-t1-o0-iid-model_like-s0",
)


def test_a_wrong_candidate_is_shown_with_its_numbers_and_pictures() -> None:
    one = outcome("weights")
    found = [
        finding("split", True, "equal bits in all 24 rows"),
        finding("ranks_add_up", False, "z 3.47, 1.33 allowed", ("weights", "combine")),
    ]
    text = html.render(collect("kernel.py:run", [one], found, command="moeref verify kernel.py:run"))
    page = parsed(text)
    assert one.verdict.status == "FAIL" and one.detail is not None
    for wanted in (
        NAME,
        "FAIL",
        f"{one.verdict.figures.noise_z:.3g}",
        f"{one.verdict.figures.matched['published']:.4f}",
        "z 3.47, 1.33 allowed",
        "equal bits in all 24 rows",
        one.repeat,
        "noise_rows",
        "moeref verify kernel.py:run",
        *(f"{z:.3g}" for z in (one.detail.tokens[0].z, one.detail.tokens[0].z_left)),
    ):
        assert wanted in page.text, wanted
    assert page.tags["figure"] == 5  # stages, map, histogram, experts, weights
    assert any("weights is named first by 1 of 1" in label for label in page.labels)
    assert any("8 of 8 lie over their limit" in label for label in page.labels)
    for stage in STAGES:
        assert stage in page.text


def test_a_right_candidate_shows_that_it_lies_within_the_noise() -> None:
    page = parsed(html.render(collect("kernel.py:run", [outcome("right")])))
    assert "PASS" in page.text and "FAIL" not in page.text
    assert "No active tokens lie over the limit" in page.text
    assert any(label.endswith("0 of them are above 8") for label in page.labels)
    assert "Nothing looked inside of the candidate" in page.text


@pytest.mark.parametrize("kind", ["nan", "idle"])
def test_what_cannot_be_drawn_is_said(kind: str) -> None:
    page = parsed(html.render(collect("kernel.py:run", [outcome(kind)])))
    if kind == "nan":
        assert "NaN or inf" in page.text and "not finite" in page.text
    else:
        assert "No token has a local expert" in page.text and not page.tags["figure"]


def test_an_explanation_comes_first_with_its_suspects_in_order() -> None:
    page = parsed(html.render(collect("kernel.py:run", [outcome("weights")], explanations=[EXPLANATION])))
    order = [
        page.text.index(part)
        for part in ("biased_weights", "16 of 16 rows fit", "vLLM #12002", "no fault of the catalogue", "Problems")
    ]
    assert order == sorted(order)
    for wanted in (
        "99.87 %",
        "all 16 rows are wrong",
        "scale_off_by_one lies 9 units off",
        "e2l1h128",
        "suspected, no",
    ):
        assert wanted in page.text
    assert any("weights 0.999, combine suspected" in label for label in page.labels)


def test_a_right_explanation_passes() -> None:
    right = replace(EXPLANATION, correct=True, suspects=(), shrunk=None, ruled_out=())
    page = parsed(html.render(collect("kernel.py:run", [], explanations=[right])))
    assert "PASS" in page.text and "FAIL" not in page.text and "suspects no stage" in page.text


def test_what_a_candidate_says_is_never_markup() -> None:
    one = replace(outcome("weights"), label=EVIL, repeat=EVIL, traceback=EVIL)
    one = replace(one, verdict=replace(one.verdict, problem=EVIL, message=EVIL, recipe=EVIL))
    told = replace(
        EXPLANATION,
        problem=EVIL,
        candidate=EVIL,
        suspects=(Suspect(EVIL, EVIL, EVIL, 0.5, EVIL, EVIL),),
        facts=(EVIL,),
        ruled_out=(EVIL,),
        shrunk=EVIL,
    )
    text = html.render(
        collect(
            EVIL,
            [one, *(error(EVIL, EVIL, EVIL) for _ in range(20))],
            [finding(EVIL, False, EVIL, (EVIL,)), finding(EVIL, True, EVIL)],
            [EVIL],
            [told],
            EVIL,
            [(EVIL, EVIL)],
        )
    )
    page = parsed(text)
    assert page.text.count("<script>alert('x')</script>") > 60
    assert "<script" not in text and "<img" not in text


def test_a_large_run_stays_under_two_megabytes_and_says_what_it_leaves_out() -> None:
    """19 failing problems at DeepSeek-V3's size, each with as much to draw as there can be."""
    generator = numpy.random.default_rng(0)
    kept = outcome("weights").detail
    assert kept is not None
    tokens = tuple(
        TokenWeights(token, tuple(range(32, 40)), *(tuple(generator.uniform(0.1, 0.5, 8)) for _ in "ab"), 90.0, 4.0)
        for token in range(208)
    )
    large = replace(
        kept,
        block_z=10 ** generator.uniform(-1, 6, (256, 56)),
        tokens_per_row=56,
        expert_z=tuple(Gate(float(z), 1.1, 32 + at) for at, z in enumerate(generator.uniform(0.5, 90, 48))),
        expert_rows=(400,) * 48,
        tokens=tokens,
    )
    outcomes = [replace(outcome("weights"), label=f"w{number}", detail=large) for number in range(19)]
    outcomes.append(replace(outcome("right"), label="passing"))
    text = html.render(collect("kernel.py:run", outcomes, left_out=["58a34f27 (seq_len 14107)"]))
    page = parsed(text)
    assert len(text.encode()) < 2_000_000
    assert sum(page.text.count(f"w{number}") > 0 for number in range(19)) == 19
    assert f"{20 - MOST_SECTIONS} of 20 problems have their row in the table only" in page.text
    assert "Not run: 58a34f27 (seq_len 14107)" in page.text
    assert page.tags["figure"] == 4 * MOST_SECTIONS and "Not passed, not shown in full" in page.text


def test_an_expert_left_out_is_named() -> None:
    kept = outcome("weights").detail
    assert kept is not None
    tokens = tuple(TokenWeights(token, (8, 11), (0.5, 0.4), (0.5, 1e-6 * token), 90.0, 1.0) for token in range(9))
    one = replace(outcome("weights"), detail=replace(kept, tokens=tokens))
    page = parsed(html.render(collect("kernel.py:run", [one])))
    assert "the median where it is off by more than 2%: 0 for expert 11." in page.text


def test_long_messages_are_cut_and_say_so() -> None:
    page = parsed(html.render(collect("kernel.py:run", [error("long", "m" * 10 * MOST_TEXT, "t" * 10 * MOST_TEXT)])))
    assert f"({9 * MOST_TEXT} more characters)" in page.text
    assert page.text.count("m" * 50) * 50 < 2 * MOST_TEXT and len(page.text) < 4 * MOST_TEXT


@pytest.mark.parametrize("missing", ["jinja2", "matplotlib"])
def test_a_missing_package_is_said_before_anything_runs(
    missing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == missing else object())
    with pytest.raises(typer.Exit) as left:
        option.check_html(tmp_path / "a.html")
    said = capsys.readouterr().err
    assert left.value.exit_code == 2 and f"--html needs {missing}: pip install 'moeref[report]'" in said


def moeref(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "moeref", *words], capture_output=True, text=True, timeout=300, check=False
    )


def test_verify_writes_the_page(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    candidate = "tests/wrong/biased_weights.py:run"
    done = moeref("verify", candidate, "--problem", NAME, "--html", str(path))
    assert done.returncode == 1 and f"written: {path}" in done.stdout, done.stdout + done.stderr
    page = parsed(path.read_text(encoding="utf-8"))
    assert candidate in page.text and str(torch.__version__) in page.text and page.tags["figure"] == 4
    assert f"moeref verify {candidate} --problem {NAME} --html" in page.text


@pytest.mark.parametrize("place", ["nowhere/report.html", "."])
def test_a_place_that_can_hold_no_file_is_refused_before_anything_runs(tmp_path: Path, place: str) -> None:
    done = moeref("verify", "tests/wrong/all_zeros.py:run", "--problem", NAME, "--html", str(tmp_path / place))
    assert done.returncode == 2 and "--html" in done.stderr and "Traceback" not in done.stderr, done.stderr
