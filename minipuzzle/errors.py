"""The one exception that means: the person at the keyboard can put this right."""


class UserError(Exception):
    """A mistake of input or environment: one line saying what is wrong and what to do."""
