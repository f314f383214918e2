"""``python -m nt_hf.plan``."""

from ..cli.program import run
from .planner import main

run(main)
