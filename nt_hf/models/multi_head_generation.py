"""``generate`` of multi-head models: drafts of one trail, and how unsure the heads were of each token."""

import torch
from transformers import PreTrainedModel

from .drafters import ModelDrafter, TrailDrafter
from .ensemble import UncertaintyRecorder, combine_logits
from .multi_head import select_heads
from .speculative import generate_speculatively

# The ways of generating that trails can draft for.
SPECULATIVE_MODES = ("greedy_search", "sample")
# The ways of generating whose steps are the forward passes that the tokens were drawn from.
RECORDED_MODES = ("greedy_search", "sample", "beam_search", "beam_sample", "assisted_generation")


class MultiHeadGenerationMixin:
    """Goes before ``GenerationMixin``; the model's ``forward`` knows ``active_heads`` and ``output_uncertainty``."""

    def generate(
        self,
        inputs=None,
        generation_config=None,
        *args,
        output_uncertainty: bool = False,
        trail_draft: int | PreTrainedModel | None = None,
        **kwargs,
    ):
        """As in ``GenerationMixin``, and with two things of its own.

        Args:
            output_uncertainty: the output has an ``uncertainty``: an ``Uncertainty`` ``[sequences, new tokens]`` of the
                distributions that each new token was chosen by, before temperature and other processing of the
                logits. The padding after a sequence's end has NaN.
            trail_draft: the head whose trail drafts several tokens before the other heads verify them together, or a
                stock model of the same vocabulary that drafts for all heads, such as ``nt_hf.inference.draft_model``.
                The output is the same, by greedy decoding token for token, by sampling in distribution, and comes
                sooner. With ``return_dict_in_generate=True`` the output has a ``speculation``, which counts accepted
                drafts.

        Raises:
            ValueError: ``output_uncertainty=True`` without ``return_dict_in_generate=True``, or for a way of generating
                other than greedy, sampling, beam search and assisted decoding; ``trail_draft`` that is no active head
                and no model of this vocabulary, for another way of generating than greedy and sampling, or without a
                ``DynamicCache``;
                ``assistant_early_exit``.
        """
        given = generation_config or self.generation_config
        early_exit = kwargs.get("assistant_early_exit", given.assistant_early_exit)
        if early_exit is not None:
            raise ValueError(
                f"assistant_early_exit={early_exit}: the first blocks of several heads are no model; accepted is "
                "trail_draft=<head>, which drafts with one trail"
            )
        if not output_uncertainty and trail_draft is None:
            return super().generate(inputs, generation_config, *args, **kwargs)
        config, _ = self._prepare_generation_config(generation_config, **kwargs)
        mode = config.get_generation_mode(kwargs.get("assistant_model"))
        other = kwargs.get("custom_generate") or config.token_healing or config.cache_implementation == "paged"
        if trail_draft is not None:
            heads = select_heads(self.config, kwargs.get("active_heads"))
            is_model = isinstance(trail_draft, PreTrainedModel)
            if not is_model and (type(trail_draft) is not int or trail_draft not in heads):
                raise ValueError(f"trail_draft={trail_draft!r}: accepted is one of the active heads {heads} or a model")
            if other or mode not in SPECULATIVE_MODES:
                raise ValueError(
                    f"trail_draft with generation mode {mode.value!r}: accepted are "
                    f"{', '.join(SPECULATIVE_MODES)}, without custom_generate, token_healing and a paged cache"
                )
            kwargs["trail_draft"] = trail_draft
        if not output_uncertainty:
            return super().generate(inputs, generation_config, *args, **kwargs)
        if not config.return_dict_in_generate:
            value = config.return_dict_in_generate
            raise ValueError(f"return_dict_in_generate={value!r} with output_uncertainty=True: accepted is True")
        if other or mode not in RECORDED_MODES:
            raise ValueError(
                f"output_uncertainty=True with generation mode {mode.value!r}: accepted are "
                f"{', '.join(RECORDED_MODES)}, without custom_generate, token_healing and a paged cache"
            )
        recorder = UncertaintyRecorder()
        # Of a prompt only the last position counts: a step's measures begin with the first new token's.
        kwargs |= {"output_uncertainty": recorder, "logits_to_keep": 1}
        outputs = super().generate(inputs, generation_config, *args, **kwargs)
        if "beam_indices" in outputs:
            rows = outputs.beam_indices.long()
        else:
            prompt = inputs if inputs is not None else kwargs.get("input_ids")
            # Without a prompt generation starts from one token, from embeddings the sequences hold new tokens only.
            width = prompt.shape[1] if prompt is not None else int(kwargs.get("inputs_embeds") is None)
            tokens = outputs.sequences[:, width:]
            rows = torch.arange(len(tokens), device=tokens.device)[:, None]
            rows = rows.where(~_is_padding(tokens, config.eos_token_id, config.pad_token_id), -1)
        outputs["uncertainty"] = recorder.select(rows)
        return outputs

    def init_continuous_batching(self, *args, **kwargs):
        """Refused: a paged cache has one slot a block of a single stack (``generate_batch`` and servers call this).

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "continuous batching, generate_batch: accepted are generate with padded prompts, or a trail of its own, "
            "extract_trail(h)"
        )

    def _validate_model_kwargs(self, model_kwargs) -> None:
        # ``generate`` would refuse an argument that ``forward`` does not take.
        super()._validate_model_kwargs({key: value for key, value in model_kwargs.items() if key != "trail_draft"})

    def _sample(
        self, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus=False, streamer=None,
        trail_draft: int | PreTrainedModel | None = None, **model_kwargs,
    ):  # fmt: skip
        if trail_draft is None:
            return super()._sample(
                input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, **model_kwargs
            )
        if synced_gpus:
            raise ValueError("trail_draft with synced_gpus=True: accepted is False")
        recorder = model_kwargs.pop("output_uncertainty", None)
        heads = select_heads(self.config, model_kwargs.get("active_heads"))
        drafter = TrailDrafter if isinstance(trail_draft, int) else ModelDrafter
        return generate_speculatively(
            self,
            drafter(self, trail_draft, heads),
            heads,
            lambda each: combine_logits(each, self.config.ensemble_mode),
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            streamer,
            recorder or None,
            **model_kwargs,
        )

    def _update_model_kwargs_for_generation(
        self, outputs, model_kwargs, is_encoder_decoder: bool = False, num_new_tokens: int = 1
    ):
        # Called once a step, whatever the way of generating, with the number of tokens that the step adds.
        if isinstance(recorder := model_kwargs.get("output_uncertainty"), UncertaintyRecorder):
            recorder.add(outputs.uncertainty, num_new_tokens)
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, is_encoder_decoder, num_new_tokens)


def _is_padding(tokens: torch.LongTensor, eos: int | list[int] | None, pad: int | None) -> torch.BoolTensor:
    """Which new tokens ``[sequences, n]`` ``generate`` filled in after the end of a sequence."""
    if eos is None:
        return torch.zeros_like(tokens, dtype=torch.bool)
    ends = torch.isin(tokens, torch.as_tensor(eos, device=tokens.device))
    padding = ends.cumsum(1) > ends.long()
    if pad is not None and not torch.isin(torch.as_tensor(pad), torch.as_tensor(eos)):
        # A sequence that a stopping criterion ended has no end-of-sequence token.
        padding |= (tokens != pad).flip(1).cumsum(1).flip(1) == 0
    return padding
