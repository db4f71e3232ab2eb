"""An operator of one's own in the engine's path: the router's softmax, checked against the reference as it runs.

    python examples/own_operator.py

The model is a small DeepSeek-V2-shaped one with random weights (V2 scores experts by a softmax, V3 by a sigmoid).
"""

import tempfile

from random_deepseek import CONFIG

import ciuic_runtime as ciuic
from ciuic_runtime.models.random_checkpoint import write_random_checkpoint


class FastSoftmax(ciuic.CustomOperator):
    calls = 0

    def forward(self, x: ciuic.CiuicTensor) -> ciuic.CiuicTensor:
        self.calls += 1
        e = (x - x.max(axis=-1, keepdims=True)).exp()
        return e / e.sum(axis=-1, keepdims=True)

    def cost(self, x: ciuic.CiuicTensor) -> ciuic.Cost:
        return ciuic.Cost(flops=5 * x.size, nbytes=2 * x.nbytes)


def main() -> None:
    softmax_routed = {"topk_method": "group_limited_greedy", "scoring_func": "softmax", "norm_topk_prob": False}
    v2 = CONFIG | {"model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"]} | softmax_routed
    with tempfile.TemporaryDirectory() as folder:
        model = write_random_checkpoint(v2, f"{folder}/tiny-deepseek-v2")
        own = ciuic.register_operator("FastSoftmax", FastSoftmax, replaces="softmax", check=True)
        with ciuic.LLM(model) as llm:
            [out] = llm.generate("Hello", ciuic.SamplingParams(max_tokens=8, ignore_eos=True))
            print(f"{len(out.token_ids)} tokens with {llm.kernels} kernels; {', '.join(llm.trace.notes)}")
            print(f"FastSoftmax ran {own.operator.calls} times, each like the reference")


if __name__ == "__main__":
    main()
