"""What a user sees of generating: where it ends and why, the same seed giving the same text in any company, streams
that are left early, and input that cannot be used."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ciuic_runtime.devices.errors import CiuicError, InvalidInput
from ciuic_runtime.devices.spec import Topology
from ciuic_runtime.engine.llm import LLM
from ciuic_runtime.engine.sampling import SamplingParams
from ciuic_runtime.models.random_checkpoint import write_random_checkpoint
from ciuic_runtime.ops.native import REFERENCE, instruction_set

PROMPTS = [[5, 250, 17, 99, 3, 3, 42] * 12, [7], list(range(60, 100)), [9, 8], [77] * 65]
FREE = SamplingParams(max_tokens=24, ignore_eos=True)


def ids(llm: LLM, prompt: Any, params: SamplingParams = FREE) -> list[int]:
    return list(llm.generate(prompt, params)[0].token_ids)


def all_free(llm: LLM) -> bool:
    batching = llm.engine.batching
    return batching.blocks.num_free == batching.blocks.num_blocks and not batching.running


# Ends


def changed(source: Path, folder: Path, **config: Any) -> Path:
    """A copy of a checkpoint that says something else in its config."""
    shutil.copytree(source, folder)
    values = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def test_any_end_of_sequence_token_ends(llm: LLM, tiny_v3: Path, here: Topology, tmp_path: Path) -> None:
    free = ids(llm, PROMPTS[0])
    first, later = free[6], free[3]
    assert free.index(first) >= 4, "this model's text does not suit the test"
    folder = changed(tiny_v3, tmp_path / "ends", eos_token_id=[319, first])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [later]}))
    with LLM(folder, devices=here, dtype="float32", max_model_len=256, max_num_seqs=2, threads=1) as other:
        output = other.generate(PROMPTS[0], SamplingParams(max_tokens=24))[0]
        assert list(output.token_ids) == free[: free.index(later) + 1]
        assert output.finish_reason == "stop"
        assert ids(other, PROMPTS[0]) == free, "ignore_eos"
        limited = other.generate(PROMPTS[0], SamplingParams(max_tokens=2))[0]
        assert (limited.finish_reason, list(limited.token_ids)) == ("length", free[:2])


def test_the_text_of_an_end_token_is_not_shown(tiny_v3: Path, here: Topology, llm: LLM, tmp_path: Path) -> None:
    free = ids(llm, PROMPTS[2])
    readable = next(i for i, t in enumerate(free) if t < 256 and t not in free[:i])
    folder = changed(tiny_v3, tmp_path / "ends", eos_token_id=[free[readable]])
    with LLM(folder, devices=here, dtype="float32", max_model_len=256, max_num_seqs=1, threads=1) as other:
        output = other.generate(PROMPTS[2], SamplingParams(max_tokens=24))[0]
    assert list(output.token_ids) == free[: readable + 1]
    assert output.text == llm.tokenizer.decode(free[:readable])


def test_stop_strings_end_before_themselves(llm: LLM) -> None:
    long = {"max_tokens": 150, "ignore_eos": True, "temperature": 1.0, "seed": 1}
    whole = llm.generate(PROMPTS[2], SamplingParams(**long))[0]
    stop = re.findall(r"[ -~]{2}", whole.text[4:])[-1]
    params = SamplingParams(**long, stop=("never there", stop))
    pieces = list(llm.stream(PROMPTS[2], params))
    final = pieces[-1][1]
    assert final.finish_reason == "stop"
    assert final.text == "".join(text for text, _ in pieces) == whole.text[: whole.text.index(stop)]
    assert len(final.token_ids) < len(whole.token_ids)
    assert final.token_ids == whole.token_ids[: len(final.token_ids)]


def test_outputs_say_how_it_went(llm: LLM) -> None:
    outputs = llm.generate(PROMPTS, [SamplingParams(max_tokens=n, ignore_eos=True) for n in (1, 2, 3, 4, 5)])
    assert [o.index for o in outputs] == list(range(5))
    assert [len(o.token_ids) for o in outputs] == [1, 2, 3, 4, 5]
    assert [list(o.prompt_token_ids) for o in outputs] == PROMPTS
    for output in outputs:
        assert output.finish_reason == "length"
        assert output.first_token_s is not None
        assert 0 < output.first_token_s <= output.total_s


def test_streamed_pieces_are_the_text(llm: LLM) -> None:
    texts = ["", "", ""]
    lengths = [0, 0, 0]
    for piece, output in llm.stream(PROMPTS[:3], FREE):
        texts[output.index] += piece
        assert output.text == texts[output.index]
        assert len(output.token_ids) == lengths[output.index] + 1
        lengths[output.index] += 1
    assert texts == [o.text for o in llm.generate(PROMPTS[:3], FREE)]


# Seeds


WARM = {"max_tokens": 20, "ignore_eos": True, "temperature": 1.2, "top_k": 50, "top_p": 0.95}


def test_a_seed_gives_the_same_tokens_in_any_company(llm: LLM) -> None:
    """Five prompts for three places, each with its own seed, alone and in two orders."""
    params = [SamplingParams(**WARM, seed=100 + i) for i in range(5)]
    alone = [ids(llm, p, one) for p, one in zip(PROMPTS, params, strict=True)]
    together = [list(o.token_ids) for o in llm.generate(PROMPTS, params)]
    turned = [list(o.token_ids) for o in llm.generate(PROMPTS[::-1], params[::-1])]
    assert together == alone
    assert turned[::-1] == alone


def test_seeds_differ_and_a_drawn_one_is_reported(llm: LLM) -> None:
    outputs = llm.generate([PROMPTS[0]] * 4, [SamplingParams(**WARM, seed=s) for s in (1, 2, None, None)])
    assert len({o.token_ids for o in outputs}) == 4
    assert [o.seed for o in outputs[:2]] == [1, 2]
    again = llm.generate(PROMPTS[0], SamplingParams(**WARM, seed=outputs[3].seed))[0]
    assert again.token_ids == outputs[3].token_ids


def test_repetition_penalty_sees_prompt_and_output(llm: LLM) -> None:
    strict = SamplingParams(max_tokens=40, ignore_eos=True, repetition_penalty=100.0)
    tokens = ids(llm, PROMPTS[2], strict)
    assert len(set(tokens)) == 40
    assert not set(tokens) & set(PROMPTS[2])


# Streams that end early


def test_a_stream_left_early_frees_its_blocks(llm: LLM) -> None:
    expected = ids(llm, PROMPTS[0])
    for _ in range(3):
        stream = llm.stream(PROMPTS, FREE)
        for _ in range(4):
            next(stream)
        assert not all_free(llm)
        stream.close()
        assert all_free(llm)
    assert ids(llm, PROMPTS[0]) == expected


def test_an_interrupt_frees_and_leaves_a_whole_trace(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of a pass: what was generated is there, the broken step is not in the trace."""
    stream = llm.stream(PROMPTS[0], FREE)
    seen = [next(stream)[1] for _ in range(3)]
    (forward,) = llm._host.executor.forwards.values()
    start = forward.start
    monkeypatch.setattr(forward, "start", lambda batch: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    monkeypatch.setattr(forward, "start", start)
    assert all_free(llm)
    steps = llm.trace.steps
    assert [s.phase for s in steps] == ["prefill"] * 3 + ["decode"] * 2
    assert ids(llm, PROMPTS[0])[:3] == list(seen[-1].token_ids)


def test_one_stream_at_a_time(llm: LLM) -> None:
    outer = llm.stream(PROMPTS[0], FREE)
    next(outer)
    for attempt in (lambda: llm.generate([1, 2], FREE), lambda: llm.logits([1, 2])):
        with pytest.raises(InvalidInput, match="an earlier stream is not at its end"):
            attempt()
    rest = [o for _, o in outer][-1]
    assert list(rest.token_ids) == ids(llm, PROMPTS[0])


# Input that cannot be used


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "no prompts were given"),
        ([[]], "prompt 0 is empty"),
        ([[1], []], "prompt 1 is empty"),
        ("", "prompt 0 is empty"),
        ([320], "token id 320.* 0 to 319"),
        ([[1, 2], [-1]], "prompt 1 has token id -1"),
        ([1, 2.5], "token id 2.5"),
        ([True, False], "token id True"),
        ([1] * 500, "prompt 0 has 500 tokens and 24 new"),
        ([[1], [1] * 489], "prompt 1 has 489 tokens and 24 new"),
    ],
)
def test_prompts_that_cannot_be_used(llm: LLM, prompt: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message) as refused:
        llm.generate(prompt, FREE)
    assert "\n" not in str(refused.value)
    assert all_free(llm)


