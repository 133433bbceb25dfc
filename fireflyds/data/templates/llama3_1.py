"""Llama 3.1 and later as Meta defines it: a system message with the date, and tools in the first question."""

from fireflyds.data.chat_template import JinjaChat

_HEADER = "{{ '<|start_header_id|>%s<|end_header_id|>\\n\\n' }}"
_TOOLS = (
    "{% if tools %}{{ 'Given the following functions, please respond with a JSON for a function call with its proper "
    'arguments that best answers the given prompt.\\n\\nRespond in the format {"name": function name, "parameters": '
    "dictionary of argument name and its value}.Do not use variables.\\n\\n' }}"
    "{% for tool in tools %}{{ tool | tojson(indent=4) + '\\n\\n' }}{% endfor %}{% endif %}"
)
_CALL = (
    "{% if message.tool_calls | length > 1 %}{{ raise_exception('one tool call in a turn at most') }}{% endif %}"
    "{% set call = message.tool_calls[0].function %}"
    "{{ '{\"name\": \"' + call.name + '\", \"parameters\": ' + call.arguments | tojson + '}' }}"
)

CHAT = JinjaChat(
    "{{ bos_token }}{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% set turns = messages[1:] if messages[0].role == 'system' else messages %}"
    + _HEADER
    % "system"
    + "{{ ('Environment: ipython\\n' if tools else '') + 'Cutting Knowledge Date: December 2023\\nToday Date: ' + "
    "(date_string or '26 Jul 2024') + '\\n\\n' + system | trim + '<|eot_id|>' }}"
    "{% for message in turns %}{% if message.role == 'user' %}"
    + _HEADER % "user"
    + "{% if loop.first %}"
    + _TOOLS
    + "{% endif %}{{ message.content | trim + '<|eot_id|>' }}{% elif message.role == 'tool' %}"
    + _HEADER % "ipython"
    + "{{ message.content | tojson + '<|eot_id|>' }}{% else %}"
    + _HEADER % "assistant"
    + "{% generation %}"
    "{% if message.tool_calls %}" + _CALL + "{% else %}{{ message.content | trim }}{% endif %}{{ '<|eot_id|>' }}"
    "{% endgeneration %}{% endif %}{% endfor %}{% if add_generation_prompt %}" + _HEADER % "assistant" + "{% endif %}",
    special=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    stop="<|eot_id|>",
)
