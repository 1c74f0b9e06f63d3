"""The experiments under results/ and the command that runs them."""
import importlib.util
import json
import shutil
from pathlib import Path

from support.runtime import UserError

import pytest
from conftest import TINY, run
from test_curves import log

import sae
import train
from support import cli, curves
from support.log import read_log

ROOT = Path(train.__file__).resolve().parent

def load(path):
    spec = importlib.util.spec_from_file_location(f"results_{Path(path).stem}",
                                                  ROOT / "results" / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

experiment = load("run.py")

def write_log(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))

def test_a_claim_holds_where_it_does_for_every_seed():
    ends = {"a": (3.0, 4.0), "b": (3.5, 4.25), "c": (2.5, 4.5)}
    logs = {f"{name}-{seed}": log([9.0, end], seed=seed)
            for name, both in ends.items() for seed, end in zip((1, 2), both, strict=True)}
    claims = {"first": ("a", "b"), "second": ("b", "a"), "third": ("a", "c"), "not run": ("a", "d")}
    table = experiment.claims_table(curves.read_curves(logs), claims)
    rows = [row.strip("| ").split(" | ")[3:] for row in table.splitlines()[2:]]
    assert rows == [["-0.375 ± 0.125", "holds"], ["0.375 ± 0.125", "does not hold"],
                    ["0.000 ± 0.500", "seeds disagree"]]

def test_an_experiment_draws_the_finished_runs(tmp_path):
    (tmp_path / "experiment.py").write_text("""
out = "out"
runs = {"NTP": "train.py", "Pause + KD": "train.py --method=pause --concept_model=out/gpt",
        "KD": "train.py"}
seeds = (1, 2)
panels = {"none": ["KD"]}
short = ("KD", "Pause + KD")
claims = {"a claim": ("KD", "NTP")}
""")
    head, *lines = log([5.0, 4.0], seed=2)
    write_log(tmp_path / "pause_kd-2.jsonl", [head | dict(concept_model_hash="one"), *lines])
    write_log(tmp_path / "ntp-1.jsonl", [head, *lines[:-1]])  # unfinished
    other = head | dict(command="train.py --another")
    write_log(tmp_path / "kd-2.jsonl", [other, *lines])       # another command
    head, *lines = log([5.0, 4.5], seed=1)
    write_log(tmp_path / "pause_kd-1.jsonl", [head | dict(concept_model_hash="another"), *lines])
    note = "note: out/gpt was not the same in all runs (pause_kd-1; pause_kd-2)"
    assert note in run(experiment.main, tmp_path, "--draw")[1]
    (tmp_path / "pause_kd-1.jsonl").unlink()
    status, out, err = run(experiment.main, tmp_path, "--draw")
    table = (tmp_path / "table.md").read_text()
    assert status == 0 and "| Pause + KD | 1 |" in out and (tmp_path / "curves.svg").is_file(), err
    assert "NTP" not in table and "| KD" not in table
    assert (tmp_path / "short.md").read_text() == table and (tmp_path / "short.png").is_file()
    assert len((tmp_path / "claims.md").read_text().splitlines()) == 2  # no claim can be checked

def test_the_cost_of_the_concept_models_is_relative_to_the_first_row(tmp_path):
    e = experiment.EXPERIMENT | dict(before={"gpt-SEED": "", "sae-SEED": ""}, seeds=(1, 2))
    assert experiment.models_table(tmp_path, e, curves.read_curve("x", [log([5.0, 4.0])])) is None
    for seed, loss in (1, 3.0), (2, 3.5):
        head, *lines = log([5.0, loss], seed=seed)
        write_log(tmp_path / f"gpt-{seed}.jsonl", [head | dict(flops_per_token=300), *lines])
        write_log(tmp_path / f"sae-{seed}.jsonl", [dict(step=1, fvu=0.5)])
    head, *lines = log([5.0, 4.0])
    first = curves.read_curve("NTP", [[head | dict(flops_per_token=150), *lines]])
    (line,) = experiment.models_table(tmp_path, e, first).splitlines()[2:]
    assert line.startswith("| gpt | 2 | 3.250 ± 0.250 |") and line.endswith("| 2.0 |")

ONE = 'runs = {"a": "train.py"}\n'

@pytest.mark.parametrize("text, message", [
    ("runs = {}", "runs={}: expected a dict"),
    ('runs = {"a": 1}', "names and commands must be strings"),
    (ONE + "seeds = ()", "seeds=()"),
    ('runs = {"a": "train.py", "A": "train.py"}', "more than case"),
    (ONE + "at_once = 0", "at_once=0"),
    (ONE + 'before = {"a-SEED": "train.py"}', "before: a-1337 is a run, too"),
    (ONE + 'panels = {"x": 5}', "panels: expected lists"),
    (ONE + 'claims = {"x": ["a"]}', "two rows each"),
    (ONE + 'once = ("b",)', "'b' in once, short, panels or claims is not a row"),
    ('runs = {"a": "train.py --seed=1"}\nevery = "--seed=2"', "both set --seed"),
    (ONE + 'after = {"../a.txt": "eval.py"}', "is not the name of a .txt file"),
    ("runs = {'a': 'train.py \"b'}", "is not a command"),
    (ONE + 'panels = {"x": [["a"]]}', "is not a row of runs")])
