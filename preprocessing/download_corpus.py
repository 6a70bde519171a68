"""Download a released corpus, resumed and checked.

python preprocessing/download_corpus.py --corpus corpora/wiki/enwiki-dec2018 --output_directory $DATA_DIR
"""

import download
from sources import CORPORA

if __name__ == "__main__":
    download.main("corpus", CORPORA)
