import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tests import tiny


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny.model().eval()


@pytest.fixture(scope="module")
def exact_model() -> LlamaForCausalLM:
    """float64, so that batched and single computations differ by rounding of no consequence."""
    return tiny.model(dtype=torch.float64).eval()


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny.tokenizer()


@pytest.fixture
def chat_tokenizer() -> PreTrainedTokenizerFast:
    """Every turn is its role's first letter, a colon, the content and eos; the assistant's part is marked."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'][0] + ':' }}{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] + '<eos>' }}{% endgeneration %}{% else %}"
        "{{ message['content'] + '<eos>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
    )
    return tokenizer
