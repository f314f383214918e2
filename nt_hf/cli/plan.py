"""What a run costs before it starts: parameters, FLOPs, memory, time, checkpoints and communication.

    nt-hf plan --config 350m --gpus 8 --gpu h100
    nt-hf plan --config 1b --gpus 64 --gpu h100 --train.micro_batch_size 8

``--config`` and the overrides ``--section.key value`` are those of nt-hf train. Nothing is measured, and no GPU is
needed.
"""

import sys
from collections.abc import Sequence

from ..config import load_run_config, parse_overrides
from ..plan.hardware import GPUS, find_gpu
from ..plan.planner import plan
from ..plan.report import report
from .program import verb_parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = verb_parser("plan", __doc__, allow_abbrev=False)
    parser.add_argument("--config", nargs="+", required=True, help="YAML files; later ones override earlier ones")
    parser.add_argument("--gpus", type=int, default=1, help="how many, one process each")
    parser.add_argument("--gpu", default="h100", help=", ".join(gpu.name for gpu in GPUS))
    parser.add_argument("--gpus_per_node", type=int, default=8)
    parser.add_argument("--mfu", type=float, default=0.4, help="assumed share of the bf16 peak (default: 0.4)")
    args, overrides = parser.parse_known_args(argv)
    run_config = load_run_config(args.config, parse_overrides(overrides))
    costs = plan(run_config, args.gpus, find_gpu(args.gpu), mfu=args.mfu, per_node=args.gpus_per_node)
    sys.stdout.write(report(costs) + "\n")
