"""Command lines and config files."""
import dataclasses
from pathlib import Path
from typing import Literal

from support.runtime import UserError

import pytest

import sae
import sample
import train
from support.checkpoint import save_checkpoint
from support.cli import key, parse
from support.training import Run

ROOT = Path(train.__file__).resolve().parent

@dataclasses.dataclass(frozen=True)
class C:
    count: int = key(3, "a count", low=1, high=10)
    rate: float = key(0.5, "a rate", low=0)
    name: str = key("x", "a name")
    on: bool = key(False, "a switch")
    kind: Literal["one", "two"] = key("one", "a kind")
    size: int | Literal["auto"] = key("auto", "a size", low=1)
    maybe: int | None = key(None, "optional, 5% of something")
    files: tuple[str, ...] = key((), "files")
    steer: str | None = key(None, "steering", bare="auto", follows=r"\d+:")
    either: bool | Literal["auto"] = key("auto", "a switch or auto")
    long_name: int = key(0, "any integer")

def values(*argv):
    return parse(C, argv)[0]

def test_every_way_to_give_a_value():
    cfg, rest = parse(C, ["a/run", "--count=4", "--rate", "1e-3", "--on", "--kind=two", "--size=7",
                          "--maybe", "2", "--files", "u", "v", "--steer", "--name=b=c", "other"])
    assert cfg == C(count=4, rate=1e-3, on=True, kind="two", size=7, maybe=2, files=("u", "v"),
                    steer="auto", name="b=c")
    assert rest == ["a/run", "other"]

@pytest.mark.parametrize("argv, name, value, rest", [
    ("--on=false", "on", False, []), ("--on false", "on", False, []),
    ("--on run", "on", True, ["run"]), ("--either auto", "either", "auto", []),
    ("--either no", "either", False, []),
    ("--either x", "either", True, ["x"]), ("--steer=3:4", "steer", "3:4", []),
    ("--steer 17:6", "steer", "17:6", []), ("--steer out/run", "steer", "auto", ["out/run"]),
    ("--steer=none", "steer", None, []), ("--files a --files=b", "files", ("a", "b"), []),
    ("--size=auto", "size", "auto", []), ("--maybe=none", "maybe", None, []),
    ("--count=1_0", "count", 10, []), ("--maybe=200e9", "maybe", 200_000_000_000, []),
    ("--long-name=3", "long_name", 3, []), ("--long_name -3", "long_name", -3, []),
    ("--name -x", "name", "-x", []), ("--debug --name y", "name", "y", []),
    ("- a", "name", "x", ["-", "a"]),
    ("--name=--", "name", "--", []), ("--name==a", "name", "=a", []),
])
def test_values_and_what_is_left(argv, name, value, rest):
    cfg, others = parse(C, argv.split())
    assert getattr(cfg, name) == value and others == rest

@pytest.mark.parametrize("argv, message", [
    ("--cuont=4", "unknown key 'cuont'; did you mean 'count'"), ("-count=4", "write --count=4"),
    ("--coun=4", "unknown key 'coun'; did you mean 'count'"), ("--zzz=4", "key 'zzz'; --help"),
    ("--debug=-", "unknown key 'debug'"),
    ("--", "unknown key ''"), ("--count=four", "count='four': expected an integer from 1 to 10"),
    ("--count=0", "count='0'"), ("--count=11", "count='11'"), ("--count=2.5", "count='2.5'"),
    ("--count=nan", "count='nan'"), ("--count=", "count=''"), ("--count", "--count needs"),
    ("--count --on", "--count needs"), ("--rate=nan", "rate='nan': expected a number of at least"),
    ("--rate=inf", "rate='inf'"), ("--rate=-1", "rate='-1'"), ("--on=maybe", "expected true or"),
    ("--kind=three", "kind='three': expected one or two"), ("--size=0", "size='0'"),
    ("--size=big", "size='big'"), ("--files", "--files needs"), ("a b", "unexpected argument 'b'"),
])
def test_what_is_wrong_is_named(argv, message):
    with pytest.raises(UserError) as e:
        parse(C, argv.split(), most=1)
    assert message in str(e.value) and "\n" not in str(e.value)

@pytest.mark.parametrize("name, ours", [
    ("lr_decay_iters", "max_iters"), ("gradient_accumulation_steps", "micro_batch_size"),
    ("always_save_checkpoint", "keep_checkpoints"), ("eval_only", "eval.py RUN"),
    ("decay_lr", "min_lr"), ("backend", "device")])
