# Written by `make sdk` from async_generations.py; do not edit.
"""The methods of the blocking client that generate. Written by `make sdk`; do not edit."""

# Annotations are not texts, so that help() shows them without quotes.
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Never

from kvmesh.client.options import UNSET, Messages, Timeout
from kvmesh.client.requests import chat_message, prompt_message
from kvmesh.client.sync_stream import Stream
from kvmesh.client.types import Completion
from kvmesh.protos import pb


class Generations(ABC):
    """Implemented by Client."""

    @abstractmethod
    def _complete(self, prompt: pb.Prompt, options: dict[str, Any]) -> Completion: ...

    @abstractmethod
    def _stream(self, prompt: pb.Prompt, options: dict[str, Any]) -> Stream: ...

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        seed: int | None = None,
        max_tokens: int | None = None,
        min_tokens: int | None = None,
        stop: str | Sequence[str] | None = None,
        stop_token_ids: Sequence[int] | None = None,
        ignore_eos: bool | None = None,
        logit_bias: Mapping[int, float] | None = None,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        skip_special_tokens: bool | None = None,
        include_stop_str_in_output: bool | None = None,
        n: int | None = None,
        request_id: str | None = None,
        model: str | None = None,
        priority: int | None = None,
        timeout_s: Timeout = UNSET,
        allowed_kv_formats: Sequence[str] | None = None,
        max_kv_divergence_nats: float | None = None,
        cache_salt: str | None = None,
        pin_s: float | None = None,
        max_reasoning_tokens: int | None = None,
        structured_output: Mapping[str, Any] | None = None,
        **unknown: Never,
    ) -> Completion:
        """Continue a prompt given as text or token ids; returns the whole output.

        An option that is left out, or None, takes the server's default, which is in brackets. The
        model may have others for the first five: see `model_info().default_sampling_params`.

        temperature: [1] 0 to 100; 0 is greedy, and so is anything below 1e-5
        top_p: [1] nucleus sampling, in (0, 1]
        top_k: [0] keep the k most likely tokens; 0 keeps all
        min_p: [0] 0 to 1: minimum probability relative to the most likely token's
        repetition_penalty: [1] 0.01 to 100; above 1 it discourages tokens of prompt and output
        presence_penalty: [0] -100 to 100, subtracted from the logits of tokens of the output
        frequency_penalty: [0] -100 to 100, subtracted once for each occurrence in the output
        seed: [random, and reported back] 64 bits
        max_tokens: [256] output tokens per choice; 0, with prompt_logprobs or pin_s, computes only
            the prompt
        min_tokens: [0] no stop token or stop string ends a choice before this many tokens
        stop: [none] strings that end a choice; its text ends before them
        stop_token_ids: [none] token ids that end a choice
        ignore_eos: [False] continue past the model's end-of-sequence tokens
        logit_bias: [none] token id -> bias added to its logit, -100 to 100
        logprobs: [none] log-probabilities of the chosen tokens, and of the k best, k from 0 to 20
        prompt_logprobs: [none] the same for the tokens of the prompt; a long prompt needs a stream
        skip_special_tokens: [True] leave special tokens, such as end-of-turn marks, out of the text
        include_stop_str_in_output: [False] the text ends after the stop string or stop token
        n: [1] choices
        request_id: [a random one] names the request, e.g. for abort
        model: [the client's, or any] checked against the served model
        priority: [0] higher starts sooner
        timeout_s: [the client's, or no limit] seconds from the call to the last token, including
            retries, at most 30 days; here None means no limit
        allowed_kv_formats: [all] KV formats that are acceptable, e.g. ["exact", "int8"]
        max_kv_divergence_nats: [none] the most that the KV format may diverge from exact KV, as
            measured: see `model_info().groups`
        cache_salt: [none] cached prefixes are shared only between requests with the same salt
        pin_s: [none] the prompt stays cached for this many seconds after the request, up to a day;
            0 ends that. `usage.pinned_tokens` says whether it does, as pins have a bound
        max_reasoning_tokens: [none] after this many tokens of reasoning the model has to answer
        structured_output: [none] what the output must match, as one of {"json_schema": a mapping or
            JSON text}, {"json_object": True}, {"regex": text}, {"grammar": Lark or GBNF},
            {"choice": texts}
        """
        return self._complete(
            prompt_message(prompt),
            {
                "temperature": temperature,
                "top_p": top_p,
                "top_k": top_k,
                "min_p": min_p,
                "repetition_penalty": repetition_penalty,
                "presence_penalty": presence_penalty,
                "frequency_penalty": frequency_penalty,
                "seed": seed,
                "max_tokens": max_tokens,
                "min_tokens": min_tokens,
                "stop": stop,
                "stop_token_ids": stop_token_ids,
                "ignore_eos": ignore_eos,
                "logit_bias": logit_bias,
                "logprobs": logprobs,
                "prompt_logprobs": prompt_logprobs,
                "skip_special_tokens": skip_special_tokens,
                "include_stop_str_in_output": include_stop_str_in_output,
                "n": n,
                "request_id": request_id,
                "model": model,
                "priority": priority,
                "timeout_s": timeout_s,
                "allowed_kv_formats": allowed_kv_formats,
                "max_kv_divergence_nats": max_kv_divergence_nats,
                "cache_salt": cache_salt,
                "pin_s": pin_s,
                "max_reasoning_tokens": max_reasoning_tokens,
                "structured_output": structured_output,
                **unknown,
            },
        )

    def generate_stream(
        self,
        prompt: str | Sequence[int],
        *,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        seed: int | None = None,
        max_tokens: int | None = None,
        min_tokens: int | None = None,
        stop: str | Sequence[str] | None = None,
        stop_token_ids: Sequence[int] | None = None,
        ignore_eos: bool | None = None,
        logit_bias: Mapping[int, float] | None = None,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        skip_special_tokens: bool | None = None,
        include_stop_str_in_output: bool | None = None,
        n: int | None = None,
        request_id: str | None = None,
        model: str | None = None,
        priority: int | None = None,
        timeout_s: Timeout = UNSET,
        allowed_kv_formats: Sequence[str] | None = None,
        max_kv_divergence_nats: float | None = None,
        cache_salt: str | None = None,
        pin_s: float | None = None,
        max_reasoning_tokens: int | None = None,
        structured_output: Mapping[str, Any] | None = None,
        **unknown: Never,
    ) -> Stream:
        """Continue a prompt; returns a stream that yields output as it is generated.

        An option that is left out, or None, takes the server's default, which is in brackets. The
        model may have others for the first five: see `model_info().default_sampling_params`.

        temperature: [1] 0 to 100; 0 is greedy, and so is anything below 1e-5
        top_p: [1] nucleus sampling, in (0, 1]
        top_k: [0] keep the k most likely tokens; 0 keeps all
        min_p: [0] 0 to 1: minimum probability relative to the most likely token's
        repetition_penalty: [1] 0.01 to 100; above 1 it discourages tokens of prompt and output
        presence_penalty: [0] -100 to 100, subtracted from the logits of tokens of the output
        frequency_penalty: [0] -100 to 100, subtracted once for each occurrence in the output
        seed: [random, and reported back] 64 bits
        max_tokens: [256] output tokens per choice; 0, with prompt_logprobs or pin_s, computes only
            the prompt
        min_tokens: [0] no stop token or stop string ends a choice before this many tokens
        stop: [none] strings that end a choice; its text ends before them
        stop_token_ids: [none] token ids that end a choice
        ignore_eos: [False] continue past the model's end-of-sequence tokens
        logit_bias: [none] token id -> bias added to its logit, -100 to 100
        logprobs: [none] log-probabilities of the chosen tokens, and of the k best, k from 0 to 20
        prompt_logprobs: [none] the same for the tokens of the prompt; a long prompt needs a stream
        skip_special_tokens: [True] leave special tokens, such as end-of-turn marks, out of the text
        include_stop_str_in_output: [False] the text ends after the stop string or stop token
        n: [1] choices
        request_id: [a random one] names the request, e.g. for abort
        model: [the client's, or any] checked against the served model
        priority: [0] higher starts sooner
        timeout_s: [the client's, or no limit] seconds from the call to the last token, including
            retries, at most 30 days; here None means no limit
        allowed_kv_formats: [all] KV formats that are acceptable, e.g. ["exact", "int8"]
        max_kv_divergence_nats: [none] the most that the KV format may diverge from exact KV, as
            measured: see `model_info().groups`
        cache_salt: [none] cached prefixes are shared only between requests with the same salt
        pin_s: [none] the prompt stays cached for this many seconds after the request, up to a day;
            0 ends that. `usage.pinned_tokens` says whether it does, as pins have a bound
        max_reasoning_tokens: [none] after this many tokens of reasoning the model has to answer
        structured_output: [none] what the output must match, as one of {"json_schema": a mapping or
            JSON text}, {"json_object": True}, {"regex": text}, {"grammar": Lark or GBNF},
            {"choice": texts}
        """
        return self._stream(
            prompt_message(prompt),
            {
                "temperature": temperature,
                "top_p": top_p,
                "top_k": top_k,
                "min_p": min_p,
                "repetition_penalty": repetition_penalty,
                "presence_penalty": presence_penalty,
                "frequency_penalty": frequency_penalty,
                "seed": seed,
                "max_tokens": max_tokens,
                "min_tokens": min_tokens,
                "stop": stop,
                "stop_token_ids": stop_token_ids,
                "ignore_eos": ignore_eos,
                "logit_bias": logit_bias,
                "logprobs": logprobs,
                "prompt_logprobs": prompt_logprobs,
                "skip_special_tokens": skip_special_tokens,
                "include_stop_str_in_output": include_stop_str_in_output,
                "n": n,
                "request_id": request_id,
                "model": model,
                "priority": priority,
                "timeout_s": timeout_s,
                "allowed_kv_formats": allowed_kv_formats,
                "max_kv_divergence_nats": max_kv_divergence_nats,
                "cache_salt": cache_salt,
                "pin_s": pin_s,
                "max_reasoning_tokens": max_reasoning_tokens,
                "structured_output": structured_output,
                **unknown,
            },
        )

    def chat(
        self,
        messages: Messages,
        *,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        seed: int | None = None,
        max_tokens: int | None = None,
        min_tokens: int | None = None,
        stop: str | Sequence[str] | None = None,
        stop_token_ids: Sequence[int] | None = None,
        ignore_eos: bool | None = None,
        logit_bias: Mapping[int, float] | None = None,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        skip_special_tokens: bool | None = None,
        include_stop_str_in_output: bool | None = None,
        n: int | None = None,
        request_id: str | None = None,
        model: str | None = None,
        priority: int | None = None,
        timeout_s: Timeout = UNSET,
        allowed_kv_formats: Sequence[str] | None = None,
        max_kv_divergence_nats: float | None = None,
        cache_salt: str | None = None,
        pin_s: float | None = None,
        max_reasoning_tokens: int | None = None,
        structured_output: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        continue_final_message: bool | None = None,
        chat_template: str | None = None,
        chat_template_name: str | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        parallel_tool_calls: bool | None = None,
        **unknown: Never,
    ) -> Completion:
        """Answer a chat rendered with the model's template; returns the whole output.

        An option that is left out, or None, takes the server's default, which is in brackets. The
        model may have others for the first five: see `model_info().default_sampling_params`.

        temperature: [1] 0 to 100; 0 is greedy, and so is anything below 1e-5
        top_p: [1] nucleus sampling, in (0, 1]
        top_k: [0] keep the k most likely tokens; 0 keeps all
        min_p: [0] 0 to 1: minimum probability relative to the most likely token's
        repetition_penalty: [1] 0.01 to 100; above 1 it discourages tokens of prompt and output
        presence_penalty: [0] -100 to 100, subtracted from the logits of tokens of the output
        frequency_penalty: [0] -100 to 100, subtracted once for each occurrence in the output
        seed: [random, and reported back] 64 bits
        max_tokens: [256] output tokens per choice; 0, with prompt_logprobs or pin_s, computes only
            the prompt
        min_tokens: [0] no stop token or stop string ends a choice before this many tokens
        stop: [none] strings that end a choice; its text ends before them
        stop_token_ids: [none] token ids that end a choice
        ignore_eos: [False] continue past the model's end-of-sequence tokens
        logit_bias: [none] token id -> bias added to its logit, -100 to 100
        logprobs: [none] log-probabilities of the chosen tokens, and of the k best, k from 0 to 20
        prompt_logprobs: [none] the same for the tokens of the prompt; a long prompt needs a stream
        skip_special_tokens: [True] leave special tokens, such as end-of-turn marks, out of the text
        include_stop_str_in_output: [False] the text ends after the stop string or stop token
        n: [1] choices
        request_id: [a random one] names the request, e.g. for abort
        model: [the client's, or any] checked against the served model
        priority: [0] higher starts sooner
        timeout_s: [the client's, or no limit] seconds from the call to the last token, including
            retries, at most 30 days; here None means no limit
        allowed_kv_formats: [all] KV formats that are acceptable, e.g. ["exact", "int8"]
        max_kv_divergence_nats: [none] the most that the KV format may diverge from exact KV, as
            measured: see `model_info().groups`
        cache_salt: [none] cached prefixes are shared only between requests with the same salt
        pin_s: [none] the prompt stays cached for this many seconds after the request, up to a day;
            0 ends that. `usage.pinned_tokens` says whether it does, as pins have a bound
        max_reasoning_tokens: [none] after this many tokens of reasoning the model has to answer
        structured_output: [none] what the output must match, as one of {"json_schema": a mapping or
            JSON text}, {"json_object": True}, {"regex": text}, {"grammar": Lark or GBNF},
            {"choice": texts}
        tools: [none] functions that the model may call, each with name, description and parameters
            (a JSON schema), or as OpenAI's API has them, {"type": "function", "function": ...}
        chat_template_kwargs: [none] variables of the model's chat template, for instance
            {"enable_thinking": False}
        continue_final_message: [False] continue the last message, do not answer it
        chat_template: [the model's] a template to use instead, in Jinja as transformers has it
        chat_template_name: [the model's default] one of the model's own templates, see
            `model_info().chat_template_names`
        tool_choice: ["auto" with tools] "auto", "none", "required", or the tool to call, as
            {"name": ...} or as OpenAI's API has it
        parallel_tool_calls: [True] whether one answer may have several calls
        """
        return self._complete(
            chat_message(messages),
            {
                "temperature": temperature,
                "top_p": top_p,
                "top_k": top_k,
                "min_p": min_p,
                "repetition_penalty": repetition_penalty,
                "presence_penalty": presence_penalty,
                "frequency_penalty": frequency_penalty,
                "seed": seed,
                "max_tokens": max_tokens,
                "min_tokens": min_tokens,
                "stop": stop,
                "stop_token_ids": stop_token_ids,
                "ignore_eos": ignore_eos,
                "logit_bias": logit_bias,
                "logprobs": logprobs,
                "prompt_logprobs": prompt_logprobs,
                "skip_special_tokens": skip_special_tokens,
                "include_stop_str_in_output": include_stop_str_in_output,
                "n": n,
                "request_id": request_id,
                "model": model,
                "priority": priority,
                "timeout_s": timeout_s,
                "allowed_kv_formats": allowed_kv_formats,
                "max_kv_divergence_nats": max_kv_divergence_nats,
                "cache_salt": cache_salt,
                "pin_s": pin_s,
                "max_reasoning_tokens": max_reasoning_tokens,
                "structured_output": structured_output,
                "tools": tools,
                "chat_template_kwargs": chat_template_kwargs,
                "continue_final_message": continue_final_message,
                "chat_template": chat_template,
                "chat_template_name": chat_template_name,
                "tool_choice": tool_choice,
                "parallel_tool_calls": parallel_tool_calls,
                **unknown,
            },
        )

    def chat_stream(
        self,
        messages: Messages,
        *,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        seed: int | None = None,
        max_tokens: int | None = None,
        min_tokens: int | None = None,
        stop: str | Sequence[str] | None = None,
        stop_token_ids: Sequence[int] | None = None,
        ignore_eos: bool | None = None,
        logit_bias: Mapping[int, float] | None = None,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        skip_special_tokens: bool | None = None,
        include_stop_str_in_output: bool | None = None,
        n: int | None = None,
        request_id: str | None = None,
        model: str | None = None,
        priority: int | None = None,
        timeout_s: Timeout = UNSET,
        allowed_kv_formats: Sequence[str] | None = None,
        max_kv_divergence_nats: float | None = None,
        cache_salt: str | None = None,
        pin_s: float | None = None,
        max_reasoning_tokens: int | None = None,
        structured_output: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        continue_final_message: bool | None = None,
        chat_template: str | None = None,
        chat_template_name: str | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        parallel_tool_calls: bool | None = None,
        **unknown: Never,
    ) -> Stream:
        """Answer a chat; returns a stream that yields output as it is generated.

        An option that is left out, or None, takes the server's default, which is in brackets. The
        model may have others for the first five: see `model_info().default_sampling_params`.

        temperature: [1] 0 to 100; 0 is greedy, and so is anything below 1e-5
        top_p: [1] nucleus sampling, in (0, 1]
        top_k: [0] keep the k most likely tokens; 0 keeps all
        min_p: [0] 0 to 1: minimum probability relative to the most likely token's
        repetition_penalty: [1] 0.01 to 100; above 1 it discourages tokens of prompt and output
        presence_penalty: [0] -100 to 100, subtracted from the logits of tokens of the output
        frequency_penalty: [0] -100 to 100, subtracted once for each occurrence in the output
        seed: [random, and reported back] 64 bits
        max_tokens: [256] output tokens per choice; 0, with prompt_logprobs or pin_s, computes only
            the prompt
        min_tokens: [0] no stop token or stop string ends a choice before this many tokens
        stop: [none] strings that end a choice; its text ends before them
        stop_token_ids: [none] token ids that end a choice
        ignore_eos: [False] continue past the model's end-of-sequence tokens
        logit_bias: [none] token id -> bias added to its logit, -100 to 100
        logprobs: [none] log-probabilities of the chosen tokens, and of the k best, k from 0 to 20
        prompt_logprobs: [none] the same for the tokens of the prompt; a long prompt needs a stream
        skip_special_tokens: [True] leave special tokens, such as end-of-turn marks, out of the text
        include_stop_str_in_output: [False] the text ends after the stop string or stop token
        n: [1] choices
        request_id: [a random one] names the request, e.g. for abort
        model: [the client's, or any] checked against the served model
        priority: [0] higher starts sooner
        timeout_s: [the client's, or no limit] seconds from the call to the last token, including
            retries, at most 30 days; here None means no limit
        allowed_kv_formats: [all] KV formats that are acceptable, e.g. ["exact", "int8"]
        max_kv_divergence_nats: [none] the most that the KV format may diverge from exact KV, as
            measured: see `model_info().groups`
        cache_salt: [none] cached prefixes are shared only between requests with the same salt
        pin_s: [none] the prompt stays cached for this many seconds after the request, up to a day;
            0 ends that. `usage.pinned_tokens` says whether it does, as pins have a bound
        max_reasoning_tokens: [none] after this many tokens of reasoning the model has to answer
        structured_output: [none] what the output must match, as one of {"json_schema": a mapping or
            JSON text}, {"json_object": True}, {"regex": text}, {"grammar": Lark or GBNF},
            {"choice": texts}
        tools: [none] functions that the model may call, each with name, description and parameters
            (a JSON schema), or as OpenAI's API has them, {"type": "function", "function": ...}
        chat_template_kwargs: [none] variables of the model's chat template, for instance
            {"enable_thinking": False}
        continue_final_message: [False] continue the last message, do not answer it
        chat_template: [the model's] a template to use instead, in Jinja as transformers has it
        chat_template_name: [the model's default] one of the model's own templates, see
            `model_info().chat_template_names`
        tool_choice: ["auto" with tools] "auto", "none", "required", or the tool to call, as
            {"name": ...} or as OpenAI's API has it
        parallel_tool_calls: [True] whether one answer may have several calls
        """
        return self._stream(
            chat_message(messages),
            {
                "temperature": temperature,
                "top_p": top_p,
                "top_k": top_k,
                "min_p": min_p,
                "repetition_penalty": repetition_penalty,
                "presence_penalty": presence_penalty,
                "frequency_penalty": frequency_penalty,
                "seed": seed,
                "max_tokens": max_tokens,
                "min_tokens": min_tokens,
                "stop": stop,
                "stop_token_ids": stop_token_ids,
                "ignore_eos": ignore_eos,
                "logit_bias": logit_bias,
                "logprobs": logprobs,
                "prompt_logprobs": prompt_logprobs,
                "skip_special_tokens": skip_special_tokens,
                "include_stop_str_in_output": include_stop_str_in_output,
                "n": n,
                "request_id": request_id,
                "model": model,
                "priority": priority,
                "timeout_s": timeout_s,
                "allowed_kv_formats": allowed_kv_formats,
                "max_kv_divergence_nats": max_kv_divergence_nats,
                "cache_salt": cache_salt,
                "pin_s": pin_s,
                "max_reasoning_tokens": max_reasoning_tokens,
                "structured_output": structured_output,
                "tools": tools,
                "chat_template_kwargs": chat_template_kwargs,
                "continue_final_message": continue_final_message,
                "chat_template": chat_template,
                "chat_template_name": chat_template_name,
                "tool_choice": tool_choice,
                "parallel_tool_calls": parallel_tool_calls,
                **unknown,
            },
        )
