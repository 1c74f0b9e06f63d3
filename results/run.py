"""Run an experiment and keep what it measured.

    python results/run.py results/stdlib-ablations              # runs what is missing, then writes table.md and the curves
    python results/run.py results/stdlib-ablations --draw       # the table and the curves of what is there

An experiment is a file experiment.py of plain assignments: `prepare` (commands), `before` {name: command} (models made
before the runs; SEED in a name or a command stands for a run's seed, so each seed has models of its own), `runs` {row: command}, `once` (rows that run with the first seed alone), `every` (keys of all runs), `seeds`, `out`,
`at_once`, `panels` {title: rows} of the picture, `orders` {claim: (row said to be better, row)}, `short` (rows
for short.md and short.png, a table and a picture of few rows), `after` {NAME.txt: command} (run once all runs are there, again when
one of them or the command is another; what it prints is kept as that file).

A run's log is copied into the experiment's folder as it is done, its command and machine written into the first line. A
later call goes on with what is missing there, or was made by another command than experiment.py has now. In another
clone `before` is made anew: its models are those of the first only where the machine and the data give the same bits (a
log's first line has a hash of the concept model).
"""
import functools
import itertools
import json
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
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import config
import data
import eval as evaluation
from config import UserError, key


EXPERIMENT = dict(out="", prepare=[], before={}, runs={}, once=(), every="", seeds=(1337,), at_once=1, panels={}, orders={}, short=(), after={})  # what experiment.py may say


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


class Job(NamedTuple):
    """One run of an experiment."""
    row: str
    seed: int
    name: str     # of its log and its folder
    command: str
    before: str   # a hash of the commands that made the models it uses

    def log(self, folder):
        """The lines of its log in the experiment's folder, up to the last evaluation; None if it isn't there whole, or was made
        otherwise (one without a command is taken at its word)."""
        path = folder / f"{self.name}.jsonl"
        log = config.read_log(path) if path.is_file() else []
        whole = log and log[0].get("max_iters") == log[-1].get("step") and "val_loss" in log[-1]
        return log if whole and (log[0].get("command", self.command), log[0].get("before", self.before)) == (self.command, self.before) else None


def models_of(e, seed):
    """{name: command} of the models made before a seed's runs. SEED in a name or a command stands for the seed; without it all seeds share them."""
    return {name.replace("SEED", str(seed)): command.replace("SEED", str(seed)) for name, command in e["before"].items()}


def jobs_of(e):
    """The Jobs of an experiment, those that run once last."""
    jobs = []
    for seed, row in itertools.product(e["seeds"], e["runs"]):
        if row not in e["once"] or seed == e["seeds"][0]:
            name = f"{file_name(row)}-{seed}"
            before = data.fingerprint(*(f"{name} {command}".encode() for name, command in models_of(e, seed).items()))
            command = f"{e['runs'][row]} {e['every']}".replace("SEED", str(seed))
            jobs.append(Job(row, seed, name, " ".join(f"{command} --seed={seed} --out_dir={Path(e['out']) / name}".split()), before))
    return sorted(jobs, key=lambda job: job.row in e["once"])


def together(calls, at_once):
    """Make the calls, so many at once. The first that fails ends all: its error is raised and no other call begins."""
    pool = ThreadPoolExecutor(at_once)
    try:
        for done in [pool.submit(call) for call in calls]:
            done.result()
    finally:
        pool.shutdown(cancel_futures=True)


def make_models(out, folder, models, threads):
    """Make the models {name: command} one after the other, each from those before it, and copy their logs into the experiment's folder."""
    for name, command in models.items():
        start_over_if_edited(out / name, command)
        call(f"{command} --out_dir={(out / name).relative_to(ROOT)} --resume", name, out / f"{name}.txt", threads)
        shutil.copy(out / name / "log.jsonl", folder / f"{name}.jsonl")
        if (out / name / "sae.json").is_file():
            shutil.copy(out / name / "sae.json", folder / f"{name}.json")


