// What tensors are while a compiled loop runs in C++: memory, sizes and strides, without an object of torch around them.
//
// The driver (loop_driver.cpp) and the programs of the steps have this text in common. Memory comes from the driver.

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <utility>

namespace gimli {

// Memory that several tensors may share.
struct Block {
  std::atomic<int64_t> owners;
  size_t size;    // bytes, of the class that it belongs to
  char* data;
  void* tensor;   // the tensor of torch that the memory is of: one that was given, or one of bytes
  bool given;     // by Python, which may change it
  bool watched;   // if given: autograd has to watch for that
  Block* next;    // in the list of what is free
};

// A tensor; does not own anything by itself. Sizes and strides lie in the library of a program, or in a given tensor.
struct Handle {
  Block* block;
  char* data;
  const int64_t *sizes, *strides;
  int32_t dims, dtype;
};

// out = beta * added + alpha * left @ right, of matrices or batches of matrices; `added` may be missing.
struct Product {
  const Handle& out;
  const Handle* added;
  const Handle &left, &right;
  double beta, alpha;
};

// What programs get from the driver.
struct Runtime {
  Block* (*allocate)(size_t bytes);
  void (*release)(Block* block);
  int32_t (*multiply)(const Product& job);
};

// std::bit_cast, which programs have from C++20 on: torch 2.11 compiles them as C++17.
template <typename To, typename From>
inline To bit_cast(const From& from) {
  return __builtin_bit_cast(To, from);
}

inline int64_t item_size(int32_t dtype) {
  constexpr int8_t sizes[] = {1, 1, 2, 4, 8, 2, 4, 8, 4, 8, 16, 1, 1, 1, 4, 2,   // by the number of torch's ScalarType;
                              0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 4, 8};         // 0: elements of less than a byte
  if (dtype < 0 || dtype >= static_cast<int32_t>(sizeof(sizes)) || !sizes[dtype]) {
    throw std::runtime_error("a compiled loop does not know the size of this dtype");
  }
  return sizes[dtype];
}

// The number of elements from the first to the last.
inline int64_t extent(const Handle& tensor) {
  int64_t last = 1;
  for (int32_t dim = 0; dim < tensor.dims; ++dim) {
    if (!tensor.sizes[dim]) return 0;
    last += (tensor.sizes[dim] - 1) * tensor.strides[dim];
  }
  return last;
}

// A tensor that is owned; or none.
template <const Runtime* const* runtime>
class OwnedBy {
 public:
  OwnedBy() : handle_{} {}
  explicit OwnedBy(const Handle& handle) : handle_(handle) {}
  OwnedBy(OwnedBy&& other) noexcept : handle_(std::exchange(other.handle_, Handle{})) {}
  OwnedBy& operator=(OwnedBy&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~OwnedBy() { reset(); }
  explicit operator bool() const { return handle_.block != nullptr; }
  operator const Handle&() const { return handle_; }
  const Handle& get() const { return handle_; }
  Handle release() { return std::exchange(handle_, Handle{}); }
  void* data_ptr() const { return handle_.data; }
  void reset() {
    if (handle_.block && handle_.block->owners.fetch_sub(1, std::memory_order_acq_rel) == 1) {
      (*runtime)->release(handle_.block);
    }
    handle_ = Handle{};
  }
  OwnedBy share() const {
    if (handle_.block) handle_.block->owners.fetch_add(1, std::memory_order_relaxed);
    return OwnedBy(handle_);
  }

 private:
  Handle handle_;
};

}  // namespace gimli
