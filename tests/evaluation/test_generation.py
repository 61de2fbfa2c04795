import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from posttrain.evaluation.generation import InverseTransformSampling, Sampling, complete, generate
from posttrain.evaluation.rows import prompt_ids
from tests import tiny

PROMPTS = ["abc=", "a", "12+34=", "xyzxyzxyz", "0?", "a"]


def greedy_truth(model, tokenizer, prompt, max_new_tokens):
    """Argmax by argmax, one sequence, no cache, no padding."""
    ids = [tokenizer.convert_tokens_to_ids(character) for character in prompt]
    new = []
    with torch.no_grad():
        while len(new) < max_new_tokens:
            token = int(model(torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                break
            new.append(token)
    special = set(tokenizer.all_special_tokens)
    return "".join(token for token in tokenizer.convert_ids_to_tokens(new) if token not in special)


def joined(texts):
    # The word-level tokenizer's decoder puts spaces between tokens.
    return [["".join(text.split()) for text in row] for row in texts]


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_greedy_batches_agree_with_one_prompt_at_a_time(exact_model, tokenizer, batch_size):
    found = generate(exact_model, tokenizer, PROMPTS, temperature=0.0, max_new_tokens=12, batch_size=batch_size)
    assert joined(found) == [[greedy_truth(exact_model, tokenizer, prompt, 12)] for prompt in PROMPTS]


def test_absolute_positions_survive_left_padding(tokenizer):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1,
        initializer_range=0.5,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).double().eval()
    found = generate(model, tokenizer, PROMPTS, temperature=0.0, max_new_tokens=10)
    assert joined(found) == [[greedy_truth(model, tokenizer, prompt, 10)] for prompt in PROMPTS]


def test_samples_depend_on_the_seed_alone(exact_model, tokenizer):
    def draw(prompts=PROMPTS, samples=3, **options):
        return generate(exact_model, tokenizer, prompts, samples=samples, max_new_tokens=10, **options)

    first = draw(seed=5)
    assert [len(row) for row in first] == [3] * len(PROMPTS)
    assert draw(seed=5, batch_size=2) == first == draw(seed=5, batch_size=1)
    assert [row[:2] for row in first] == draw(seed=5, samples=2)
    assert draw(PROMPTS[:2], seed=5) == first[:2]
    assert draw(seed=6) != first
    assert first[1] != first[5]  # the same prompt twice draws twice
    assert len({text for row in first for text in row}) > len(PROMPTS)


def test_nothing_is_left_changed(tokenizer):
    model = tiny.model(attention_dropout=0.5)
    model.train()
    tokenizer.padding_side = "right"
    settings, state = model.generation_config, torch.get_rng_state()
    numpy_state = np.random.get_state()[1].copy()
    first = generate(model, tokenizer, PROMPTS, samples=2, max_new_tokens=6)
    assert generate(model, tokenizer, PROMPTS, samples=2, max_new_tokens=6) == first  # so dropout was off
    assert all(module.training for module in model.modules())
    assert model.generation_config is settings and torch.is_grad_enabled()
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("right", "<pad>")
    assert torch.equal(torch.get_rng_state(), state) and (np.random.get_state()[1] == numpy_state).all()


def test_no_padding_token_is_needed(exact_model, tokenizer):
    expected = generate(exact_model, tokenizer, PROMPTS, temperature=0.0, max_new_tokens=8)
    tokenizer.pad_token = None
    assert generate(exact_model, tokenizer, PROMPTS, temperature=0.0, max_new_tokens=8) == expected
    assert tokenizer.pad_token is None


def test_the_models_own_sampling_settings_play_no_part(tokenizer):
    model = tiny.model()
    expected = generate(model, tokenizer, PROMPTS, samples=2, max_new_tokens=8)
    model.generation_config.update(repetition_penalty=5.0, top_k=1, temperature=0.1, do_sample=True, min_new_tokens=8)
    assert generate(model, tokenizer, PROMPTS, samples=2, max_new_tokens=8) == expected


def test_a_model_may_name_further_stops(tokenizer):
    model = tiny.model()
    first = "".join(generate(model, tokenizer, ["abc"], temperature=0.0, max_new_tokens=6)[0][0].split())[0]
    model.generation_config.eos_token_id = [1, tokenizer.convert_tokens_to_ids(first)]
    forwards = []
    model.register_forward_hook(lambda *_: forwards.append(1))
    found = complete(model, tokenizer, [prompt_ids(tokenizer, "abc")], Sampling(temperature=0.0, max_new_tokens=6))
    assert (found.texts, found.unfinished, len(forwards)) == ([[""]], 0, 1)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.6)])
