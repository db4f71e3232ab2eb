"""A batch of prompts through the Python API, streamed as the tokens come.

python examples/generate.py MODEL
"""

import sys

import ciuic_runtime as ciuic

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} MODEL")
    prompts = ["The capital of France is", "Water boils at"]
    with ciuic.LLM(sys.argv[1]) as llm:
        for text, output in llm.stream(prompts, ciuic.SamplingParams(max_tokens=16)):
            print(f"[{output.index}] {text!r}")
        print(f"decode: {llm.trace.tokens_per_s('decode'):.1f} tokens/s together")
