"""``python -m hallucination_guard.cli``."""

from __future__ import annotations

import sys

from hallucination_guard.cli.app import main

sys.exit(main())
