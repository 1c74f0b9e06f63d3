"""OpenWebMath (Paster et al. 2023, arXiv 2310.06786): mathematical web pages, 6 315 233 documents.

    python data/openwebmath/prepare.py                     # writes train.bin, val.bin, meta.json beside this file
    python data/openwebmath/prepare.py --num_docs=20000    # a small try: the first documents only
    python data/openwebmath/prepare.py --source=FOLDER     # with no network: from the hub's parquet files, brought by hand

Streams up to 27 GB from the hub and needs about 60 GB of disk, about 30 GB at the end (--out=FOLDER takes another
disk; train with --dataset=FOLDER then). It can be stopped at any time: the same command goes on. See data/hub.py.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import config
from data import hub


def main(argv):
    return hub.prepare(argv, __doc__, Path(__file__).resolve().parent, "hf://datasets/open-web-math/open-web-math", documents=6_315_233)


if __name__ == "__main__":
    config.run(main)
