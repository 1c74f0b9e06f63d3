"""The demo, on a laptop: data, concept model, SAE, NTP, CoCoMix, table, plot, report, steering.

    python demo.py    # or make demo, which installs the packages first; run it again to resume
"""
import shlex
import signal
import subprocess
import sys
from pathlib import Path

COMMANDS = """
data/stdlib/prepare.py
train.py config/stdlib_gpt.py --resume
sae.py config/stdlib_sae.py --resume
train.py config/stdlib_ntp.py --resume
train.py config/stdlib_cocomix.py --resume
eval.py out/stdlib/ntp out/stdlib/cocomix --plot=out/stdlib/curves.png --overwrite
concepts.py out/stdlib/cocomix --tokens=200_000 --top=10
sample.py out/stdlib/cocomix --steer --start="    def __init__(self" --max_new_tokens=60
"""

if __name__ == "__main__":
    if sys.argv[1:]:
        sys.exit(f"{__doc__}\nIt takes no arguments.")
    signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C ends the command, which saves first
    for command in COMMANDS.strip().splitlines():
        print("python", command, flush=True)
        argv = [sys.executable, *shlex.split(command)]
        if status := subprocess.call(argv, cwd=Path(__file__).resolve().parent):
            sys.exit(status)
