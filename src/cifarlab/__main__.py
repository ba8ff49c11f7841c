"""`python -m cifarlab`, so that torchrun can start it: `torchrun --nproc-per-node 2 -m cifarlab train …`."""

import sys

from cifarlab.cli import main

if __name__ == "__main__":
    sys.exit(main())
