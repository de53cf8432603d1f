"""Asks tinker 0.38 for every kind of score of one prompt: a job on stdin, answers on stdout."""

import json
import os
import sys
from typing import Any

import numpy as np
import tinker
from tinker import types


def tensor(fields: dict[str, Any]) -> types.TensorData:
    return types.TensorData(
        data=np.array(fields["data"], dtype=np.int64),
        dtype="int64",
        shape=fields["shape"],
        sparse_crow_indices=fields.get("crow"),
        sparse_col_indices=fields.get("columns"),
    )


def ask(client: Any, prompt: list[int], case: dict[str, Any]) -> Any:
    options = dict(case)
    params = types.SamplingParams(**options.pop("params"))
    if "target_prompt_logprobs" in options:
        options["target_prompt_logprobs"] = tensor(options["target_prompt_logprobs"])
    model_input = types.ModelInput.from_ints(prompt)
    return client.sample(prompt=model_input, num_samples=1, sampling_params=params, **options)


def numbers(data: types.TensorData | None) -> dict[str, Any] | None:
    if data is None:
        return None
    return {"shape": data.shape, "data": data.data, "crow": data.sparse_crow_indices}


def told(response: Any) -> dict[str, Any]:
    alternatives = response.prompt_alt_tokens
    sequence = response.sequences[0]
    return {
        "tokens": sequence.tokens,
        "logprobs": sequence.logprobs,
        "topk_sampled": sequence.topk_logprobs,
        "prompt_logprobs": response.prompt_logprobs,
        "topk_prompt": response.topk_prompt_logprobs,
        "targets": numbers(response.target_prompt_logprobs),
        "alternatives": None
        if alternatives is None
        else {"tokens": numbers(alternatives.tokens), "logprobs": numbers(alternatives.logprobs)},
        "cache_hits": response.prompt_cache_hit_tokens,
    }


def main() -> None:
    job = json.load(sys.stdin)
    client = tinker.ServiceClient().create_sampling_client(base_model=job["model"]).result()
    answers = []
    for case in job["cases"]:  # one after the other: the second finds what the first left cached
        answers.append(told(ask(client, job["prompt"], case).result()))
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # the SDK's threads, which nobody can end, abort a shutdown once in a while
