"""Models of this package in lm-evaluation-harness, under the name ``moe_jax``.

Importing this module registers it:

    import lm_eval, moe_jax.evaluate.harness
    lm_eval.simple_evaluate(model="moe_jax", model_args="pretrained=FOLDER,dtype=float32", ...)
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_jax.config import ModelConfig
from moe_jax.data.tokenizer import largest_token_id, load_tokenizer
from moe_jax.evaluate.likelihood import BATCH_TOKENS, log_likelihoods
from moe_jax.hf import load_hf
from moe_jax.hf.folder import CONFIG, find_folder, read_json
from moe_jax.hf.nested import text_part
from moe_jax.metrics import progress_bar
from moe_jax.model.generate import generate, padded_length, stop_at
from moe_jax.settings import check_names
from moe_jax.tokens import check_token_ids

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import (
        handle_stop_sequences,
        has_bos_prefix,
        normalize_gen_kwargs,
        postprocess_generated_text,
    )
    from lm_eval.utils import (
        get_rolling_token_windows,
        make_disjoint_window,
        simple_parse_args_string,
    )
except ImportError as error:
    raise ImportError(
        f'tasks need lm-evaluation-harness: pip install "moe_jax[eval]" ({error})'
    ) from error

MAX_NEW_TOKENS = 256  # of a request that does not say; as in the harness's hf model
_MOST_ROWS = 64  # prompts that are continued at once
_GENERATION = "generation_config.json"


@dataclass(frozen=True)
class HarnessOptions:
    """How the harness uses a model.

    Attributes:
        max_length: tokens of context; None: as many as the model was made for.
        batch_tokens: tokens of a step, padding included.
        end_tokens: ids that end a generated text, beside the tokenizer's end-of-text.
        prefix_token_id: stands before a continuation without context; None: the tokenizer's
            beginning-of-text token, or end-of-text.
        seed: of requests with a temperature.
    """

    max_length: int | None = None
    batch_tokens: int = BATCH_TOKENS
    end_tokens: frozenset[int] = frozenset()
    prefix_token_id: int | None = None
    seed: int = 0


@register_model("moe_jax")
class MoeJaxLM(TemplateLM):
    """Answers as the harness's ``hf`` model does, item by item, to rounding.

    Tokenization of pairs, the token before an empty context, truncation on the left, and rolling
    windows are the harness's own rules. For how many programs are compiled, see
    ``likelihood.log_likelihoods``; generation compiles two for each prompt length (a power of two
    from 32), number of rows (a power of two up to 64) and number of new tokens.

    Raises:
        ValueError: a tokenizer with ids that the model does not have.
    """

    def __init__(
        self,
        params: dict[str, Any],
        config: ModelConfig,
        tokenizer: Any,
        options: HarnessOptions | None = None,
    ) -> None:
        super().__init__()
        options = options or HarnessOptions()
        check_token_ids(largest_token_id(tokenizer), config.vocab_size)
        self.params, self.model_config, self.tokenizer = params, config, tokenizer
        self.end_tokens = {*options.end_tokens, tokenizer.eos_token_id}
        self.max_length = options.max_length or config.max_positions
        self.options = options

    @classmethod
    def from_pretrained(
        cls, pretrained: str, tokenizer: str = "", dtype: str | None = None, **options: Any
    ) -> MoeJaxLM:
        """A checkpoint, by what ``model_args`` of the harness say.

        Args:
            tokenizer: folder or file of another tokenizer.
            dtype: of the weights; None keeps the checkpoint's.
            options: fields of ``HarnessOptions``. The checkpoint's generation settings add to
                ``end_tokens``.

        Raises:
            FileNotFoundError, ValueError: a checkpoint or tokenizer that cannot be used, or an
                unknown option.
        """
        check_names(options, [field.name for field in dataclasses.fields(HarnessOptions)])
        made = HarnessOptions(**options)
        folder = find_folder(pretrained)
        ends = frozenset(made.end_tokens) | end_tokens_of(folder)
        config, params = load_hf(pretrained, dtype=dtype)
        loaded = load_tokenizer(tokenizer or folder)
        return cls(params, config, loaded, dataclasses.replace(made, end_tokens=ends))

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict, additional_config: dict | None = None) -> MoeJaxLM:
        """The harness's way to make a model; its batch size and device are left to JAX."""
        return cls.from_pretrained(**arg_dict)

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict | None = None
    ) -> MoeJaxLM:
        """As ``create_from_arg_obj``, from ``key=value,...``."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string))

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        if self.options.prefix_token_id is not None:
            return self.options.prefix_token_id
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history, add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs
    ) -> list[int]:
        """Token ids; a text that has the first token spelt out does not get another one."""
        if add_special_tokens is None and has_bos_prefix(
            string, self.tokenizer.decode(self.prefix_token_id)
        ):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **options)

    def loglikelihood(self, requests, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(self, requests, **kwargs) -> list[tuple[float, bool]]:
        answers = self._score([(context, target) for _, context, target in requests])
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def _score(self, pairs) -> list[tuple[float, bool]]:
        return log_likelihoods(
            self.params,
            self.model_config,
            pairs,
            max_length=self.max_length,
            batch_tokens=self.options.batch_tokens,
        )

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = True) -> list[float]:
        windows = []
        for request in requests:
            rolling = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1
            )
            windows.append([make_disjoint_window(window) for window in rolling])
        answers = iter(self._score([window for parts in windows for window in parts]))
        totals = [sum(next(answers)[0] for _ in parts) for parts in windows]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests, disable_tqdm: bool = True) -> list[str]:
        by_options: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            by_options.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        texts = [""] * len(requests)
        with progress_bar(len(requests), "generating", "requests") as progress:
            for members in by_options.values():
                options = requests[members[0]].args[1]
                contexts = [requests[i].args[0] for i in members]
                for i, text in zip(
                    members, self._generate(contexts, options, progress), strict=True
                ):
                    texts[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return texts

    def _generate(self, contexts: Sequence[str], options: dict[str, Any], progress) -> list[str]:
        """Texts of requests with the same options."""
        until, count, temperature = self._generation(options)
        room = self.max_length - count
        prompts = [self.tok_encode(context)[-room:] for context in contexts]
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), prompts[i]))
        finished = stop_at(self.tokenizer, until)
        texts = [""] * len(contexts)
        while order:
            length = padded_length(len(prompts[order[0]]))
            most = min(_MOST_ROWS, max(1, self.options.batch_tokens // length))
            rows = min(most, 1 << (len(order) - 1).bit_length())
            batch, order = order[:rows], order[rows:]
            filling = [prompts[batch[-1]]] * (rows - len(batch))  # ends when its twin does
            made = generate(
                self.params,
                self.model_config,
                [*(prompts[i] for i in batch), *filling],
                count,
                end_tokens=self.end_tokens,
                finished=finished,
                temperature=temperature,
                seed=self.options.seed + len(order),  # another one for each batch
            )
            for i, tokens in zip(batch, made[: len(batch)], strict=True):
                text = self.tokenizer.decode(tokens, skip_special_tokens=True)
                texts[i] = postprocess_generated_text(text, until, None)
            progress.update(len(batch))
        return texts

    def _generation(self, options: dict[str, Any]) -> tuple[list[str], int, float]:
        """Stop strings, number of new tokens and temperature of a request."""
        known: dict[str, Any] = dict(normalize_gen_kwargs(options, MAX_NEW_TOKENS))
        eos = self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False)
        until = handle_stop_sequences(known.pop("until"), eos=eos)
        count = known.pop("max_gen_toks")
        if not 1 <= count < self.max_length:
            raise ValueError(f"max_gen_toks must be in [1, {self.max_length - 1}], got {count}")
        temperature = float(known.pop("temperature", 0.0))
        draws = known.pop("do_sample") and temperature > 0
        if draws and known:
            raise ValueError(f"only temperature shapes draws here, got {sorted(known)} as well")
        return until, count, temperature if draws else 0.0


def end_tokens_of(folder: Path) -> set[int]:
    """Ids that end a text, by the generation settings or else the configuration in ``folder``."""
    files = [folder / name for name in (_GENERATION, CONFIG)]
    raw = next((text_part(read_json(file)) for file in files if file.exists()), {})
    ids = raw.get("eos_token_id")
    return {ids} if isinstance(ids, int) else set(ids or ())
