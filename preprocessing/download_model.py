"""Download a released model, resumed and checked.

python preprocessing/download_model.py --model models/atlas/xl --output_directory $DATA_DIR
"""

import download
from sources import MODELS

if __name__ == "__main__":
    download.main("model", MODELS)
