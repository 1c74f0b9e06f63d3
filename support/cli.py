"""Command lines and config files, generated from one frozen dataclass per script.

    @dataclass(frozen=True)
    class Config:
        batch_size: int = key(16, "sequences per optimizer step", low=1)
        method: Literal["ntp", "cocomix"] = key("ntp", "what to train")

    cfg, rest = parse(Config, sys.argv[1:], doc=__doc__)

Types and ranges are checked, and an unknown key names the closest known one. A config file holds
plain assignments. It is run as Python, so trust it as you trust code.
"""
import argparse
import dataclasses
import difflib
import functools
import math
import re
import runpy
import types
import typing
from pathlib import Path

from support.runtime import UserError

WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "text",
         type(None): "none"}
SWITCH = {"true": True, "1": True, "yes": True, "on": True,
          "false": False, "0": False, "no": False, "off": False}
INVALID = object()

def key(default, meaning, low=None, high=None, bare=None, follows=None):
    """A config key. low, high: the allowed range, ends included. bare: the value of `--key` alone;
    the next argument is then its value only if it matches the pattern `follows`."""
    return dataclasses.field(default=default, metadata=dict(
        meaning=meaning, low=low, high=high, bare=bare, follows=follows))

def parse(cls, argv, doc="", most=None, files=True):
    """(an instance of the dataclass cls, the positional arguments that are no config file).

    Arguments in any order: config files (*.py, read from left to right), --key=value, --key value,
    --switch. The command line overrides the files. most: how many other positional arguments are
    allowed. files: are config files allowed ("shared": unknown keys in them are ignored)?
    """
    kinds = typing.get_type_hints(cls)
    keys = {field.name: (field, kinds[field.name]) for field in dataclasses.fields(cls)}
    parser = _parser(keys, doc)
    if "--help" in argv or "-h" in argv:
        parser.print_help()
        raise SystemExit(0)
    given, others = parser.parse_known_args(_attach_values(argv, keys))
    values, rest = {}, []
    for arg in others:
        if arg.startswith("-") and arg != "-":
            raise _unknown(arg, keys, "command line")
        if not arg.endswith(".py"):
            rest.append(arg)
        elif files:
            values |= _read_keys(arg, keys, shared=files == "shared")
        else:
            raise UserError(f"unexpected config file {arg}: this command takes a run, such as "
                            "out/stdlib/cocomix")
    if most is not None and len(rest) > most:
        hint = "" if most else "; config files end in .py, keys begin with --"
        raise UserError(f"unexpected argument {rest[most]!r}{hint}")
    for name, value in vars(given).items():
        values[name] = tuple(value) if isinstance(value, list) else value
    return cls(**values), rest

def _parser(keys, doc):
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=(doc or "").strip(), add_help=False,
        epilog="  --debug               show the traceback of an error",
        allow_abbrev=False, argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (field, kind) in keys.items():
        default = "none" if field.default is None else repr(field.default)
        text = f"{field.metadata['meaning']}; {_expected(field, kind)} (default {default})"
        parser.add_argument(f"--{name}", metavar="", help=text.replace("%", "%%"),
                            action="extend" if typing.get_origin(kind) is tuple else "store",
                            type=functools.partial(_from_argument, field, kind))
    return parser

def _attach_values(argv, keys):
    """Rewrite every option as --name==value. argparse would take a run after a switch as its value
    (--resume out/run), reject a value that begins with a dash and lose a value of "--"."""
    args, out = list(argv), []
    while args:
        arg = args.pop(0)
        name, equals, value = arg.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if arg.startswith("--") and name in keys:
            values = [value] if equals else _take_values(*keys[name], args)
            out += [f"--{name}=={value}" for value in values]
        elif arg != "--debug":
            out.append(arg)
    return out

def _from_argument(field, kind, text):
    return _convert(field, kind, "command line", text.removeprefix("="))

def _take_values(field, kind, args):
    """The values of an option, removed from the front of the arguments after it."""
    meta, many, taken = field.metadata, typing.get_origin(kind) is tuple, []
    if meta["bare"] is not None:
        return [args.pop(0)] if args and re.match(meta["follows"], args[0]) else [meta["bare"]]
    if bool in _members(kind):
        fits = args and _cast_any(kind, args[0]) not in (None, INVALID)
        return [args.pop(0)] if fits else ["true"]
    while args and not args[0].startswith("--") and (many or not taken):
        taken.append(args.pop(0))
    if not taken:
        raise UserError(f"command line: --{field.name} needs {_expected(field, kind)}")
    return taken

