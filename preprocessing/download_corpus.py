"""Download a released corpus, resumed and checked.

python preprocessing/download_corpus.py --corpus corpora/wiki/enwiki-dec2018 --output_directory $DATA_DIR
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from preprocessing import download
from preprocessing.sources import CORPORA

if __name__ == "__main__":
    download.main("corpus", CORPORA)
