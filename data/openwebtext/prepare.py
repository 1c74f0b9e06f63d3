"""OpenWebText (Gokaslan and Cohen 2019): about 9B tokens of GPT-2's, 8,013,769 documents.

    python data/openwebtext/prepare.py                   # the whole dataset
    python data/openwebtext/prepare.py --num_docs=20000  # a small trial: the first documents only
    python data/openwebtext/prepare.py --source=FOLDER   # no network: from the hub's parquet files

Streams about 24 GB and needs about 45 GB of disk, 18 GB when done. Run it again to resume.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from support import hub, runtime

def main(argv):
    return hub.prepare(argv, __doc__, __file__, "Skylion007/openwebtext", 8_013_769)

if __name__ == "__main__":
    runtime.run(main)
