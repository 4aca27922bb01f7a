"""`python -m moekernels`."""

import sys

from moekernels.cli import main

sys.exit(main())
