"""Loading and saving of multi-head models: masks are checked, sparse files and single heads are read."""

import os
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.utils import logging

from .masks import check_masks, check_state_dict
from .model_card import GENERIC, density_of, model_card
from .multi_head import check_not_quantised, renumber_head
from .sparse_checkpoint import SparseWeight, check_dense, compress_state_dict, read_tensors

logger = logging.get_logger(__name__)


class CheckpointFilesMixin:
    """``from_pretrained`` and ``save_pretrained`` of a multi-head ``PreTrainedModel``."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *args,
        heads: Sequence[int] | None = None,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        **kwargs,
    ):
        """As in ``PreTrainedModel``; a checkpoint that lacks weights or violates its masks is an error.

        Masks that a checkpoint lacks are all ones (dense). Sparse checkpoints load like dense ones.

        Args:
            heads: the heads to load, all by default. Head ``heads[i]`` of the checkpoint becomes head ``i`` of a model
                of ``len(heads)`` heads; the weights of the others are not read.

        Raises:
            ValueError: ``heads`` is no choice of the checkpoint's heads, a file is truncated, weights are missing or of
                another shape, a sparse weight lacks values, or a weight outside its mask is not 0; the message names
                them.
        """
        path = pretrained_model_name_or_path
        if heads is not None:
            kwargs["heads"] = heads  # Transformers hands on to ``__init__`` what is no key of the config
        try:
            # Stock, a wrong shape is named in the log only, and masks may be missing.
            model, info = super().from_pretrained(
                path, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
        except Exception as error:
            if type(error).__name__ != "SafetensorError":  # by name: this file imports torch and transformers only
                raise
            raise ValueError(f"{path}: a truncated or damaged weight file: {error}") from error
        if hasattr(model, "_source_heads"):
            raise ValueError(
                f"heads={heads!r}: {path} holds no safetensors files; single heads are read from these only"
            )
        if missing := sorted(key for key in info["missing_keys"] if not key.endswith("weight_mask")):
            raise ValueError(
                f"{path} lacks {len(missing)} weights of {cls.__name__}, for example {', '.join(missing[:3])}"
            )
        if info["mismatched_keys"] and not ignore_mismatched_sizes:
            name, theirs, ours = sorted(info["mismatched_keys"])[0]
            raise ValueError(
                f"{path} has {len(info['mismatched_keys'])} tensors of another shape than its config asks for, for "
                f"example {name}: {list(theirs)} instead of {list(ours)}"
            )
        expanded = vars(model).pop("_expanded", ())
        if violations := check_masks(model, known=() if info["mismatched_keys"] else expanded):
            raise ValueError(
                f"{path} has non-zero weights outside their masks ({_some(violations)}): it was trained, or adapters "
                "were merged, without the masks. from_pretrained(..., masked_modules=[]) loads the weights as they "
                "are, dense. To keep the masks, train with nt_hf.freeze_topology; nt_hf.apply_masks before saving "
                "sets the weights outside to 0, which undoes a part of the training"
            )
        return (model, info) if output_loading_info else model

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, **kwargs):
        # Called when the files are found, and downloaded. Transformers reads the tensors of a state dict one by one, so
        # the weights of a sparse checkpoint are expanded one by one, and those of other heads not read at all.
        tensors = state_dict or {}
        if state_dict is None and checkpoint_files and checkpoint_files[0].endswith(".safetensors"):
            tensors = read_tensors(checkpoint_files)
        heads = vars(model).pop("_source_heads", None) if tensors else None
        if heads is not None:
            numbers = {old: new for new, old in enumerate(heads)}
            renamed = ((renumber_head(name, numbers), tensor) for name, tensor in tensors.items())
            tensors = {name: tensor for name, tensor in renamed if name is not None}
        expanded = {name for name, tensor in tensors.items() if isinstance(tensor, SparseWeight)}
        if heads is None and not expanded:
            tensors = state_dict
        else:
            checkpoint_files = None  # weights that are offloaded to the disk would be looked up in them
            model._expanded = expanded  # these are 0 outside their masks
        return PreTrainedModel._load_pretrained_model(model, tensors, checkpoint_files, load_config, **kwargs)

    def save_pretrained(
        self, save_directory, is_main_process: bool = True, state_dict=None, *args, sparse: bool = False, **kwargs
    ):
        """As in ``PreTrainedModel``; with ``sparse=True`` only the active values of masked weights are stored.

        ``from_pretrained`` needs no option to load them, bit for bit. See the sparse_checkpoint module for the format.
        A directory without a README.md gets one, see the model_card module.

        Raises:
            ValueError: with ``sparse=True``, the model has no masks, a weight outside its mask is not 0, or weights are
                offloaded or quantised; nothing is written.
        """
        check_dense(self, "save_pretrained")
        if state_dict is None and (own := self._untied_copies()):
            state_dict = self.state_dict() | own
        card = os.path.join(save_directory, "README.md")
        density = None
        if is_main_process and not os.path.exists(card):
            density = density_of(self.state_dict() if state_dict is None else state_dict)  # before it is compressed
        if sparse:
            check_not_quantised(self, "save_pretrained(sparse=True)")
            tensors = dict(self.state_dict() if state_dict is None else state_dict)
            # First, as only an owner has a mask: later the owner's weight shares memory with nothing any more.
            state_dict = compress_state_dict(remove_tied_weights_from_state_dict(tensors, self))
        elif violations := check_masks(self) if state_dict is None else check_state_dict(state_dict):
            logger.warning(
                "%s: weights outside their masks are not 0 (%s), and from_pretrained refuses this checkpoint unless "
                "it is told masked_modules=[], which makes it dense. nt_hf.freeze_topology(model, optimizer) keeps the "
                "masks in training; adapters that are merged into masked weights make them dense",
                save_directory, _some(violations),
            )  # fmt: skip
        if self._auto_class is not None:
            # Transformers adds the class that is saved; the base model is in the same file.
            base = f"{type(self).__module__.split('.')[-1]}.{type(self.base_model).__name__}"
            self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), "AutoModel": base}
        super().save_pretrained(save_directory, is_main_process, state_dict, *args, **kwargs)
        # push_to_hub=True has written a card by now.
        if is_main_process and os.path.isdir(save_directory) and not os.path.exists(card):
            self._write_card(card, density)

    def _write_card(self, path: str, density: float | None) -> None:
        with open(path, "w", encoding="utf-8") as file:
            file.write(model_card(self, density))

    def _upload_modified_files(self, working_dir, *args, **kwargs):
        # push_to_hub has written the repository's own card by now, or, where that has none, one that says nothing.
        card = os.path.join(working_dir, "README.md")
        if os.path.exists(card):
            with open(card, encoding="utf-8") as file:
                says_nothing = GENERIC in file.read()
            if says_nothing:
                self._write_card(card, density_of(self.state_dict()))
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def _untied_copies(self) -> dict[str, torch.Tensor]:
        """Makes the configuration say whether LM heads and embeddings share weights; copies of what only seems to.

        PEFT replaces weights by merged copies, and looks at one LM head to tell whether they are still tied. LM heads
        that share a weight among themselves, but not with the embedding, are written one by one.
        """
        if not (heads := getattr(self, "lm_heads", ())):
            return {}
        embeddings = self.get_embeddings()
        pairs = [(head, embeddings[h if len(embeddings) > 1 else 0]) for h, head in enumerate(heads)]
        if not pairs or not all(hasattr(module, "weight") for pair in pairs for module in pair):
            return {}
        self.config.tie_word_embeddings = tied = all(head.weight is table.weight for head, table in pairs)
        if tied or len({id(head.weight) for head in heads}) == len(heads):
            return {}
        return {f"lm_heads.{h}.weight": head.weight.detach().clone() for h, head in enumerate(heads)}


def _some(names: Sequence[str], most: int = 3) -> str:
    """The first names of a list, and how many more there are."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
