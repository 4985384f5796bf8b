"""What the programs share: tasks as environments, and data sets."""


class BadInput(ValueError):
    """Something that the user has to change; the message says what, and in which flag or file. Exit code 2."""
