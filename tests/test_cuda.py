"""The half hour on a GPU (results/gpu.py), rehearsed. The tests that need a GPU are with their
modules, marked cuda."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

def gpu(*argv):
    done = subprocess.run([sys.executable, "results/gpu.py", *argv], cwd=ROOT, text=True,
                          capture_output=True)
    return done.returncode, done.stdout + done.stderr

@pytest.mark.slow
def test_the_half_hour_on_a_gpu_can_be_rehearsed_and_resumed():
    status, out = gpu("--rehearse")
    assert status == 0, out
    measured = ROOT / "out/rehearsal/bench.jsonl"
    rows = {json.loads(line)["row"] for line in measured.read_text().splitlines()}
    assert {"ntp_69m", "pause_69m", "kd_69m", "cocomix_69m"} <= rows
    status, out = gpu("--rehearse")
    assert status == 0 and out.count("finished before") == 7, out

@pytest.mark.slow
def test_it_stops_in_time():
    (ROOT / "out/rehearsal/tests.txt").unlink(missing_ok=True)
    status, out = gpu("--rehearse", "--minutes=0.1")  # less than a stopped run needs to save
    assert status == 0 and "tests: no time left" in out
