"""Run an experiment and keep what it measured.

    python results/run.py results/stdlib-ablations              # runs what is missing, then writes table.md and the curves
    python results/run.py results/stdlib-ablations --draw       # the table and the curves of what is there

An experiment is a file experiment.py of plain assignments: `prepare` (commands), `before` {name: command} (models made
once), `runs` {row: command}, `once` (rows that run with the first seed alone), `every` (keys of all runs), `seeds`, `out`,
`at_once`, `panels` {title: rows} of the picture, `orders` {claim: (row said to be better, row)}. A run's log is copied into the experiment's folder as it is done, its
command and machine written into runs.json there; a later call goes on with what is missing or has another command now.
In another clone `before` is made anew: its models are those of the first only where the machine and the data give the
same bits (the logs hold a hash of the concept model).
"""
import itertools
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import config
import eval as evaluation
from config import UserError, key


EXPERIMENT = dict(out="", prepare=[], before={}, runs={}, once=(), every="", seeds=(1337,), at_once=1, panels={}, orders={})  # what experiment.py may say


@dataclass(frozen=True)
class Config:
    draw: bool = key(False, "only write the table and the curves of what is there")
    only: str | None = key(None, "run the rows whose names begin with this")


def call(command, name, log, threads):
    """Run `python command` from the repository's folder, its output into the file log. UserError: it failed."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as file:
        file.write(f"$ python {command}\n".encode())
        file.flush()
        status = subprocess.call([sys.executable, *shlex.split(command)], cwd=ROOT, stdout=file, stderr=file,
                                 env={**os.environ, "OMP_NUM_THREADS": str(threads)} if threads else None)
    if status:
        raise UserError(f"{name}: `python {command}` ended with status {status}: {log.read_text().strip().splitlines()[-1]} (all of it: {log})")


def file_name(row):
    """A row's name as a file's: "Pause + KD" → pause_kd."""
    return re.sub(r"\W+", "_", row.lower()).strip("_")


def finished(path):
    """Is the log at path that of a whole run, up to its last evaluation?"""
    if not path.is_file():
        return False
    log = config.read_log(path)
    return bool(log) and log[0].get("max_iters") == log[-1].get("step") and "val_loss" in log[-1]


class Job(NamedTuple):
    """One run of an experiment."""
    row: str
    name: str     # of its log and its folder
    command: str


class Made:
    """runs.json of an experiment's folder: {name of a log: the command that made it, and the machine}."""
    def __init__(self, folder):
        self.path, self.lock = folder / "runs.json", threading.Lock()
        self.runs = json.loads(self.path.read_text()) if self.path.is_file() else {}

    def by(self, job):
        """Was the job's log made by its command, as far as is known?"""
        return job.name not in self.runs or self.runs[job.name]["command"] == job.command

    def note(self, job, machine):
        with self.lock:
            self.runs[job.name] = dict(command=job.command, machine=machine)
            self.path.write_text(json.dumps(dict(sorted(self.runs.items())), indent=1) + "\n")

    def forget(self, job):
        with self.lock:
            del self.runs[job.name]


def orders(curves, claims):
    """{claim: (row said to be better, row)} as a Markdown table: the difference of their losses at the end, seed by seed, and
    whether each seed has it so."""
    rows = ["| said | of | val loss less that of | difference | here |", "| --- | --- | --- | ---: | --- |"]
    for claim, names in claims.items():
        if not all(name in curves for name in names):
            continue
        better, other = (curves[name].at(curves[name].tokens[-1]) for name in names)
        apart = [better[seed] - other[seed] for seed in better if seed in other]
        verdict = "holds" if max(apart) < 0 else "does not hold" if min(apart) > 0 else "seeds disagree"
        rows.append(f"| {claim} | {names[0]} | {names[1]} | {evaluation.spread(apart)} | {verdict + (' (one seed)' if len(apart) == 1 else '')} |")
    return "\n".join(rows)


