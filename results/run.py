"""Run an experiment and keep its logs, tables and pictures.

    python results/run.py results/stdlib-ablations          # run what is missing, then draw
    python results/run.py results/stdlib-ablations --draw   # draw the runs that are finished

An experiment is a folder with a file experiment.py of plain assignments:

    out       folder of the runs
    prepare   commands to run first
    before    {name: command} models trained before the runs. SEED in a name or command is replaced
              by the run's seed, so each seed has models of its own; without it seeds share them
    runs      {row: command} one row of the table each
    once      rows to run with the first seed only
    every     keys added to all runs
    seeds, at_once (how many runs in parallel)
    panels    {title: rows} of the picture
    claims    {claim: (row that should have the lower loss, row)}, checked in claims.md
    short     rows for a small table and picture, short.md and short.png
    after     {NAME.txt: command} run when all runs are finished, and again when one of them or the
              command has changed; its output is kept in that file

Finished logs are copied into the experiment's folder; their first line has the command and the
machine. models.md has what the training of the concept models cost. If interrupted, run the same
command again: finished runs are skipped, unless experiment.py now has another command for them. In
a new clone the models in `before` are trained again, and equal the old ones only where machine and
data give the same bits (the first line has the concept model's hash).
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
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from support.runtime import UserError, progress, run

from support import curves
from support.cli import key, parse, read_config_file
from support.files import atomic_write, fingerprint
from support.log import read_log

ROOT = Path(__file__).resolve().parents[1]
# the keys of experiment.py, with their types and defaults
EXPERIMENT = dict(out="", prepare=[], before={}, runs={}, once=(), every="", seeds=(1337,),
                  at_once=1, panels={}, claims={}, short=(), after={})

@dataclass(frozen=True)
class Config:
    draw: bool = key(False, "run nothing, only draw the finished runs")
    only: str | None = key(None, "run only the rows whose names begin with this")

# --------------------------------------------------------------------------------------------------
# experiment.py

def check_types(e, check):
    for name, default in EXPERIMENT.items():
        filled = e[name] or name not in ("runs", "out", "seeds")
        check(isinstance(e[name], type(default)) and filled,
              f"{name}={e[name]!r}: expected a {type(default).__name__}; "
              "results/stdlib-ablations has an example")
    for name in ("before", "runs", "after"):
        check(all(isinstance(text, str) for pair in e[name].items() for text in pair),
              f"{name}: names and commands must be strings")
    for name in ("panels", "claims"):
        check(all(isinstance(rows, (list, tuple)) for rows in e[name].values()),
              f"{name}: expected lists of rows")
    check(e["at_once"] >= 1, f"at_once={e['at_once']} must be at least 1")

def check_commands(e, check):
    commands = *e["prepare"], *(c for name in ("before", "runs", "after") for c in e[name].values())
    for command in (*commands, e["every"]):
        try:
            shlex.split(command)
        except (ValueError, AttributeError) as error:
            check(False, f"{command!r} is not a command ({error})")
    for name in e["after"]:
        check(re.fullmatch(r"[\w-]+\.txt", name), f"after: {name!r} is not the name of a .txt file")

def check_rows(e, check):
    check(len({file_name(row) for row in e["runs"]}) == len(e["runs"]),
          "rows must differ in more than case and punctuation")
    names = {f"{file_name(row)}-{seed}" for row in e["runs"] for seed in e["seeds"]}
    models = {name.replace("SEED", str(seed)) for name in e["before"] for seed in e["seeds"]}
    check(not names & models, f"before: {', '.join(names & models)} is a run, too")
    check(all(len(rows) == 2 for rows in e["claims"].values()),
          "claims: two rows each, the one that should have the lower loss first")
    for row in itertools.chain(e["once"], e["short"], *e["panels"].values(), *e["claims"].values()):
        check(isinstance(row, str) and row in e["runs"],
              f"{row!r} in once, short, panels or claims is not a row of runs")
    for row, command in e["runs"].items():
        both = keys_of(command) & keys_of(e["every"])
        check(not both, f"{row!r} and every both set {', '.join(both)}")

def keys_of(command):
    return {word.partition("=")[0] for word in command.split() if word.startswith("--")}

def read_experiment(path):
    """experiment.py as a dict with all keys of EXPERIMENT. UserError: something in it is wrong."""
    e = EXPERIMENT | read_config_file(path)

    def check(ok, message):
        if not ok:
            raise UserError(f"{path}: {message}")

    check_types(e, check)
    check_commands(e, check)
    check_rows(e, check)
    return e

def file_name(row):
    """A row's name as a file name: "Pause + KD" → pause_kd."""
    return re.sub(r"\W+", "_", row.lower()).strip("_")

