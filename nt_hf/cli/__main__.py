"""``python -m nt_hf.cli VERB``: the console program ``nt-hf``, also for launchers that start a module."""

from nt_hf_console import main

if __name__ == "__main__":
    main()
