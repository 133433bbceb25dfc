"""Mistral 7B v0.3, Mixtral 8x22B and their kind (tokenizer v3): a space behind `[INST]`, the system message before the
last question."""

from fireflyds.data.chat_template import JinjaChat

CHAT = JinjaChat(
    "{{ bos_token }}{% if tools %}{{ raise_exception('no tools') }}{% endif %}"
    "{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% for message in messages %}{% if message.role == 'user' %}"
    "{% set is_last = messages[loop.index:] | selectattr('role', 'equalto', 'user') | list | length == 0 %}"
    "{{ '[INST] ' + (system + '\\n\\n' if system and is_last else '') + message.content + '[/INST]' }}"
    "{% elif message.role == 'assistant' %}{{ ' ' }}{% generation %}{{ message.content + eos_token }}"
    "{% endgeneration %}{% endif %}{% endfor %}",
    special=("[INST]", "[/INST]"),
)
