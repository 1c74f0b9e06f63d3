"""Configuration: a frozen dataclass a script, filled from a config file and from the command line.

    @dataclass(frozen=True)
    class Config:
        batch_size: int = key(16, "sequences an optimizer step", low=1)
        method: Literal["ntp", "cocomix"] = key("ntp", "what is trained")

    cfg, rest = parse(Config, sys.argv[1:], doc=__doc__)

Types are checked, unknown keys name the nearest known one, and --help prints every key. A config file
holds plain assignments; it is run as Python, so trust it as you trust code. Whatever a person can do
wrong raises UserError, which `run` turns into one line on stderr and exit status 1 (--debug shows the
traceback). What every command shares stands here too: the progress bar, the log, the signals. No torch.
"""
import dataclasses
import difflib
import fcntl
import functools
import json
import math
import os
import re
import runpy
import signal
import sys
import time
import types
import typing
import weakref
from pathlib import Path

from tqdm import tqdm

replace = dataclasses.replace  # a copy of a config with other values

# Which of torchrun's processes this is, of all and on this machine. The first one writes and speaks.
try:
    RANK, LOCAL_RANK, WORLD_SIZE = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
except ValueError as e:
    sys.exit(f"error: RANK, LOCAL_RANK and WORLD_SIZE are torchrun's, and whole numbers ({e}); unset them")


def _leave(number, _):
    """Ctrl-C while a script of ours still imports its libraries, which would print a traceback or swallow it."""
    if not RANK:
        os.write(2, b"stopped\n")
    os._exit(128 + number)


_main = getattr(sys.modules["__main__"], "__file__", None)
if _main and Path(_main).resolve().is_relative_to(Path(__file__).resolve().parents[1]) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _leave)  # until `run` has the command in hand


class UserError(Exception):
    """Something a person can mend: one line that says what is wrong, with which value, and the remedy."""


def key(default, meaning, low=None, high=None, bare=None, follows=None):
    """A config key. low, high: the allowed range, ends included. bare: the value of `--key` alone; the next argument
    is then its value only if it matches the pattern `follows`."""
    return dataclasses.field(default=default, metadata=dict(meaning=meaning, low=low, high=high, bare=bare, follows=follows))


# ---------------------------------------------------------------------------------------------------
# values

def _members(kind):
    """The alternatives of a type: int | None -> (int, NoneType); others stand alone."""
    return typing.get_args(kind) if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union else (kind,)


def _expected(kind, meta):
    """What a value of this type looks like, in words."""
    low, high = meta.get("low"), meta.get("high")
    bounds = f" from {low} to {high}" if low is not None and high is not None else f" of at least {low}" if low is not None else f" of at most {high}" if high is not None else ""
    def words(k):
        if typing.get_origin(k) is typing.Literal:
            choices = list(map(str, typing.get_args(k)))
            return " or ".join(choices) if len(choices) < 3 else "one of " + ", ".join(choices)
        if typing.get_origin(k) is tuple:
            return "one or more of " + words(typing.get_args(k)[0])
        return {int: "an integer" + bounds, float: "a number" + bounds, bool: "true or false", str: "text", type(None): "none"}[k]
    return " or ".join(map(words, _members(kind)))


def _one(kind, value):
    """value (text from the command line, or a Python value from a file) as `kind`; ValueError if it is none."""
    text = isinstance(value, str)
    if typing.get_origin(kind) is typing.Literal:
        for choice in typing.get_args(kind):
            if value == choice and type(value) is type(choice) or text and value == str(choice):
                return choice
    elif typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)[0]
        return tuple(_one(inner, v) for v in ((value,) if text else value))
    elif kind is type(None):
        if value is None or text and value.lower() in ("none", ""):
            return None
    elif kind is bool:
        if isinstance(value, bool):
            return value
        if text and value.lower() in ("true", "1", "yes", "on", "false", "0", "no", "off"):
            return value.lower() in ("true", "1", "yes", "on")
    elif kind is int:
        if isinstance(value, bool):
            raise ValueError
        number = float(value) if text and not value.strip().lstrip("+-").replace("_", "").isdigit() else int(value)
        if number == int(number) and (text or value == number):  # 200e9 is an integer, 0.5 is none
            return int(number)
    elif kind is float:
        if not isinstance(value, bool) and math.isfinite(float(value)):
            return float(value)
    elif kind is str and text and "\0" not in value:
        return value
    raise ValueError