def start_over_if_edited(folder, command):
    """Remove a run's folder if another command began it; note this one beside it."""
    note = folder.with_name(folder.name + ".command")
    if note.is_file() and note.read_text() != command:
        shutil.rmtree(folder, ignore_errors=True)
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(command)


def orders(curves, claims):
    """{claim: (row said to be better, row)} as a Markdown table: the difference of their losses at the last evaluation that all
    rows share, seed by seed, and whether each seed has it so."""
    end, rows = evaluation.shared_tokens(curves)[-1], ["| said | of | val loss less that of | difference | here |", "| --- | --- | --- | ---: | --- |"]
    for claim, names in claims.items():
        better, other = (curves[name].at(end) if name in curves else {} for name in names)
        apart = [better[seed] - other[seed] for seed in better if seed in other]
        if apart:
            verdict = "holds" if max(apart) < 0 else "does not hold" if min(apart) > 0 else "seeds disagree"
            rows.append(f"| {claim} | {names[0]} | {names[1]} | {evaluation.spread(apart)} | {verdict + (' (one seed)' if len(apart) == 1 else '')} |")
    return "\n".join(rows)


def draw(folder, e, jobs):
    """table.md, orders.md and the curves of the jobs whose logs are there."""
    rows = list(e["runs"])
    logs = {f"{job.row}-{job.seed}": log for job in sorted(jobs, key=lambda job: rows.index(job.row)) if (log := job.log(folder))}
    if not logs:
        raise UserError(f"{folder}: no run of it is finished yet")
    for row in rows:
        alike = len({job.before for job in jobs}) == 1  # all seeds should have one concept model
        if alike and len({log[0].get("concept_model_hash") for job in jobs if job.row == row and (log := logs.get(f"{row}-{job.seed}"))}) > 1:
            print(f"note: the seeds of {row!r} had different concept models; remove its older logs to make them anew")
    curves = evaluation.curves(logs)
    (folder / "table.md").write_text(evaluation.course(curves) + "\n")
    print(evaluation.course(curves))
    if e["orders"]:
        (folder / "orders.md").write_text(orders(curves, e["orders"]) + "\n")
        print("\n" + orders(curves, e["orders"]))
    if few := {row: curves[row] for row in e["short"] if row in curves}:
        (folder / "short.md").write_text(evaluation.course(few) + "\n")
        evaluation.plot(folder / "short", few)
    print(f"curves: {evaluation.plot(folder / 'curves', curves, e['panels'])}")


def run_after(folder, commands, anew):
    """Each {NAME.txt: command}: the command and what it prints into the file of the folder, unless that holds them already."""
    if anew:  # first of all: one that fails must not leave what older runs gave
        for name in commands:
            (folder / name).unlink(missing_ok=True)
    for name, command in commands.items():
        path, first = folder / name, f"$ python {command}\n"
        if not path.is_file() or not path.read_text().startswith(first):
            print(f"{name}: python {command}", flush=True)
            done = subprocess.run([sys.executable, *shlex.split(command)], cwd=ROOT, capture_output=True, text=True, errors="replace")
            if done.returncode:
                raise UserError(f"{name}: `python {command}` ended with status {done.returncode}: {(done.stderr.strip().splitlines() or ['nothing said'])[-1]}; "
                                "in another clone the models of its runs are missing: remove their logs to make them anew")
            path.write_text(first + done.stdout)


