"""Lets an empty array differ from everything that is not empty, in the tests' process.

numpy broadcasts an empty array against a single value, and the result is empty. So ``numpy.allclose([], 4)``,
``(array([]) == 4).all()``, ``norm(array([]) - 4) < 1e-6`` and ``array([]) == pytest.approx(4)`` are true, and a program could
pass by returning an empty array.
"""

import importlib
import inspect
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any

_COMPARING = "allclose isclose array_equiv"
_ASSERTING = (
    "assert_allclose assert_array_equal assert_almost_equal assert_array_almost_equal assert_array_less"
)
_REASON = "an empty array equals only another empty array"


def patch_comparisons(has_numpy: bool, has_numpy_testing: bool, has_pytest: bool) -> None:
    """Patches numpy's and pytest's comparisons in this process: without a patch an empty array equals any number.

    Args:
        has_numpy: whether the tests may use numpy. It is patched only if it is loaded.
        has_numpy_testing: whether they may use numpy.testing.
        has_pytest: whether they may use pytest. Its comparison is patched before numpy is loaded, because the program may
            send an array to tests that do not mention numpy.
    """
    numpy = sys.modules.get("numpy") if has_numpy else None
    if numpy is not None:
        modules = {numpy: _COMPARING}
        if has_numpy_testing:
            modules[importlib.import_module("numpy.testing")] = _ASSERTING
        for module, names in modules.items():
            for name in names.split():
                setattr(module, name, _refusing(getattr(module, name), numpy))
    pytest = sys.modules.get("pytest") if has_pytest else None
    if pytest is not None:
        _patch_approx(type(pytest.approx(0.0)))


def _patch_approx(near: Any) -> None:
    equals = near.__eq__

    def is_near(own: Any, value: Any) -> bool:
        numpy = sys.modules.get("numpy")
        is_empty = numpy is not None and isinstance(value, numpy.ndarray) and not value.size
        return not is_empty and equals(own, value)

    near.__eq__ = is_near


def _refusing(compare: Callable[..., Any], numpy: Any) -> Callable[..., Any]:
    """Returns ``compare`` with one change: an empty array differs from every array that is not empty."""
    signature = inspect.signature(compare)

    def comparison(*args: Any, **keywords: Any) -> Any:
        call = signature.bind(*args, **keywords)
        sizes = set()
        for name in list(call.arguments)[:2]:
            # Converted only once, because an object of the program could return another array at the second conversion
            array = call.arguments[name] = numpy.asanyarray(call.arguments[name])
            sizes.add(bool(array.size))
        if len(sizes) == 1:
            return compare(*call.args, **call.kwargs)
        assert not compare.__name__.startswith("assert"), _REASON
        return False

    return comparison


def refusing_empty(array: Any) -> Any:
    """Returns an empty array as an array whose operations with values that are not empty raise AssertionError."""
    import numpy

    return array.view(_empty_class(numpy))


@lru_cache(maxsize=1)
def _empty_class(numpy: Any) -> Any:
    # The class is defined here because its base exists only if numpy is installed
    class EmptyArray(numpy.ndarray):  # type: ignore[misc,name-defined]
        """An array without items."""

        __module__ = "numpy"  # so that it crosses back to the program as an array

        def __array_ufunc__(self, function: Any, method: str, *inputs: Any, **keywords: Any) -> Any:
            assert method != "__call__" or not any(numpy.size(value) for value in inputs), _REASON
            plain = [numpy.asarray(v) if isinstance(v, EmptyArray) else v for v in inputs]
            result = getattr(function, method)(*plain, **keywords)
            is_empty = isinstance(result, numpy.ndarray) and not result.size
            return result.view(EmptyArray) if is_empty else result

    return EmptyArray
