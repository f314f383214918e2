"""``nt-hf finetune`` from a checkout, and for launchers that start files; ``--help`` shows its options."""

# nt_hf comes before torch: it sets how idle threads wait, which torch reads when it is loaded.
from nt_hf.cli.finetune import main
from nt_hf.cli.program import run

if __name__ == "__main__":
    run(main)
