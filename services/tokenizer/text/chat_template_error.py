"""The error of chat templates, in a file of its own: the workers that report it load no Jinja."""


class ChatTemplateError(Exception):
    """A conversation cannot be rendered; the message is the template's own or says which limit was hit."""
