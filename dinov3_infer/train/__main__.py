"""`python -m dinov3_infer.train`."""

import sys

from .command import main

sys.exit(main())
