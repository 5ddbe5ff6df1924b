"""The error of saved buffers, which the lowest modules raise, too."""


class ExperienceBufferError(ValueError):
    """A saved experience buffer or an image in it cannot be read, or a path cannot take one."""