def _fits(members, value):
    for member in members:
        try:
            return _one(member, value) is not None
        except ValueError:
            pass
    return False


def _convert(field, kind, value, where):
    for member in sorted(_members(kind), key=lambda member: member is not type(None)):  # "none" is none before it is text
        try:
            result = _one(member, value)
        except (ValueError, TypeError, OverflowError):
            continue
        low, high = field.metadata.get("low"), field.metadata.get("high")
        if isinstance(result, (int, float)) and not isinstance(result, bool):
            if low is not None and result < low or high is not None and result > high:
                break
        return result
    raise UserError(f"{where}: {field.name}={value!r}: expected {_expected(kind, field.metadata)}")


# ---------------------------------------------------------------------------------------------------
# command lines and files

def _unknown(name, known, where):
    near = difflib.get_close_matches(name, known, 1, 0.5)
    return UserError(f"{where}: unknown key {name!r}" + (f"; did you mean {near[0]!r}?" if near else "; --help lists the keys"))


def read_config_file(path):
    """The assignments of a config file as a dict. UserError: no such file, or it does not run."""
    path = Path(path)
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else [], 1)
        raise UserError(f"no config file {path}" + (f"; did you mean {path.parent / near[0]}?" if near else ""))
    try:
        names = runpy.run_path(str(path))
    except (Exception, SystemExit) as e:
        line = getattr(e, "lineno", None)
        raise UserError(f"config file {path} does not run: {type(e).__name__}: {e}" + (f" (line {line})" if line and "line" not in str(e) else "")) from e
    return {k: v for k, v in names.items() if not k.startswith("_") and not isinstance(v, types.ModuleType) and not callable(v)}


