"""Fine-tuning of models of several heads by TRL's `SFTTrainer`: which weights learn, and from which loss.

The loop, the chat templates, packing and all of its options are TRL's. Ours are what TRL cannot know: heads.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate.utils import parse_flag_from_env
from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.pytorch_utils import Conv1D
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

from ..data.tokenizers import check_vocabulary
from ..models.auto import NeuroTrailsForCausalLM, family_of
from ..models.configuration_neurotrails import MODEL_TYPE_PREFIX
from ..models.ensemble import combine_logits
from ..models.losses import IGNORE_INDEX
from ..models.masks import masked_modules
from ..models.merging import distillation_loss, with_student
from ..sparsity.config import SparsityConfig
from ..sparsity.trainer_callback import SparsityCallback
from .finetune_config import FinetuneConfig
from .finetune_data import answers_only, chat_template, load_chat_tokenizer, load_examples
from .initial_model import add_noise, require_different_heads

logger = logging.getLogger(__name__)


class HeadsTrainer(SFTTrainer):
    """TRL's trainer, in which every head learns from its own loss, as in pretraining; or one from the ensemble.

    TRL itself reads one LM head, and so would train the ensemble's likelihood. The evaluation's ``eval_loss`` is the
    cross-entropy of what the result predicts: of the ensemble of all heads, or of the student. ``eval_head_loss`` is
    the mean over the heads, ``eval_ensemble_loss`` that of a student's teacher.

    Args:
        distillation: the settings of [`distillation_loss`], for a model of [`with_student`].
        kwargs: of `SFTTrainer`.
    """

    def __init__(self, *args, distillation: Mapping[str, float] | None = None, **kwargs):
        self.distillation = distillation
        super().__init__(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = {**inputs, "use_cache": False}
        training, labels = self.model.training, inputs["labels"]
        if training and self.distillation is None:
            return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)
        # Logits exist only of positions where a row has a label.
        targets = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        keep = (targets != IGNORE_INDEX).any(0).nonzero().squeeze(1)
        targets = targets[:, keep]
        measured = self._metrics["train" if training else "eval"]
        if self.distillation is None:
            outputs = model(**inputs, logits_to_keep=keep)
            loss = _cross_entropy(outputs.logits, targets)
            measured["head_loss"].append(outputs.loss.item())
        else:
            inputs.pop("labels")
            outputs = model(**inputs, logits_to_keep=keep, output_head_logits=True)
            *teachers, student = outputs.head_logits
            with torch.no_grad():
                teacher = combine_logits(teachers, self.model.config.ensemble_mode)
            if training:
                loss = distillation_loss(student, teacher, targets, count=num_items_in_batch, **self.distillation)
            else:
                loss = _cross_entropy(student, targets)
                measured["ensemble_loss"].append(_cross_entropy(teacher, targets).item())
            if num_items_in_batch is not None and self.args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes  # the count is of all processes, gradients are averaged
        return (loss, outputs) if return_outputs else loss


def _cross_entropy(logits: torch.Tensor, targets: torch.LongTensor) -> torch.Tensor:
    """The mean over the labels; 0 where there are none."""
    total = nn.functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )
    return total / (targets != IGNORE_INDEX).sum().clamp(min=1)


def finetune(config: FinetuneConfig, args: SFTConfig) -> SFTTrainer:
    """Fine-tunes as asked, and writes the result into ``args.output_dir``.

    The result is a multi-head checkpoint; of ``train="lora"`` with the adapters merged, of ``train="trail"`` the stock
    model of the student. Trainer's checkpoints, from which a run resumes, lie beside it.

    Raises:
        ValueError: something in the settings or the data is wrong; nothing has been written then.
    """
    _check_trainer(args)
    resume_from = _resume_from(args)
    is_stock = not family_of(config.model).startswith(MODEL_TYPE_PREFIX)
    tokenizer = load_chat_tokenizer(config.model, args)
    template = chat_template(tokenizer, args)
    sources = {name: source for name, source in (("data", config.data), ("validation", config.validation)) if source}
    sets = {name: answers_only(name, load_examples(name, source), args, template) for name, source in sources.items()}
    model = _load_model(config, args, is_stock)
    check_vocabulary(tokenizer, model.config.vocab_size)
    if config.train == "trail":
        model = with_student(model, config.trail)
    adapters = _choose_weights(model, config)
    masks = [SparsityCallback(SparsityConfig(update_interval=0), resume_from)] if masked_modules(model) else []
    is_trail = config.train == "trail"
    trainer = HeadsTrainer(
        model,
        args,
        distillation={"alpha": config.distil, "temperature": config.temperature} if is_trail else None,
        train_dataset=sets["data"],
        eval_dataset=sets.get("validation"),
        processing_class=tokenizer,
        peft_config=adapters,
        callbacks=masks,
    )
    parameters = list(trainer.model.parameters())
    trained = sum(x.numel() for x in parameters if x.requires_grad)
    logger.info("train=%s: %d of %d weights are trained", config.train, trained, sum(x.numel() for x in parameters))
    trainer.train(resume_from_checkpoint=resume_from)
    if config.validation and args.eval_strategy == "no":
        trainer.evaluate()  # at least once
    _save(trainer, config)
    return trainer


def _check_trainer(args: SFTConfig) -> None:
    """Refuses the options of TRL that would take another loss than the heads' own, or need sharded weights."""
    for name, accepted in (("label_smoothing_factor", 0.0), ("loss_type", "nll")):
        if getattr(args, name) != accepted:
            raise ValueError(f"{name}={getattr(args, name)!r}: accepted is {accepted!r}, the loss is that of each head")
    for name in ("fsdp", "deepspeed"):
        flag = f"ACCELERATE_USE_{name.upper()}"  # of accelerate launch
        if getattr(args, name) or parse_flag_from_env(flag):
            raise ValueError(f"{name}={getattr(args, name)!r}: accepted is one process, or data parallel ones")


