"""Wide residual networks for small images (Zagoruyko and Komodakis 2016, arXiv 1605.07146), as stock models.

Transformers has none. A WRN-28-10 is ``WideResNetConfig(num_hidden_layers=12, width=10)``: 12 blocks of two
convolutions, a stem and three convolutions on shortcuts.
"""

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput


class WideResNetConfig(PreTrainedConfig):
    """Configuration of a wide residual network.

    Args:
        num_channels: channels of an image.
        embedding_size: channels of the stem.
        num_hidden_layers: residual blocks, a multiple of ``stages``; the name's depth minus 4, divided by 2.
        width: factor of the blocks' channels, the second number of the name.
        stages: each but the first halves the image and doubles the channels.
        dropout: between the two convolutions of a block.
        image_size: side of the images that it is made for; others work, too.
    """

    model_type = "wide_resnet"

    num_channels: int = 3
    embedding_size: int = 16
    num_hidden_layers: int = 12
    width: int = 10
    stages: int = 3
    dropout: float = 0.0
    image_size: int = 32

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        for name in ("num_channels", "embedding_size", "num_hidden_layers", "width", "stages", "image_size"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r}: accepted is a whole number from 1")
        if self.num_hidden_layers % self.stages:
            raise ValueError(
                f"num_hidden_layers={self.num_hidden_layers}: accepted is a multiple of stages={self.stages}"
            )

    @property
    def hidden_sizes(self) -> list[int]:
        """Channels of each block's output."""
        blocks = self.num_hidden_layers // self.stages
        return [self.embedding_size * self.width * 2**stage for stage in range(self.stages) for _ in range(blocks)]


class WideResNetBlock(nn.Module):
    """Two 3 x 3 convolutions, each after its batch norm and ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs or stride > 1 else None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """From ``[batch, channels, height, width]`` to the same, with ``outputs`` channels, ``1 / stride`` as large."""
        active = torch.relu(self.norm1(hidden))
        skipped = hidden if self.shortcut is None else self.shortcut(active)
        return skipped + self.conv2(self.dropout(torch.relu(self.norm2(self.conv1(active)))))


class WideResNetPreTrainedModel(PreTrainedModel):
    config_class = WideResNetConfig
    config: WideResNetConfig
    base_model_prefix = "wide_resnet"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = ("WideResNetBlock",)
    supports_gradient_checkpointing = False

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            init.ones_(module.weight)
            init.zeros_(module.bias)
            init.zeros_(module.running_mean)
            init.ones_(module.running_var)
            init.zeros_(module.num_batches_tracked)


class WideResNetModel(WideResNetPreTrainedModel):
    """Stem, blocks, and the last batch norm with its ReLU."""

    def __init__(self, config: WideResNetConfig):
        super().__init__(config)
        widths, blocks = config.hidden_sizes, config.num_hidden_layers // config.stages
        self.stem = nn.Conv2d(config.num_channels, config.embedding_size, 3, 1, 1, bias=False)
        self.layers = nn.ModuleList(
            WideResNetBlock(before, width, 2 if index and index % blocks == 0 else 1, config.dropout)
            for index, (before, width) in enumerate(zip([config.embedding_size, *widths], widths))
        )
        self.norm = nn.Sequential(nn.BatchNorm2d(widths[-1]), nn.ReLU())
        self.pooler = nn.AdaptiveAvgPool2d(1)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor | None = None, **kwargs) -> BaseModelOutputWithPooling:
        """``pixel_values`` ``[batch, channels, height, width]``; the pooled output is ``[batch, channels, 1, 1]``."""
        hidden = self.stem(pixel_values)
        for layer in self.layers:
            hidden = layer(hidden)
        hidden = self.norm(hidden)
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=self.pooler(hidden))


class WideResNetForImageClassification(WideResNetPreTrainedModel):
    """A wide residual network with a linear classifier of its pooled output."""

    def __init__(self, config: WideResNetConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.wide_resnet = WideResNetModel(config)
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(config.hidden_sizes[-1], config.num_labels))
        self.post_init()

    def forward(
        self, pixel_values: torch.Tensor | None = None, labels: torch.Tensor | None = None, **kwargs
    ) -> ImageClassifierOutput:
        """Logits ``[batch, num_labels]``; with ``labels``, ``[batch]`` or shares ``[batch, num_labels]``, the loss."""
        logits = self.classifier(self.wide_resnet(pixel_values).pooler_output)
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


AutoConfig.register(WideResNetConfig.model_type, WideResNetConfig, exist_ok=True)
AutoModel.register(WideResNetConfig, WideResNetModel, exist_ok=True)
AutoModelForImageClassification.register(WideResNetConfig, WideResNetForImageClassification, exist_ok=True)
WideResNetConfig.register_for_auto_class()
WideResNetModel.register_for_auto_class("AutoModel")
WideResNetForImageClassification.register_for_auto_class("AutoModelForImageClassification")
