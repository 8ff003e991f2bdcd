// What the text of a program that Inductor wrote means in a compiled loop: the same names, on tensors of lean_runtime.h.
// Follows the headers of Inductor and lean_runtime.h; the text of the program follows this.

#include <omp.h>

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

// ----------------------------------------------------------------------------------------------------------- products

constexpr int64_t LARGE = 1 << 18;  // multiplications from which the kernels of torch win
constexpr int64_t ALONE = 1 << 17;  // multiplications of a batch up to which one thread is enough

template <typename T>
struct Matrix {
  T* data;
  int64_t rows, columns, row, column;  // sizes, strides
  Matrix transposed() const { return {data, columns, rows, column, row}; }
};

// Some rows and `Vectors` vectors of columns of: out = left @ right + added. `right` has unit stride along its columns,
// of which the last vector has `last`.
template <typename T, int Rows, int Vectors>
inline void tile(const Matrix<T>& out, const Matrix<const T>& left, const T* right, int64_t right_row,
                 const Matrix<const T>* added, int64_t row, int64_t column, int64_t last) {
  using Vector = at::vec::Vectorized<T>;
  constexpr int64_t width = Vector::size();
  Vector sums[Rows][Vectors];
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < Vectors; ++v) {
      sums[r][v] = Vector(0);
      if (added) {
        const T* from = added->data + (row + r) * added->row + (column + v * width) * added->column;
        const int64_t count = v == Vectors - 1 ? last : width;
        sums[r][v] = added->column ? Vector::loadu(from, count) : Vector(*from);
      }
    }
  }
  const T* from = left.data + row * left.row;
  right += column;
  for (int64_t k = 0; k < left.columns; ++k) {
    Vector parts[Vectors];
    for (int v = 0; v < Vectors - 1; ++v) parts[v] = Vector::loadu(right + v * width);
    parts[Vectors - 1] = last == width ? Vector::loadu(right + (Vectors - 1) * width)
                                       : Vector::loadu(right + (Vectors - 1) * width, last);
    for (int r = 0; r < Rows; ++r) {
      const Vector factor(from[r * left.row]);
      for (int v = 0; v < Vectors; ++v) sums[r][v] = at::vec::fmadd(factor, parts[v], sums[r][v]);
    }
    from += left.column;
    right += right_row;
  }
  for (int r = 0; r < Rows; ++r) {
    T* to = out.data + (row + r) * out.row + column;
    for (int v = 0; v < Vectors - 1; ++v) sums[r][v].store(to + v * width);
    if (last == width) sums[r][Vectors - 1].store(to + (Vectors - 1) * width);
    else sums[r][Vectors - 1].store(to + (Vectors - 1) * width, last);
  }
}

template <typename T, int Vectors>
inline void columns(const Matrix<T>& out, const Matrix<const T>& left, const T* right, int64_t right_row,
                    const Matrix<const T>* added, int64_t column, int64_t last) {
  int64_t row = 0;
  for (; row + 6 <= out.rows; row += 6) tile<T, 6, Vectors>(out, left, right, right_row, added, row, column, last);
  for (; row + 2 <= out.rows; row += 2) tile<T, 2, Vectors>(out, left, right, right_row, added, row, column, last);
  if (row < out.rows) tile<T, 1, Vectors>(out, left, right, right_row, added, row, column, last);
}

template <typename T>
inline void row_major(const Matrix<T>& out, const Matrix<const T>& left, const T* right, int64_t right_row,
                      const Matrix<const T>* added) {
  constexpr int64_t width = at::vec::Vectorized<T>::size();
  for (int64_t column = 0; column < out.columns;) {
    const int64_t rest = out.columns - column;
    if (rest > width) {
      const int64_t last = rest >= 2 * width ? width : rest - width;
      columns<T, 2>(out, left, right, right_row, added, column, last);
      column += width + last;
    } else {
      columns<T, 1>(out, left, right, right_row, added, column, rest);
      column += rest;
    }
  }
}

// Copies a matrix, so that it has unit stride along its columns.
template <typename T>
inline void pack(const Matrix<const T>& from, T* to) {
  int64_t row = 0;
  constexpr int width = at::vec::Vectorized<T>::size();
  if constexpr (std::is_same_v<T, float> && (width == 8 || width == 16)) {
    for (; from.row == 1 && row + width <= from.rows; row += width) {
      int64_t column = 0;
      for (; column + width <= from.columns; column += width) {
        at::vec::transpose_mxn<float, width, width>(from.data + row + column * from.column, from.column,
                                                    to + row * from.columns + column, from.columns);
      }
      for (; column < from.columns; ++column) {
        for (int64_t r = row; r < row + width; ++r) to[r * from.columns + column] = from.data[r + column * from.column];
      }
    }
  }
  for (; row < from.rows; ++row) {
    const T* line = from.data + row * from.row;
    for (int64_t column = 0; column < from.columns; ++column) to[row * from.columns + column] = line[column * from.column];
  }
}

