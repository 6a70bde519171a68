"""Download a released model, resumed and checked.

python preprocessing/download_model.py --model models/atlas/xl --output_directory $DATA_DIR
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from preprocessing import download
from preprocessing.sources import MODELS

if __name__ == "__main__":
    download.main("model", MODELS)
