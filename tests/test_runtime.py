"""How commands end, the progress bar, signals, the log, and files that are written completely."""
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from support.runtime import Stop, UserError

import pytest
from conftest import run

from support import runtime
from support.files import atomic_write, fingerprint, mixed_seed
from support.log import Log, read_log

ROOT = Path(runtime.__file__).resolve().parents[1]

def raises(error):
    def main(argv):
        raise error
    return main

@pytest.mark.parametrize("error, line", [
    (UserError("k=3 is\n too  many; use --k=2"), "error: k=3 is too many; use --k=2"),
    (AssertionError("k=3 is too many"), "error: k=3 is too many"),
    (FileNotFoundError(2, "No such file", "a.txt"), "error: No such file: a.txt"),
    (MemoryError(), "error: out of memory: a smaller --micro_batch_size"),
    (RuntimeError("CUDA out of memory. x\ny"), "error: out of memory: a smaller --micro_batch"),
])
def test_an_error_the_user_can_fix_is_one_line(error, line):
    status, _, err = run(raises(error))
    assert status == 1 and err.startswith(line) and err.count("\n") == 1
    with pytest.raises(type(error)):
        run(raises(error), "--debug")

@pytest.mark.parametrize("error", [RuntimeError("shapes"), AssertionError(), ValueError("bug")])
def test_a_bug_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        run(raises(error))

def test_the_exit_status_of_a_command():
    assert run(lambda argv: None)[0] == 0 and run(lambda argv: 3)[0] == 3
    assert run(raises(KeyboardInterrupt()))[0] == 130

@pytest.mark.parametrize("set_by_user, expected", [
    ({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")])
def test_idle_openmp_threads_spin_for_a_short_time_only(set_by_user, expected):
    env = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    code = ("import os, sys, support.runtime; assert 'torch' not in sys.modules;"
            "print(os.environ.get('GOMP_SPINCOUNT'))")
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env | set_by_user,
                             capture_output=True, text=True)
    assert process.stdout.strip() == expected, process.stderr

def test_a_rank_that_is_not_a_number_is_one_line():
    process = subprocess.run([sys.executable, "-c", "import support.runtime"], cwd=ROOT,
                             env=os.environ | {"RANK": "one"}, capture_output=True, text=True)
    assert process.returncode == 1 and process.stderr.startswith("error: RANK='one': expected a ")

def test_without_a_terminal_the_bar_writes_a_line_every_ten_seconds(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with runtime.progress(100, "work") as bar:
        for i in range(100):
            bar.update()
            bar.set_postfix_str(f"loss {i}")
    lines = sys.stderr.getvalue().split("\r")[1:]
    assert bar.mininterval == 10 and len(lines) == 2
    assert "100%" in lines[1] and "loss 99" in lines[1]

def test_signals_are_kept_until_the_loop_reads_them(capsys):
    before = signal.getsignal(signal.SIGTERM)
    with Stop() as stop:
        assert stop.signal is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
        assert stop.leave(stop.signal, "out/ckpt.pt", 5) == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    assert capsys.readouterr().err == ("\nstopped by SIGTERM at step 5; saved in out/ckpt.pt; "
                                       "--resume continues from there\n")

# -- the log ---------------------------------------------------------------------------------------

def test_a_new_log_replaces_the_old_one_only_when_it_begins(tmp_path):
    path, sent = tmp_path / "log.jsonl", []
    path.write_text('{"step": 1}\n')
    log = Log(path, 0, also=lambda line, step: sent.append((step, line)))
    assert log.empty
    log.write(dict(step=0, loss=1 / 3, name="a", none=None))
    assert path.read_text() == '{"step": 1}\n'
    log.begin()
    log.write(dict(step=1, loss=2))
    assert path.read_text() == ('{"step": 0, "loss": 0.3333333, "name": "a", "none": null}\n'
                                '{"step": 1, "loss": 2}\n')
    assert [step for step, _ in sent] == [0, 1] and list(tmp_path.iterdir()) == [path]

def test_a_resumed_log_drops_the_lines_after_its_step(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(dict(step=step)) + "\n" for step in range(6)))
    log = Log(path, 3)
    assert not log.empty and [line["step"] for line in read_log(path)] == [0, 1, 2, 3]
    with pytest.raises(UserError, match="another process is training in"):
        Log(path, 3)
    del log
    assert not Log(path, 3).empty

# -- files -----------------------------------------------------------------------------------------

def test_a_file_is_written_completely_or_not_at_all(tmp_path):
    path = tmp_path / "a" / "file"
    with atomic_write(path) as file:
        file.write(b"old")
    for error in (ValueError("bug"), KeyboardInterrupt(), OSError(2, "No such file", "input.txt")):
        with pytest.raises(type(error)), atomic_write(path) as file:
            file.write(b"new")
            raise error
    with pytest.raises(UserError, match="file can't be written .No space left on device.; what"):
        with atomic_write(path):
            raise OSError(28, "No space left on device")
    with pytest.raises(UserError, match="can't be written .*choose another folder"):
        with atomic_write(tmp_path / "a"):
            pass
    assert path.read_bytes() == b"old" and [p.name for p in path.parent.iterdir()] == ["file"]

def test_hashes_and_seeds():
    assert fingerprint(b"ab", b"c") != fingerprint(b"a", b"bc") and len(fingerprint(b"")) == 16
    assert mixed_seed(1, 2) == mixed_seed(1, 2) != mixed_seed(2, 1)
