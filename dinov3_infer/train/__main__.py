"""`python -m dinov3_infer.train`."""

import sys

from .cli import main

sys.exit(main())
