// Products of small matrices, which lean programs (lean_program.h) call through the driver (loop_driver.cpp).

#include <omp.h>

#include "lean_dots.h"

namespace gimli {

constexpr int64_t LARGE = 1 << 25;  // multiplications of two matrices from which the kernels of torch win
constexpr int64_t WIDE = 1 << 17;   // elements of the right matrix up to which it stays in the cache
constexpr int64_t ALONE = 1 << 19;  // multiplications up to which one thread is enough

// out = left @ right + added; `out` has unit stride along its columns.
template <typename T>
void of_columns(const Matrix<T>& out, const Matrix<const T>& left, const Matrix<const T>& right, const Matrix<const T>* added) {
  if (right.column == 1 || right.columns == 1) return in_parts(Job<T>{out, left, right.data, right.row, added});
  T* packed = space_for<T, 0>(right.rows * right.columns);
  pack(right, packed, right.columns);
  in_parts(Job<T>{out, left, packed, right.columns, added});
}

// Whether turning the product, whose rows are then the vectors, saves more than turning the result takes.
template <typename T>
bool is_better_turned(const Matrix<T>& out, const Matrix<const T>& left) {
  constexpr int64_t width = Lanes<T>::width, DEEP = 64, SMALL = 1 << 14;
  auto vectors = [](int64_t count) { return (count + width - 1) / width; };
  const int64_t now = out.rows * vectors(out.columns), then = out.columns * vectors(out.rows);
  return left.row == 1 && left.column != 1 && left.columns >= DEEP && out.rows * out.columns <= SMALL && 5 * then < 4 * now;
}

// out = left @ right + added; `out` has unit stride along its columns, or along its rows.
template <typename T>
void product(const Matrix<T>& out, const Matrix<const T>& left, const Matrix<const T>& right, const Matrix<const T>* added) {
  if (is_dotted(out, left)) return one_column(out, left, right, added);
  if (out.columns == 1 && out.row == 1 && out.rows > 1 && (!added || added->row <= 1)) {  // vectors run along the rows
    const auto turned = added ? added->transposed() : Matrix<const T>{};
    return of_columns<T>(out.transposed(), right.transposed(), left.transposed(), added ? &turned : nullptr);
  }
  if (!added && is_better_turned(out, left)) {
    T* turned = space_for<T, 1>(out.rows * out.columns);
    of_columns<T>({turned, out.columns, out.rows, out.rows, 1}, right.transposed(), left.transposed(), nullptr);
    return pack<T>({turned, out.rows, out.columns, 1, out.rows}, out.data, out.row);
  }
  of_columns(out, left, right, added);
}

template <typename T, bool Constant>
inline auto matrix(const Handle& tensor, int64_t batch, int64_t rows, int64_t columns) {
  using Element = std::conditional_t<Constant, const T, T>;
  const int32_t d = tensor.dims;
  auto stride = [&](int32_t dim) { return dim < 0 || tensor.sizes[dim] == 1 ? 0 : tensor.strides[dim]; };
  Matrix<Element> made{reinterpret_cast<Element*>(tensor.data), rows, columns, stride(d - 2), stride(d - 1)};
  if (d == 3) made.data += batch * stride(0);
  if (!Constant && columns == 1) made.column = 1;  // there is only one
  return made;
}

// How many loops run whose tape leaves the caches, as the driver finds: what they multiply is likely to be far.
inline std::atomic<int> far_loops{0};

// Asks for one matrix of a batch before it is its turn.
inline void fetch(const Handle& batch, int64_t index) {
  constexpr int64_t LINE = 64;
  const int64_t size = item_size(batch.dtype), one = batch.sizes[1] * batch.sizes[2] * size;
  const char* from = batch.data + index * batch.strides[0] * size;
  for (int64_t at = 0; at < one; at += LINE) __builtin_prefetch(from + at);
}

template <typename T>
void products(const Handle& out, const Handle* added, const Handle& left, const Handle& right) {
  const int32_t d = out.dims;
  const int64_t rows = out.sizes[d - 2], columns = out.sizes[d - 1], inner = left.sizes[d - 1];
  const int64_t count = d == 3 ? out.sizes[0] : 1;
  const int64_t threads = count * rows * columns * inner > ALONE ? omp_get_max_threads() : 1;
  const int64_t parts = count > 1 ? 1 : std::clamp<int64_t>(rows / 8, 1, threads);  // of the rows of one matrix
  auto one = [&](int64_t index) {
    const int64_t batch = index / parts, part = index % parts;
    const int64_t first = part * rows / parts, end = (part + 1) * rows / parts;
    auto o = matrix<T, false>(out, batch, rows, columns).some_rows(first, end);
    auto a = matrix<T, true>(left, batch, rows, inner).some_rows(first, end);
    auto b = matrix<T, true>(right, batch, inner, columns);
    const auto c = added ? matrix<T, true>(*added, batch, rows, columns).some_rows(first, end) : Matrix<const T>{};
    product<T>(o, a, b, added ? &c : nullptr);
  };
  if (threads > 1 && count * parts > 1) {
#pragma omp parallel for
    for (int64_t index = 0; index < count * parts; ++index) one(index);
  } else {
    const bool far = far_loops.load(std::memory_order_relaxed);
    for (int64_t index = 0; index < count * parts; ++index) {
      if (far && index + 1 < count) fetch(left, index + 1), fetch(right, index + 1);
      one(index);
    }
  }
}

// Whether the kernels above take it: their results are rows one after another, and what is added has one along columns.
inline bool is_small(const Product& job) {
  const Handle &out = job.out, *added = job.added;
  const int32_t d = out.dims;
  if ((out.dtype != 6 && out.dtype != 7) || job.beta != 1 || job.alpha != 1) return false;
  const int64_t wide = out.sizes[d - 1] * job.left.sizes[d - 1];
  if (wide > WIDE || out.sizes[d - 2] * wide > LARGE) return false;
  const bool rows = out.strides[d - 1] == 1 || out.sizes[d - 1] == 1;
  const bool simple = !added || !added->dims || added->sizes[added->dims - 1] == 1 || added->strides[added->dims - 1] <= 1;
  return rows && simple;
}

// A tensor of torch on the memory of a tensor.
struct Borrowed {
  AtenTensorHandle tensor = nullptr;
  explicit Borrowed(const Handle* of) {
    if (of && aoti_torch_create_tensor_from_blob(of->data, of->dims, of->sizes, of->strides, 0, of->dtype,
                                                 aoti_torch_device_type_cpu(), 0, &tensor)) {
      throw std::runtime_error("torch did not take the memory of a tensor");
    }
  }
  ~Borrowed() {
    if (tensor) aoti_torch_delete_tensor_object(tensor);
  }
};

inline int32_t multiply(const Product& job) {
  if (!extent(job.out)) return 0;
  if (is_small(job)) {
    if (job.out.dtype == 6) products<float>(job.out, job.added, job.left, job.right);
    else products<double>(job.out, job.added, job.left, job.right);
    return 0;
  }
  const Borrowed out(&job.out), added(job.added), left(&job.left), right(&job.right);
  const auto o = out.tensor, c = added.tensor, a = left.tensor, b = right.tensor;
  const bool batched = job.out.dims == 3;
  if (!c) return batched ? aoti_torch_cpu_bmm_out(o, a, b) : aoti_torch_cpu_mm_out(o, a, b);
  return batched ? aoti_torch_cpu_baddbmm_out(o, c, a, b, job.beta, job.alpha)
                 : aoti_torch_cpu_addmm_out(o, c, a, b, job.beta, job.alpha);
}

}  // namespace gimli