def test_what_is_wrong_in_an_experiment_is_named(tmp_path, text, message):
    (tmp_path / "experiment.py").write_text(f'out = "out"\n{text}\n')
    status, _, err = run(experiment.main, tmp_path)
    assert status == 1 and message in err, err

def test_the_output_of_a_command_is_kept_until_the_command_changes(tmp_path):
    script = "import sys; print(*sys.argv[1:]); sys.exit(sys.argv[1] == 'fail')"
    (tmp_path / "say.py").write_text(script)
    say, kept = str(tmp_path / "say.py"), tmp_path / "said.txt"

    def run_after(what, again=()):
        experiment.run_after(tmp_path, {"said.txt": f"{say} {what}"}, again)

    run_after("'one thing'")
    assert kept.read_text() == f"$ python {say} 'one thing'\none thing\n"
    kept.write_text(kept.read_text() + "as before")
    run_after("'one thing'")
    assert kept.read_text().endswith("as before")
    run_after("another")
    assert kept.read_text().endswith("another\nanother\n")
    run_after("another", again=[1])
    assert kept.is_file()
    with pytest.raises(UserError, match="ended with status 1"):
        run_after("fail", again=[1])
    assert not kept.exists()  # not the output of earlier runs

def test_models_before_the_runs_are_trained_once_each_and_again_after_a_change(
        tmp_path, monkeypatch):
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(experiment, "ROOT", tmp_path)
    started = []

    def call(command, name, log, threads):
        started.append((name, threads))
        folder = log.with_suffix("")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "log.jsonl").write_text(command)
    monkeypatch.setattr(experiment, "call", call)

    def train(gpt):
        before = {"gpt": gpt, "sae-SEED": "sae.py --seed=SEED", "more-SEED": "train.py"}
        e = experiment.EXPERIMENT | dict(out="out", before=before, runs={"a": "train.py"},
                                         seeds=(1, 2), at_once=2)
        experiment.train_before(e, tmp_path / "results", experiment.jobs_of(e), 1)
    train("train.py")
    assert started[0] == ("gpt", None)
    assert sorted(started[1:]) == [(f"{name}-{seed}", 1) for name in ("more", "sae")
                                   for seed in (1, 2)]
    mine = tmp_path / "out" / "sae-1" / "mine"
    mine.touch()
    train("train.py")
    assert mine.exists()  # nothing has changed
    train("train.py --n_layer=2")
    assert not mine.exists() and (tmp_path / "results" / "sae-1.jsonl").is_file()

@pytest.mark.slow
def test_an_experiment_runs_what_is_missing(dataset, tmp_path, monkeypatch):
    folder, out, calls, call = tmp_path / "results", tmp_path / "out", [], experiment.call
    folder.mkdir()

    def write(runs, more=""):
        every = " ".join([*TINY, f"--dataset={dataset}"])
        text = f'out = "{out}"\nevery = "{every}"\nruns = {runs}\nat_once = 2\n{more}'
        (folder / "experiment.py").write_text(text)

    def counting_call(command, *rest):
        calls.append(command)
        call(command, *rest)

    monkeypatch.setattr(experiment, "call", counting_call)
    write({"NTP": "train.py", "Pause + KD": "train.py --method=pause"})
    status, stdout, err = run(experiment.main, folder)
    assert status == 0 and len(calls) == 2, err
    assert "| NTP | 1 |" in (folder / "table.md").read_text() and "| Pause + KD | 1 |" in stdout
    assert (folder / "curves.svg").is_file()
    assert read_log(folder / "pause_kd-1337.jsonl")[0]["machine"].endswith("2 runs at once")

    ntp = folder / "ntp-1337.jsonl"
    write_log(ntp, read_log(ntp)[:-1])
    assert run(experiment.main, folder)[0] == 0
    assert read_log(ntp)[-1]["step"] == read_log(ntp)[0]["max_iters"]
    assert len(calls) == 3 and "train.py --n_layer" in calls[2] and calls[2].endswith("--resume")

    rows = {"NTP": "train.py", "Pause + KD": "train.py --method=pause --beta1=0.8"}
    before, more = ntp.read_bytes(), 'once = ("NTP",)\nseeds = (1337, 2)\n'
    write(rows, more)  # a row with another command, and a second seed of it
    assert run(experiment.main, folder)[0] == 0 and len(calls) == 5
    assert all("--beta1=0.8" in command for command in calls[3:])
    assert ntp.read_bytes() == before and not (folder / "ntp-2.jsonl").exists()

    shutil.rmtree(out / "pause_kd-2")
    (folder / "pause_kd-2.jsonl").unlink()
    rows["Pause + KD"] = rows["Pause + KD"].replace("0.8", "0.7")
    write(rows, more)  # what the old command left is removed
    assert run(experiment.main, folder, "--only=Pause")[0] == 0 and len(calls) == 7
    assert "beta1=0.7" in read_log(folder / "pause_kd-1337.jsonl")[0]["command"]

    broken = f'{{"broken": "train.py --n_head=7 --n_embd=16 --dataset={dataset}"}}'
    (folder / "experiment.py").write_text(f'out = "{out}"\nruns = {broken}\n')
    status, _, err = run(experiment.main, folder)
    assert status == 1 and "n_embd=16 is not divisible" in err

