"""The corpus that needs no download: the standard library of the Python that runs this script.

    python data/stdlib/prepare.py              # writes train.bin, val.bin, meta.json next to it
    python data/stdlib/prepare.py --train_bpe  # first retrains bpe.tiktoken on the train split

About 12 MB of source, without tests and generated files. A fixed list of modules is held out, so
the split depends only on the Python version. The library differs slightly between builds: results
are comparable only if the hash of the files in meta.json is the same.
"""
import platform
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from support.runtime import UserError, progress, run

from support.bpe import save_bpe, train_bpe
from support.cli import key, parse
from support.files import fingerprint
from support.prepare import finished, write_meta, write_tokens
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
    train_bpe: int | None = key(None, "retrain data/stdlib/bpe.tiktoken with this many tokens",
                                low=300, high=4096, bare="4096", follows=r"\d")
    force: bool = key(False, "prepare an intact dataset again")

def read_library():
    """({split: texts}, hash of all files, number of files) of the standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    splits, contents = dict(train=[], val=[]), []
    for name in sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py")):
        *folders, file = name.split("/")
        if EXCLUDED & set(folders) or name.startswith("config-"):
            continue
        if file.startswith("_sysconfigdata"):
            continue
        module = name.split("/")[0].removesuffix(".py")
        text = (root / name).read_bytes().decode("utf-8", "replace").replace("\r\n", "\n")
        contents += [name.encode(), text.encode()]
        if text.strip():
            splits["val" if module in VAL else "train"].append(text)
    if not contents:
        raise UserError(f"no .py files under {root}: this Python has no readable standard library; "
                        "use data/text/prepare.py")
    return splits, fingerprint(*contents), len(contents) // 2

def main(argv):
    cfg, _ = parse(Config, argv, __doc__, most=0, files=False)
    out = Path(cfg.out)
    splits, digest, n_files = read_library()
    if cfg.train_bpe:
        save_bpe(train_bpe(splits["train"], cfg.train_bpe), HERE / "bpe.tiktoken")
    tokenizer = load_tokenizer("stdlib")
    meta = None if cfg.force else finished(out)
    hashes = digest, tokenizer_hash("stdlib", tokenizer)
    if meta and (meta.get("source_hash"), meta["tokenizer_hash"]) == hashes:
        print(f"{out}: already prepared ({meta['train_tokens']:,} train tokens, "
              f"{meta['val_tokens']:,} val tokens)")
        return
    (out / "meta.json").unlink(missing_ok=True)
    counts = {}
    chars = sum(len(text) for texts in splits.values() for text in texts)
    with progress(chars, "encode", "char", unit_scale=True) as bar:
        for split, texts in splits.items():
            pieces = ((text, True) for text in texts)
            counts[split] = write_tokens(out / f"{split}.bin", pieces, tokenizer, bar)
    source = f"the standard library of Python {platform.python_version()}"
    write_meta(out, "stdlib", tokenizer, counts, source=source, source_hash=digest,
               train_files=len(splits["train"]), val_files=len(splits["val"]))
    print(f"{out}: {counts['train']:,} train tokens, {counts['val']:,} val tokens from {n_files} "
          f"files, hash {digest}")

if __name__ == "__main__":
    run(main)