@pytest.mark.parametrize("tokens", [[], [320], [1] * 513])
def test_logits_of_what_cannot_be_used(llm: LLM, tokens: list[int]) -> None:
    with pytest.raises(InvalidInput, match="the prompt"):
        llm.logits(tokens)


def test_a_prompt_that_fills_the_context(llm: LLM) -> None:
    assert len(ids(llm, [3] * 488)) == 24
    assert llm.logits([3] * 512).shape == (512, 320)


def test_as_many_parameters_as_prompts(llm: LLM) -> None:
    with pytest.raises(InvalidInput, match="2 prompts and 3 sampling parameters"):
        llm.generate([[1], [2]], [FREE] * 3)


def native_or_skip() -> str:
    chosen = instruction_set()
    if chosen == REFERENCE:
        pytest.skip("the native kernels are not built here")
    return chosen


def with_nan(where: str, source: Path, folder: Path) -> Path:
    (file,) = changed(source, folder).glob("*.safetensors")
    tensors = load_file(file)
    tensors[where][3] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    return folder


@pytest.mark.parametrize("where", ["model.norm.weight", "model.layers.2.self_attn.kv_b_proj.weight"])
def test_nan_weights_that_are_packed_are_refused(where: str, tiny_v3: Path, here: Topology, tmp_path: Path) -> None:
    folder = with_nan(where, tiny_v3, tmp_path / "broken")
    with pytest.raises(InvalidInput, match=rf"{where} cannot be packed .*row [03], column [03] is nan"):
        LLM(folder, devices=here, max_model_len=256, max_num_seqs=2, threads=1, kernels=native_or_skip())


