"""`python -m dinov3_infer`."""

import sys

from .cli import main

sys.exit(main())
