"""``python -m graphpeft``."""

import sys

from graphpeft.command import main

sys.exit(main())
