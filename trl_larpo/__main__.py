"""`python -m trl_larpo`: what `accelerate launch -m trl_larpo train ...` runs."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
