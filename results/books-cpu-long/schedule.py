"""train.py that asks the concept model during the first steps only.

    python results/books-cpu-long/schedule.py --until=2400 --method=kd …   # keys: train.py's

From step `until` on there are neither labels nor a teacher, as if concept_weight and kd_weight were
0: the student is left alone once it has learned what its concept model can teach it.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train
from support import runtime  # before torch
from support.cli import key

@dataclass(frozen=True)
class Config(train.Config):
    until: int = key(0, "steps in which the concept model is asked", low=0)

def scheduled(run, concept_model, x, y, stored, accumulate=train.accumulate):
    """train.accumulate of a step of the schedule."""
    if run.step >= run.cfg.until:
        concept_model = stored = None
    return accumulate(run, concept_model, x, y, stored)

train.Config, train.accumulate = Config, scheduled

if __name__ == "__main__":
    runtime.run(train.main, parallel=True)
