"""How commands end, the progress bar, signals, the log, and files that are written completely."""
import io
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

from support.runtime import Stop, UserError

import filelock
import pytest
from conftest import run
from torch._dynamo.exc import TorchDynamoException

from support import runtime
from support.files import atomic_write, fingerprint, lock_folder, mixed_seed, unlock
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
    (MemoryError(), "error: out of memory: a smaller --batch_size"),
    (RuntimeError("CUDA out of memory. x\ny"), "error: out of memory: a smaller --batch_size"),
    (TorchDynamoException("Failed to find C compiler.\nmore"),
     "error: torch.compile failed (Failed to find C compiler.); --compile=false runs without it"),
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

def start(code="import support.runtime", **env):
    """(status, stderr) of a Python process."""
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | env,
                             capture_output=True, text=True)
    return process.returncode, process.stderr

ADDRESS = dict(MASTER_ADDR="localhost", MASTER_PORT="29500")

@pytest.mark.parametrize("env, message", [
    (dict(RANK="one"), "RANK='one': expected a whole number"),
    (dict(WORLD_SIZE="2", RANK="0"), "WORLD_SIZE=2, RANK=0, LOCAL_RANK=0 and MASTER_ADDR=None"),
    (dict(RANK="1"), "WORLD_SIZE=1, RANK=1"),
    (dict(LOCAL_RANK="1"), "LOCAL_RANK=1"),
    (dict(WORLD_SIZE="0"), "WORLD_SIZE=0"),
    (dict(RANK="-1"), "RANK=-1"),
    (dict(WORLD_SIZE="2", RANK="2") | ADDRESS, "WORLD_SIZE=2, RANK=2"),
    (dict(WORLD_SIZE="2", MASTER_ADDR="localhost"), "MASTER_PORT=''"),
    (dict(WORLD_SIZE="2") | ADDRESS | dict(MASTER_PORT="x"), "MASTER_PORT='x': expected a whole"),
])
def test_what_only_torchrun_sets_is_one_line_without_it(env, message):
    status, err = start(**env)
    assert status == 1 and err.startswith("error: ") and message in err and err.count("\n") == 1
    assert "unset" in err

def test_what_torchrun_sets_is_accepted():
    assert start(WORLD_SIZE="2", RANK="1", LOCAL_RANK="1", **ADDRESS) == (0, "")

@pytest.mark.parametrize("script", ["sae.py", "concepts.py", "eval.py", "sample.py", "bench.py"])
def test_only_train_runs_in_several_processes(script):
    code = f"import runpy; runpy.run_path({script!r}, run_name='__main__')"
    status, err = start(code, WORLD_SIZE="2", RANK="0", **ADDRESS)
    assert status == 1 and err.startswith("error: only train.py runs in several processes")

def test_an_old_python_is_one_line():
    status, err = start("import sys; sys.version_info = (3, 9, 18); import support.runtime")
    assert (status, err) == (1, "error: Python 3.9 is too old: 3.10 or newer is needed\n")

def test_without_a_terminal_the_bar_writes_a_line_every_ten_seconds(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with runtime.progress(100, "work") as bar:
        for i in range(100):
            bar.update()
            bar.set_postfix_str(f"loss {i}")
    lines = sys.stderr.getvalue().split("\r")[1:]
    assert bar.mininterval == 10 and len(lines) == 2
    assert "100%" in lines[1] and "loss 99" in lines[1]

@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1"])
def test_signals_are_kept_until_the_loop_reads_them(capsys, name):
    number = getattr(signal, name)
    started_with = signal.signal(number, signal.SIG_DFL)  # nohup ignores SIGHUP
    before = signal.getsignal(number)
    with Stop() as stop:
        assert stop.signal is None
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # a closed terminal sends two
        assert stop.signal == number
        assert stop.leave(stop.signal, "out/ckpt.pt", 5) == 128 + number
    assert signal.getsignal(number) is before
    signal.signal(number, started_with)
    assert capsys.readouterr().err == (f"\nstopped by {name} at step 5; saved in out/ckpt.pt; "
                                       "--resume continues from there\n")

@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows")
def test_under_nohup_a_closed_terminal_stops_nothing():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.signal is None
    finally:
        signal.signal(signal.SIGHUP, before)

def test_a_terminal_that_is_gone_ends_nothing_early(monkeypatch):
    class Gone(io.StringIO):
        def write(self, text):
            raise OSError(5, "Input/output error")
    monkeypatch.setattr(sys, "stderr", Gone())
    assert Stop().leave(1, "out/ckpt.pt", 5) == 129

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
    assert [step for step, _ in sent] == [0, 1]
    assert {p.name for p in tmp_path.iterdir()} == {"log.jsonl", ".lock"}
    del log
    assert list(tmp_path.iterdir()) == [path]

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

def test_where_folders_cannot_be_synced_files_are_written(tmp_path, monkeypatch):
    """As on SMB, sshfs and VirtualBox's shared folders."""
    fsync = os.fsync

    def files_only(number):
        if stat.S_ISDIR(os.fstat(number).st_mode):
            raise OSError(22, "Invalid argument")
        fsync(number)
    monkeypatch.setattr(os, "fsync", files_only)
    before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else None
    for content in (b"old", b"new"):
        with atomic_write(tmp_path / "file") as file:
            file.write(content)
    assert (tmp_path / "file").read_bytes() == b"new"
    assert before is None or len(os.listdir("/proc/self/fd")) == before

def test_a_folder_is_locked_where_it_can_be(tmp_path, monkeypatch):
    first = lock_folder(tmp_path, "training", "out_dir")
    with pytest.raises(UserError, match="another process is training in .* another --out_dir"):
        lock_folder(tmp_path, "training", "out_dir")
    unlock(first)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".lock").touch()  # left by a process that was killed
    unlock(lock_folder(tmp_path, "training", "out_dir"))
    for error in (NotImplementedError("flock"), OSError(38, "Function not implemented")):
        def no_locks(lock, error=error):
            raise error
        monkeypatch.setattr(filelock.FileLock, "acquire", no_locks)
        unlock(lock_folder(tmp_path, "training", "out_dir"))

def test_hashes_and_seeds():
    assert fingerprint(b"ab", b"c") != fingerprint(b"a", b"bc") and len(fingerprint(b"")) == 16
    assert mixed_seed(1, 2) == mixed_seed(1, 2) != mixed_seed(2, 1)
