// Memory and tensors of the driver of compiled loops (loop_driver.cpp).

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "lean_runtime.h"
#include "lean_products.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

namespace {

using gimli::Block;
using gimli::extent;
using gimli::Handle;
using gimli::item_size;
using gimli::Runtime;
using Entry = void (*)(Handle*, Handle*);
using Places = std::vector<int64_t>;
using Pairs = std::vector<std::pair<int64_t, int64_t>>;

struct PythonError {};  // Python already knows

void check(int32_t code) {
  if (code != AOTI_TORCH_SUCCESS) throw std::runtime_error("a call of torch failed in the loop of compiled steps");
}

// ------------------------------------------------------------------------------------------------------------- memory

// Keeps what is let go for the next that need as much: in small loops, allocation is most of the work.
class Pool {
 public:
  Block* allocate(size_t bytes) {
    const size_t kind = kind_of(bytes);
    if (kind < KINDS) {
      const Lock lock(busy_);
      if (Block* found = free_[kind]) {
        free_[kind] = found->next;
        kept_ -= found->size;
        found->owners.store(1, std::memory_order_relaxed);
        return found;
      }
    }
    return make(kind < KINDS ? size_of(kind) : bytes);
  }

  void release(Block* block) {
    const size_t kind = block->given ? KINDS : kind_of(block->size);
    if (kind < KINDS) {
      const Lock lock(busy_);
      if (kept_ + block->size <= LIMIT) {
        kept_ += block->size;
        block->next = free_[kind];
        free_[kind] = block;
        return;
      }
    }
    drop(block);
  }

  // Gives back to torch what is kept for later.
  void empty() {
    const Lock lock(busy_);
    for (Block*& first : free_) {
      while (Block* block = first) {
        first = block->next;
        drop(block);
      }
    }
    kept_ = 0;
  }

 private:
  static constexpr size_t KINDS = 96, FINE = 64, UNIT = 64;  // multiples of 64 bytes to 4 KiB; then 4 for each doubling
  static constexpr size_t LIMIT = 64 << 20;                  // bytes that are kept

  struct Lock {
    explicit Lock(std::atomic_flag& busy) : busy_(busy) {
      while (busy_.test_and_set(std::memory_order_acquire)) {
      }
    }
    ~Lock() { busy_.clear(std::memory_order_release); }
    std::atomic_flag& busy_;
  };

  static void drop(Block* block) {
    aoti_torch_delete_tensor_object(static_cast<AtenTensorHandle>(block->tensor));
    delete block;
  }

  static size_t size_of(size_t kind) {
    if (kind < FINE) return UNIT * (kind + 1);
    const size_t above = kind - FINE;
    return (UNIT * FINE / 4 * (5 + above % 4)) << (above / 4);
  }

  static size_t kind_of(size_t bytes) {
    if (bytes <= UNIT * FINE) return bytes ? (bytes - 1) / UNIT : 0;
    size_t kind = FINE;
    while (kind < KINDS && size_of(kind) < bytes) ++kind;
    return kind;
  }

  static Block* make(size_t bytes) {
    const int64_t size = bytes, stride = 1;
    AtenTensorHandle tensor;
    check(aoti_torch_empty_strided(1, &size, &stride, aoti_torch_dtype_uint8(), aoti_torch_device_type_cpu(), 0, &tensor));
    void* data;
    check(aoti_torch_get_data_ptr(tensor, &data));
    return new Block{{1}, bytes, static_cast<char*>(data), tensor, false, false, nullptr};
  }

  std::atomic_flag busy_ = ATOMIC_FLAG_INIT;
  Block* free_[KINDS] = {};
  size_t kept_ = 0;
};

Pool& pool() {
  static Pool& made = *new Pool;  // outlives what lets go of memory when the process ends
  return made;
}

const Runtime here{[](size_t bytes) { return pool().allocate(bytes); }, [](Block* block) { pool().release(block); }, gimli::multiply};
const Runtime* const runtime = &here;

// ------------------------------------------------------------------------------------------------------------- tensors

using Value = gimli::OwnedBy<&runtime>;

Value empty_like(const Handle& like) {
  Handle made = like;
  made.block = runtime->allocate(extent(like) * item_size(like.dtype));
  made.data = made.block->data;
  return Value(made);
}

Value zeros_like(const Handle& like) {
  Value made = empty_like(like);
  std::memset(made.data_ptr(), 0, extent(like) * item_size(like.dtype));
  return made;
}

// A tensor of torch, which is owned from then on.
Value given_value(AtenTensorHandle tensor, bool watched = false) {
  Handle made{};
  int64_t dims, *sizes, *strides;
  void* data;
  check(aoti_torch_get_dim(tensor, &dims));
  check(aoti_torch_get_sizes(tensor, &sizes));
  check(aoti_torch_get_strides(tensor, &strides));
  check(aoti_torch_get_dtype(tensor, &made.dtype));
  check(aoti_torch_get_data_ptr(tensor, &data));
  made.sizes = sizes, made.strides = strides, made.dims = static_cast<int32_t>(dims);
  made.data = static_cast<char*>(data);
  made.block = new Block{{1}, 0, made.data, tensor, true, watched, nullptr};
  return Value(made);
}

// A tensor of torch with memory of its own.
AtenTensorHandle copy_of(const Handle& value) {
  AtenTensorHandle made;
  check(aoti_torch_empty_strided(value.dims, value.sizes, value.strides, value.dtype, aoti_torch_device_type_cpu(), 0, &made));
  void* data;
  check(aoti_torch_get_data_ptr(made, &data));
  std::memcpy(data, value.data, extent(value) * item_size(value.dtype));
  return made;
}

// A tensor of torch: the one that was given, or a copy.
AtenTensorHandle torch_tensor(const Handle& value) {
  if (value.block->given && value.data == value.block->data) {
    int64_t* sizes;
    const auto tensor = static_cast<AtenTensorHandle>(value.block->tensor);
    check(aoti_torch_get_sizes(tensor, &sizes));
    if (sizes == value.sizes) {
      AtenTensorHandle made;
      check(aoti_torch_new_tensor_handle(tensor, &made));
      return made;
    }
  }
  return copy_of(value);
}

Value sum_of(const Handle& first, const Handle& second) {
  AtenTensorHandle parts[2], made;
  const Handle* given[] = {&first, &second};
  for (int index = 0; index < 2; ++index) {
    const Handle& one = *given[index];
    check(aoti_torch_create_tensor_from_blob(one.data, one.dims, one.sizes, one.strides, 0, one.dtype,
                                             aoti_torch_device_type_cpu(), 0, &parts[index]));
  }
  const auto code = aoti_torch_cpu_add_Tensor(parts[0], parts[1], 1.0, &made);
  for (auto part : parts) aoti_torch_delete_tensor_object(part);
  check(code);
  return given_value(made);
}

}  // namespace
