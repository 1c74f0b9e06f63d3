"""Command lines and config files, generated from one frozen dataclass per script.

    class Config:  # a frozen dataclass
        batch_size: int = key(16, "sequences per optimizer step", low=1)
        method: Literal["ntp", "cocomix"] = key("ntp", "what to train")
    cfg, rest = parse(Config, sys.argv[1:], doc=__doc__)

A config file holds plain assignments. It is run as Python, so trust it as you trust code.
"""
import argparse
import re
import runpy
import types
import typing
from contextlib import suppress
from dataclasses import field, fields
from difflib import get_close_matches
from math import inf, isfinite
from pathlib import Path

from support.runtime import UserError, explain

TEXTS = tuple[str, ...]
WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "text",
         TEXTS: "one or more texts", types.NoneType: "none"}
SWITCH = {"true": True, "1": True, "yes": True, "on": True,
          "false": False, "0": False, "no": False, "off": False}
RENAMED = dict(  # what nanoGPT's other keys are called here
    lr_decay_iters="the cosine ends at max_iters",
    decay_lr="min_lr=learning_rate keeps the learning rate constant",
    gradient_accumulation_steps="batch_size counts all sequences of a step, micro_batch_size those "
    "of a pass", always_save_checkpoint="keep_checkpoints keeps all; each evaluation writes one",
    eval_only="evaluate a run with python eval.py RUN", backend="device selects it",
    init_from="only train.py starts from weights; others take a run without a key",
    compile="only train.py and bench.py compile", dtype="only train.py and bench.py have it")

def key(default, meaning, low=-inf, high=inf, bare=None, follows=None):
    """A config key. low, high: the allowed range, ends included. bare: the value of `--key` alone;
    the next argument is then its value only if it matches the pattern `follows`."""
    return field(default=default, metadata=dict(meaning=meaning, low=low, high=high, bare=bare,
                                                follows=follows))

def parse(cls, argv, doc="", most=None, files=True):
    """(an instance of cls, the positional arguments). Config files (*.py, read from left to right),
    --key=value, --key value and --switch come in any order; the command line overrides the files.
    most: how many positional arguments are allowed. files: are config files allowed ("shared":
    unknown keys in them are ignored)?"""
    keys = {k.name: k for k in fields(cls)}
    parser = _parser(keys, doc)
    if "--help" in argv or "-h" in argv:
        parser.print_help()
        raise SystemExit(0)
    given, others = parser.parse_known_args(_attach_values(argv, keys))
    values, rest = {}, []
    for arg in others:
        if arg.startswith("-") and arg != "-":
            name = arg.lstrip("-").partition("=")[0].replace("-", "_")
            _check_known([name], keys, f"unexpected argument {arg!r}")
            raise UserError(f"unexpected argument {arg!r}: write --{arg.lstrip('-')}")
        if not arg.endswith(".py"):
            rest.append(arg)
        elif files:
            content = read_config_file(arg)
            _check_known(content if files != "shared" else [], keys, arg)
            values |= {name: _convert(keys[name], value, arg)
                       for name, value in content.items() if name in keys}
        else:
            raise UserError(f"unexpected config file {arg}: this command takes a run")
    if most is not None and len(rest) > most:
        raise UserError(f"unexpected argument {rest[most]!r}; {_hint(rest[most], keys, files)}")
    values |= {name: tuple(value) if isinstance(value, list) else value
               for name, value in vars(given).items()}
    cfg = cls(**values)
    object.__setattr__(cfg, "given", set(values))  # the keys that do not have their default
    return cfg, rest

def _hint(arg, keys, files):
    """What an argument that is none may be meant for."""
    if arg.partition("=")[0].replace("-", "_") in keys:
        return f"write --{arg}"
    if files and Path(f"{arg}.py").is_file():
        return f"did you mean {arg}.py?"
    folder = f", the run's folder --out_dir={arg}" * ("/" in arg and "out_dir" in keys)
    return "keys are --key" + ", config files FILE.py" * bool(files) + folder

def _parser(keys, doc):
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=doc.strip(), add_help=False, allow_abbrev=False,
        epilog="With --debug, an error shows its traceback.",
        argument_default=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter)
    for k in keys.values():
        default = "none" if k.default is None else repr(k.default)
        text = f"{k.metadata['meaning']}; {_expected(k)} (default {default})"
        parser.add_argument(f"--{k.name}", metavar="", help=text.replace("%", "%%"),
                            type=lambda text, k=k: _convert(k, text.removeprefix("=")),
                            action="extend" if k.type == TEXTS else "store")
    return parser