def test_samples_follow_the_models_distribution(tokenizer, temperature, top_p):
    model = tiny.model()
    with torch.no_grad():
        logits = model(torch.tensor([prompt_ids(tokenizer, "ab=")])).logits[0, -1].double()
    truth = torch.softmax(logits / temperature, dim=-1)
    if top_p < 1:
        order = truth.argsort(descending=True)
        keep = order[: int((truth[order].cumsum(0) < top_p).sum()) + 1]
        truth = torch.zeros_like(truth).index_copy(0, keep, truth[keep] / truth[keep].sum())
    count = 2000
    options = {"samples": count, "temperature": temperature, "top_p": top_p, "max_new_tokens": 1, "batch_size": 1000}
    texts = generate(model, tokenizer, ["ab="], **options)[0]
    for text in sorted(set(texts) - {""}):  # special tokens decode to nothing
        p = float(truth[tokenizer.convert_tokens_to_ids(text)])
        assert p > 0 and abs(texts.count(text) / count - p) < 5 * (p * (1 - p) / count) ** 0.5


def test_extreme_uniform_numbers_choose_possible_tokens():
    scores = torch.tensor([[-torch.inf, 0.0, 3.0, -torch.inf]] * 2)
    uniforms = torch.tensor([[0.0], [1 - 2**-53]], dtype=torch.float64)
    chosen = InverseTransformSampling(uniforms, 1)(torch.zeros(2, 1, dtype=torch.int64), scores)
    assert chosen.argmax(dim=-1).tolist() == [1, 2]


def test_long_prompts_keep_their_end_and_are_counted(tokenizer):
    model = tiny.model(dtype=torch.float64, max_position_embeddings=16)
    sampling = Sampling(temperature=0.0, max_new_tokens=6)
    ids = [prompt_ids(tokenizer, prompt) for prompt in ("0123456789abcdef", "ab")]
    found = complete(model, tokenizer, ids, sampling)
    assert found.truncated_prompts == 1
    assert joined(found.texts)[0] == [greedy_truth(model, tokenizer, "6789abcdef", 6)]
    with pytest.raises(ValueError, match=r"max_new_tokens=16 leaves no room .* 16 positions"):
        generate(model, tokenizer, ["a"], max_new_tokens=16)


# peft reads the deprecated name itself.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_models_generate_with_their_adapter(tokenizer):
    model = tiny.model()
    plain = generate(model, tokenizer, PROMPTS, temperature=0.0, max_new_tokens=6)
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    settings = adapted.get_base_model().generation_config
    found = generate(adapted, tokenizer, PROMPTS, temperature=0.0, max_new_tokens=6)
    assert joined(found) == [[greedy_truth(adapted.eval(), tokenizer, prompt, 6)] for prompt in PROMPTS]
    assert found != plain and adapted.get_base_model().generation_config is settings
    with adapted.disable_adapter():
        assert generate(adapted, tokenizer, PROMPTS, temperature=0.0, max_new_tokens=6) == plain


def test_chat_prompts_and_progress(model, chat_tokenizer):
    messages = [{"role": "user", "content": "ab"}]
    steps = []
    options = {"samples": 3, "max_new_tokens": 5, "batch_size": 4}
    found = generate(model, chat_tokenizer, [messages, "u:ab<eos>a:"], progress=steps.append, **options)
    assert sum(steps) == 6 and len(found) == 2
    greedy = generate(model, chat_tokenizer, [messages, "u:ab<eos>a:"], samples=2, temperature=0.0, max_new_tokens=5)
    assert greedy[0] == greedy[1] and greedy[0][0] == greedy[0][1]


def test_no_prompts_give_no_completions(model, tokenizer):
    assert generate(model, tokenizer, [], max_new_tokens=8) == []


@pytest.mark.parametrize(
    ("setting", "value"),
    [("samples", 0), ("temperature", -1.0), ("top_p", 0.0), ("top_p", 1.5), ("max_new_tokens", 0), ("batch_size", 0)],
)
def test_settings_out_of_range_are_named(model, tokenizer, setting, value):
    with pytest.raises(ValueError, match=f"{setting} must .*{value}"):
        generate(model, tokenizer, ["a"], **{setting: value})
