"""``python -m attnhub``: the same as the command ``attnhub``."""

import sys

from attnhub.cli import main

if __name__ == "__main__":
    sys.exit(main())
