"""`python -m vidistill` and `torchrun -m vidistill`."""

import sys

from vidistill.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
