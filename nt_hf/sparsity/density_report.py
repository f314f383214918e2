"""How many weights are active: by tensor, by group of tensors and overall."""

from dataclasses import dataclass

from ..text import markdown_table


@dataclass(frozen=True)
class DensityRow:
    """Density of one tensor, of a group of tensors, or overall; ``shape`` only for a tensor."""

    name: str
    shape: tuple[int, ...] | None
    size: int
    target: int
    active: int
    density: float


@dataclass(frozen=True)
class DensityReport:
    """Densities by tensor, by group (see [`group_of`]) and overall."""

    tensors: list[DensityRow]
    groups: list[DensityRow]
    overall: DensityRow

    def __str__(self) -> str:
        """A table of the groups and of all; each tensor's row is in ``tensors``."""
        rows = [["weights", "tensors", "size", "target", "active", "density"]]
        for row in (*self.groups, self.overall):
            tensors = sum(row is self.overall or group_of(tensor.name) == row.name for tensor in self.tensors)
            counts = (f"{count:,}" for count in (tensors, row.size, row.target, row.active))
            rows.append([row.name, *counts, f"{row.density:.4f}"])
        return markdown_table(rows)


def group_of(name: str) -> str:
    """Group of a weight, for reports: its name up to the first number.

    "model.layers.3.mlp.up_proj.weight" → "model.layers", "lm_heads.0.weight" → "lm_heads"; without a number the
    module's name, "model.embed_tokens.weight" → "model.embed_tokens".
    """
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0]] if numbers else parts[:-1]) or name


def total_row(name: str, rows: list[DensityRow]) -> DensityRow:
    """The row of several tensors together."""
    size, target, active = (sum(getattr(row, key) for row in rows) for key in ("size", "target", "active"))
    return DensityRow(name, None, size, target, active, active / size if size else 1.0)
