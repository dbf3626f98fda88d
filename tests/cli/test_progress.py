"""Progress on standard error: bars on a terminal, lines in a pipe, nothing with --quiet; and where the time went."""

import logging
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from commandline import QUICK, mpcompile, restored_settings
from searches import search_of, tried
from terminal_screen import COLUMNS, lines_of, terminal

from mpcompile.cli import console
from mpcompile.cli.app import app
from mpcompile.cli.console import configure_logging, progress
from mpcompile.cli.stage_times import StageTimes
from mpcompile.system.progress import Progress, report_found, stage_progress, tracked

STAGES = ("load", "masks", "write")
LONG = "blocks." + 30 * "long." + "name"


def shown_run(warn: bool = True) -> None:
    """A run of three stages, one with loops in each other, that logs and prints meanwhile."""
    with progress(quiet=False) as observe, stage_progress(observe, STAGES) as begin:
        begin("load")
        begin("masks")
        for layer in tracked(["first", LONG], unit="layers"):
            for batch in tracked(range(3), "image {}".format, "images"):
                time.sleep(0.02)
                if warn and layer == LONG and batch == 1:
                    logging.getLogger("mpcompile.test").warning("a warning")
                    print("printed", file=sys.stderr)
        begin("write")


@pytest.fixture(autouse=True)
def _logging() -> Iterator[None]:
    with restored_settings():
        configure_logging(0, quiet=False)
        yield


def test_nothing_is_left_of_the_bars_and_nothing_is_glued_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch) as found:
        shown_run()
    assert found.screen() == ["WARNING mpcompile.test: a warning", "printed"]


def test_bars_show_the_stage_and_the_loops_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch) as found:
        shown_run(warn=False)
    written = found.written.decode()
    # The screen whenever the bars are drawn anew, which begins with the cursor at their first line.
    drawn = [lines_of(written[: match.start()]) for match in re.finditer(r"\r\x1b\[2K", written)]
    assert max(len(line) for lines in drawn for line in lines) <= COLUMNS
    fullest = max(drawn, key=lambda lines: sum(map(bool, lines)))
    stage, layers, images = [line for line in fullest if line]
    assert stage.startswith("masks ")
    assert re.search(r" 2/3, 0:0\d$", stage)
    assert re.search(r"^  (first|blocks\.[a-z.]+…) .* [01]/2 layers$", layers)
    assert re.search(r"^    image \d .* \d/3 images$", images)


@pytest.mark.parametrize("kind", ["dumb", "unknown"])
def test_a_terminal_without_control_sequences_gets_lines(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch) as found:
        monkeypatch.setenv("TERM", kind)
        shown_run(warn=False)
    assert found.screen() == [f"[{number}/3] {stage}, after 0:00" for number, stage in enumerate(STAGES, 1)]


def test_a_pipe_gets_a_line_for_each_stage(capsys: pytest.CaptureFixture[str]) -> None:
    shown_run()
    assert capsys.readouterr().err.splitlines() == [
        "[1/3] load, after 0:00",
        "[2/3] masks, after 0:00",
        "WARNING mpcompile.test: a warning",
        "printed",
        "[3/3] write, after 0:00",
    ]


def test_a_pipe_gets_lines_within_a_long_stage(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "LINE_SECONDS", 0.0)
    shown_run(warn=False)
    lines = capsys.readouterr().err.splitlines()
    assert "[2/3] masks, after 0:00; 1 of 2 layers; 2 of 3 images" in lines
    assert len(lines) == 3 + 2 + 6


def fails() -> None:
    with progress(quiet=False) as observe, stage_progress(observe, STAGES) as begin:
        begin("load")
        raise ZeroDivisionError


def test_a_stage_that_fails_leaves_no_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch) as found:
        with pytest.raises(ZeroDivisionError):
            fails()
        print("mpcompile: the error", file=sys.stderr)
    assert found.screen() == ["mpcompile: the error"]


