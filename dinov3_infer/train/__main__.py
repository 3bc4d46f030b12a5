"""`python -m dinov3_infer.train`, the same as `dinov3-infer train`."""

import sys

from .command import main

sys.exit(main())
