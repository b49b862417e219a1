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
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
    "{% else %}<think>\n{% endif %}{% endif %}"
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


# Short templates of the constructs that published ones are made of, by the model whose kind they are.
QWEN3 = (
    "{%- if tools %}{{ '<|im_start|>system\\n' }}{%- if messages[0].role == 'system' %}{{- messages[0].content "
    "+ '\\n' }}"
    "{%- endif %}{%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}{{- '<|im_end|>\\n' }}"
    "{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}"
    "{%- endif %}{%- set ns = namespace(searching=true, last=messages|length - 1) %}"
    "{%- for message in messages[::-1] %}{%- set index = (messages|length - 1) - loop.index0 %}"
    "{%- if ns.searching and message.role == 'user' and message.content is string %}"
    "{%- set ns.searching = false %}{%- set ns.last = index %}{%- endif %}{%- endfor %}"
    "{%- for message in messages %}"
    "{%- set content = message.content if message.content is string else '' %}"
    "{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}"
    "{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}"
    "{%- elif message.role == 'assistant' %}{%- set thought = '' %}"
    "{%- if message.reasoning_content is string %}{%- set thought = message.reasoning_content %}"
    "{%- elif '</think>' in content %}"
    "{%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
    "{{- '<|im_start|>' + message.role + '\\n' }}{%- if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}{%- endif %}{{- content.lstrip('\\n') }}"
    '{%- for call in message.tool_calls or [] %}{{- \'\\n<tool_call>\\n{"name": "\' ~ call.function.name }}'
    '{{- \'", "arguments": \' }}{%- if call.function.arguments is string %}{{- call.function.arguments }}'
    "{%- else %}{{- call.function.arguments | tojson }}{%- endif %}{{- '}\\n</tool_call>' }}{%- endfor %}"
    "{{- '<|im_end|>\\n' }}{%- elif message.role == 'tool' %}"
    "{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}"
    "{{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}"
    "{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)
GEMMA = (
    "{{ bos_token }}\n{%- if messages[0]['role'] == 'system' -%}{%- set prefix = messages[0]['content'] + '\\n\\n' -%}"
    "{%- set turns = messages[1:] -%}{%- else -%}{%- set prefix = '' -%}{%- set turns = messages -%}{%- endif -%}\n"
    "{%- for message in turns -%}{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('Conversation roles must alternate') }}{%- endif -%}"
    "{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}"
    "{{ '<start_of_turn>' + role + '\\n' + (prefix if loop.first else '') }}{{ message['content'] | trim }}"
    "{{ '<end_of_turn>\\n' }}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- "
    "endif -%}\n"
)
MISTRAL = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] %}"
    "{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}"
    "{%- if not tools is defined %}{%- set tools = none %}{%- endif %}"
    "{%- set users = loop_messages | selectattr('role', 'equalto', 'user') | list %}{{- bos_token }}"
    "{%- for message in loop_messages %}{%- if message['role'] == 'user' %}"
    "{%- if tools is not none and (message == users[-1]) %}{{- '[AVAILABLE_TOOLS] [' }}{%- for tool in tools %}"
    '{%- set tool = tool.function %}{{- \'{"type": "function", "function": {\' }}'
    "{%- for key, val in tool.items() if key != 'return' %}"
    "{%- if val is string %}{{- '\"' + key + '\": \"' + val + '\"' }}{%- else %}{{- '\"' + key + '\": ' + val|tojson }}"
    "{%- endif %}{%- if not loop.last %}{{- ', ' }}{%- endif %}{%- endfor %}{{- '}}' }}"
    "{%- if not loop.last %}{{- ', ' }}{%- else %}{{- ']' }}{%- endif %}{%- endfor %}{{- '[/AVAILABLE_TOOLS]' }}"
    "{%- endif %}{%- if loop.last and system_message is defined %}"
    "{{- '[INST] ' + system_message + '\\n\\n' + message['content'] + '[/INST]' }}"
    "{%- else %}{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}"
    "{%- elif message.tool_calls is defined and message.tool_calls is not none %}{{- '[TOOL_CALLS] [' }}"
    "{%- for tool_call in message.tool_calls %}{%- set out = tool_call.function|tojson %}{{- out[:-1] }}"
    "{{- ', \"id\": \"' + tool_call.id + '\"}' }}{%- if not loop.last %}{{- ', ' }}{%- endif %}{%- endfor %}"
    "{{- ']' + eos_token }}{%- elif message['role'] == 'assistant' %}{{- ' ' + message['content'] + eos_token }}"
    "{%- elif message['role'] in ['tool', 'tool_results'] %}"
    "{{- '[TOOL_RESULTS] {\"content\": ' + message.content|string + '}[/TOOL_RESULTS]' }}"
    "{%- else %}{{- raise_exception('unknown role') }}{%- endif %}{%- endfor %}"
)
GLM = (
    "[gMASK]<sop>\n{%- macro visible_text(content) -%}{%- if content is string -%}{{- content }}"
    "{%- elif content is iterable and content is not mapping -%}{%- for item in content -%}{{- item.text }}"
    "{%- endfor -%}{%- else -%}{{- content }}{%- endif -%}{%- endmacro -%}"
    "{%- for m in messages %}{%- if m.role == 'user' -%}<|user|>\n{{ visible_text(m.content) }}"
    "{{- '/nothink' if (enable_thinking is defined and not enable_thinking) else '' -}}"
    "{%- elif m.role == 'assistant' -%}<|assistant|>"
    "{%- set thought = '' %}{%- if m.reasoning_content is string %}{%- set thought = m.reasoning_content %}{%- endif %}"
    "{%- if thought -%}{{ '\\n<think>' + thought.strip() + '</think>' }}{%- else -%}{{ '\\n<think></think>' "
    "}}{%- endif -%}"
    "{%- if m.content is string and m.content.strip() -%}{{ '\\n' + visible_text(m.content).strip() }}{%- endif -%}"
    "{%- for tc in m.tool_calls or [] %}{{ '\\n<tool_call>' + tc.function.name }}\n"
    "{% for k, v in tc.function.arguments.items() %}<arg_key>{{ k }}</arg_key>\n<arg_value>"
    "{{ v | tojson(ensure_ascii=False) if v is not string else v }}</arg_value>\n{% endfor %}</tool_call>{% endfor %}"
    "{%- elif m.role == 'tool' -%}<|observation|>\n{{ m.content }}"
    "{%- elif m.role == 'system' -%}<|system|>\n{{ visible_text(m.content) }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>"
    "{{- '\\n<think></think>' if (enable_thinking is defined and not enable_thinking) else '' -}}{%- endif -%}"
)
SMOLLM3 = (
    "{# ── defaults ── #}\n{%- if enable_thinking is not defined -%}\n{%- set enable_thinking = true -%}\n{%- "
    "endif -%}\n"
    "{%- set mode = '/think' if enable_thinking else '/no_think' -%}\n"
    "{%- if messages[0].role == 'system' -%}\n  {%- if '/no_think' in messages[0].content -%}\n"
    "    {%- set mode = '/no_think' -%}\n  {%- endif -%}\n"
    "{{- '<|im_start|>system\\n' ~ messages[0].content.replace('/no_think', '') | trim ~ mode ~ '<|im_end|>\\n' -}}\n"
    "{%- endif -%}\n{%- for message in messages -%}\n"
    "    {%- set content = message.content if message.content is string else '' -%}\n"
    "    {%- if message.role == 'user' -%}\n        {{ '<|im_start|>user\\n' + content + '<|im_end|>\\n' }}\n"
    "    {%- elif message.role == 'assistant' -%}\n        {% generation %}\n"
    "        {{ '<|im_start|>assistant\\n' + content.lstrip('\\n') + '<|im_end|>\\n' }}\n        {% endgeneration %}\n"
    "    {%- endif -%}\n{%- endfor -%}\n{%- if add_generation_prompt -%}\n"
    "    {{ '<|im_start|>assistant\\n' }}{{ '<think>\\n\\n</think>\\n' if mode == '/no_think' }}\n{%- endif -%}\n"
)
DEEPSEEK_V31 = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{% if not thinking is defined %}{% set thinking = false %}{% endif %}"
    "{% set ns = namespace(system='', is_last_user=false) %}"
    "{%- for message in messages %}{%- if message['role'] == 'system' %}"
    "{% set ns.system = ns.system + ('\\n\\n' if ns.system else '') + message['content'] %}{%- endif %}{%- endfor %}"
    "{{ bos_token }}{{ ns.system }}{%- for message in messages %}{%- if message['role'] == 'user' %}"
    "{%- set ns.is_last_user = true -%}{{'<｜User｜>' + message['content']}}{%- endif %}"
    "{%- if message['role'] == 'assistant' and message['tool_calls'] is not defined %}"
    "{%- if ns.is_last_user %}{{'<｜Assistant｜></think>'}}{%- endif %}{%- set ns.is_last_user = false -%}"
    "{%- set content = message['content'] -%}{%- if '</think>' in content %}"
    "{%- set content = content.split('</think>', 1)[1] -%}{%- endif %}{{content + eos_token}}{%- endif %}{%- endfor -%}"
    "{% if add_generation_prompt and ns.is_last_user %}{{'<｜Assistant｜>'}}"
    "{%- if not thinking %}{{'</think>'}}{%- else %}{{'<think>'}}{%- endif %}{% endif %}"
)
HARMONY = (
    "{%- macro typed(spec, required=false) -%}{%- if spec.type == 'array' -%}{{ typed(spec['items']) + '[]' }}"
    "{%- elif spec.type == 'object' -%}{{ '{' }}{%- for name, inner in spec.get('properties', {}).items() -%}"
    "{{ name }}{%- if name not in (spec.required or []) -%}?{%- endif -%}{{ ': ' + typed(inner) }}"
    "{%- if not loop.last -%}{{ ', ' }}{%- endif -%}{%- endfor -%}{{ '}' }}"
    "{%- else -%}{{ spec.type or 'any' }}{%- endif -%}{%- endmacro -%}"
    "{%- if reasoning_effort is not defined %}{%- set reasoning_effort = 'medium' %}{%- endif %}"
    "{{- '<|start|>system<|message|>Date: ' + strftime_now('%Y-%m') + '\\nReasoning: ' + reasoning_effort + "
    "'<|end|>' }}"
    "{%- for tool in tools or [] %}{{- 'type ' + tool.function.name + ' = (_: ' }}"
    "{{- typed(tool.function.parameters or {}) + ') => any;\\n' }}{%- endfor %}"
    "{%- for message in messages %}{%- if message.role == 'assistant' %}"
    "{%- if 'thinking' in message and message.thinking %}"
    "{{- '<|start|>assistant<|channel|>analysis<|message|>' + message.thinking + '<|end|>' }}{%- endif %}"
    "{%- if 'tool_calls' in message %}{%- set call = message.tool_calls[0].function %}"
    "{{- '<|start|>assistant to=functions.' + call.name + '<|message|>' + (call.arguments | tojson) + '<|call|>' }}"
    "{%- else %}{{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|end|>' }}{%- endif %}"
    "{%- else %}{{- '<|start|>' + message.role + '<|message|>' + message.content + '<|end|>' }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}<|start|>assistant{%- endif %}"
)
GRANITE = (
    "{%- if tools and documents %}{%- set about = 'tools and documents' %}{%- elif thinking %}{%- set about = "
    "'thought' %}"
    "{%- else %}{%- set about = 'nothing' %}{%- endif %}{{- '<|role|>system Today: ' + strftime_now('%B %Y') + about }}"
    "{%- for document in documents or [] %}{{- document['text'] }}{%- endfor %}"
    "{%- for message in messages %}{{- '<|role|>' + message['role'] + '<|end|>' + (message['content'] or '') + '\\n' }}"
    "{%- if loop.last and add_generation_prompt %}{{- '<|role|>assistant' }}"
    "{%- if controls %}{{- ' ' + controls | tojson() }}{%- endif %}{{- '<|end|>' }}{%- endif %}{%- endfor %}"
)
KIMI = (
    "{%- if not tools is none %}<|im_system|>tool_declare<|im_middle|>{{ tools | tojson(separators=(',', ':')) }}"
    "<|im_end|>{%- endif %}{%- for message in messages -%}{%- if loop.first and messages[0]['role'] != 'system' -%}"
    "<|im_system|>system<|im_middle|>You are a helpful assistant<|im_end|>{%- endif -%}"
    "{%- set name = message.name if message.name is defined else message.role -%}"
    "{%- if message.role == 'user' -%}<|im_user|>{{ name }}<|im_middle|>"
    "{%- elif message.role == 'assistant' -%}<|im_assistant|>{{ name }}<|im_middle|>"
    "{%- else -%}<|im_system|>{{ name }}<|im_middle|>{%- endif -%}"
    "{%- if message.role == 'assistant' and message.get('reasoning_content') -%}"
    "<think>{{ message['reasoning_content'] }}</think>{%- endif -%}"
    "{%- if message.role == 'tool' -%}## Return of {{ message.tool_call_id }}\n{{ message.content }}"
    "{%- elif message.content is string -%}{{ message.content }}"
    "{%- elif message.content is not none and message.content is defined -%}"
    "{%- for part in message.content -%}{{ part['text'] }}{%- endfor -%}{%- endif -%}"
    "{%- if message.get('tool_calls') -%}<|tool_calls_section_begin|>{%- for call in message.tool_calls -%}"
    "<|tool_call_begin|>{{ call['id'] }}<|tool_call_argument_begin|>"
    "{% if call['function']['arguments'] is string %}{{ call['function']['arguments'] }}"
    "{% else %}{{ call['function']['arguments'] | tojson }}{% endif %}<|tool_call_end|>{%- endfor -%}"
    "<|tool_calls_section_end|>{%- endif -%}<|im_end|>{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}\n"
)
NAMED_TOKENS = (
    "{%- if pad_token is defined %}{{ pad_token }}{% endif %}{{ unk_token if unk_token is defined else '?' }}"
    "{{ 'no mask' if mask_token is not defined }}{{ 'null tools' if tools is none else tools | length }}"
    "{{ 'null documents' if documents is defined and documents is none }}{{ messages | length }}"
    "{% for a, b in {'z': 1, 'a': 'ä'} | dictsort %}{{ a }}{{ b }}{% endfor %}{{ dict(a=1) | tojson }}"
    "{{ {'z': '<é>', 'a': [1, none, true]} | tojson }}{{ {'b': 1, 'a': 2} | tojson(indent=2, sort_keys=true) }}"
)
PUBLISHED = {
    "deepseek r1": DEEPSEEK,
    "deepseek v3.1": DEEPSEEK_V31,
    "gemma": GEMMA,
    "glm 4.5": GLM,
    "gpt-oss": HARMONY,
    "granite": GRANITE,
    "hermes": HERMES,
    "kimi k2": KIMI,
    "llama 3": LLAMA,
    "mistral": MISTRAL,
    "named tokens": NAMED_TOKENS,
    "qwen3": QWEN3,
    "smollm3": SMOLLM3,
}
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": {"city": "Å", "days": 2}}}
TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks <there>",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "array", "items": {"type": "integer"}}},
            "required": ["city"],
        },
    },
}
CONVERSATIONS = {
    "one turn": [{"role": "user", "content": "  Weather? <think> "}],
    "system": [{"role": "system", "content": "Be brief. /no_think"}, {"role": "user", "content": "Why?"}],
    "thought in the text": [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "<think>\nbecause\n</think>\n\na"},
        {"role": "user", "content": "next"},
    ],
    "thought beside it": [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a", "reasoning_content": "because"},
        {"role": "user", "content": "next"},
    ],
    "a call": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "reasoning_content": "look it up", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "Rain"},
    ],
    "two of the user": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
}