def _unknown(arg, keys, where):
    name = arg.lstrip("-").partition("=")[0].replace("-", "_")
    if name in keys:
        return UserError(f"unexpected argument {arg!r}: write --{arg.lstrip('-')}")
    near = difflib.get_close_matches(name, keys, 1, 0.5)
    hint = f"did you mean {near[0]!r}?" if near else "--help lists the keys"
    return UserError(f"{where}: unknown key {name!r}; {hint}")

def read_config_file(path):
    """The assignments of a config file as a dict. UserError: missing, or it raises."""
    path = Path(path)
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.py")], 1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise UserError(f"no config file {path}{hint}")
    try:
        names = runpy.run_path(str(path))
    except (Exception, SystemExit) as e:
        raise UserError(f"config file {path} does not run: {type(e).__name__}: {e}") from e
    return {name: value for name, value in names.items() if not name.startswith("_")
            and not isinstance(value, types.ModuleType) and not callable(value)}

def _read_keys(path, keys, shared):
    content = read_config_file(path)
    unknown = [] if shared else [name for name in content if name not in keys]
    if len(unknown) > 1:
        raise UserError(f"{path} sets keys that this script does not have ({', '.join(unknown)}): "
                        "is it another script's?")
    if unknown:
        raise _unknown(unknown[0], keys, path)
    return {name: _convert(*keys[name], path, content[name]) for name in content if name in keys}

def check_unchanged(before, now, path, free):
    """UserError if a key that is not in `free` differs between a checkpoint's config and `now`."""
    for name, value in now.items():
        if name not in free and name in before and before[name] != value:
            raise UserError(f"{path} has {name}={before[name]!r}, but now it is {value!r}: "
                            "take it back, or choose another --out_dir")

# --------------------------------------------------------------------------------------------------
# Values: text from the command line, or Python values from a file

def _members(kind):
    """The alternatives of a type: int | None → (int, NoneType)."""
    union = typing.get_origin(kind) in (types.UnionType, typing.Union)
    return typing.get_args(kind) if union else (kind,)

def _convert(field, kind, where, value):
    result, low, high = _cast_any(kind, value), field.metadata["low"], field.metadata["high"]
    if isinstance(result, (int, float)) and not isinstance(result, bool):
        if low is not None and result < low or high is not None and result > high:
            result = INVALID
    if result is INVALID:
        raise UserError(f"{where}: {field.name}={value!r}: expected {_expected(field, kind)}")
    return result

def _cast_any(kind, value):
    """value as the first alternative of a type that fits, None before all others; else INVALID."""
    for member in sorted(_members(kind), key=lambda member: member is not type(None)):
        try:
            return _cast(member, value)
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
            pass
    return INVALID

def _cast(kind, value):
    origin, choices, text = typing.get_origin(kind), typing.get_args(kind), isinstance(value, str)
    if origin is tuple:
        return tuple(_cast(choices[0], v) for v in ([value] if text else value))
    if origin is typing.Literal and value in choices or kind is str and text and "\0" not in value:
        return value
    if kind is type(None) and (value is None or text and value.lower() in ("none", "")):
        return None
    if kind is bool:
        return value if isinstance(value, bool) else SWITCH[value.lower()]
    if kind is float and not isinstance(value, bool) and math.isfinite(float(value)):
        return float(value)
    if kind is int and not isinstance(value, bool):
        if text:  # 200e9 is an integer, too
            value = int(value) if re.fullmatch(r"\s*[+-]?[\d_]+\s*", value) else float(value)
        if value == int(value):
            return int(value)
    raise ValueError

def _expected(field, kind):
    """What a value of a key looks like, in words."""
    return " or ".join(_in_words(member, field.metadata) for member in _members(kind))

def _in_words(kind, meta):
    low, high, args = meta["low"], meta["high"], typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(args) if len(args) < 3 else "one of " + ", ".join(args)
    if typing.get_origin(kind) is tuple:
        return "one or more of " + _in_words(args[0], meta)
    if kind not in (int, float) or low is None and high is None:
        return WORDS[kind]
    if low is None or high is None:
        return WORDS[kind] + (f" of at least {low}" if high is None else f" of at most {high}")
    return f"{WORDS[kind]} from {low} to {high}"
