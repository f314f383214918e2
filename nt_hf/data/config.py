"""The section ``data`` of a run's configuration."""

from dataclasses import dataclass, field

from ..checks import SWITCH, TEXT, Rule, check, check_fields, choice, integer, optional

PACKINGS = ("pack", "pad")
ON_BAD_LINE = ("error", "skip")
SOURCE = Rule(
    lambda value: (
        TEXT.valid(value) or (isinstance(value, list | tuple) and bool(value) and all(map(TEXT.valid, value)))
    ),
    "a text source or a list of them",
)
RULES = {
    "train": SOURCE,
    "validation": SOURCE,
    "tokenizer": TEXT,
    "sequence_length": integer(2),  # one token predicts nothing
    "packing": choice(PACKINGS),
    "shuffle_block": integer(0),
    "order_per_head": SWITCH,
    "num_workers": integer(0),
    "on_bad_line": choice(ON_BAD_LINE),
    "validation_tokens": optional(integer(1)),
    "text_field": TEXT,
}


@dataclass
class DataConfig:
    """What to read and how to make batches of it; ``TokenBatches`` explains the fields.

    Raises:
        ValueError: a field has a value that is not accepted.
    """

    train: str | list[str] = "hub:allenai/c4:en:train"
    validation: str | list[str] = "hub:allenai/c4:en:validation"
    tokenizer: str = "sample"
    sequence_length: int = 256
    packing: str = "pack"
    shuffle_block: int = 1024
    order_per_head: bool = False
    num_workers: int = 0
    on_bad_line: str = "error"
    validation_tokens: int | None = field(default=10_000_000, metadata={"help": "at most so many; None for all"})
    text_field: str = "text"

    def __post_init__(self):
        check_fields(self, RULES)
        ordered = Rule(lambda separate: not separate or self.shuffle_block > 0, "false where shuffle_block is 0")
        check("order_per_head", self.order_per_head, ordered)
