"""Whether the answer of a conversation thinks: as its chat template has it, unless the request or the server say more.

A template may have a variable that switches thinking (`ChatTemplate.switch`). A request may ask by `enable_thinking`,
by that variable itself, or by a `reasoning_effort` of "none". [serve] thinking speaks for requests that do not:
"always" and "never" turn the switch, and open or close the thinking where a prompt does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from isthmus.data.chat_template import END_THINK, SWITCHES, THINK, ChatTemplate
from isthmus.engines.local.api.protocol import ApiError, Conversation, Message
from isthmus.recipe.schema import Thinking

_RESERVED = {"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token"}


@dataclass(frozen=True)
class Asked:
    """What the template is given, and whether the server has to see to what it then does."""

    variables: dict[str, Any]
    forced: Thinking = "auto"

    def finish(self, prompt: str, template: ChatTemplate) -> str:
        """The prompt, with its thinking opened or closed where the server has to."""
        end = prompt.rstrip()
        decided = end.endswith((THINK, END_THINK))
        written_otherwise = template.switch is not None and not template.knows_thinking
        if self.forced == "auto" or written_otherwise:
            return prompt
        if self.forced == "always":
            return prompt if decided else f"{prompt}{THINK}\n"
        if end.endswith(THINK):
            return f"{end}\n\n{END_THINK}\n\n"
        return prompt if decided or not template.knows_thinking else f"{prompt}{THINK}\n\n{END_THINK}\n\n"


def read_wishes(template: ChatTemplate, ask: Conversation, served: Thinking) -> Asked:
    """Raises ApiError (400) for a variable that the template does not have, and a wish that it cannot meet."""
    variables, wishes = dict(ask.chat_template_kwargs), {}
    for name in SWITCHES:
        if isinstance(variables.get(name), bool):
            wishes[f"chat_template_kwargs.{name}"] = variables[name]
            if name not in template.variables:
                del variables[name]
    if ask.enable_thinking is not None:
        wishes["enable_thinking"] = ask.enable_thinking
    if ask.reasoning_effort is not None:
        if ask.reasoning_effort == "none" and "reasoning_effort" not in template.variables:
            wishes["reasoning_effort"] = False
        else:
            variables["reasoning_effort"] = ask.reasoning_effort
    _check_variables(template, variables)
    wish = _one_wish(template, wishes, served)
    forced: Thinking = "auto"
    if wish is None and served != "auto":
        wish, forced = served == "always", served
    if wish is not None and template.switch is not None:
        variables.setdefault(template.switch, wish)
    return Asked(variables, forced)


def check_history(template: ChatTemplate, messages: list[Message]) -> None:
    """Refuse thinking of earlier turns that the template neither prints nor cuts: it would be lost unseen."""
    if template.reads_reasoning or template.cuts_thinking:
        return
    if any(message.thought for message in messages):
        raise ApiError(
            "the chat template of this model has no place for the reasoning_content of earlier turns; leave it out",
            param="messages",
        )


def _check_variables(template: ChatTemplate, variables: dict[str, Any]) -> None:
    unused = sorted(variables.keys() - (template.variables - _RESERVED))
    if not unused:
        return
    field = "reasoning_effort" if unused == ["reasoning_effort"] else "chat_template_kwargs"
    hint = f'; it has {template.switch}, which reasoning_effort = "none" turns off' if template.switch else ""
    raise ApiError(
        f"{field}: the chat template of this model does not use {', '.join(unused)}"
        f"{hint if field == 'reasoning_effort' else ''}",
        param=field,
    )


def _one_wish(template: ChatTemplate, wishes: dict[str, bool], served: Thinking) -> bool | None:
    """What a request asks for, if it does. It can have what the template does anyway, or has a switch for."""
    if not wishes:
        return None
    names = ", ".join(wishes)
    if len(set(wishes.values())) > 1:
        raise ApiError(f"{names} contradict each other", param=next(iter(wishes)).partition(".")[0])
    name, wish = next(iter(wishes.items()))
    thinks = template.knows_thinking if served == "auto" else served == "always"
    if template.switch is None and wish != thinks:
        cannot = "switch thinking off" if thinks else "switch thinking on"
        raise ApiError(
            f"{name}: the chat template of this model has no variable to {cannot}", param=name.partition(".")[0]
        )
    return wish
