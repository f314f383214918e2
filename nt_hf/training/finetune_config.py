"""What fine-tuning takes beside the options of TRL's `SFTConfig`."""

from dataclasses import dataclass, field

from ..checks import Rule, check, choice, integer, number, optional

#: Which weights learn.
TRAIN = {
    "all": "every weight, each head from its own loss",
    "heads": "the heads; backbone and embeddings stay as they are",
    "lora": "low-rank adapters on the linear layers of the heads' blocks, merged at the end",
    "trail": "a copy of one head, from text and from the ensemble of all heads; the result is its stock model",
}
_RULES: dict[str, Rule] = {
    "train": choice(TRAIN),
    "num_ensemble_heads": optional(integer(1)),
    "blocks_in_head": optional(integer(0)),
    "head_noise": number("[0, inf)"),
    "lora_r": integer(1),
    "lora_alpha": number("(0, inf)"),
    "trail": integer(0),
    "distil": number("[0, 1]"),
    "temperature": number("(0, inf)"),
}


@dataclass
class FinetuneConfig:
    """The model, the data, and which weights learn; fields and their meaning are the options of ``nt-hf finetune``.

    Raises:
        ValueError: a field is out of its range; the message names it, its value and what is accepted.
    """

    model: str = field(
        metadata={"help": "checkpoint to start from, stock or of several heads: a directory or a hub id"}
    )
    data: list[str] = field(
        metadata={
            "help": "examples with columns messages, or prompt and completion, or text: files .jsonl, .json, .parquet, "
            ".arrow, .txt, or hub:<repo>[@<revision>][:<config>[:<split>]]"
        }
    )
    validation: list[str] = field(default_factory=list, metadata={"help": "the same, to evaluate on"})
    train: str = field(default="all", metadata={"help": "; ".join(f"{name}: {what}" for name, what in TRAIN.items())})
    num_ensemble_heads: int | None = field(default=None, metadata={"help": "heads that a stock model gets (3)"})
    blocks_in_head: int | None = field(
        default=None, metadata={"help": "blocks in a head, the last ones of a stock model (two thirds)"}
    )
    head_noise: float = field(
        default=0.01,
        metadata={
            "help": "of a stock model, whose heads begin as copies: standard deviation of noise on the matrices of "
            "every head but the first, as a share of each matrix's own"
        },
    )
    lora_r: int = field(default=16, metadata={"help": "rank of the adapters of train=lora"})
    lora_alpha: float = field(default=32.0, metadata={"help": "their scale, which is alpha / r"})
    trail: int = field(default=0, metadata={"help": "the head that train=trail starts from"})
    distil: float = field(
        default=0.5, metadata={"help": "share of the ensemble in the loss of train=trail; the rest is the text's"}
    )
    temperature: float = field(default=2.0, metadata={"help": "at which train=trail compares predictions"})

    def __post_init__(self):
        for name, rule in _RULES.items():
            check(name, getattr(self, name), rule)