def words(tiny_files: tuple[Path, Path], folder: Path) -> list[object]:
    quick = folder / "quick.yaml"
    quick.write_text(f"passes: [{{nm-mask: {{pattern: 2:4, criterion: magnitude, refit: none}}}}]\n{QUICK}")
    return [tiny_files[0], "--data", tiny_files[1], "-o", folder / "out", "--config", quick]


def test_quiet_is_quiet(
    tiny_files: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["mpcompile", *map(str, words(tiny_files, tmp_path)), "--quiet"])
    with terminal(monkeypatch) as found:
        app(standalone_mode=False)
    assert found.written == b""
    assert capfd.readouterr() == ("", "")


def test_long_stages_tell_their_steps_and_the_summary_where_the_time_went(
    tiny_files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "LINE_SECONDS", 0.0)
    done = mpcompile(*words(tiny_files, tmp_path))
    assert done.returncode == 0, done.stderr
    line = re.compile(r"\[\d/9\] ([a-z -]+), after \d:\d\d(; \d+ of \d+ ([a-z ]+).*)?")
    found = [line.fullmatch(text) for text in done.stderr.splitlines()]
    assert all(found), done.stderr
    steps = {(match[1], match[3]) for match in found if match and match[3]}
    assert steps >= {("export compressed", "images"), ("evaluate", "images"), ("time", "batch sizes")}
    [told] = [text for text in done.stdout.splitlines() if text.startswith("Time: ")]
    assert re.fullmatch(r"Time: [\d.:]+ (s|min) in all: .*export dense [\d.]+ s.*\.", told)


def search_run(last_seconds: float = 0.12) -> None:
    """A run whose second stage is a search that tries two recipes, and goes on for `last_seconds` after them."""
    points = tried("strong", 6.0, 2.3), tried("mild", 0.3, 1.2)
    with progress(quiet=False) as observe, stage_progress(observe, STAGES) as begin:
        begin("load")
        begin("masks")
        for number in tracked(range(2), "recipe {}".format, "recipes"):
            time.sleep(0.12)  # a bar is drawn ten times a second
            report_found(search_of(*points[: number + 1]))
        time.sleep(last_seconds)
        begin("write")


def test_a_search_shows_its_picture_above_the_bars_while_it_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch) as found:
        search_run(last_seconds=0.5)  # several drawings, also on a busy machine
    written = found.written.decode()
    drawn = [lines_of(written[: match.start()]) for match in re.finditer(r"\r\x1b\[2K", written)]
    # The picture may be drawn before the bar of the stage has begun, so the last of the fullest pictures is read.
    fullest = [line for line in max(reversed(drawn), key=lambda lines: "\n".join(lines).count("●")) if line]
    assert fullest[0] == "Change of top-1 in percentage points, against speedup over dense"
    assert sum(line.count("●") for line in fullest) == 1
    assert sum(line.count("○") for line in fullest) == 1
    assert [line for line in fullest if line.startswith("masks ")]
    assert not found.screen()


def test_a_pipe_gets_a_line_for_each_recipe_of_a_search(capsys: pytest.CaptureFixture[str]) -> None:
    search_run()
    line, speed = "[2/3] masks, after 0:00; ", "times as fast as dense"
    assert capsys.readouterr().err.splitlines() == [
        "[1/3] load, after 0:00",
        "[2/3] masks, after 0:00",
        f"{line}recipe 1 of at most 12, strong: 2.30 {speed}, drop 6.00 ± 0.20 points, not within the limit",
        f"{line}recipe 2 of at most 12, mild: 1.20 {speed}, drop 0.30 ± 0.20 points, within the limit",
        "[3/3] write, after 0:00",
    ]


def test_what_is_found_keeps_the_step_and_takes_no_time_in_the_summary() -> None:
    heard: list[Progress] = []
    with stage_progress(heard.append, STAGES) as begin:
        begin("masks")
        for _ in tracked(["one"], unit="recipes"):
            report_found("a record")
    assert [(at.step, at.found) for at in heard] == [(None, None), ("one", None), ("one", "a record")]
    times = StageTimes(lambda: 0.0)
    for at in heard:
        times.note(at)
    assert [stage for stage, _ in times.stages] == ["masks"]
    assert [loop.at for loop in times.loops] == [heard[1]]
