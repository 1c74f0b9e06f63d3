"""The corpus that needs no download: the running interpreter's own standard library.

    python data/stdlib/prepare.py               # writes train.bin, val.bin, meta.json beside this file
    python data/stdlib/prepare.py --train_bpe   # first makes the repository's bpe.tiktoken anew, from the train split

About 12 MB of Python source. Tests and machine-made files are left out; whole modules, by a fixed list of
names, are held out for val, so the split is the same for everyone on one Python version. The library
differs a little between builds: meta.json carries a hash of the files, and results compare only at equal
hashes.
"""
import platform
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import config
import data

HERE = Path(__file__).resolve().parent
VAL = {"argparse", "bisect", "calendar", "configparser", "csv", "fractions", "gzip", "html", "json", "platform", "queue", "shelve",
       "statistics", "string", "tarfile", "textwrap", "tomllib", "uuid"}
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_vendor", "ensurepip", "encodings", "pydoc_data"}  # the last two are machine-made tables


@dataclass(frozen=True)
class Config:
    out: str = config.key(str(HERE), "folder to write to")
    train_bpe: int | None = config.key(None, "make data/stdlib/bpe.tiktoken anew, of so many tokens", low=300, high=4096, bare="4096", follows=r"\d")
    force: bool = config.key(False, "prepare again though it is done")


def files():
    """[(module name, path)] of the standard library's sources, sorted by path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        parts = path.relative_to(root).parts
        if not LEFT_OUT & set(parts[:-1]) and not parts[-1].startswith("_sysconfigdata") and not parts[0].startswith("config-"):
            found.append((parts[0].removesuffix(".py"), path))
    return root, found


def prepared(out, digest, tokenizer_hash):
    """Is the dataset there, whole, of these sources and this tokenizer?"""
    try:
        meta = data.load_meta(out)
        data.load_tokens(out, "train"), data.load_tokens(out, "val")
        return meta["source_hash"] == digest and meta["tokenizer_hash"] == tokenizer_hash
    except (config.UserError, KeyError):
        return False


def main(argv):
    cfg, _ = config.parse(Config, argv, __doc__, most=0, files=False)
    out = Path(cfg.out)
    root, found = files()
    if not found:
        raise config.UserError(f"no .py files under {root}: this Python has no readable standard library; use data/text/prepare.py")
    splits = {"train": [], "val": []}
    contents = []
    for module, path in found:
        text = path.read_bytes().decode("utf-8", errors="replace").replace("\r\n", "\n")
        contents += [path.relative_to(root).as_posix().encode(), text.encode()]
        if text.strip():
            splits["val" if module in VAL else "train"].append(text)
    digest = data.fingerprint(*contents)
    if cfg.train_bpe:
        data.save_bpe(data.train_bpe(splits["train"], cfg.train_bpe), HERE / "bpe.tiktoken")
    tokenizer = data.load_tokenizer("stdlib")
    if not cfg.force and prepared(out, digest, data.tokenizer_hash("stdlib", tokenizer)):
        meta = data.load_meta(out)
        print(f"{out}: already prepared ({meta['train_tokens']:,} train tokens, {meta['val_tokens']:,} val tokens)")
        return
    (out / "meta.json").unlink(missing_ok=True)
    counts = {}
    with config.progress(sum(len(t) for texts in splits.values() for t in texts), "encode", "char", unit_scale=True) as bar:
        for split, texts in splits.items():
            counts[split] = data.write_tokens(out / f"{split}.bin", ((text, True) for text in texts), tokenizer, bar)
    data.write_meta(out, "stdlib", tokenizer, counts, source=f"the standard library of Python {platform.python_version()}", source_hash=digest,
                    train_files=len(splits["train"]), val_files=len(splits["val"]))
    print(f"{out}: {counts['train']:,} train tokens, {counts['val']:,} val tokens from {len(found)} files, hash {digest}")


if __name__ == "__main__":
    config.run(main)
