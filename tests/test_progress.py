"""Progress lines and metrics files."""

import errno
import json
import re
import sys
import time

import pytest

from topgap_jax import progress
from topgap_jax.progress import Metrics, bar, read_metrics, write_text


class Terminal:
    """Standard error as a terminal, which keeps what is written."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return True

    def fileno(self):
        raise OSError("no size to ask for")


def test_a_terminal_gets_a_bar_with_rate_and_remaining_time(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with bar(100, "training", done=20) as shown:
        shown.update(30)
        shown.note("loss 1.5")
        shown.update(50)
    assert re.search(r"\rtraining: 100%\|.*\| 100/100 \[\d\d:\d\d<.*images/s, loss 1\.5\]", terminal.text)


def test_elsewhere_one_line_now_and_then_and_one_at_the_end(capsys, monkeypatch):
    with bar(100, "evaluating", "runs") as shown:
        for _ in range(50):
            shown.update(2)
    assert re.fullmatch(r"evaluating: 100% 100/100 \[00:\d\d<00:00, .* runs/s\]\n", capsys.readouterr().err)
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.0)
    with bar(4, "evaluating") as shown:
        shown.update(1)
        shown.note("loss 2")
        shown.update(1)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1:3] for line in lines] == [["25%", "1/4"], ["50%", "2/4"], ["50%", "2/4"]]
    assert "loss 2" not in lines[0] and "loss 2" in lines[1]


@pytest.mark.parametrize("done, left, remaining", [(10, 40, "00:40"), (10, 400, "01:30"), (10, 0, "00:00")])
def test_the_time_left_is_at_most_that_of_the_steps(capsys, monkeypatch, done, left, remaining):
    """10 of 100 units in 10 seconds: 90 at this pace, at most as long as the steps that are left take at theirs."""
    now = iter([0.0, *[10.0] * 20])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.0)
    shown = progress._Lines(100, "attacking", "images", 0)
    shown.done = 10
    shown.at_most(done, left)
    assert capsys.readouterr().err.startswith(f"attacking: 10% 10/100 [00:10<{remaining}, ")


def test_a_terminal_gets_the_time_that_is_left_without_a_unit_done(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "DRAWN_SECONDS", 0.0)
    with bar(4, "attacking") as shown:
        shown.tqdm.start_t -= 60
        shown.at_most(10, 20)
        shown.update(4)
    assert re.search(r"\rattacking:   0%\|.*\| 0/4 \[01:00<02:00, ", terminal.text)
    assert re.search(r"\rattacking: 100%\|.*\| 4/4 \[01:00<00:00, ", terminal.text)


def test_the_time_left_does_not_change_the_rate(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with bar(100, "attacking") as shown:
        for _ in range(25):
            shown.at_most(10, 20)
            time.sleep(0.02)  # half a second for 50 units
        shown.update(50)
    assert 0 < float(re.findall(r"([\d.]+) images/s", terminal.text)[-1]) <= 100


def test_a_disabled_bar_is_silent(capsys):
    with bar(4, "evaluating", enabled=False) as shown:
        shown.update(4)
        shown.at_most(1, 2)
        shown.note("done")
    assert capsys.readouterr().err == ""


def test_rows_after_the_checkpoint_are_dropped(tmp_path):
    with Metrics(tmp_path) as metrics:
        for step in (1, 2, 3):
            metrics.write(step, "train", {"loss": step / 2}, epoch=1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "ki')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    with Metrics(tmp_path, 2) as metrics:
        metrics.write(3, "train", {"loss": 9}, epoch=1)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": step, "kind": "train", "epoch": 1, "loss": loss, "crc32": crc32}
        for step, loss, crc32 in ((1, 0.5, "61a7b9d2"), (2, 1.0, "ee5e82ea"), (3, 9.0, "38cc7f2c"))
    ]
    assert read_metrics(tmp_path / "absent") == []


DAMAGED = [
    b"", b'{"step": 4, "ki', b'{"step": 4}\r{', b"\xff\xfe", b"[1, 2]", b'"step"', b"null", b'{"kind": "train"}', b'{"step": "4"}', b'{"step": true}',
    b'{"step": -1}', b'{"step": 4, "loss": [1]}', b'{"step": 4, "loss": {}}', b'{"step": 4, "loss": 1' + b"0" * 400 + b"}",
    b'{"step": 1' + b"0" * 5000 + b"}", b"[" * 100_000, '{"step": 4}'.encode("utf-16-be"),
]  # fmt: skip


def test_damaged_lines_are_passed_over_and_counted(tmp_path, capsys):
    """Rows after them stay, also where a run goes on, which takes out the rows of later steps and nothing else."""
    row = lambda step: b'{"step": %d, "kind": "train", "loss": NaN, "note": "a", "none": null}\n' % step
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(row(1) + b"".join(line + b"\n" for line in DAMAGED) + row(2) + row(5) + row(3) + b'{"step": 9')
    assert [each["step"] for each in read_metrics(tmp_path)] == [1, 2, 5, 3]
    said = f"topgap: {path}: {len(DAMAGED)} of {len(DAMAGED) + 4} lines are damaged and passed over\n"
    assert capsys.readouterr().err == said
    with Metrics(tmp_path, 3):
        pass
    kept = path.read_bytes()
    assert kept == row(1) + b"".join(line + b"\n" for line in DAMAGED) + row(2) + row(3)
    before = path.stat().st_ino
    with Metrics(tmp_path, 3) as metrics:
        metrics.write(4, "train", {"loss": 1.0})
    assert path.stat().st_ino == before, "appended to, not written anew"
    assert path.read_bytes() == kept + b'{"step": 4, "kind": "train", "loss": 1.0, "crc32": "c33b3adc"}\n'


def test_a_row_that_is_not_what_was_written_is_passed_over(tmp_path, capsys):
    """One flipped bit makes another loss of a loss."""
    with Metrics(tmp_path) as metrics:
        for step in (1, 2, 3):
            metrics.write(step, "train", {"loss": 0.5})
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes().replace(b"0.5", b"0.7", 1))
    assert [row["step"] for row in read_metrics(tmp_path)] == [2, 3]
    assert "1 of 3 lines are damaged and passed over" in capsys.readouterr().err


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    write_text(tmp_path / "a.json", "old")

    def killed(*paths):
        raise KeyboardInterrupt

    monkeypatch.setattr(progress.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_text(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "old"


def test_a_full_disk_leaves_the_old_file_and_no_part_of_the_new(tmp_path, monkeypatch):
    write_text(tmp_path / "a.json", "old")

    def full(path, content):
        path.write_text(content.decode()[:2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(progress.Path, "write_bytes", full)
    with pytest.raises(OSError):
        write_text(tmp_path / "a.json", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"] and (tmp_path / "a.json").read_text() == "old"
