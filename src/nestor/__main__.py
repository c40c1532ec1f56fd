"""``python -m nestor``."""

import sys

from nestor.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
