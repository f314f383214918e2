"""The section ``data`` of a run's configuration."""

from dataclasses import dataclass, field

from .checks import check_choice, check_int, check_source

PACKINGS = ("pack", "pad")
ON_BAD_LINE = ("error", "skip")


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
        for name in ("train", "validation"):
            check_source(name, getattr(self, name))
        for name in ("tokenizer", "text_field"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)!r}: expected a non-empty string")
        check_choice("packing", self.packing, PACKINGS)
        check_choice("on_bad_line", self.on_bad_line, ON_BAD_LINE)
        check_int("sequence_length", self.sequence_length, 2)  # one token predicts nothing
        check_int("shuffle_block", self.shuffle_block, 0)
        check_int("num_workers", self.num_workers, 0)
        if not isinstance(self.order_per_head, bool) or (self.order_per_head and not self.shuffle_block):
            raise ValueError(
                f"order_per_head={self.order_per_head!r}: expected true, with a shuffle_block above 0, or false"
            )
        if self.validation_tokens is not None:
            check_int("validation_tokens", self.validation_tokens, 1)
