"""``python -m attnhub.testing``; see `attnhub.testing.program`."""

import sys

from attnhub.testing.program import main

if __name__ == "__main__":
    sys.exit(main())
