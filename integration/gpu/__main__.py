"""`python -m integration.gpu`: what was carried along is unpacked before anything is imported."""

import sys

from . import carried

print(carried.use(), flush=True)

from .bench import main  # noqa: E402 - qplug needs einops, which may have been carried

sys.exit(main())
