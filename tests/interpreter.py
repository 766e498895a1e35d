"""Triton's interpreter without what it does again and again: a third of the time of its tests.

Every call of a device function makes Triton 3.9 go through all of `triton.language` for what it
interprets, though the launch has just done so; and every operation makes a table of dtypes anew.
"""

from __future__ import annotations

import triton.language as tl
from triton.runtime import interpreter


def hasten() -> None:
    """Let the interpreter do so once; a Triton without these functions stays as it is."""
    if hasattr(interpreter, "_patch_lang") and hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = _once(interpreter._patch_lang)
    if hasattr(interpreter, "_get_np_dtype"):
        interpreter._get_np_dtype = _remembered(interpreter._get_np_dtype)


def _once(patch_lang):
    def patched(fn):
        languages = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
        if languages and not any(tl.core.is_builtin(language.load) for language in languages):
            return interpreter._LangPatchScope()
        return patch_lang(fn)

    return patched


def _remembered(np_dtype):
    known = {}

    def dtype_of(kind):
        kind = kind.scalar
        if isinstance(kind, tl.pointer_type):
            return np_dtype(kind)
        if kind.name not in known:
            known[kind.name] = np_dtype(kind)
        return known[kind.name]

    return dtype_of
