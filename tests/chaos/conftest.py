"""The runner is in the checkout, beside the tests; the package comes from where it is installed."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))
