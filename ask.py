"""Ask a trained model, in the terminal or with --serve in a browser: `python ask.py RUN`."""

from atlas.asking.command import main
from atlas.command_line import quiet_until_started

if __name__ == "__main__":
    quiet_until_started()
    main()
