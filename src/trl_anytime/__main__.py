"""`python -m trl_anytime` is the command `trl-anytime`."""

import sys

from .cli import main

sys.exit(main())
