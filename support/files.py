"""Files that are written completely or not at all, locked folders, short hashes, and seeds."""
import fcntl
import hashlib
import os
from contextlib import contextmanager
from pathlib import Path

from support.runtime import UserError

import numpy as np

@contextmanager
def atomic_write(path):
    """`with atomic_write(path) as file`: write to a temporary file, fsync it and rename it to path.

    UserError: the file cannot be written (full disk, read-only folder). The old file is then kept.
    """
    path, tmp = Path(path), Path(f"{path}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(tmp, "wb")
    except OSError as e:
        raise _failed(path, e) from e
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _rename(tmp, path)
    except (OSError, RuntimeError) as e:
        # torch.save wraps the disk's error; one with a file name comes from reading something else
        cause = e.__context__ if isinstance(e, RuntimeError) else e
        if isinstance(cause, OSError) and cause.filename is None:
            raise _failed(path, cause) from e
        raise
    finally:
        tmp.unlink(missing_ok=True)

def _rename(tmp, path):
    try:
        os.replace(tmp, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # so that the new name is on the disk, too
        os.close(folder)
    except OSError as e:
        raise _failed(path, e) from e

def _failed(path, error):
    return UserError(f"{path} can't be written ({error.strerror or error}); what was there before "
                     "is kept; free some space or choose another folder")

def lock_folder(folder, doing, key):
    """Create a folder and lock it. Returns a file descriptor: closing it releases the lock, and so
    does the end of the process. UserError: can't be made, or another process has locked it."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{folder} can't be made ({e.strerror}); choose another --{key}") from e
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        os.close(lock)
        raise UserError(f"another process is {doing} in {folder}: wait until it ends, or choose "
                        f"another --{key}") from e
    except OSError:
        pass  # a file system without locks
    return lock

def fingerprint(*parts):
    """A short hash of byte strings."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]

def mixed_seed(*numbers):
    """One seed from several numbers; different numbers give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
