"""Greedy tokens by vLLM, for the tests, which run it in the environment of vLLM: one engine a process.

Reads `{"model": folder, "adapter": folder or None, "prompts": [[token, ...], ...], "tokens": int, "options": {...}}`,
prints the tokens of each prompt as JSON in a line that begins with TOKENS, among what vLLM prints.
"""

import json
import sys

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def main() -> None:
    request = json.load(sys.stdin)
    llm = LLM(
        request["model"],
        dtype="float32",
        skip_tokenizer_init=True,
        max_model_len=128,
        max_num_seqs=4,
        disable_log_stats=True,
        **request["options"],
    )
    greedy = SamplingParams(temperature=0, max_tokens=request["tokens"], ignore_eos=True, detokenize=False)
    adapter = request["adapter"] and LoRARequest("adapter", 1, request["adapter"])
    prompts = [{"prompt_token_ids": prompt} for prompt in request["prompts"]]
    outputs = llm.generate(prompts, greedy, lora_request=adapter)
    print("TOKENS", json.dumps([list(output.outputs[0].token_ids) for output in outputs]), flush=True)


if __name__ == "__main__":  # the processes of tensor parallelism import it again
    main()