class Job(NamedTuple):
    """One run of an experiment."""
    row: str
    seed: int
    name: str     # of its folder and its log
    command: str
    before: str   # a hash of the commands that trained the models it uses

    def log(self, folder):
        """Its log in the experiment's folder, or None if it is missing, unfinished, or from another
        command. A log without a command is trusted."""
        path = folder / f"{self.name}.jsonl"
        log = read_log(path) if path.is_file() else []
        if not log or log[0].get("max_iters") != log[-1].get("step") or "val_loss" not in log[-1]:
            return None
        same = (log[0].get("command", self.command) == self.command
                and log[0].get("before", self.before) == self.before)
        return log if same else None

def models_of(e, seed):
    """{name: command} of the models that a seed's runs use."""
    return {name.replace("SEED", str(seed)): command.replace("SEED", str(seed))
            for name, command in e["before"].items()}

def jobs_of(e):
    """All Jobs of an experiment; rows that run only once come last."""
    jobs = []
    for seed, row in itertools.product(e["seeds"], e["runs"]):
        if row in e["once"] and seed != e["seeds"][0]:
            continue
        name, models = f"{file_name(row)}-{seed}", models_of(e, seed)
        before = fingerprint(*(f"{model} {command}".encode() for model, command in models.items()))
        keys = f"{e['runs'][row]} {e['every']}".replace("SEED", str(seed))
        command = f"{keys} --seed={seed} --out_dir={Path(e['out']) / name}"
        jobs.append(Job(row, seed, name, " ".join(command.split()), before))
    return sorted(jobs, key=lambda job: job.row in e["once"])

# --------------------------------------------------------------------------------------------------
# Running

def call(command, name, log, threads):
    """Run `python command` from the repository's root, with its output appended to the file log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)} if threads else None
    with open(log, "ab") as file:
        file.write(f"$ python {command}\n".encode())
        file.flush()
        status = subprocess.call([sys.executable, *shlex.split(command)], cwd=ROOT, stdout=file,
                                 stderr=file, env=env)
    if status:
        last = log.read_text().strip().splitlines()[-1]
        raise UserError(f"{name}: `python {command}` ended with status {status}: {last} "
                        f"(full output: {log})")

def in_parallel(calls, at_once):
    """Make the calls, at_once at a time. The first error stops the ones that have not started."""
    pool = ThreadPoolExecutor(at_once)
    try:
        done, _ = wait([pool.submit(call) for call in calls], return_when=FIRST_EXCEPTION)
        for call in done:
            call.result()
    finally:
        pool.shutdown(cancel_futures=True)

def remove_if_edited(folder, command):
    """Remove a run's folder if another command started it; write this one down next to it."""
    note = folder.with_name(folder.name + ".command")
    if note.is_file() and note.read_text() == command:
        return
    if note.is_file():
        shutil.rmtree(folder, ignore_errors=True)
    with atomic_write(note) as file:
        file.write(command.encode())

def train_model(e, folder, name, command, earlier, threads):
    """Train a model of `before` and copy its log into the experiment's folder. earlier: the
    commands of the models that it may have learned from."""
    out = ROOT / e["out"] / name
    remove_if_edited(out, " # after: ".join([command, *earlier]))
    call(f"{command} --out_dir={Path(e['out']) / name} --resume", name,
         out.with_name(f"{name}.txt"), threads)
    shutil.copy(out / "log.jsonl", folder / f"{name}.jsonl")
    if (out / "sae.json").is_file():
        shutil.copy(out / "sae.json", folder / f"{name}.json")

