"""The corpus that needs no download: the standard library of the Python that runs this script.

    python data/stdlib/prepare.py              # writes train.bin, val.bin, meta.json next to it
    python data/stdlib/prepare.py --train_bpe  # with a tokenizer trained on the train split

About 10 MB of source, without tests and generated files. A fixed list of modules is held out. The
library differs slightly between builds: results are comparable only if the hash of the files in
meta.json is the same.
"""
import platform
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from support.runtime import run

from support.bpe import bpe_tokenizer
from support.cli import key, parse
from support.files import fingerprint
from support.prepare import already_prepared, locked, write_dataset
from support.tokens import load_tokenizer, tokenizer_hash

HERE = Path(__file__).resolve().parent
VAL = {"argparse", "bisect", "calendar", "configparser", "csv", "fractions", "gzip", "html",
       "json", "platform", "queue", "shelve", "statistics", "string", "tarfile", "textwrap",
       "tomllib", "uuid"}
EXCLUDED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__",
            "_vendor", "ensurepip", "encodings", "pydoc_data"}  # the last two: generated tables

@dataclass(frozen=True)
class Config:
    out: str = key(str(HERE), "folder to write to")
    train_bpe: int | None = key(None, "train a tokenizer with this many tokens and use it instead "
                                "of bpe.tiktoken", low=300, high=4096, bare="4096", follows=r"\d")
    force: bool = key(False, "prepare an intact dataset again, or overwrite another one")

def read_library():
    """({split: [(text, True)]}, hash of all files) of the standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    splits, contents = dict(train=[], val=[]), []
    for name in sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py")):
        *folders, file = name.split("/")
        if EXCLUDED & {*folders} or name.startswith("config-") or file.startswith("_sysconfigdata"):
            continue
        module = name.split("/")[0].removesuffix(".py")
        text = (root / name).read_bytes().decode("utf-8", "replace").replace("\r\n", "\n")
        contents += [name.encode(), text.encode()]
        if text.strip():
            splits["val" if module in VAL else "train"].append((text, True))
    return splits, fingerprint(*contents)

def main(argv):
    cfg, _ = parse(Config, argv, __doc__, most=0, files=False)
    splits, digest = read_library()
    with locked(cfg.out):
        name, tokenizer = "stdlib", load_tokenizer("stdlib")
        if cfg.train_bpe:
            texts = (text for text, _ in splits["train"])
            name, tokenizer = bpe_tokenizer(texts, cfg.train_bpe, cfg.out)
        wanted = dict(source_hash=digest, tokenizer_hash=tokenizer_hash(name, tokenizer))
        ours = Path(cfg.out).resolve() == HERE  # where no other script writes
        if cfg.force or not already_prepared(cfg.out, wanted, replace=ours):
            source = f"the standard library of Python {platform.python_version()}"
            write_dataset(cfg.out, splits, name, tokenizer, source=source, source_hash=digest,
                          train_files=len(splits["train"]), val_files=len(splits["val"]))

if __name__ == "__main__":
    run(main)