def _attach_values(argv, keys):
    """Rewrite every option as --name==value. argparse would take a run after a switch as its value
    (--resume out/run), reject a value that begins with a dash and lose a value of "--"."""
    args, attached = [arg for arg in argv if arg != "--debug"], []
    while args:
        arg = args.pop(0)
        name, equals, value = arg.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if arg.startswith("--") and name in keys:
            values = [value] if equals else _take(keys[name], args)
            attached += [f"--{name}=={value}" for value in values]
        else:
            attached.append(arg)
    return attached

def _check_known(names, keys, where):
    unknown = [name for name in names if name not in keys]
    if unknown:
        near = get_close_matches(unknown[0], keys, 1, 0.5)
        hint = f"did you mean {near[0]!r}?" if near else "--help lists the keys"
        hint = RENAMED.get(unknown[0], hint if len(unknown) == 1 else "is it another script's?")
        raise UserError(f"{where}: unknown key {', '.join(unknown)!r}; {hint}")

def read_config_file(path):
    """The assignments of a config file as a dict. UserError: missing, or it raises."""
    path = Path(path)
    if not path.is_file():
        files = [*path.parent.glob("*.py"), *Path("config").glob("*.py")]
        near = get_close_matches(path.name, [file.name for file in files], 1)
        hints = [f"; did you mean {file}?" for file in files if file.name in near]
        raise UserError(f"no config file {path}" + "".join(hints[-1:]))
    with explain(f"config file {path} does not run", "correct it", (Exception, SystemExit)):
        names = runpy.run_path(str(path))
    return {name: value for name, value in names.items() if not name.startswith("_")
            and not isinstance(value, types.ModuleType) and not callable(value)}

def _take(k, args):
    """The values of an option without "=", removed from the front of the arguments after it."""
    bare, follows = k.metadata["bare"], k.metadata["follows"]
    if bool in _kinds(k):
        words = (*SWITCH, *typing.get_args(_kinds(k)[-1]))
        bare, follows = "true", f"(?i)({'|'.join(words)})$"
    if bare is not None:
        return [args.pop(0)] if args and re.match(follows, args[0]) else [bare]
    taken = []
    while args and not args[0].startswith("--") and (k.type == TEXTS or not taken):
        taken.append(args.pop(0))
    if not taken:
        raise UserError(f"command line: --{k.name} needs {_expected(k)}")
    return taken

def _kinds(k):
    """The alternatives of a key's type: int | None → (int, NoneType)."""
    union = typing.get_origin(k.type) in (types.UnionType, typing.Union)
    return typing.get_args(k.type) if union else (k.type,)

def _expected(k):
    """What a value of a key looks like, in words."""
    words = [WORDS.get(kind) or " or ".join(typing.get_args(kind)) for kind in _kinds(k)]
    low, high = k.metadata["low"], k.metadata["high"]
    if low > -inf:  # of a number, the first alternative
        words[0] += f" of at least {low}" if high == inf else f" from {low} to {high}"
    return " or ".join(words)

def _convert(k, value, where="command line"):
    """A value, text or from a file, as the key's type. UserError: another type, out of range."""
    for kind in reversed(_kinds(k)):  # none before text
        with suppress(AttributeError, KeyError, OverflowError, TypeError, ValueError):
            result = _cast(kind, value)
            low, high = k.metadata["low"], k.metadata["high"]
            if not isinstance(result, (int, float)) or low <= result <= high:
                return result
    raise UserError(f"{where}: {k.name}={value!r}: expected {_expected(k)}")

def _cast(kind, value):
    """A value as one type; an error if it does not fit."""
    if kind == TEXTS:
        return tuple(_cast(str, v) for v in ([value] if isinstance(value, str) else value))
    same_type = type(value) is kind and kind is not float and "\0" not in str(value)
    if same_type or value in typing.get_args(kind):
        return value
    if kind is types.NoneType and str(value).lower() in ("none", ""):
        return None
    if kind is bool:
        return SWITCH[value.lower()]
    number = float(value) if kind is float or set("eE.") & set(str(value)) else int(value)
    if isfinite(number) and number == kind(number) and not isinstance(value, bool):
        return kind(number)  # 200e9 is an integer, too
    raise ValueError
