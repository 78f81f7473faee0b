"""What the readers of a model folder's vocabulary share: everything but encoding plain text."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Literal, overload

from ..arguments import flag, is_int, items, plain
from ..errors import CapacityError, RequestError, TokenizerError, shown
from .chat_template import ChatTemplate, RenderedChat, find_templates
from .settings import Settings
from .vocabulary import AddedToken, AddedTokenFinder, Vocabulary

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

BRACKETED = re.compile(r"[<\[{(|].*\w.*[>\]})|]", re.DOTALL)  # such as <|im_end|> or [INST]


class FolderTokenizer(ABC):
    """A tokenizer of a model folder. A reader gives its table and encodes plain text."""

    def __init__(
        self,
        settings: Settings,
        table: Mapping[int, bytes],
        own: Mapping[int, AddedToken],  # added tokens in the vocabulary's own file
        *,
        pieces: Mapping[str, int] | None = None,  # the other tokens by name
        strip_space: bool = False,
        keeps_all_text: bool,  # every byte that is no white space is in some token
        built_in_template: str | None = None,
    ) -> None:
        added = settings.added_tokens(own, pieces or {})
        self._vocabulary = vocabulary = Vocabulary(table, added, strip_space=strip_space)
        self._settings = settings
        self._finder = AddedTokenFinder(added)
        self._longest = vocabulary.longest if keeps_all_text else None
        self.vocab_size = vocabulary.size
        self.special_ids = vocabulary.special_ids
        self.bos_token_id = settings.bos(vocabulary)
        self.eos_token_ids = settings.eos(vocabulary)
        self._prefix: list[int] = []  # ids that the model expects around every text
        self._suffix: list[int] = []
        templates = find_templates(settings.folder, settings.config)
        if not templates and built_in_template:
            templates = {"default": built_in_template}
        self._chat = self._chat_template(templates) if templates else None
        self._control = {
            token.content
            for token in added.values()
            if token.special or _is_structure(token.content, templates.values())
        }

    @property
    def chat_templates(self) -> Mapping[str, str]:
        """The folder's chat templates by name."""
        return {} if self._chat is None else self._chat.sources

    def encode(
        self, text: str, *, add_special_tokens: bool = True, max_length: int | None = None
    ) -> list[int]:
        """Ids of text that may come from anybody: control tokens in it are plain text."""
        surround = flag(add_special_tokens, "add_special_tokens")
        self._check(text, max_length)
        ids = self._ids(text, lambda token, *_: token.content not in self._control)
        return [*self._prefix, *ids, *self._suffix] if surround else ids

    def encode_with_special(
        self, text: str, *, add_special_tokens: bool = False, max_length: int | None = None
    ) -> list[int]:
        """Ids of a prompt with its control tokens; what should be around it is added only once."""
        surround = flag(add_special_tokens, "add_special_tokens")
        self._check(text, max_length)
        ids = self._ids(text, lambda *_: True)
        if not surround:
            return ids
        before, after = self._prefix, self._suffix
        before = [] if ids[: len(before)] == before else before
        return [*before, *ids, *([] if after and ids[-len(after) :] == after else after)]

    def fewest_tokens(self, text: str) -> int:
        """No encoding of the text has fewer tokens. Costs far less than to encode."""
        if self._longest is None:
            return 0
        # Added tokens may take white space around them, as much as there is.
        solid = "".join(text.split())
        return -(-len(solid.encode()) // self._longest)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ids. Ids outside the vocabulary have none."""
        skip = flag(skip_special_tokens, "skip_special_tokens")
        ids = items(ids, "ids")
        if any(type(i) is not int for i in ids):  # seldom; every token of a stream comes here
            ids = tuple(plain(i) for i in ids)
            if not all(map(is_int, ids)):
                raise RequestError(f"ids must be token ids, not {shown(ids)}")
        return self._vocabulary.decode(ids, skip_special_tokens=skip)

    @overload
    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], /, *, tokenize: Literal[False], **ask: Any
    ) -> str: ...

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        max_length: int | None = None,
        tokenize: Literal[True] = True,
        **ask: Any,
    ) -> list[int]: ...

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        max_length: int | None = None,
        tokenize: bool = True,
        **ask: Any,
    ) -> list[int] | str:
        """Ids of a conversation, where control tokens are those that the template wrote alone.

        With `tokenize=False` its text, as transformers has it.
        """
        if not flag(tokenize, "tokenize"):
            return self._render(messages, ask).text
        return self.chat_prompt(messages, max_length=max_length, **ask)[1]

    def chat_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        max_length: int | None = None,
        **ask: Any,
    ) -> tuple[str, list[int]]:
        """Text and ids of a conversation, rendered once: both forms of `apply_chat_template`."""
        rendered = self._render(messages, ask)
        self._check(rendered.text, max_length)
        own = [asked] if isinstance(asked := ask.get("chat_template"), str) else []

        def accept(token: AddedToken, start: int, end: int) -> bool:
            is_control = token.content in self._control or _is_structure(token.content, own)
            return not is_control or rendered.is_template(start, end)

        return rendered.text, self._ids(rendered.text, accept)

    def render_chat_template(self, messages: Sequence[Mapping[str, Any]], /, **ask: Any) -> str:
        """The text of a conversation, as transformers renders it with `tokenize=False`."""
        return self._render(messages, ask).text

    def _check(self, text: str, max_length: int | None) -> None:
        if not isinstance(text, str):
            raise RequestError(f"text must be a string, not {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"the text has a lone surrogate at character {error.start}; send valid Unicode"
            ) from error
        max_length = plain(max_length)
        if max_length is not None and not is_int(max_length):
            raise RequestError(f"max_length must be an integer or None, not {shown(max_length)}")
        if max_length is not None and (fewest := self.fewest_tokens(text)) > max_length:
            raise CapacityError(
                f"a prompt of {len(text)} characters has {fewest} tokens or more, and may have "
                f"{max_length}; shorten the prompt or raise max_model_len"
            )

    @abstractmethod
    def _encode_plain(self, text: str, *, first: bool) -> list[int]:
        """Ids of text without any added token; `first` = the text stands at the very start."""

    def _ids(self, text: str, accept: Callable[[AddedToken, int, int], bool]) -> list[int]:
        ids: list[int] = []
        for i, part in enumerate(self._finder.split(text, accept)):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += self._encode_plain(part, first=i == 0)
        return ids

    def _chat_template(self, templates: Mapping[str, str]) -> ChatTemplate:
        variables = dict(self._settings.named)
        if self.bos_token_id is not None:
            bos = self._vocabulary.added[self.bos_token_id].content
            variables.setdefault("bos_token", bos)
        return ChatTemplate(templates, origin=str(self._settings.folder), variables=variables)

    def _render(self, messages: Sequence[Mapping[str, Any]], ask: dict[str, Any]) -> RenderedChat:
        template, asked = self._chat, ask.get("chat_template")
        if template is None and isinstance(asked, str):
            template = self._chat_template({"default": asked})
        if template is None:
            raise TokenizerError(
                f"{self._settings.folder} has no chat template; add a chat_template.jinja file or "
                "send a plain prompt"
            )
        return template.render(messages, **ask)


def _is_structure(content: str, templates: Iterable[str]) -> bool:
    """Whether an added token that is not marked special is no word of the language either.

    `add_tokens` of transformers marks none, so tokens of a chat's structure may come without.
    """
    written = not content.isspace() and any(content in source for source in templates)
    return written or BRACKETED.fullmatch(content) is not None


def unreadable(path: Path, why: str) -> TokenizerError:
    """The error for a file that is no vocabulary."""
    return TokenizerError(f"{path} cannot be read as a tokenizer: {why}; fetch the file again")
