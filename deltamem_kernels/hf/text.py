"""Between a conversation's text and its tokens."""

_REPLY = "THE-REPLY"  # stands for a reply where a template is rendered for what follows it


class Text:
    """Messages to tokens, tokens to text.

    Args:
        tokenizer: A transformers tokenizer, with or without a chat template, or a pair of callables
            ``(text -> token ids, token ids -> text)``.

    Raises:
        TypeError: It is neither.
    """

    def __init__(self, tokenizer):
        self.tokenizer = None
        if isinstance(tokenizer, (tuple, list)) and len(tokenizer) == 2 and all(map(callable, tokenizer)):
            self._encode, self._decode = tokenizer
        elif hasattr(tokenizer, "encode") and hasattr(tokenizer, "decode"):
            self.tokenizer = tokenizer
            self._encode = lambda text: tokenizer.encode(text, add_special_tokens=False)
            self._decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=True)
        else:
            raise TypeError(
                "DeltaMemSession: tokenizer must be a tokenizer, a pair of callables or None, got "
                f"{type(tokenizer).__name__}"
            )

    def message(self, text: str, last: int | None) -> list[int]:
        """Tokens of a user's message up to where the reply begins.

        Args:
            text: The message.
            last: The context's last token; None: the message opens a context.
        """
        if self.tokenizer is None:
            return list(self._encode(text))
        if not getattr(self.tokenizer, "chat_template", None):
            return list(self.tokenizer.encode(text, add_special_tokens=last is None))
        user = {"role": "user", "content": text}
        if last is not None:
            # Rendered beside a reply, since a template may open every conversation with a system message.
            past = [{"role": "user", "content": ""}, {"role": "assistant", "content": _REPLY}]
            _, found, rest = self._render([*past, user]).rpartition(_REPLY)
            if found:
                return list(self._encode(rest.removeprefix(self.tokenizer.decode([last]))))
        return list(self._encode(self._render([user])))

    def _render(self, messages) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def pieces(self, tokens):
        """Text of an iterator of tokens, piece by piece; a character of several tokens comes when it is whole."""
        ids, start, shown = [], 0, 0
        for token in tokens:
            ids.append(token)
            # from a few tokens back: what a token reads as depends on those before it
            before, after = self._decode(ids[start:shown]), self._decode(ids[start:])
            if len(after) > len(before) and not after.endswith("\ufffd"):
                start, shown = shown, len(ids)
                yield after[len(before) :]
        rest = self._decode(ids[start:])[len(self._decode(ids[start:shown])) :]
        if rest:
            yield rest
