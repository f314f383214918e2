"""The section ``data`` of a run's configuration."""

from dataclasses import dataclass

from ..checks import SWITCH, TEXT, Rule, check, check_fields, choice, integer, optional, rules_of, setting

SOURCE = Rule(
    lambda value: (
        TEXT.valid(value) or (isinstance(value, list | tuple) and bool(value) and all(map(TEXT.valid, value)))
    ),
    "a source of data or a list of them",
)


@dataclass
class DataConfig:
    """What to read and how to make batches of it; ``TokenBatches`` explains the fields.

    Raises:
        ValueError: a field has a value that is not accepted.
    """

    train: str | list[str] = setting("hub:allenai/c4:en:train", SOURCE)
    validation: str | list[str] = setting("hub:allenai/c4:en:validation", SOURCE)
    tokenizer: str = setting("sample", TEXT)
    sequence_length: int = setting(256, integer(2))  # one token predicts nothing
    packing: str = setting("pack", choice(["pack", "pad"]))
    shuffle_block: int = setting(1024, integer(0))
    order_per_head: bool = setting(False, SWITCH)
    num_workers: int = setting(0, integer(0))
    on_bad_line: str = setting("error", choice(["error", "skip"]))
    validation_tokens: int | None = setting(10_000_000, optional(integer(1)))
    text_field: str = setting("text", TEXT)

    def __post_init__(self):
        check_fields(self)
        ordered = Rule(lambda separate: not separate or self.shuffle_block > 0, "false where shuffle_block is 0")
        check("order_per_head", self.order_per_head, ordered)


RULES = rules_of(DataConfig)
