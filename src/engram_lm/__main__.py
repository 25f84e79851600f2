"""``python -m engram_lm`` is the command ``engram-lm``."""

import sys

from engram_lm.cli import main

sys.exit(main())
