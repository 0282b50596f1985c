"""`python -m mpsearch`: the command line."""

import sys

from mpsearch.cli import main

sys.exit(main())