def parse(cls, argv, doc="", most=None, files=True):
    """(an instance of the dataclass cls, the positional arguments that are no config file).

    Positional arguments that end in .py are config files, read in order; --key=value, --key value and a bare
    --flag come after them, wherever they stand. most: how many other positional arguments are allowed; files: whether
    config files are ("shared": also those of another script, whose keys are passed over).
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    kinds = typing.get_type_hints(cls)
    values, given, rest = {}, {}, []
    args = list(argv)
    if "--help" in args or "-h" in args:
        print(help_text(cls, doc))
        raise SystemExit(0)
    while args:
        arg = args.pop(0)
        if arg == "--debug":
            continue
        if not arg.startswith("-") or arg == "-":
            if arg.endswith(".py"):
                if not files:
                    raise UserError(f"unexpected config file {arg}: this command takes a run, such as out/stdlib/cocomix")
                content = read_config_file(arg)
                unknown = [name for name in content if name not in fields and files != "shared"]
                if len(unknown) > 1:
                    raise UserError(f"{arg} sets keys that this script does not have ({', '.join(unknown)}): is it another script's?")
                if unknown:
                    raise _unknown(unknown[0], fields, arg)
                values |= {name: _convert(fields[name], kinds[name], value, arg) for name, value in content.items() if name in fields}
            else:
                rest.append(arg)
            continue
        name, equals, value = arg.lstrip("-").partition("=")
        name = name.replace("-", "_")
        if not arg.startswith("--") and name in fields:
            raise UserError(f"unexpected argument {arg!r}: write --{arg.lstrip('-')}")
        if name not in fields:
            raise _unknown(name, fields, "command line")
        field, members = fields[name], _members(kinds[name])
        if typing.get_origin(kinds[name]) is tuple:
            value = [value] if equals else []
            while not equals and args and not args[0].startswith("--"):
                value.append(args.pop(0))
            if not value:
                raise UserError(f"command line: --{name} needs {_expected(kinds[name], field.metadata)}")
        elif not equals:
            if field.metadata.get("bare") is not None:
                value = args.pop(0) if args and re.match(field.metadata["follows"], args[0]) else field.metadata["bare"]
            elif bool in members:
                value = args.pop(0) if args and _fits(members, args[0]) else "true"
            elif args and not args[0].startswith("--"):
                value = args.pop(0)
            else:
                raise UserError(f"command line: --{name} needs {_expected(kinds[name], field.metadata)}")
        value = _convert(field, kinds[name], value, "command line")
        given[name] = given.get(name, ()) + value if isinstance(value, tuple) else value  # given twice, a list goes on
    if most is not None and len(rest) > most:
        raise UserError(f"unexpected argument {rest[most]!r}" + ("; config files end in .py, keys begin with --" if most == 0 else ""))
    return cls(**{**values, **given}), rest


def help_text(cls, doc=""):
    kinds = typing.get_type_hints(cls)
    lines = [(doc or "").strip(), "", "keys:"]
    for f in dataclasses.fields(cls):
        default = f" (default {'none' if f.default is None else f.default!r})"
        lines.append(f"  --{f.name:18} {f.metadata.get('meaning', '')}; {_expected(kinds[f.name], f.metadata)}{default}")
    lines.append(f"  --{'debug':18} show the traceback of an error")
    return "\n".join(lines)


def run(main):
    """main(argv), ending as a command should: an error that a person can mend is one line, exit status 1."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that can't show a character shows a ? for it
    if RANK:
        sys.stdout = open(os.devnull, "w")
    try:
        status = main(sys.argv[1:])
    except (UserError, OSError, MemoryError, RuntimeError) as e:
        runtime, first_line = isinstance(e, RuntimeError), (str(e).splitlines() or ["no more said"])[0]
        memory = isinstance(e, MemoryError) or runtime and re.search("out of memory|can't allocate memory", str(e))
        lost = WORLD_SIZE > 1 and runtime and not memory and re.search("gloo|NCCL|socket", str(e))
        if LOCAL_RANK or lost:
            time.sleep(2 + LOCAL_RANK)  # what ends all processes is said once: torchrun stops this one before it says it again
            print(file=sys.stderr)  # another one's bar stands on the line
        if "--debug" in sys.argv or runtime and not memory and not lost:
            raise
        if isinstance(e, BrokenPipeError):  # `| head` closed the pipe: nothing to say
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        message = (f"out of memory: a smaller --micro_batch_size (or --batch_size) needs less ({first_line})" if memory else
                   f"no connection to another process of this run: if it has ended, it says why itself ({first_line})" if lost else
                   str(e) if isinstance(e, UserError) or not e.filename else f"{e.strerror or e}: {e.filename}")
        sys.exit("error: " + " ".join(message.split()))
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(status)


def progress(total, what, unit="it", disable=False, **kwargs):
    """The one progress bar: on a terminal it moves, in a log file it writes a line every ten seconds."""
    moves = sys.stderr.isatty()
    bar = tqdm(total=total, desc=what, unit=unit, dynamic_ncols=True, smoothing=0.05, disable=disable or RANK > 0,
               mininterval=0.2 if moves else 10, maxinterval=10 if moves else 60, **kwargs)
    bar.set_postfix_str = functools.partial(bar.set_postfix_str, refresh=moves)  # by default it draws the bar at each call
    return bar


def pyplot():
    """matplotlib.pyplot, drawing into files. UserError: not installed."""
    try:
        import matplotlib
    except ImportError as e:
        raise UserError("drawing needs matplotlib: pip install -r requirements.txt") from e
    matplotlib.use("Agg")
    import matplotlib.pyplot
    return matplotlib.pyplot


def picture_path(path):
    """UserError if path (None: no picture) is not one that a picture can be written to."""
    if path is not None and (Path(path).suffix not in (".png", ".svg", ".pdf") or Path(path).is_dir()):
        raise UserError(f"plot={str(path)!r}: expected the path of a file that ends in .png, .svg or .pdf")


