"""``nt-hf evaluate images`` for those who work in a checkout; ``--help`` shows its options."""

import sys

from nt_hf_console import main

if __name__ == "__main__":
    main(["evaluate", "images", *sys.argv[1:]])