@pytest.mark.parametrize("name, rows",
                         [("stdlib-ablations", 25), ("books-cpu", 19), ("books-cpu-long", 13),
                          ("books-h200", 8)])
def test_each_row_of_an_experiment_is_a_run_that_its_script_accepts(name, rows):
    e = experiment.read_experiment(ROOT / "results" / name / "experiment.py")
    commands = [*e["before"].values(), *(f"{row} {e['every']}" for row in e["runs"].values())]
    for command in commands:
        script, *argv = command.replace("SEED", "1").split()
        argv = [str(ROOT / arg) if arg.startswith("config/") else arg for arg in argv]
        if script.endswith("schedule.py"):
            script, argv = "train.py", [arg for arg in argv if not arg.startswith("--until=")]
        cfg, rest = cli.parse({"train.py": train, "sae.py": sae}[script].Config, argv)
        assert not rest
        if script == "train.py":
            train.model_config(cfg, 4096, 2048, 160)  # raises where the keys don't fit together
    assert len({experiment.file_name(row) for row in e["runs"]}) == len(e["runs"]) == rows

def test_a_log_of_a_run_with_another_concept_model_is_not_accepted(tmp_path):
    e = experiment.EXPERIMENT | dict(out="out", before={"gpt": "train.py"}, runs={"a": "train.py"})
    job, = experiment.jobs_of(e)
    head = dict(step=0, max_iters=1, command=job.command, before=job.before)
    lines = head, dict(step=1, val_loss=2.0)
    (tmp_path / f"{job.name}.jsonl").write_text("".join(json.dumps(t) + "\n" for t in lines))
    assert job.log(tmp_path)
    other, = experiment.jobs_of(e | dict(before={"gpt": "train.py --n_layer=9"}))
    assert other.command == job.command and other.log(tmp_path) is None

def test_a_run_is_started_again_where_its_models_have_other_commands(tmp_path, monkeypatch):

    def call(command, name, log, threads):
        folder = log.with_suffix("")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "log.jsonl").write_text('{"step": 0}\n')
    monkeypatch.setattr(experiment, "call", call)
    (tmp_path / "results").mkdir()
    for gpt, kept in (("train.py", True), ("train.py", True), ("train.py --n_layer=2", False)):
        e = experiment.EXPERIMENT | dict(out="out", before={"gpt": gpt}, runs={"a": "train.py"})
        job, = experiment.jobs_of(e)
        (tmp_path / "out" / job.name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / job.name / "mine").touch()
        experiment.run_job(job, tmp_path / "out", tmp_path / "results", 1, "here")
        assert (tmp_path / "out" / job.name / "mine").exists() == kept
    head = read_log(tmp_path / "results" / f"{job.name}.jsonl")[0]
    assert (head["command"], head["before"]) == (job.command, job.before)

def test_rows_that_run_once_have_the_first_seed_and_come_last():
    e = experiment.EXPERIMENT | dict(
        out="out", before={"gpt-SEED": "train.py --seed=SEED"}, once=("a",), seeds=(1, 2),
        runs={"a": "train.py", "b": "train.py --x=SEED"}, every="--y=out/gpt-SEED")
    jobs = experiment.jobs_of(e)
    assert [(job.row, job.seed) for job in jobs] == [("b", 1), ("b", 2), ("a", 1)]
    assert jobs[1].command == "train.py --x=2 --y=out/gpt-2 --seed=2 --out_dir=out/b-2"
    assert len({job.before for job in jobs}) == 2

# -- results/books-cpu-long ------------------------------------------------------------------------