def train_before(e, folder, jobs, threads):
    """Prepare the data and train the models that jobs use, those of all seeds side by side."""
    for command in e["prepare"]:
        call(command, "prepare", ROOT / e["out"] / "prepare.txt", None)
    sets = [list(models_of(e, seed).items()) for seed in dict.fromkeys(job.seed for job in jobs)]
    for i in range(len(e["before"])):
        models = {models[i]: [command for _, command in models[:i]] for models in sets}
        in_parallel([functools.partial(train_model, e, folder, *model, earlier,
                                       None if len(models) == 1 else threads)
                     for model, earlier in models.items()], e["at_once"])

def run_job(job, out, folder, threads, machine):
    """Train one run and copy its log, with command and machine, into the experiment's folder."""
    remove_if_edited(out / job.name, f"{job.command} # before: {job.before}")
    call(f"{job.command} --resume", job.row, out / f"{job.name}.txt", threads)
    start, *lines = (out / job.name / "log.jsonl").read_text().splitlines()
    about = dict(command=job.command, before=job.before, machine=machine)
    with atomic_write(folder / f"{job.name}.jsonl") as file:
        for line in (json.dumps(json.loads(start) | about), *lines):
            file.write(f"{line}\n".encode())

def run_jobs(e, folder, jobs):
    out, at_once = ROOT / e["out"], e["at_once"]
    threads = max(1, os.cpu_count() // at_once)
    machine = (f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}; "
               f"{at_once} run{'s' * (at_once > 1)} at once")
    for name in e["after"]:  # an older output is not left behind
        (folder / name).unlink(missing_ok=True)
    train_before(e, folder, jobs, threads)
    with progress(len(jobs), folder.name, "run") as bar:
        def run_one(job):
            run_job(job, out, folder, threads, machine)
            bar.update()
            bar.set_postfix_str(job.row)
        in_parallel([functools.partial(run_one, job) for job in jobs], at_once)

def run_after(folder, commands, again):
    """Run {NAME.txt: command} and keep each command and its output in folder/NAME.txt, unless the
    file already has that command. again: run them all."""
    if again:  # first, so that a command that fails does not leave an older output behind
        for name in commands:
            (folder / name).unlink(missing_ok=True)
    for name, command in commands.items():
        path, first = folder / name, f"$ python {command}\n"
        if path.is_file() and path.read_text().startswith(first):
            continue
        print(f"{name}: python {command}", flush=True)
        done = subprocess.run([sys.executable, *shlex.split(command)], cwd=ROOT, text=True,
                              capture_output=True, errors="replace")
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise UserError(f"{name}: `python {command}` ended with status {done.returncode}: "
                            f"{last}; in a new clone the models of finished runs are missing: "
                            "remove their logs to train them again")
        with atomic_write(path) as file:
            file.write((first + done.stdout).encode())

# --------------------------------------------------------------------------------------------------
# Tables and pictures

def verdict(differences):
    if max(differences) < 0:
        text = "holds"
    elif min(differences) > 0:
        text = "does not hold"
    else:
        text = "seeds disagree"
    return text + (" (one seed)" if len(differences) == 1 else "")

def claims_table(found, claims):
    """{claim: (row that should have the lower loss, row)} as a Markdown table: the difference of
    their losses, seed by seed, at the last evaluation that all rows share."""
    end = curves.shared_tokens(found)[-1]
    rows = ["| claim | row | compared with | val loss difference | verdict |",
            "| --- | --- | --- | ---: | --- |"]
    for claim, (better, other) in claims.items():
        if better not in found or other not in found:
            continue
        losses, others = found[better].at(end), found[other].at(end)
        differences = [losses[seed] - others[seed] for seed in losses if seed in others]
        if differences:
            rows.append(f"| {claim} | {better} | {other} | {curves.spread(differences)} "
                        f"| {verdict(differences)} |")
    return "\n".join(rows)