def read_experiment(path):
    """experiment.py as a dict of all of EXPERIMENT. UserError: something in it is not as it should be."""
    e = EXPERIMENT | config.read_config_file(path)

    def check(ok, message):
        if not ok:
            raise UserError(f"{path}: {message}")
    for name, default in EXPERIMENT.items():
        check(isinstance(e[name], type(default)) and (e[name] or name not in ("runs", "out", "seeds")), f"{name}={e[name]!r}: expected a {type(default).__name__}; results/stdlib-ablations has an example")
    for name in ("before", "runs", "after"):
        check(all(isinstance(text, str) for pair in e[name].items() for text in pair), f"{name}: names and commands are texts")
    for name in ("panels", "orders"):
        check(all(isinstance(rows, (list, tuple)) for rows in e[name].values()), f"{name}: expected lists of rows")
    check(e["at_once"] >= 1, f"at_once={e['at_once']} must be at least 1")
    check(len({file_name(row) for row in e["runs"]}) == len(e["runs"]), "rows must differ in more than case and punctuation")
    check(all(len(rows) == 2 for rows in e["orders"].values()), "orders: two rows each, the one said to be better first")
    for command in (*e["prepare"], *e["before"].values(), *e["runs"].values(), *e["after"].values(), e["every"]):
        try:
            shlex.split(command)
        except (ValueError, AttributeError) as error:
            raise UserError(f"{path}: {command!r} is no command ({error})") from error
    for name in e["after"]:
        check(re.fullmatch(r"[\w-]+\.txt", name), f"after: {name!r} is no name of a .txt file")
    for row in itertools.chain(e["once"], e["short"], *e["panels"].values(), *e["orders"].values()):
        check(isinstance(row, str) and row in e["runs"], f"{row!r} in once, short, panels or orders is no row of runs")
    keys = lambda command: {word.partition("=")[0] for word in command.split() if word.startswith("--")}
    for row, command in e["runs"].items():
        check(not (both := keys(command) & keys(e["every"])), f"{row!r} and every both set {', '.join(both)}")
    return e


def main(argv):
    cfg, rest = config.parse(Config, [arg.removesuffix("/experiment.py") for arg in argv], __doc__, most=1, files=False)
    if not rest or not (Path(rest[0]) / "experiment.py").is_file():
        raise UserError(f"name the folder of an experiment, one with an experiment.py, such as results/stdlib-ablations{f', not {rest[0]}' if rest else ''}")
    if cfg.draw and cfg.only:
        raise UserError("--draw draws all rows: leave --only out")
    folder = Path(rest[0]).resolve()
    e = read_experiment(folder / "experiment.py")
    out, at_once, jobs = ROOT / e["out"], e["at_once"], jobs_of(e)
    threads = max(1, os.cpu_count() // at_once)
    chosen = [job for job in jobs if job.row.startswith(cfg.only or "")]
    if not chosen:
        raise UserError(f"only={cfg.only!r}: no row begins with it; there are {' | '.join(e['runs'])}")
    missing = [] if cfg.draw else [job for job in chosen if not job.log(folder)]
    if not missing and not cfg.draw:
        print(f"the logs of all {len(chosen)} runs are there, nothing is run: remove those that are to be made anew from {folder}")
    if missing:
        for command in e["prepare"]:
            call(command, "prepare", out / "prepare.txt", None)
        sets = list({str(models): models for job in missing if (models := models_of(e, job.seed))}.values())  # one for all seeds, or one each
        together([functools.partial(make_models, out, folder, models, None if len(sets) == 1 else threads) for models in sets], at_once)

    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}; {at_once} run{'s' * (at_once > 1)} at once"
    with config.progress(len(missing), folder.name, "run", disable=not missing) as bar:
        def run(job):
            start_over_if_edited(out / job.name, f"{job.command} # before: {job.before}")
            call(f"{job.command} --resume", job.row, out / f"{job.name}.txt", threads)
            start, *lines = (out / job.name / "log.jsonl").read_text().splitlines()
            start = json.dumps(json.loads(start) | dict(command=job.command, before=job.before, machine=machine))
            with data.replacing(folder / f"{job.name}.jsonl") as file:
                file.write("".join(f"{line}\n" for line in (start, *lines)).encode())
            bar.update()
            bar.set_postfix_str(job.row)
        together([functools.partial(run, job) for job in missing], at_once)
    draw(folder, e, jobs)
    if not cfg.draw and all(job.log(folder) for job in jobs):
        run_after(folder, e["after"], anew=missing)


if __name__ == "__main__":
    config.run(main)
