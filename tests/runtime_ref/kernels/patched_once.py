"""Triton's interpreter, without patching the language anew for every device function that a kernel calls.

A launch patches `triton.language` and puts it back at its end; in between, each call of another jitted function does the same
work again, to no effect, and that is half of the time of small kernels. Here only the launch does it.
"""

import contextlib

from triton.runtime import interpreter


class _Nothing:
    def restore(self):
        pass


@contextlib.contextmanager
def patched_once():
    """While it is open, nested calls patch once per launch for each module that they come from."""
    original, seen = interpreter._patch_lang, set()

    def patch(fn):
        outermost, where = not seen, id(fn.__globals__)
        if where in seen:
            return _Nothing()
        scope = original(fn)
        seen.add(where)
        if outermost:
            restore = scope.restore

            def ended():
                seen.clear()
                restore()

            scope.restore = ended
        return scope

    interpreter._patch_lang = patch
    try:
        yield
    finally:
        interpreter._patch_lang = original
