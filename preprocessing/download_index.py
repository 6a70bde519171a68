"""Download a released index, resumed and checked.

python preprocessing/download_index.py --index indices/atlas/wiki/xl --output_directory $DATA_DIR
"""

import download
from sources import INDICES

if __name__ == "__main__":
    download.main("index", INDICES)