@pytest.mark.parametrize("method, term", [("kd", "kl"), ("cocomix", "concept_loss")])
def test_a_scheduled_run_asks_its_concept_model_in_the_first_steps_only(chain, dataset, tmp_path,
                                                                        monkeypatch, method, term):
    for name in ("Config", "accumulate"):  # schedule.py replaces them
        monkeypatch.setattr(train, name, getattr(train, name))
    argv = [*TINY, f"--dataset={dataset}", f"--method={method}",
            f"--concept_model={chain['gpt']}", f"--sae={chain['sae']}"]
    assert run(train.main, *argv, f"--out_dir={tmp_path / 'all'}")[0] == 0
    load("books-cpu-long/schedule.py")
    assert run(train.main, *argv, f"--out_dir={tmp_path / 'half'}", "--until=4")[0] == 0
    through, half = ({line["step"]: line for line in read_log(tmp_path / name / "log.jsonl")
                      if "loss" in line} for name in ("all", "half"))
    assert [step for step, line in half.items() if term in line] == [1, 2, 3, 4]
    assert list(through) == list(half) == list(range(1, 9))
    # the losses of step 5 are those of the weights that step 4 left
    equal = [through[step]["loss"] == half[step]["loss"] for step in through]
    assert equal[:5] == [True] * 5 and not any(equal[5:])
    monkeypatch.undo()  # train.py would ask it again
    status, _, err = run(train.main, *argv, f"--out_dir={tmp_path / 'half'}", "--resume")
    assert status == 1 and "until=4, a key of another script" in err

def test_leads_need_the_logs_of_ntp_and_of_the_concept_models(tmp_path, monkeypatch):
    gaps = load("books-cpu-long/gaps.py")
    monkeypatch.setattr(gaps, "HERE", tmp_path)
    write_log(tmp_path / "kd-1.jsonl", log([3.0, 2.0], seed=1))
    status, _, err = run(gaps.main)
    assert status == 1 and "the logs of NTP" in err and not (tmp_path / "gaps.md").exists()

def test_leads_crossings_and_costs_are_counted_as_defined(tmp_path, monkeypatch):
    gaps = load("books-cpu-long/gaps.py")
    monkeypatch.setattr(gaps, "HERE", tmp_path)

    def write(name, seed, losses, command="train.py", **flops):
        start = dict(flops_per_token=100, concept_flops_per_token=0, max_iters=8, step=0,
                     seed=seed, command=command) | flops
        write_log(tmp_path / f"{name}-{seed}.jsonl", [start] + [
            dict(step=i, tokens=1_000_000 * i, val_loss=loss, seconds=float(i))
            for i, loss in enumerate(losses, 1)])
    for seed in (1, 2):
        write("gpt", seed, [5.0, 4.5])
        write("ntp", seed, [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0])
    write("kd", 1, [9.0, 7.5, 6.5, 5.5, 4.5, 3.5, 2.5, 1.5], concept_flops_per_token=50)
    write("kd", 2, [9.0, 7.5, 6.5, 5.5, 4.25, 3.25, 2.0, 1.0], concept_flops_per_token=50)
    write("tuned_half", 1, [9.0, 7.5, 6.5, 5.5, 4.4, 4.6, 3.0, 1.0], "schedule.py --until=4",
          concept_flops_per_token=50)
    write("cocomix", 1, [8.0, 7.0])  # not finished
    assert run(gaps.main)[0] == 0
    found = {name: [[cell.strip() for cell in line.strip("|").split("|")]
                    for line in (tmp_path / f"{name}.md").read_text().splitlines()[2:]]
             for name in ("gaps", "costs", "pairs")}
    ntp, kd, half = found["gaps"]
    assert [row[:2] for row in found["gaps"]] == [["NTP", "2"], ["KD", "2"], ["tuned, half", "1"]]
    assert ntp[-1] == "6.0 ± 0.0" and half[2:] == ["0.000", *["-0.500"] * 3, "-0.600", "0.600",
                                                   "0.000", "-1.000", "7.0"]
    assert kd[-2:] == ["-0.750 ± 0.250", "5.5 ± 0.5"]
    # to NTP's last 2.0: 7.5 of 8 steps, and 7; half: 7.5, of which 4 ask the concept model
    assert found["costs"] == [
        ["NTP", "2", "100.0%", "100.0% ± 0.0%", "100.0% ± 0.0%"],
        ["KD", "2", "150.0%", "90.6% ± 3.1%", "135.9% ± 4.7%"],
        ["tuned, half", "1", "125.0%", "93.8%", "118.8%"]]
    assert not found["pairs"]
    shares = gaps.saved(gaps.read_rows()[0]["KD"], gaps.read_rows()[0]["NTP"])
    assert shares[1][1] == pytest.approx(1 - (100 + 100 * 1 / 1.5) / 200)
    assert (tmp_path / "gaps.png").is_file() and (tmp_path / "gaps.svg").is_file()