def save_figure(figure, path):
    """Write a matplotlib figure. The same figure gives the same bytes: no date, no random ids."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pyplot().rcParams["svg.hashsalt"] = "cocomix"
    figure.savefig(path, dpi=150, metadata={"Date": None} if str(path).endswith(".svg") else {"CreationDate": None} if str(path).endswith(".pdf") else None)


class Log:
    """log.jsonl of a run: a JSON object a line, each with its step. Begun at `step`, it keeps the lines up to there
    and drops later ones, so a resumed run leaves no gap and no double step. A new run's lines wait for `begin`, called
    when its first checkpoint stands: till then the folder is as it was. The first process writes it, and hands each line
    to `also(line, step=its step)` if there is one. UserError: it can't be written, or another process trains in the folder."""
    def __init__(self, path, step=0, also=None):
        self.path, self.also, self.empty, self._waiting = Path(path), also, False, None
        if RANK:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(f"{self.path.parent} can't be made ({e.strerror}); choose another --out_dir") from e
        lock = os.open(self.path.parent, os.O_RDONLY)
        weakref.finalize(self, os.close, lock)  # the system, too, lets go of it, however the process ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise UserError(f"another process is training in {self.path.parent}: wait until it ends, or choose another --out_dir") from e
        except OSError:
            pass  # a file system without locks
        kept = [line for line in read_log(self.path) if line.get("step", math.inf) <= step] if step and self.path.is_file() else []
        self.empty = not kept
        self._waiting = list(map(self._text, kept))
        if step:
            self.begin()

    @staticmethod
    def _text(values):
        return json.dumps({k: float(f"{v:.7g}") if isinstance(v, float) else v for k, v in values.items()}) + "\n"

    def begin(self):
        """Replace the file, if there is one, by the lines that wait."""
        if RANK:
            return
        tmp = self.path.with_suffix(".tmp")
        try:
            tmp.write_text("".join(self._waiting))
            os.replace(tmp, self.path)
        except OSError as e:
            raise self._failed(e) from e
        self._waiting = None

    def write(self, values):
        if RANK:
            return
        if self.also:
            self.also(values, step=values["step"])
        if self._waiting is not None:
            return self._waiting.append(self._text(values))
        try:
            with open(self.path, "a") as file:
                file.write(self._text(values))
        except OSError as e:
            raise self._failed(e) from e

    def _failed(self, error):
        return UserError(f"{self.path} can't be written ({error.strerror}); free some space; --resume goes on from the last checkpoint")


def read_log(path):
    """The lines of a log.jsonl as dicts; what is none, such as a last line that a crash cut short, is left out."""
    lines = []
    for line in Path(path).read_text(errors="replace").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            pass
    return [line for line in lines if isinstance(line, dict)]


class Spikes:
    """Warns, in a line above the bar, of a loss far above what it was: by six standard deviations and a twentieth of its
    running mean, both over about the last 50 values seen. The first 20 only teach it."""
    def __init__(self):
        self.seen, self.mean, self.variance = 0, 0.0, 0.0

    def see(self, name, value, step, remedy):
        over = value - self.mean
        if not RANK and self.seen >= 20 and over > max(6 * self.variance ** 0.5, self.mean / 20):
            tqdm.write(f"warning: the {name} {value:.3f} at step {step} is far above its running mean {self.mean:.3f}; {remedy}", file=sys.stderr)
        self.seen += 1
        share = max(0.02, 1 / self.seen)
        self.mean += share * over
        self.variance = (1 - share) * (self.variance + share * over ** 2)


class Stop:
    """`with Stop() as stop`: Ctrl-C and SIGTERM set stop.signal, for the loop to save and leave; a second one ends at once
    (not under torchrun, which passes on what its processes have got already, and ends them by itself after 30 s)."""
    def __enter__(self):
        self.signal = None
        self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _handle(self, number, _):
        if self.signal and WORLD_SIZE == 1:
            os._exit(128 + number)
        self.signal = number

    def leave(self, number, checkpoint, step):
        """Say how to go on; the exit status of a command that signal `number` ended."""
        if not RANK:
            print(f"\nstopped by {signal.Signals(number).name} at step {step}; saved in {checkpoint}; --resume goes on from there", file=sys.stderr)
        return 128 + number

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)


def check_same(before, now, path, free):
    """UserError if a key other than the free ones differs between a checkpoint's config and the present one."""
    for name, value in now.items():
        if name not in free and name in before and before[name] != value:
            raise UserError(f"{path} was made with {name}={before[name]!r}, now it is {value!r}: take it back, or start another --out_dir")
