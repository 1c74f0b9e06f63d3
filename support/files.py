"""Files written completely or not at all, locked folders, JSON files, short hashes, and seeds."""
import fcntl
import hashlib
import json
import os
from contextlib import contextmanager
from pathlib import Path

from support.runtime import UserError, explain

import numpy as np

@contextmanager
def atomic_write(path):
    """`with atomic_write(path) as file`: write to a temporary file, fsync it and rename it to path.

    UserError: the file cannot be written (full disk, read-only folder). The old file is then kept.
    """
    path, tmp = Path(path), Path(f"{path}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(tmp, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(tmp, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # so that the new name is on the disk, too
        os.close(folder)
    except (OSError, RuntimeError) as e:
        cause = e.__context__ if isinstance(e, RuntimeError) else e  # torch.save wraps the disk's
        if not isinstance(cause, OSError) or cause.filename not in (None, str(tmp), str(path)):
            raise  # from reading another file
        raise UserError(f"{path} can't be written ({cause.strerror or cause}); what was there "
                        "before is kept; free some space or choose another folder") from e
    finally:
        tmp.unlink(missing_ok=True)

def read_json(path, remedy="copy it again"):
    """The content of a JSON file, a dict."""
    with explain(f"{path} is damaged", remedy):
        return dict(**json.loads(path.read_text("utf-8-sig")))

def lock_folder(folder, doing, key):
    """Create a folder and lock it. Returns a file descriptor: closing it releases the lock, and so
    does the end of the process. UserError: can't be made, or another process has locked it."""
    with explain(f"{folder} can't be made", f"choose another --{key}", OSError):
        Path(folder).mkdir(parents=True, exist_ok=True)
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