def models_table(folder, e, first):
    """The GPTs of `before` as a Markdown table: their final losses and what their own training
    cost, also relative to that of the row `first`; None where none has been trained."""
    names = {name for seed in e["seeds"] for name in models_of(e, seed)}
    logs = {name: log for name in sorted(names) if (path := folder / f"{name}.jsonl").is_file()
            and "val_loss" in (log := read_log(path) or [{}])[-1]}
    rows, cost = [], first.flops_per_token * first.tokens[-1]
    for name, curve in curves.read_curves(logs).items():
        flops = curve.flops_per_token * curve.tokens[-1]
        ends = curves.spread(curve.at(curve.tokens[-1]).values())
        rows.append([name, str(len(curve.losses)), ends, f"{flops:.2e}",
                     f"{flops / cost:.1f}" if cost else "–"])
    headings = "concept model", "seeds", "val loss", "FLOPs of its training", "÷ the first row's"
    return curves.markdown(list(headings), rows) if rows else None

def note_mixed_models(logs):
    """Say so where runs name the same concept model or dataset but learned from different ones."""
    for option, name in (("concept_model", "concept_model_hash"), ("dataset", "data_hash")):
        found = {}  # path: {hash: names of runs}
        for job, log in logs.items():
            path = re.search(rf"--{option}=(\S+)", job.command)
            if path and log[0].get(name):
                found.setdefault(path[1], {}).setdefault(log[0][name], []).append(job.name)
        for path, runs in found.items():
            if len(runs) > 1:
                groups = "; ".join(", ".join(names) for names in runs.values())
                print(f"note: {path} was not the same in all runs ({groups}); remove the older "
                      "logs to train them again")

def write_table(path, text):
    path.write_text(text + "\n")
    print(text)

def draw(folder, e, jobs):
    """Write table.md, claims.md, short.md and the pictures of the finished jobs."""
    rows = list(e["runs"])
    logs = {job: log for job in sorted(jobs, key=lambda job: rows.index(job.row))
            if (log := job.log(folder))}
    if not logs:
        raise UserError(f"{folder}: none of its runs is finished yet; start it without --draw")
    note_mixed_models(logs)
    found = curves.read_curves({f"{job.row}-{job.seed}": log for job, log in logs.items()})
    write_table(folder / "table.md", curves.learning_curves(found))
    if e["claims"]:
        print()
        write_table(folder / "claims.md", claims_table(found, e["claims"]))
    if models := models_table(folder, e, next(iter(found.values()))):
        (folder / "models.md").write_text(models + "\n")
    if few := {row: found[row] for row in e["short"] if row in found}:
        (folder / "short.md").write_text(curves.learning_curves(few) + "\n")
        curves.plot(folder / "short", few)
    print(f"curves: {curves.plot(folder / 'curves', found, e['panels'])}")

def main(argv):
    argv = [arg.removesuffix("/experiment.py") for arg in argv]
    cfg, rest = parse(Config, argv, __doc__, most=1, files=False)
    if not rest or not (Path(rest[0]) / "experiment.py").is_file():
        given = f", not {rest[0]}" if rest else ""
        raise UserError("name the folder of an experiment, one with an experiment.py, such as "
                        f"results/stdlib-ablations{given}")
    if cfg.draw and cfg.only:
        raise UserError("--draw draws all rows: leave --only out")
    folder = Path(rest[0]).resolve()
    e = read_experiment(folder / "experiment.py")
    jobs, missing = jobs_of(e), []
    chosen = [job for job in jobs if job.row.startswith(cfg.only or "")]
    if not chosen:
        rows = " | ".join(e["runs"])
        raise UserError(f"only={cfg.only!r}: no row begins with it; there are {rows}")
    if not cfg.draw:
        missing = [job for job in chosen if not job.log(folder)]
        if missing:
            run_jobs(e, folder, missing)
        else:
            print(f"all {len(chosen)} runs are finished; to repeat one, remove its log in {folder}")
    draw(folder, e, jobs)
    if not cfg.draw and all(job.log(folder) for job in jobs):
        run_after(folder, e["after"], again=missing)

if __name__ == "__main__":
    run(main)