@pytest.mark.parametrize(
    ("where", "kernels"),
    [
        ("model.norm.weight", "reference"),
        ("model.layers.2.self_attn.kv_b_proj.weight", "reference"),
        ("model.layers.2.self_attn.o_proj.weight", "auto"),
        ("model.layers.2.mlp.shared_experts.down_proj.weight", "auto"),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_weights_are_reported(
    where: str, kernels: str, temperature: float, tiny_v3: Path, here: Topology, tmp_path: Path
) -> None:
    folder = with_nan(where, tiny_v3, tmp_path / "broken")
    with LLM(folder, devices=here, max_model_len=256, max_num_seqs=2, threads=1, kernels=kernels) as llm:
        with pytest.raises(CiuicError, match=r"prompt 0, position 3: .*NaN or infinite") as failed:
            llm.generate([1, 2, 3], SamplingParams(temperature=temperature))
        assert not isinstance(failed.value, InvalidInput)
        assert all_free(llm)


def test_without_a_tokenizer_token_ids_still_work(tiny_v3: Path, here: Topology, llm: LLM, tmp_path: Path) -> None:
    folder = changed(tiny_v3, tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with LLM(folder, devices=here, dtype="float32", max_model_len=256, max_num_seqs=1, threads=1) as bare:
        output = bare.generate(PROMPTS[0], FREE)[0]
        assert list(output.token_ids) == ids(llm, PROMPTS[0])
        assert output.text == ""
        for prompt, params in (("text", FREE), ([1], SamplingParams(stop=("x",)))):
            with pytest.raises(InvalidInput, match=r"tokenizer.json"):
                bare.generate(prompt, params)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_reference_operators_give_the_same_text(
    dtype: str, tiny_v3: Path, here: Topology, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An installation without a compiler: close to the kernels' logits."""
    import importlib

    with LLM(tiny_v3, devices=here, dtype=dtype, max_model_len=256, max_num_seqs=1, threads=1) as llm:
        native = llm.logits(PROMPTS[0])
        monkeypatch.setattr(importlib.import_module("ciuic_runtime.ops.rms_norm"), "kernels", lambda: None)
        reference = llm.logits(PROMPTS[0])
    close = {"float32": 1e-5, "bfloat16": 0.05}[dtype]
    assert torch.dist(native, reference) <= close * reference.norm()


def test_float16_files_run_in_bfloat16(here: Topology, tmp_path: Path) -> None:
    config = {
        "model_type": "llama", "vocab_size": 300, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    }  # fmt: skip
    folder = write_random_checkpoint(config, tmp_path / "half", dtype="float16")
    with LLM(folder, devices=here, threads=1) as llm:
        assert llm.model.format == "bfloat16"
        assert len(ids(llm, [1, 2, 3])) == 24
