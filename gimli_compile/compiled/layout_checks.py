"""Checks that programs for the CPU get inputs of the sizes and strides that they were made for.

Inductor writes them into its C++ programs from some version of torch on; in torch 2.11 it does not, and such a program
would read other memory than it is meant to.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

_INPUT = re.compile(r"^ *auto (\w+) = std::move\(inputs\[(\d+)\]\);\n", re.MULTILINE)
_BEGIN, _END = "void inductor_entry_impl(", "} // inductor_entry_impl"
_HEADER = "#include <torch/csrc/inductor/cpp_wrapper/cpu.h>\n"
_CHECK = """
#include <initializer_list>
namespace gimli {
inline void check_layout(const RAIIAtenTensorHandle& tensor, std::initializer_list<int64_t> sizes,
                         std::initializer_list<int64_t> strides, const char* what) {
  int64_t dims, *found_sizes, *found_strides;
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(tensor.get(), &dims));
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor.get(), &found_sizes));
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor.get(), &found_strides));
  bool fits = dims == static_cast<int64_t>(sizes.size());
  for (int64_t dim = 0; fits && dim < dims; ++dim) {
    const int64_t size = sizes.begin()[dim];
    fits = found_sizes[dim] == size && (size <= 1 || found_strides[dim] == strides.begin()[dim]);
  }
  if (!fits) throw std::runtime_error(std::string("a compiled program was given other sizes or strides: ") + what);
}
}  // namespace gimli
"""


def with_checks(text: str, inputs: Sequence[torch.Tensor]) -> str:
    """Returns the text of a program that looks at each of its inputs that it uses, where Inductor lets it look at none.

    `define_check` makes the text complete; in lean programs (`lean.py`) the check is known.
    """
    begin, end = text.find(_BEGIN), text.find(_END)
    named = list(_INPUT.finditer(text, max(begin, 0), max(end, 0)))
    if not named or any(f"assert_size_stride({found[1]}," in text for found in named):
        return text
    last = named[-1].end()
    used = (found for found in named if re.search(rf"\b{found[1]}\b", text[last:end]))
    checks = [_check(found[1], inputs[int(found[2])]) for found in used]
    return "".join((text[:last], *checks, text[last:]))


def define_check(text: str) -> str:
    """Returns the text of a program that is not lean with the function that `with_checks` calls, if it does."""
    return text.replace(_HEADER, _HEADER + _CHECK, 1) if "gimli::check_layout(" in text else text


def _check(name: str, value: torch.Tensor) -> str:
    if value.numel() == 0:  # as in Inductor: nothing is read
        return ""
    sizes, strides = (", ".join(f"{number}L" for number in numbers) for numbers in (value.shape, value.stride()))
    return f'    gimli::check_layout({name}, {{{sizes}}}, {{{strides}}}, "{name}");\n'
