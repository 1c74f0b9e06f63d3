"""Config files and command lines."""
import dataclasses
from typing import Literal

import pytest

import config
import train
from config import UserError, key, parse


@dataclasses.dataclass(frozen=True)
class C:
    count: int = key(3, "a count", low=1, high=10)
    rate: float = key(0.5, "a rate", low=0)
    name: str = key("x", "a name")
    on: bool = key(False, "a switch")
    kind: Literal["one", "two"] = key("one", "a kind")
    size: int | Literal["auto"] = key("auto", "a size", low=1)
    maybe: int | None = key(None, "perhaps")
    files: tuple[str, ...] = key((), "files")
    steer: str | None = key(None, "steering", bare="auto", follows=r"\d+:")
    either: bool | Literal["auto"] = key("auto", "a switch or auto")


def values(*argv):
    return parse(C, argv)[0]


def test_every_way_to_give_a_value():
    cfg, rest = parse(C, ["a/run", "--count=4", "--rate", "1e-3", "--on", "--kind=two", "--size=7", "--maybe", "2", "--files", "u", "v", "--steer", "--name=b=c", "other"])
    assert (cfg.count, cfg.rate, cfg.on, cfg.kind, cfg.size, cfg.maybe, cfg.files, cfg.steer, cfg.name) == (4, 1e-3, True, "two", 7, 2, ("u", "v"), "auto", "b=c")
    assert rest == ["a/run", "other"]
    assert values("--on=false").on is False and values("--on", "false").on is False and values("--steer=3:4").steer == "3:4"
    assert values("--steer", "17:6").steer == "17:6" and parse(C, ["--steer", "out/run"])[1] == ["out/run"] and values("--steer=none").steer is None
    assert values("--either", "auto").either == "auto" and values("--either", "no").either is False and parse(C, ["--either", "x"])[1] == ["x"]
    assert values("--files", "a", "--files=b").files == ("a", "b")
    assert parse(train.Config, ["--max_tokens=200e9"])[0].max_tokens == 200_000_000_000
    assert values("--size=auto").size == "auto" and values("--maybe=none").maybe is None and values("--count=1_0").count == 10


@pytest.mark.parametrize("argv, message", [
    (["--cuont=4"], "unknown key 'cuont'; did you mean 'count'"), (["--zzz=4"], "unknown key 'zzz'; --help"), (["-count=4"], "write --count=4"),
    (["--count=four"], "count='four': expected an integer from 1 to 10"), (["--count=0"], "count='0'"), (["--count=11"], "count='11'"), (["--count=2.5"], "count='2.5'"),
    (["--count=nan"], "count='nan'"), (["--count="], "count=''"), (["--count"], "--count needs"), (["--rate=nan"], "rate='nan': expected a number of at least 0"),
    (["--rate=inf"], "rate='inf'"), (["--rate=-1"], "rate='-1'"), (["--on=maybe"], "on='maybe': expected true or false"), (["--kind=three"], "kind='three': expected one or two"),
    (["--size=0"], "size='0'"), (["--size=big"], "size='big'"), (["--files"], "--files needs"), (["a", "b"], "unexpected argument 'b'"),
])
def test_what_is_wrong_is_named(argv, message):
    with pytest.raises(UserError) as e:
        parse(C, argv, most=1)
    assert message in str(e.value) and "\n" not in str(e.value)


def test_config_files_and_the_command_line_over_them(tmp_path):
    (tmp_path / "a.py").write_text("# comment\nfrom math import sqrt\ncount = 2 * 3\nrate = 1\nfiles = ('p', 'q')\n")
    cfg, rest = parse(C, ["--rate=0.25", str(tmp_path / "a.py")])
    assert (cfg.count, cfg.rate, cfg.files, rest) == (6, 0.25, ("p", "q"), [])


@pytest.mark.parametrize("text, message", [
    ("cuont = 3", "unknown key 'cuont'; did you mean 'count'"), ("count = 'many'", "count='many'"), ("count = True", "count=True"), ("count = 2.5", "count=2.5"),
    ("on = 1", "on=1: expected true or false"), ("count = ", "does not run: SyntaxError"), ("count = 1 / 0", "does not run: ZeroDivisionError"), ("rate = float('nan')", "rate=nan"), ("exit()", "does not run: SystemExit"),
    ("name = 3", "name=3: expected text"),
])
def test_what_is_wrong_in_a_file_is_named(tmp_path, text, message):
    (tmp_path / "a.py").write_text(text)
    with pytest.raises(UserError) as e:
        parse(C, [str(tmp_path / "a.py")])
    assert message in str(e.value) and "a.py" in str(e.value)


def test_a_config_file_that_is_not_there_names_the_nearest():
    with pytest.raises(UserError, match="did you mean config/stdlib_ntp.py"):
        parse(train.Config, ["config/stdlib_npt.py"])


def test_every_config_file_of_the_repository_fits_its_script():
    import sae
    from pathlib import Path
    for path in sorted((Path(config.__file__).parent).glob("[a-z]*.py")):
        parse(sae.Config if path.stem.endswith("_sae") else train.Config, [str(path)])


def test_help_prints_every_key(capsys):
    with pytest.raises(SystemExit) as e:
        parse(train.Config, ["--help"], train.__doc__)
    text = capsys.readouterr().out
    assert e.value.code == 0 and all(f"--{f.name} " in text for f in dataclasses.fields(train.Config))