// out = left @ right + added; `out` has unit stride along its columns, or along its rows.
template <typename T>
inline void product(Matrix<T> out, Matrix<const T> left, Matrix<const T> right, const Matrix<const T>* added, T* space) {
  Matrix<const T> turned;
  if (out.columns == 1 && out.row == 1 && out.rows > 1 && (!added || added->row <= 1)) {  // vectors run along the rows
    out = out.transposed();
    std::swap(left, right);
    left = left.transposed(), right = right.transposed();
    if (added) turned = added->transposed(), added = &turned;
  }
  if (right.column == 1 || right.columns == 1) return row_major(out, left, right.data, right.row, added);
  pack(right, space);
  row_major(out, left, static_cast<const T*>(space), right.columns, added);
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

template <typename T>
void products(const Handle& out, const Handle* added, const Handle& left, const Handle& right) {
  const int32_t d = out.dims;
  const int64_t rows = out.sizes[d - 2], columns = out.sizes[d - 1], inner = left.sizes[d - 1];
  const int64_t count = d == 3 ? out.sizes[0] : 1;
  const bool parallel = count > 1 && count * rows * columns * inner > ALONE && omp_get_max_threads() > 1;
#pragma omp parallel if (parallel)
  {
    thread_local std::vector<T> space;
    const size_t needed = inner * std::max(rows, columns);
    if (space.size() < needed) space.resize(needed);
#pragma omp for
    for (int64_t index = 0; index < count; ++index) {
      auto a = matrix<T, true>(left, index, rows, inner);
      auto b = matrix<T, true>(right, index, inner, columns);
      const auto c = added ? matrix<T, true>(*added, index, rows, columns) : Matrix<const T>{};
      product<T>(matrix<T, false>(out, index, rows, columns), a, b, added ? &c : nullptr, space.data());
    }
  }
}

// A tensor of torch on the memory of a tensor.
inline AtenTensorHandle borrowed(const Handle& tensor) {
  AtenTensorHandle made;
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(tensor.data, tensor.dims, tensor.sizes, tensor.strides, 0,
                                                                 tensor.dtype, aoti_torch_device_type_cpu(), 0, &made));
  return made;
}

// Whether the kernels above take it: their results are rows one after another, and what is added has one along columns.
inline bool is_small(const Handle& out, const Handle* added, const Handle& left) {
  const int32_t d = out.dims;
  if (out.dtype != 6 && out.dtype != 7) return false;
  if (out.sizes[d - 2] * out.sizes[d - 1] * left.sizes[d - 1] > LARGE) return false;
  const bool rows = out.strides[d - 1] == 1 || out.sizes[d - 1] == 1;
  const bool simple = !added || !added->dims || added->sizes[added->dims - 1] == 1 || added->strides[added->dims - 1] <= 1;
  return rows && simple;
}

template <typename Call>
inline int32_t multiply(const Handle& out, const Handle* added, const Handle& left, const Handle& right, Call large) {
  if (!extent(out)) return 0;
  if (!is_small(out, added, left)) {
    RAIIAtenTensorHandle made(borrowed(out)), a(borrowed(left)), b(borrowed(right));
    RAIIAtenTensorHandle c(added ? borrowed(*added) : nullptr);
    return large(made, c, a, b);
  }
  if (out.dtype == 6) products<float>(out, added, left, right);
  else products<double>(out, added, left, right);
  return 0;
}

using Torch = RAIIAtenTensorHandle;

inline int32_t mm(const Handle& out, const Handle& left, const Handle& right) {
  return multiply(out, nullptr, left, right,
                  [](Torch& o, Torch&, Torch& a, Torch& b) { return aoti_torch_cpu_mm_out(o, a, b); });
}

inline int32_t bmm(const Handle& out, const Handle& left, const Handle& right) {
  return multiply(out, nullptr, left, right,
                  [](Torch& o, Torch&, Torch& a, Torch& b) { return aoti_torch_cpu_bmm_out(o, a, b); });
}

inline int32_t addmm(const Handle& out, const Handle& added, const Handle& left, const Handle& right, double beta,
                     double alpha) {
  if (beta == 1 && alpha == 1) {
    return multiply(out, &added, left, right,
                    [](Torch& o, Torch& c, Torch& a, Torch& b) { return aoti_torch_cpu_addmm_out(o, c, a, b, 1, 1); });
  }
  Torch o(borrowed(out)), c(borrowed(added)), a(borrowed(left)), b(borrowed(right));
  return aoti_torch_cpu_addmm_out(o, c, a, b, beta, alpha);
}

inline int32_t baddbmm(const Handle& out, const Handle& added, const Handle& left, const Handle& right, double beta,
                       double alpha) {
  if (beta == 1 && alpha == 1) {
    return multiply(out, &added, left, right,
                    [](Torch& o, Torch& c, Torch& a, Torch& b) { return aoti_torch_cpu_baddbmm_out(o, c, a, b, 1, 1); });
  }
  Torch o(borrowed(out)), c(borrowed(added)), a(borrowed(left)), b(borrowed(right));
  return aoti_torch_cpu_baddbmm_out(o, c, a, b, beta, alpha);
}

}  // namespace gimli

#define AtenTensorHandle gimli::Handle
#define RAIIAtenTensorHandle gimli::Owned
#define steal_from_raw_handles_to_raii_handles gimli::inputs
#define aoti_torch_empty_strided gimli::empty_strided
#define aoti_torch_new_tensor_handle gimli::share
#define reinterpret_tensor_wrapper gimli::view
#define wrap_with_raii_handle_if_needed gimli::own
#define aoti_torch_cpu_mm_out gimli::mm
#define aoti_torch_cpu_bmm_out gimli::bmm
#define aoti_torch_cpu_addmm_out gimli::addmm
#define aoti_torch_cpu_baddbmm_out gimli::baddbmm
#define assert_size_stride gimli::check_layout
