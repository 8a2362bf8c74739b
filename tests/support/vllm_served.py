"""Serves a model with vLLM and prints what it says; run by test_vllm_served.py with the Python of another environment.

    python vllm_served.py REQUEST.json

REQUEST: {"model": directory, "runner": 1 or 2, "engram": settings or null, "batches": [[{"ids", "extra_args",
"max_tokens"}, ...], ...]}. The last line printed is JSON: {"interface": 1, 2 or null, "said": for every batch, for every
request, tokens and their log-probabilities, or an error}.

Model runner 2 wants Triton, which PyPI has for GPUs alone. Its kernels here (sampling, bookkeeping) are run by Triton's
interpreter; attention and the rest of the model are vLLM's own for CPUs.
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


def interpret_triton() -> None:
    """Before vLLM is imported."""
    os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    from triton.backends import backends

    # vLLM for CPUs switches Triton off where there is no backend of this name
    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)


def main() -> None:
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf8"))
    if asked["runner"] == 2:
        interpret_triton()
    from vllm import LLM, SamplingParams
    from vllm.exceptions import VLLMValidationError

    from engram_lm.vllm import plugin

    settings = {"engram": asked["engram"]} if asked["engram"] else {}
    llm = LLM(
        asked["model"], dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=4, seed=0,
        logprobs_mode="processed_logprobs", additional_config=settings, distributed_executor_backend="uni",
    )  # fmt: skip
    said = []
    for batch in asked["batches"]:
        parameters = [
            SamplingParams(
                temperature=0, max_tokens=one["max_tokens"], extra_args=one["extra_args"], logprobs=0
            )
            for one in batch
        ]
        try:
            found = llm.generate(
                [{"prompt_token_ids": one["ids"]} for one in batch], parameters, use_tqdm=False
            )
        except VLLMValidationError as error:
            said.append({"error": str(error)})
            continue
        said.append([])
        for output in (one.outputs[0] for one in found):
            tokens = list(output.token_ids)
            log_p = [step[token].logprob for token, step in zip(tokens, output.logprobs, strict=True)]
            said[-1].append({"tokens": tokens, "log_p": log_p})
    made = [processor() for processor, _ in plugin._MADE]
    interfaces = [1 if processor._states is None else 2 for processor in made if processor is not None]
    print(json.dumps({"interface": interfaces[0] if interfaces else None, "said": said}))


if __name__ == "__main__":
    main()
