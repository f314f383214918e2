"""``python -m nt_hf.plan``."""

from ..cli.plan import main
from ..cli.program import run

run(main)
