"""log.jsonl of a run, and the warning about loss spikes."""
import json
import math
import sys
import weakref
from contextlib import suppress
from pathlib import Path

from support.runtime import RANK, explain

from tqdm import tqdm

from support.files import atomic_write, lock_folder, unlock

class Log:
    """log.jsonl: one JSON object per line, each with its step. Only process 0 writes it.

    Opened at `step`, it keeps the lines up to that step, so a resumed run has neither gaps nor
    duplicates. A new run changes the folder only at `begin`, after its first checkpoint is saved.
    `also(line, step=…)`, if given, receives each line. changes: entries that the first line of the
    resumed run changes. UserError: not writable, or another process trains in the folder.
    """
    def __init__(self, path, step=0, also=None, changes=None):
        self.path, self.also, self.empty, self._pending = Path(path), also, False, None
        if RANK:
            return
        weakref.finalize(self, unlock, lock_folder(self.path.parent, "training", "out_dir"))
        kept = read_log(self.path) if step and self.path.is_file() else []
        for line in kept[:1]:
            line.update(changes or {} if "max_iters" in line else {})
        kept = [self._text(line) for line in kept if line.get("step", math.inf) <= step]
        self.empty, self._pending = not kept, kept
        if step:
            self.begin()

    @staticmethod
    def _text(values):
        short = {k: float(f"{v:.7g}") if isinstance(v, float) else v for k, v in values.items()}
        return json.dumps(short) + "\n"

    def begin(self):
        """Replace the file by the pending lines; from now on `write` appends to it."""
        if RANK:
            return
        with atomic_write(self.path) as file:
            file.write("".join(self._pending).encode())
        self._pending = None

    def write(self, values):
        if RANK:
            return
        if self.also:
            self.also(values, step=values["step"])
        if self._pending is not None:
            self._pending.append(self._text(values))
            return
        remedy = "free some space, then --resume continues from the last checkpoint"
        with explain(f"{self.path} can't be written", remedy, OSError):
            with open(self.path, "a") as file:
                file.write(self._text(values))

def read_log(path):
    """The lines of a log.jsonl as dicts, damaged ones skipped (a crash may cut off the last)."""
    lines = []
    for line in Path(path).read_text(errors="replace").splitlines():
        with suppress(ValueError):
            lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict)]

class SpikeDetector:
    """Warns of a loss more than six standard deviations and 5% above its running mean. Mean and
    variance are over about the last 50 values; the first 20 never warn."""
    def __init__(self):
        self.seen, self.mean, self.variance = 0, 0.0, 0.0

    def update(self, name, value, step, remedy):
        over = value - self.mean
        spike = over > max(6 * self.variance ** 0.5, self.mean / 20)
        if RANK == 0 and self.seen >= 20 and spike:
            tqdm.write(f"warning: the {name} {value:.3f} at step {step} is far above its running "
                       f"mean {self.mean:.3f}; {remedy}", file=sys.stderr)
        self.seen += 1
        share = max(0.02, 1 / self.seen)
        self.mean += share * over
        self.variance = (1 - share) * (self.variance + share * over ** 2)