def draw(folder, e):
    """table.md, orders.md and the curves of an experiment's rows that are there."""
    logs = {}
    for row in e["runs"]:
        for seed in e["seeds"]:
            path = folder / f"{file_name(row)}-{seed}.jsonl"
            if finished(path):
                logs[f"{row}-{seed}"] = config.read_log(path)
    if not logs:
        raise UserError(f"{folder}: no run of it is finished yet")
    curves = evaluation.curves(logs)
    (folder / "table.md").write_text(evaluation.course(curves) + "\n")
    print(evaluation.course(curves))
    if e["orders"]:
        (folder / "orders.md").write_text(orders(curves, e["orders"]) + "\n")
        print("\n" + orders(curves, e["orders"]))
    print(f"curves: {evaluation.plot(folder / 'curves', curves, e['panels'])}")


def main(argv):
    cfg, rest = config.parse(Config, argv, __doc__, most=1, files=False)
    if not rest or not (Path(rest[0]) / "experiment.py").is_file():
        raise UserError(f"name the folder of an experiment, one with an experiment.py, such as results/stdlib-ablations{f', not {rest[0]}' if rest else ''}")
    folder = Path(rest[0]).resolve()
    e = EXPERIMENT | config.read_config_file(folder / "experiment.py")
    for name, default in EXPERIMENT.items():
        if not isinstance(e[name], type(default)) or name in ("runs", "out") and not e[name]:
            raise UserError(f"{folder / 'experiment.py'}: {name}={e[name]!r}: expected a {type(default).__name__}; results/stdlib-ablations has an example")
    if not any(row.startswith(cfg.only or "") for row in e["runs"]):
        raise UserError(f"only={cfg.only!r}: no row begins with it; there are {' | '.join(e['runs'])}")
    if e["at_once"] < 1 or len({file_name(row) for row in e["runs"]}) < len(e["runs"]):
        raise UserError(f"{folder / 'experiment.py'}: at_once={e['at_once']} must be at least 1, and rows must differ in more than case and punctuation")
    if unknown := [row for row in itertools.chain(e["once"], *e["panels"].values(), *e["orders"].values()) if row not in e["runs"]]:
        raise UserError(f"{folder / 'experiment.py'}: {unknown[0]!r} in once, panels or orders is no row of runs")
    at_once, out, made = e["at_once"], Path(e["out"]), Made(folder)
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}; {at_once} run{'s' * (at_once > 1)} at once"
    jobs = []
    for seed, row in itertools.product(e["seeds"], e["runs"]):
        name = f"{file_name(row)}-{seed}"
        if row.startswith(cfg.only or "") and (row not in e["once"] or seed == e["seeds"][0]):
            jobs.append(Job(row, name, " ".join(f"{e['runs'][row]} {e['every']} --seed={seed} --out_dir={out / name}".split())))
    jobs.sort(key=lambda job: job.row in e["once"])
    missing = [] if cfg.draw else [job for job in jobs if not (finished(folder / f"{job.name}.jsonl") and made.by(job))]
    if missing:
        for command in e["prepare"]:
            call(command, "prepare", ROOT / out / "prepare.txt", None)
        for name, command in e["before"].items():
            call(f"{command} --out_dir={out / name} --resume", name, ROOT / out / f"{name}.txt", None)
            shutil.copy(ROOT / out / name / "log.jsonl", folder / f"{name}.jsonl")
            if (ROOT / out / name / "sae.json").is_file():
                shutil.copy(ROOT / out / name / "sae.json", folder / f"{name}.json")

    with config.progress(len(missing), folder.name, "run") as bar:
        def run(job):
            if not made.by(job):  # of an older experiment.py
                shutil.rmtree(ROOT / out / job.name, ignore_errors=True)
                made.forget(job)
            call(f"{job.command} --resume", job.row, ROOT / out / f"{job.name}.txt", os.cpu_count() // at_once or 1)
            shutil.copy(ROOT / out / job.name / "log.jsonl", folder / f"{job.name}.jsonl")
            made.note(job, machine)
            bar.update()
            bar.set_postfix_str(job.row)
        pool = ThreadPoolExecutor(at_once)
        try:
            for done in [pool.submit(run, job) for job in missing]:
                done.result()
        finally:
            pool.shutdown(cancel_futures=True)
    draw(folder, e)


if __name__ == "__main__":
    config.run(main)
