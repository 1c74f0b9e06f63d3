"""OpenWebMath (Paster et al. 2023, arXiv 2310.06786): 6,315,233 mathematical web pages.

    python data/openwebmath/prepare.py                   # the whole dataset
    python data/openwebmath/prepare.py --num_docs=20000  # a small trial: the first documents only
    python data/openwebmath/prepare.py --source=FOLDER   # no network: from the hub's parquet files

Streams up to 27 GB and needs about 60 GB of disk, 30 GB when done. Run it again to resume.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from support import hub, runtime

def main(argv):
    return hub.prepare(argv, __doc__, __file__, "open-web-math/open-web-math", 6_315_233)

if __name__ == "__main__":
    runtime.run(main)
