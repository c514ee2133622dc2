"""`composer-se compare` for the tests that start it in processes of its own: few and short turns."""

from __future__ import annotations

import sys

from composer_se.cli import main
from composer_se.compare import kept_speeds, speed
from composer_se.measure import timing

kept_speeds.ROUNDS = 2
speed.TURN_SECONDS = 0.1
timing.VISIT_SECONDS = 0.1

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))
