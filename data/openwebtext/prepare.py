"""OpenWebText (Gokaslan and Cohen 2019): about 9B tokens of GPT-2's, 8 013 769 documents.

    python data/openwebtext/prepare.py                     # writes train.bin, val.bin, meta.json beside this file
    python data/openwebtext/prepare.py --num_docs=20000    # a small try: the first documents only
    python data/openwebtext/prepare.py --source=FOLDER     # with no network: from the hub's parquet files, brought by hand

Streams about 24 GB from the hub and needs about 45 GB of disk, 18 GB at the end (--out=FOLDER takes another disk;
train with --dataset=FOLDER then). It can be stopped at any time: the same command goes on. See data/hub.py.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import config
from data import hub


def main(argv):
    return hub.prepare(argv, __doc__, Path(__file__).resolve().parent, "hf://datasets/Skylion007/openwebtext", documents=8_013_769)


if __name__ == "__main__":
    config.run(main)
