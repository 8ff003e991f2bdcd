// What the text of a program that Inductor wrote means in a compiled loop: the same names, on tensors of lean_runtime.h.
// Follows the headers of Inductor and lean_runtime.h; the text of the program follows this.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

namespace gimli {

static const Runtime* runtime;
using Owned = OwnedBy<&runtime>;

inline int32_t empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype, int32_t, int32_t,
                             Handle* made) {
  *made = Handle{nullptr, nullptr, sizes, strides, static_cast<int32_t>(dims), dtype};
  made->block = runtime->allocate(extent(*made) * item_size(dtype));
  made->data = made->block->data;
  return 0;
}

inline int32_t share(const Handle& tensor, Handle* made) {
  *made = tensor;
  tensor.block->owners.fetch_add(1, std::memory_order_relaxed);
  return 0;
}

inline Handle view(const Handle& tensor, int64_t dims, const int64_t* sizes, const int64_t* strides, int64_t offset) {
  Handle made;
  share(tensor, &made);
  made.data += offset * item_size(tensor.dtype);
  made.sizes = sizes, made.strides = strides, made.dims = static_cast<int32_t>(dims);
  return made;
}

inline Owned own(const Handle& tensor) { return Owned(tensor); }
inline const Owned& own(const Owned& tensor) { return tensor; }

inline void check_layout(const Handle& tensor, std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides,
                         const char* what) {
  bool fits = tensor.dims == static_cast<int32_t>(sizes.size());
  for (int32_t dim = 0; fits && dim < tensor.dims; ++dim) {
    const int64_t size = sizes.begin()[dim];
    fits = tensor.sizes[dim] == size && (size <= 1 || tensor.strides[dim] == strides.begin()[dim]);
  }
  if (!fits) throw std::runtime_error(std::string("a compiled program was given other sizes or strides: ") + what);
}

struct Inputs {
  const Handle* handles;
  Owned operator[](int64_t index) const { return Owned(handles[index]); }
};

inline Inputs inputs(const Handle* handles, int64_t) { return {handles}; }

inline int32_t mm(const Handle& out, const Handle& left, const Handle& right) {
  return runtime->multiply({out, nullptr, left, right, 1, 1});
}

inline int32_t addmm(const Handle& out, const Handle& added, const Handle& left, const Handle& right, double beta,
                     double alpha) {
  return runtime->multiply({out, &added, left, right, beta, alpha});
}

inline void succeeded(int32_t code) {
  if (code) throw std::runtime_error("a call of torch failed in a compiled program");
}

}  // namespace gimli

#define AOTI_TORCH_ERROR_CODE_CHECK(call) gimli::succeeded(call)
#define CACHE_TORCH_DTYPE(name) static const auto cached_torch_dtype_##name = aoti_torch_dtype_##name()
#define CACHE_TORCH_DEVICE(name) static const auto cached_torch_device_type_##name = aoti_torch_device_type_##name()

#define AtenTensorHandle gimli::Handle
#define RAIIAtenTensorHandle gimli::Owned
#define steal_from_raw_handles_to_raii_handles gimli::inputs
#define aoti_torch_empty_strided gimli::empty_strided
#define aoti_torch_new_tensor_handle gimli::share
#define reinterpret_tensor_wrapper gimli::view
#define wrap_with_raii_handle_if_needed gimli::own
#define aoti_torch_cpu_mm_out gimli::mm
#define aoti_torch_cpu_bmm_out gimli::mm
#define aoti_torch_cpu_addmm_out gimli::addmm
#define aoti_torch_cpu_baddbmm_out gimli::addmm
#define assert_size_stride gimli::check_layout
