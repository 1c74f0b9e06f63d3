"""What every command shares: errors in one line, Ctrl-C, the progress bar. Imports no torch.

A script imports this module before torch: Ctrl-C then ends it without a traceback while it is still
importing, and OpenMP reads the variable set below when torch loads it.
"""
import functools
import os
import re
import signal
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.version_info < (3, 10):
    sys.exit("error: Python %d.%d is too old: 3.10 or newer is needed" % sys.version_info[:2])

from tqdm import tqdm

# Idle OpenMP threads spin, by default for a long time, and slow down other processes.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

class UserError(Exception):
    """An error the user can fix: one line with what is wrong, the value and the remedy."""

@contextmanager
def explain(what, remedy, kinds=(AttributeError, KeyError, TypeError, ValueError)):
    """`with explain(…)`: an error of these kinds becomes a UserError: what, the reason, remedy."""
    try:
        yield
    except kinds as e:
        reason = (str(e).splitlines() or ["no details"])[-1].strip()
        raise UserError(f"{what}: {type(e).__name__}: {reason}; {remedy}") from e

def _from_torchrun(name, default):
    text = os.environ.get(name, default)
    try:
        return int(text)
    except ValueError:
        sys.exit(f"error: {name}={text!r}: expected a whole number, as set by torchrun; unset it")

RANK = _from_torchrun("RANK", 0)  # of this process in the job; process 0 writes files and prints
LOCAL_RANK = _from_torchrun("LOCAL_RANK", 0)  # of this process on its machine
WORLD_SIZE = _from_torchrun("WORLD_SIZE", 1)
if not (0 <= LOCAL_RANK <= RANK < WORLD_SIZE) or WORLD_SIZE > 1 and not (
        os.environ.get("MASTER_ADDR") and _from_torchrun("MASTER_PORT", "")):
    sys.exit(f"error: {WORLD_SIZE=}, {RANK=}, {LOCAL_RANK=} and MASTER_ADDR="
             f"{os.environ.get('MASTER_ADDR')!r} are not what torchrun sets: start several "
             "processes with torchrun --nproc_per_node=N train.py …, or unset these variables")

def _exit_at_once(number, _):
    """Ctrl-C during the imports, which would print a traceback or swallow it."""
    if RANK == 0:
        os.write(2, b"stopped\n")
    os._exit(128 + number)

def _is_our_script():
    main = getattr(sys.modules["__main__"], "__file__", None)
    return bool(main) and Path(main).resolve().is_relative_to(Path(__file__).resolve().parents[1])

if _is_our_script() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _exit_at_once)  # until `run` takes over

# --------------------------------------------------------------------------------------------------
# Running a command

LOST = "no connection to another process of this run"

def run(main, parallel=False):
    """Run main(argv) as a command. An error the user can fix ends in one line, exit status 1.
    parallel: several processes may run it together."""
    if signal.getsignal(signal.SIGINT) is _exit_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # print ? for what the terminal cannot show
    if RANK:
        sys.stdout = open(os.devnull, "w")
    try:
        if WORLD_SIZE > 1 and not parallel:
            raise UserError("only train.py runs in several processes: start this command with "
                            "python, not torchrun")
        status = main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
    except (UserError, AssertionError, OSError, MemoryError, RuntimeError) as e:
        message = _message(e)
        if LOCAL_RANK or (message or "").startswith(LOST):
            # An error common to all processes is printed once: torchrun stops this process first.
            time.sleep(2 + LOCAL_RANK)
            print(file=sys.stderr)  # end the line of another process's progress bar
        if "--debug" in sys.argv or message is None:
            raise
        if isinstance(e, BrokenPipeError):  # `| head` closed the pipe: nothing to report
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        sys.exit("error: " + " ".join(message.split()))
    sys.exit(status)

def _message(error):
    """The message for the user, or None for a bug, which needs its traceback."""
    text, internal = str(error), isinstance(error, RuntimeError)
    first_line = text.splitlines()[0] if text else "no details"
    no_memory = internal and re.search("out of memory|can't allocate memory", text)
    if no_memory or isinstance(error, MemoryError):
        return ("out of memory: a smaller --batch_size (train.py: --micro_batch_size) needs less "
                f"({first_line})")
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"torch.compile failed ({first_line}); --compile=false runs without it"
    if WORLD_SIZE > 1 and internal and re.search("gloo|NCCL|socket", text):
        return f"{LOST}; if it failed, it printed why ({first_line})"
    if isinstance(error, OSError) and error.filename:
        return f"{error.strerror or error}: {error.filename}"
    return None if internal else text or None

def progress(total, what, unit="it", disable=False, **kwargs):
    """The progress bar. Without a terminal it writes a line every ten seconds."""
    terminal = sys.stderr.isatty()
    often, at_most = (0.2, 10) if terminal else (10, 60)
    bar = tqdm(total=total, desc=what, unit=unit, dynamic_ncols=True, smoothing=0.05,
               mininterval=often, maxinterval=at_most, disable=disable or RANK > 0, **kwargs)
    # by default every call redraws the bar
    bar.set_postfix_str = functools.partial(bar.set_postfix_str, refresh=terminal)
    return bar

class Stop:
    """`with Stop() as stop`: Ctrl-C, SIGTERM, SIGHUP (a closed terminal) and SIGUSR1 (Slurm's
    warning) set stop.signal, so that the loop can save and end. A Ctrl-C after any of them ends the
    process at once; not under torchrun, which sends another signal itself."""
    def __enter__(self):
        self.signal, self._before = None, {}
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
            number = getattr(signal, name, None)  # Windows has the first two
            if number and (name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN):  # nohup
                self._before[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number, _):
        if self.signal and number == signal.SIGINT and WORLD_SIZE == 1:
            os._exit(128 + number)
        self.signal = number

    def leave(self, number, checkpoint, step):
        """Print how to resume → the exit status of a command that signal `number` ended."""
        with suppress(OSError):  # the terminal may be closed
            if RANK == 0:
                print(f"\nstopped by {signal.Signals(number).name} at step {step}; saved in "
                      f"{checkpoint}; --resume continues from there", file=sys.stderr)
        return 128 + number

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)
