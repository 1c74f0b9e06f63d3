"""Files written completely or not at all, locked folders, JSON files, short hashes, and seeds."""
import hashlib
import json
import os
import re
from contextlib import contextmanager, suppress
from pathlib import Path

from support.runtime import UserError, explain

import filelock
import numpy as np

@contextmanager
def atomic_write(path):
    """`with atomic_write(path) as file`: write to a temporary file, fsync it and rename it to path.

    UserError: the file cannot be written (full disk, read-only folder). The old file is then kept.
    """
    path, tmp = Path(path), Path(f"{path}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(tmp, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(tmp, path)
        _sync_folder(path.parent)  # so that the new name is on the disk, too
    except (OSError, RuntimeError) as e:
        cause = e.__context__ if isinstance(e, RuntimeError) else e  # torch.save wraps the disk's
        if not isinstance(cause, OSError) or cause.filename not in (None, str(tmp), str(path)):
            raise  # from reading another file
        raise UserError(f"{path} can't be written ({cause.strerror or cause}); what was there "
                        "before is kept; free some space or choose another folder") from e
    finally:
        tmp.unlink(missing_ok=True)

def _sync_folder(folder):
    with suppress(OSError):  # Windows opens no folders, and some network drives do not sync them
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)

def read_json(path, remedy="copy it again"):
    """The content of a JSON file, a dict."""
    with explain(f"{path} is damaged", remedy):
        return dict(**json.loads(path.read_text("utf-8-sig")))

def lock_folder(folder, doing, key):
    """Create a folder and lock it, by a file .lock in it. `unlock` releases the lock, and so does
    the end of the process. UserError: can't be made, or another process has locked it."""
    with explain(f"{folder} can't be made", f"choose another --{key}", OSError):
        Path(folder).mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(Path(folder, ".lock"), timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout as e:
        if Path(lock.lock_file).exists():  # else it can't be written: the first file will say why
            raise UserError(f"another process is {doing} in {folder}: wait until it ends, or "
                            f"choose another --{key}") from e
    except (OSError, NotImplementedError):
        pass  # a file system without locks
    if lock.is_locked:
        for path in Path(folder).glob("*.tmp"):  # left by a process that was killed
            if re.search(r"\.(bin|html|json|jsonl|pt|tiktoken)\.\d+\.tmp$", path.name):
                path.unlink(missing_ok=True)
    return lock

def unlock(lock):
    if lock.is_locked:
        with suppress(OSError):  # Windows does not delete a file that is open
            os.unlink(lock.lock_file)
        lock.release()

def fingerprint(*parts):
    """A short hash of byte strings."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]

def mixed_seed(*numbers):
    """One seed from several numbers; different numbers give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