def _resume_from(args: SFTConfig) -> str | None:
    """The checkpoint to continue from: a path, or for "true" the last of ``args.output_dir``."""
    path = args.resume_from_checkpoint
    if path is None or str(path).lower() == "false":
        return None
    output = Path(args.output_dir)
    found = path
    if str(path).lower() == "true":
        found = get_last_checkpoint(output) if output.is_dir() else None
    if found is None or not Path(found).is_dir():
        raise ValueError(
            f"resume_from_checkpoint={path!r}: accepted is the directory of a checkpoint, or true where {output} holds "
            "one"
        )
    return str(found)


def _load_model(config: FinetuneConfig, args: SFTConfig, is_stock: bool) -> PreTrainedModel:
    """The multi-head model of a checkpoint, fp32 unless ``args.model_init_kwargs`` says otherwise."""
    options = {"dtype": torch.float32, **(args.model_init_kwargs or {})}
    args.model_init_kwargs = None  # the model is loaded here
    shape = {"num_ensemble_heads": config.num_ensemble_heads, "blocks_in_head": config.blocks_in_head}
    shape = {name: value for name, value in shape.items() if value is not None}
    if not is_stock:
        model = NeuroTrailsForCausalLM.from_pretrained(config.model, **options)
        for name, value in shape.items():
            if value != getattr(model.config, name):
                raise ValueError(f"{name}={value}: accepted is {getattr(model.config, name)}, as in {config.model}")
    elif config.train == "trail":
        raise ValueError(f"train=trail: {config.model} has one trail; accepted is a checkpoint of several heads")
    else:
        model = NeuroTrailsForCausalLM.from_stock(config.model, **shape, **options)
        add_noise(model, config.head_noise, args.seed)
    heads = model.config.num_ensemble_heads
    if config.train == "trail" and not (heads > 1 and config.trail < heads):
        raise ValueError(f"trail={config.trail}: accepted is a head from 0 to {heads - 1}, of two or more")
    if config.train in ("all", "heads"):  # adapters begin at random, each as another one
        require_different_heads(model, f"head_noise={config.head_noise:g}", "a number above 0, or train=lora")
    return model


def _choose_weights(model: PreTrainedModel, config: FinetuneConfig) -> LoraConfig | None:
    """Freezes what does not learn; returns the adapters of ``train="lora"``."""
    if config.train == "all":
        return None
    model.requires_grad_(False)
    count = model.config.num_ensemble_heads
    heads = [model.head_modules(head) for head in ([count - 1] if config.train == "trail" else range(count))]
    if config.train == "lora":
        layers = [module for modules in heads for path, module in modules.items() if path.startswith("layers.")]
        layers = {module for module in layers if isinstance(module, (nn.Linear, Conv1D))}
        names = [name for name, module in model.named_modules() if module in layers]
        if masked := [name for name in names if f"{name}.weight" in masked_modules(model)]:
            raise ValueError(
                f"train=lora: {masked[0]} is masked, and adapters would fill its zeros; accepted are all and heads"
            )
        return LoraConfig(r=config.lora_r, lora_alpha=config.lora_alpha, target_modules=names, task_type="CAUSAL_LM")
    for modules in heads:
        for module in modules.values():
            module.requires_grad_(True)
    for embedding in model.get_embeddings():  # a full ensemble's lie in its heads; tied LM heads stay, too
        embedding.requires_grad_(False)
    return None


def _save(trainer: SFTTrainer, config: FinetuneConfig) -> None:
    """Writes the result, its tokenizer and the log into the output directory."""
    output = trainer.args.output_dir
    if config.train in ("lora", "trail"):
        model = trainer.accelerator.unwrap_model(trainer.model)
        if config.train == "lora":
            model = model.merge_and_unload()
        else:
            model = model.extract_trail(model.config.num_ensemble_heads - 1)
        if trainer.is_world_process_zero():
            model.save_pretrained(output)
            trainer.processing_class.save_pretrained(output)
    else:
        trainer.save_model(output)
    trainer.save_state()
