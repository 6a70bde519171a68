"""Download a released index, resumed and checked.

python preprocessing/download_index.py --index indices/atlas/wiki/xl --output_directory $DATA_DIR
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from preprocessing import download
from preprocessing.sources import INDICES

if __name__ == "__main__":
    download.main("index", INDICES)
