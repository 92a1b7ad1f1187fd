"""chat_template of a recipe: auto, one of our own templates by its name, or the text of one."""

from __future__ import annotations

from dataclasses import dataclass, field

from della.errors import Collector, Location, clip, suggest
from della.recipe.tree import Leaf, Table, show

AUTO = "auto"
MOST_CHARACTERS = 100_000
_TURN = "message['role'] == "
TEMPLATES = {
    "chatml": (
        "{%- for message in messages %}\n"
        "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}\n"
        "{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n"
        "{{- '<|im_start|>assistant\\n' }}\n"
        "{%- endif %}\n"
    ),
    "llama3": (
        "{{- bos_token }}\n"
        "{%- for message in messages %}\n"
        "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}\n"
        "{{- message['content'] | trim + '<|eot_id|>' }}\n"
        "{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n"
        "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n"
        "{%- endif %}\n"
    ),
    "mistral": (
        "{{- bos_token }}\n"
        "{%- set ns = namespace(system='') %}\n"
        "{%- for message in messages %}\n"
        f"{{%- if {_TURN}'system' %}}\n"
        "{%- set ns.system = message['content'] + '\\n\\n' %}\n"
        f"{{%- elif {_TURN}'user' %}}\n"
        "{{- '[INST] ' + ns.system + message['content'] + ' [/INST]' }}\n"
        "{%- set ns.system = '' %}\n"
        "{%- else %}\n"
        "{{- ' ' + message['content'] | trim + eos_token }}\n"
        "{%- endif %}\n"
        "{%- endfor %}\n"
    ),
    "alpaca": (
        "{%- for message in messages %}\n"
        f"{{%- if {_TURN}'system' %}}\n"
        "{{- message['content'] + '\\n\\n' }}\n"
        f"{{%- elif {_TURN}'user' %}}\n"
        "{{- '### Instruction:\\n' + message['content'] + '\\n\\n' }}\n"
        "{%- else %}\n"
        "{{- '### Response:\\n' + message['content'] + eos_token + '\\n\\n' }}\n"
        "{%- endif %}\n"
        "{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n"
        "{{- '### Response:\\n' }}\n"
        "{%- endif %}\n"
    ),
    "exaone": (
        "{%- for message in messages %}\n"
        f"{{%- if loop.first and not {_TURN}'system' %}}\n"
        "{{- '[|system|][|endofturn|]\\n' }}\n"
        "{%- endif %}\n"
        "{{- '[|' + message['role'] + '|]' + message['content'] }}\n"
        f"{{%- if {_TURN}'user' %}}\n"
        "{{- '\\n' }}\n"
        "{%- else %}\n"
        "{{- '[|endofturn|]\\n' }}\n"
        "{%- endif %}\n"
        "{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n"
        "{{- '[|assistant|]' }}\n"
        "{%- endif %}\n"
    ),
}  # fmt: skip
"""Our own templates by name, in Jinja as transformers takes it."""


@dataclass(frozen=True)
class ChatTemplate:
    """``name`` is "auto", one of ours, or "" for a template that the recipe holds; ``text`` is the template,
    "" for auto."""

    name: str
    text: str
    location: Location = field(compare=False, repr=False)


def read_template(root: Table, problems: Collector) -> ChatTemplate | None:
    """The chat template that a recipe asks for; None where it does not."""
    key = "chat_template"
    node = root.entries[key].node if key in root.entries else None
    if node is None or (isinstance(node, Leaf) and node.value is None):
        return None
    at = node.location
    if not isinstance(node, Leaf) or not node.text.strip():
        found = show(node) if not isinstance(node, Leaf) else "empty text"
        problems.add(f"{key!r} must be text, found {found}", "write 'chat_template: auto'", location=at)
        return None
    text = node.text.strip()
    if text == AUTO or text in TEMPLATES:
        return ChatTemplate(text, TEMPLATES.get(text, ""), at)
    if "{{" in text or "{%" in text:
        if len(text) > MOST_CHARACTERS:
            said = f"{key!r} has {len(text):,} characters, and no template has more than {MOST_CHARACTERS:,}"
            problems.add(said, "is it the right file?", location=at, parameter=key)
        return ChatTemplate("", node.text, at)
    names = (AUTO, *TEMPLATES)
    said = f"unknown {key} {clip(text)!r}"
    fix = suggest(text, names) or f"write one of {', '.join(names)}, or a template with {{{{ ... }}}}"
    problems.add(said, fix, location=at, parameter=key)
    return None
