"""Chat templates in the style of ChatML and Llama 3, for the tokenizer of tiny models."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

from helpers.tiny import tiny_tokenizer

SPECIAL_TOKENS = ["<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|eot|>"]
DEFAULT_SYSTEM = "You are a helpful assistant."
# Both write a default system message where there is none; the second strips contents, and uses macros and namespaces.
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    f"{{{{ '<|im_start|>system\n{DEFAULT_SYSTEM}<|im_end|>\n' }}}}{{% endif %}}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = """{{- bos_token }}
{%- macro header(role) %}{{ '<|start|>' + role + '<|end|>\\n\\n' }}{% endmacro %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "Today is Friday." %}
{%- endif %}
{{- header('system') + system + '<|eot|>' }}
{%- set ns = namespace(count=0) %}
{%- for message in messages %}
    {%- set ns.count = ns.count + 1 %}
    {{- header(message['role']) + message['content']|trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- header('assistant') }}
{%- endif %}
"""


def tokenizer_with(template: str | None) -> PreTrainedTokenizerFast:
    """The tokenizer with a chat template, or without one."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL_TOKENS})
    tokenizer.chat_template = template
    return tokenizer
