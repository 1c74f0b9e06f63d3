"""Run an experiment and keep what it measured.

    python results/run.py results/stdlib-ablations              # runs what is missing, then writes table.md and the curves
    python results/run.py results/stdlib-ablations --draw       # the table and the curves of what is there

An experiment is a file experiment.py of plain assignments: `prepare` (commands), `before` {name: command} (models made
once), `runs` {row: command}, `every` (keys of all runs), `seeds`, `out`, `at_once`, `panels` {title: rows} of the picture. A
row's logs are copied into the experiment's folder as they are done; a later call goes on with what is missing there. In another clone `before` is made
anew: its models are those of the first only where the machine and the data give the same bits.
"""
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import config
import eval as evaluation
from config import UserError, key


EXPERIMENT = dict(out="", prepare=[], before={}, runs={}, every="", seeds=(1337,), at_once=1, panels={})  # what experiment.py may say


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


def draw(folder, e):
    """table.md and the curves of an experiment's rows that are there."""
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
    seeds, at_once, out = e["seeds"], e["at_once"], Path(e["out"])
    jobs = [(row, seed, folder / f"{file_name(row)}-{seed}.jsonl") for seed in seeds for row in e["runs"] if row.startswith(cfg.only or "")]
    missing = [] if cfg.draw else [job for job in jobs if not finished(job[2])]
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
            row, seed, log = job
            to = out / f"{file_name(row)}-{seed}"
            call(f"{e['runs'][row]} {e['every']} --seed={seed} --out_dir={to} --resume", row, ROOT / f"{to}.txt", os.cpu_count() // at_once or 1)
            shutil.copy(ROOT / to / "log.jsonl", log)
            bar.update()
            bar.set_postfix_str(row)
        pool = ThreadPoolExecutor(at_once)
        try:
            for done in [pool.submit(run, job) for job in missing]:
                done.result()
        finally:
            pool.shutdown(cancel_futures=True)
    if missing:
        (folder / "machine.txt").write_text(f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}; {at_once} runs at once\n")
    draw(folder, e)


if __name__ == "__main__":
    config.run(main)
