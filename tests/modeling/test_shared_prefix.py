"""Completions that share their prompt's row, against rows of their own."""

import functools

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask, flex_attention

from posttrain.modeling import StatisticsGroup, VocabRequest, attach
from posttrain.modeling.shared_prefix import shared_prefix_layout, shared_prefix_mask, worthwhile
from tests.modeling import families

LOGP = (StatisticsGroup(("logp",)),)
PROMPTS = [[5, 6, 7, 8, 9], [10], [], [11, 12, 13]]
CHOSEN = [[20, 21, 22], [23, 24], [25, 26, 27], [28]]
REJECTED = [[30], [31, 32, 33, 34], [35, 36], [28, 37]]
REFUSAL = [[40, 41], [42], [43, 44], [45]]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


@pytest.fixture(autouse=True)
def softmax_in_full(monkeypatch):
    """The models' own goes through float32 whatever the dtype."""
    own = torch.nn.functional.softmax

    def softmax(values, dim, dtype=None):
        return own(values, dim, dtype=torch.promote_types(values.dtype, dtype or values.dtype))

    monkeypatch.setattr(torch.nn.functional, "softmax", softmax)


def separate_logp(model, prompts, *completions):
    """The truth: every completion in a right-padded row of its own, log_softmax of the model's own logits."""
    sequences = [(p, own) for role in completions for p, own in zip(prompts, role, strict=True)]
    length = max(len(p) + len(own) for p, own in sequences)
    ids = torch.zeros(len(sequences), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (prompt, own) in enumerate(sequences):
        ids[row, : len(prompt) + len(own)] = torch.tensor(prompt + own)
        mask[row, : len(prompt) + len(own)] = 1
    logp = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.log_softmax(-1)
    return torch.stack(
        [
            logp[row, position - 1, ids[row, position]]
            for row, (prompt, own) in enumerate(sequences)
            for position in range(max(len(prompt), 1), len(prompt) + len(own))
        ]
    )


def shared_logp(model, prompts, *completions, **options):
    layout = shared_prefix_layout(prompts, *completions, pad_token_id=0, **options)
    answer = model(
        input_ids=layout.input_ids,
        position_ids=layout.position_ids,
        segment_ids=layout.segment_ids,
        vocab_request=VocabRequest(layout.target_index, layout.targets, groups=LOGP),
    )
    return answer.statistics[0]["logp"]


def assert_same(model, *sequences, dtype=torch.float64, **options):
    expected = separate_logp(model, *sequences)
    gradients = families.gradients(model, expected)
    found = shared_logp(attach(model), *sequences, **options)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    ours = families.gradients(model, found)
    assert ours.keys() == gradients.keys()
    # the bias of a key has no gradient but rounding
    floor = 1e-3 * max(gradient.norm() for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert (ours[name] - gradient).norm() <= tolerance * max(gradient.norm(), floor), name


def built(family, implementation="sdpa", dtype=torch.float64):
    model = families.model(family).to(dtype)
    model.set_attn_implementation(implementation)
    for module in model.modules():
        if dtype == torch.float64 and type(module).__name__.endswith("RMSNorm"):
            module.forward = functools.partial(norm_in_full, module)
    return model


def norm_in_full(module, hidden):
    """The models' own goes through float32, and its backward rounds a sum of gradients otherwise than its parts."""
    return module.weight * hidden * (hidden.square().mean(-1, keepdim=True) + module.variance_epsilon).rsqrt()


def test_a_layout_by_hand():
    layout = shared_prefix_layout([[5, 6], [7]], [[8], [9, 10]], [[11, 12], [13]], pad_token_id=99)
    assert layout.input_ids.tolist() == [[5, 6, 8, 11, 12], [7, 9, 10, 13, 99]]
    assert layout.position_ids.tolist() == [[0, 1, 2, 2, 3], [0, 1, 2, 1, 0]]
    assert layout.segment_ids.tolist() == [[0, 0, 1, 2, 2], [0, 1, 1, 2, -1]]
    assert layout.targets.tolist() == [8, 9, 10, 11, 12, 13]
    # the prompt's last position predicts the first token of both completions
    assert layout.target_index.tolist() == [1, 5, 6, 1, 3, 5]
    assert layout.lengths == [1, 2, 2, 1]


def test_an_empty_prompt_predicts_nothing_and_an_empty_completion_has_no_target():
    layout = shared_prefix_layout([[], [7, 8]], [[1, 2], []], [[3], [4]], pad_token_id=0, pad_to_multiple_of=4)
    assert layout.input_ids.tolist() == [[1, 2, 3, 0], [7, 8, 4, 0]]
    assert layout.position_ids.tolist() == [[0, 1, 0, 0], [0, 1, 2, 0]]
    assert layout.targets.tolist() == [2, 4] and layout.target_index.tolist() == [0, 5]
    assert layout.lengths == [1, 0, 0, 1]
    nothing = shared_prefix_layout([], [], [], pad_token_id=0)
    assert nothing.input_ids.shape == (0, 0) and nothing.targets.shape == (0,)


def test_a_role_without_a_completion_for_every_prompt_is_refused():
    with pytest.raises(ValueError, match="role 2 has 1 completions for 2 prompts"):
        shared_prefix_layout([[1], [2]], [[3], [4]], [[5]], pad_token_id=0)


def test_a_mask_by_hand():
    segments = torch.tensor([[0, 0, 1, 2, 2, -1]])
    visible = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [1, 1, 0, 1, 1, 0],
        [1, 1, 0, 0, 0, 1],
    ]
    expected = torch.tensor(visible, dtype=torch.bool)[None, None]
    assert torch.equal(shared_prefix_mask(segments, "sdpa"), expected)
    added = shared_prefix_mask(segments, "eager", torch.bfloat16)
    assert added.dtype == torch.bfloat16 and torch.equal(added == 0, expected)
    assert (added[~expected] == torch.finfo(torch.bfloat16).min).all()
    with pytest.raises(ValueError, match="'flash_attention_2' takes no mask"):
        shared_prefix_mask(segments, "flash_attention_2")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_logp_and_gradients_are_those_of_separate_rows(family, implementation, dtype):
    assert_same(built(family, implementation, dtype), PROMPTS, CHOSEN, REJECTED, dtype=dtype)


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neox", "phi", "granite", "qwen3_moe"])
def test_other_families_too(family):
    model = built(family)
    model.config.output_router_logits = False
    prompts = [prompt or [3] for prompt in PROMPTS]
    assert_same(model, prompts, CHOSEN, REJECTED)


@pytest.mark.parametrize("options", [{}, {"pad_to_multiple_of": 32}])
def test_three_completions_of_a_prompt_and_more_padding(options):
    assert_same(built("llama"), PROMPTS, CHOSEN, REJECTED, REFUSAL, **options)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    model = built("qwen3").train()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_same(model, PROMPTS, CHOSEN, REJECTED)


def test_positions_that_restart_are_not_taken_for_packed_sequences():
    """What transformers does with them where the mask is left out, which a mask of four dimensions must prevent."""
    model = attach(built("llama"))
    pair = PROMPTS[1:2], CHOSEN[1:2], REJECTED[1:2]
    expected = separate_logp(model, *pair)
    layout = shared_prefix_layout(*pair, pad_token_id=0)
    request = VocabRequest(layout.target_index, layout.targets, groups=LOGP)
    ids, positions = layout.input_ids, layout.position_ids
    packed = model(input_ids=ids, position_ids=positions, vocab_request=request).statistics[0]["logp"]
    assert not torch.allclose(packed, expected, atol=1e-3)
    torch.testing.assert_close(shared_logp(model, *pair), expected)


def test_logits_are_those_of_the_request():
    model = attach(built("llama", "eager"))
    layout = shared_prefix_layout(PROMPTS, CHOSEN, REJECTED, pad_token_id=0)
    inputs = {"position_ids": layout.position_ids, "segment_ids": layout.segment_ids}
    logp = model(layout.input_ids, **inputs).logits.log_softmax(-1).flatten(0, 1)
    expected = logp[layout.target_index, layout.targets]
    torch.testing.assert_close(shared_logp(model, PROMPTS, CHOSEN, REJECTED), expected)


def test_a_completion_does_not_move_with_the_other():
    model = attach(built("llama"))
    one = shared_logp(model, [[5, 6]], [[7, 8]], [[9, 10, 11]])
    other = shared_logp(model, [[5, 6]], [[7, 8]], [[12, 13, 14]])
    assert torch.equal(one[:2], other[:2]) and not torch.allclose(one[2:], other[2:])


def test_low_precision_is_as_near_to_the_truth_as_separate_rows():
    truth = separate_logp(built("llama"), PROMPTS, CHOSEN, REJECTED)
    for implementation in ("sdpa", "eager"):
        model = built("llama", implementation, torch.bfloat16)
        own = (separate_logp(model, PROMPTS, CHOSEN, REJECTED).double() - truth).norm()
        found = (shared_logp(attach(model), PROMPTS, CHOSEN, REJECTED).double() - truth).norm()
        assert found <= 1.5 * own + 1e-2


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_block_mask_hides_what_the_dense_mask_hides():
    layout = shared_prefix_layout(
        [[*range(150)], [1]], [[*range(80)], [2]], [[*range(60)], [*range(200)]], pad_token_id=0
    )
    blocks = shared_prefix_mask(layout.segment_ids, "flex_attention")
    dense = shared_prefix_mask(layout.segment_ids, "sdpa")
    rows, length = layout.segment_ids.shape
    assert blocks.shape == (rows, 1, length, length)
    assert torch.equal(create_mask(blocks.mask_mod, rows, 1, length, length, device="cpu"), dense)
    query, key, value = (torch.randn(rows, 2, length, 16, dtype=torch.float64) for _ in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=dense)
    found = flex_attention(query, key, value, block_mask=blocks)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_flex_attention_leaves_out_whole_blocks():
    layout = shared_prefix_layout([[1] * 128], [[2] * 256], [[3] * 256], pad_token_id=0)
    blocks = shared_prefix_mask(layout.segment_ids, "flex_attention")
    # of 5 x 5 blocks the causal triangle has 15, four of which lie between the completions
    assert int((blocks.to_dense() > 0).sum()) == 11


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_equals_separate_rows(monkeypatch):
    """Uncompiled and without gradient: on a CPU it has no backward."""
    from transformers.integrations import flex_attention as integration

    model = attach(built("qwen3", "flex_attention"))
    monkeypatch.setattr(integration, "WrappedFlexAttention", lambda training: lambda: flex_attention)
    found = shared_logp(model, PROMPTS, CHOSEN, REJECTED)
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(found, separate_logp(model, PROMPTS, CHOSEN, REJECTED), rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compiled FlexAttention trains on a GPU only")
def test_compiled_flex_attention_equals_separate_rows():
    model = built("llama", "sdpa", torch.float32)
    expected = separate_logp(model, PROMPTS, CHOSEN, REJECTED)
    gradients = families.gradients(model, expected)
    model.set_attn_implementation("flex_attention")
    attach(model.cuda())
    layout = shared_prefix_layout(PROMPTS, CHOSEN, REJECTED, pad_token_id=0)
    answer = model(
        input_ids=layout.input_ids.cuda(),
        position_ids=layout.position_ids.cuda(),
        segment_ids=layout.segment_ids.cuda(),
        vocab_request=VocabRequest(layout.target_index.cuda(), layout.targets.cuda(), groups=LOGP),
    )
    found = answer.statistics[0]["logp"]
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-3)
    for name, gradient in families.gradients(model, found.cpu()).items():
        assert (gradient.cpu() - gradients[name]).norm() <= 1e-2 * gradients[name].norm(), name


@pytest.mark.parametrize(
    ("prompt", "completion", "width", "expected"),
    [(410, 102, 512, True), (256, 256, 512, True), (102, 410, 512, False), (256, 256, 32, False), (0, 100, 512, False)],
)
def test_sharing_pays_for_long_prompts_and_wide_models(prompt, completion, width, expected):
    lengths = ([prompt] * 2, [completion] * 2, [completion] * 2)
    assert worthwhile(*lengths, width=width, implementation="sdpa") is expected
    assert worthwhile(*lengths, width=width, implementation="flex_attention") is (prompt > 0)


def test_a_prompt_with_one_completion_is_never_shared():
    for implementation in ("sdpa", "flex_attention"):
        assert not worthwhile([100], [10], width=512, implementation=implementation)
