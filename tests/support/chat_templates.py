"""Chat templates of published models, reduced to what concerns calls, and tokenizers that know their marks."""

from __future__ import annotations

from tokenizers import AddedToken
from tokenizers import Tokenizer as BpeTokenizer

from isthmus.data.tokenizer import Tokenizer
from isthmus.engines.local.api.tools import DeepseekFormat, HermesFormat, LlamaFormat
from tests.support.engine_bundle import TEXTS

# DeepSeek-R1's, with the list of tools that serving projects add to it. Arguments are appended as text.
DEEPSEEK = (
    "{{ bos_token }}{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}"
    "{%- for message in messages %}{% if message['role'] == 'user' %}<｜User｜>{{ message['content'] }}"
    "{% elif message['role'] == 'tool' %}<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>{{ message['content'] }}"
    "<｜tool▁output▁end｜><｜tool▁outputs▁end｜>"
    "{% elif message['role'] == 'assistant' %}<｜Assistant｜>{{ message['content'] }}"
    "{% if message['tool_calls'] %}<｜tool▁calls▁begin｜>{% for tool in message['tool_calls'] %}"
    "{{ '<｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + tool['function']['name'] + '\\n```json\\n'"
    " + tool['function']['arguments'] + '\\n```<｜tool▁call▁end｜>' }}{% endfor %}<｜tool▁calls▁end｜>{% endif %}"
    "{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
)
# Qwen2.5's: arguments are objects. `enable_thinking` is Qwen3's.
HERMES = (
    "{%- if tools %}# Tools\n<tools>{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}\n</tools>\n"
    '{{ "<tool_call>\\n{\\"name\\": <function-name>, \\"arguments\\": <args-json-object>}\\n</tool_call>" }}{% endif %}'
    "{%- for message in messages %}<|im_start|>{{ message.role }}\n"
    "{%- if message.role == 'tool' %}<tool_response>\n{{ message.content }}\n</tool_response>"
    "{%- else %}{{ message.content }}{% endif %}"
    "{%- for tool_call in message.tool_calls or [] %}\n<tool_call>\n"
    '{{ \'{"name": "\' }}{{ tool_call.function.name }}{{ \'", "arguments": \' }}'
    "{{ tool_call.function.arguments | tojson }}"
    "{{ '}\\n</tool_call>' }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
LLAMA = (
    "{%- if not tools is defined %}{% set tools = none %}{% endif %}{{ bos_token }}"
    "{%- if tools is not none %}"
    '{{ \'Respond in the format {"name": function name, "parameters": dictionary of arguments}.\' }}'
    "{% for t in tools %}{{ t | tojson(indent=4) }}\n{% endfor %}{% endif %}"
    "{%- for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
    "{% if message.tool_calls %}{% set tool_call = message.tool_calls[0].function %}"
    '{{ \'{"name": "\' + tool_call.name + \'", \' }}{{ \'"parameters": \' }}{{ tool_call.arguments | tojson }}{{ "}" }}'
    "{% else %}{{ message.content | trim }}{% endif %}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
FORMATS = {
    "deepseek": (DEEPSEEK, DeepseekFormat.marks),
    "deepseek v3.1": (DEEPSEEK.replace("\\n```json\\n", "").replace("\\n```", ""), DeepseekFormat.marks),
    "hermes": (HERMES, HermesFormat.marks),
    "llama": (LLAMA, LlamaFormat.marks),
}


def tokenizer_for(name: str, *, special: bool = True, single: bool = True) -> Tokenizer:
    """A small tokenizer with a format's template. Its marks are tokens of their own if `single`."""
    template, marks = FORMATS[name]
    bpe = BpeTokenizer.from_str(Tokenizer.train(TEXTS, 300).serialise())
    if single:
        bpe.add_special_tokens([AddedToken(mark, special=special, normalized=False) for mark in marks])
    return Tokenizer(bpe, template)
