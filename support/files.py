"""Files that are written completely or not at all, JSON files, short hashes, and seeds."""
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
        return dict(**json.loads(path.read_text(encoding="utf-8")))

def fingerprint(*parts):
    """A short hash of byte strings."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]

def mixed_seed(*numbers):
    """One seed from several numbers; different numbers give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
