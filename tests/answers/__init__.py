"""Answers to the course's exercises, a file for each notebook: of each name that an exercise asks for all answers that
are right, and the known wrong ones with what the check must say of each. A test runs every check on both."""

from importlib import import_module
from pkgutil import iter_modules

_chapters = [import_module(f".{module.name}", __name__) for module in iter_modules(__path__)]
ANSWERS = {chapter.NOTEBOOK: chapter.ANSWERS for chapter in _chapters}