def test_nanogpts_names_lead_to_ours(name, ours, tmp_path):
    (tmp_path / "a.py").write_text(f"{name} = 1\nother = 2\n")
    for argv in ([f"--{name}=1"], [str(tmp_path / "a.py")]):
        with pytest.raises(UserError, match=f"unknown key '{name}.*; .*{ours}"):
            parse(train.Config, argv)

@pytest.mark.parametrize("name", ["init_from", "compile", "dtype"])
def test_nanogpts_names_in_other_scripts(name):
    with pytest.raises(UserError, match=f"unknown key '{name}'; .*(name the run|only train.py)"):
        parse(sample.Config, [f"--{name}=x"])

def test_config_files_and_the_command_line_over_them(tmp_path):
    (tmp_path / "a.py").write_text("# comment\nfrom math import sqrt\ncount = 2 * 3\nrate = 1\n"
                                   "files = ('p', 'q')\n")
    (tmp_path / "b.py").write_text("count = 7\n")
    cfg, rest = parse(C, ["--rate=0.25", str(tmp_path / "a.py"), str(tmp_path / "b.py")])
    assert (cfg.count, cfg.rate, cfg.files, rest) == (7, 0.25, ("p", "q"), [])

def test_shared_config_files_may_hold_the_keys_of_another_script(tmp_path):
    (tmp_path / "a.py").write_text("count = 2\nn_layer = 3\n")
    assert parse(C, [str(tmp_path / "a.py")], files="shared")[0].count == 2
    with pytest.raises(UserError, match="unknown key 'n_layer'"):
        parse(C, [str(tmp_path / "a.py")])
    with pytest.raises(UserError, match="unexpected config file .*a.py: this command takes a run"):
        parse(C, [str(tmp_path / "a.py")], files=False)

@pytest.mark.parametrize("text, message", [
    ("cuont = 3", "unknown key 'cuont'; did you mean 'count'"), ("count = 'many'", "count='many'"),
    ("count = True", "count=True"), ("count = 2.5", "count=2.5"),
    ("on = 1", "on=1: expected true or false"), ("count = ", "does not run: SyntaxError"),
    ("count = 1 / 0", "does not run: ZeroDivisionError"), ("rate = float('nan')", "rate=nan"),
    ("exit()", "does not run: SystemExit"), ("name = 3", "name=3: expected text"),
    ("a, b = 1, 2", "is it another script's?"),
])
def test_what_is_wrong_in_a_file_is_named(tmp_path, text, message):
    (tmp_path / "a.py").write_text(text)
    with pytest.raises(UserError) as e:
        parse(C, [str(tmp_path / "a.py")])
    assert message in str(e.value) and "a.py" in str(e.value)

def test_a_missing_config_file_names_the_closest():
    with pytest.raises(UserError, match="did you mean config/stdlib_ntp.py"):
        parse(C, ["config/stdlib_npt.py"])
    with pytest.raises(UserError, match="no config file nowhere/a.py$"):
        parse(C, ["nowhere/a.py"])

def test_every_config_file_of_the_repository_fits_its_script():
    for path in sorted(ROOT.glob("config/[a-z]*.py")):
        parse(sae.Config if path.stem.endswith("_sae") else train.Config, [str(path)])

@pytest.mark.parametrize("cls", [C, train.Config])
def test_help_prints_every_key(capsys, cls):
    with pytest.raises(SystemExit) as e:
        parse(cls, ["--help"], train.__doc__)
    text = capsys.readouterr().out
    assert e.value.code == 0 and train.__doc__.strip() in text
    assert all(f"--{f.name} " in text for f in dataclasses.fields(cls))
    assert cls is train.Config or "5% of something; an integer or none (default none)" in text

def test_a_resumed_run_keeps_all_but_its_free_keys(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Config:
        out_dir: str = str(tmp_path)
        resume: bool = True
        overwrite: bool = False
        learning_rate: float = 1.0
        n_layer: int = 2
        new: int = 3

    class Example(Run):
        file, config, needs, free = "ckpt.pt", "keys", ("keys", "step", "seconds"), ("out_dir",)

    before = dict(n_layer=2, out_dir="elsewhere", resume=True, learning_rate=1.0)
    save_checkpoint(tmp_path / "ckpt.pt", keys=before, step=4, seconds=2.0)
    assert Example(Config(), 5, 10).tokens == 40
    with pytest.raises(UserError, match="ckpt.pt has n_layer=2, but now it is 3: take it back"):
        Example(Config(n_layer=3), 5, 10)
