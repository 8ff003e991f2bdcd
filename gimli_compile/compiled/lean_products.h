// Products of small matrices, which lean programs (lean_program.h) call through the driver (loop_driver.cpp).

#include <omp.h>
#include <torch/csrc/inductor/cpp_prefix.h>

#include <array>
#include <utility>

namespace gimli {

constexpr int64_t LARGE = 1 << 25;  // multiplications of two matrices from which the kernels of torch win
constexpr int64_t WIDE = 1 << 17;   // elements of the right matrix up to which it stays in the cache
constexpr int64_t ALONE = 1 << 19;  // multiplications up to which one thread is enough

template <typename T>
struct Matrix {
  T* data;
  int64_t rows, columns, row, column;  // sizes, strides
  Matrix transposed() const { return {data, columns, rows, column, row}; }
  Matrix some_rows(int64_t first, int64_t end) const { return {data + first * row, end - first, columns, row, column}; }
};

// out = left @ right + added; `out`, `right` and `added` (if there is any) have unit stride along their columns, or
// `added` has one column only: then its stride is 0.
template <typename T>
struct Job {
  const Matrix<T>& out;
  const Matrix<const T>& left;
  const T* right;
  int64_t right_row;
  const Matrix<const T>* added;
};

// std::bit_cast, which programs have from C++20 on: torch 2.11 compiles them as C++17.
template <typename To, typename From>
inline To bit_cast(const From& from) {
  return __builtin_bit_cast(To, from);
}

// Vectors of elements, without constructors: those of `Vectorized` keep arrays of them out of registers.
template <typename T>
struct Lanes {
  using Vector = at::vec::Vectorized<T>;
  typedef T Raw __attribute__((vector_size(sizeof(Vector))));
  static constexpr int64_t width = Vector::size();
#if defined(CPU_CAPABILITY_AVX512)
  using Mask = std::conditional_t<sizeof(T) == 4, __mmask16, __mmask8>;
  static Mask first(int64_t count) { return (1u << count) - 1; }
  static Raw load(const T* from, Mask mask) {
    if constexpr (sizeof(T) == 4) return (Raw)_mm512_maskz_loadu_ps(mask, from);
    else return (Raw)_mm512_maskz_loadu_pd(mask, from);
  }
#else
  using Mask = int64_t;
  static Mask first(int64_t count) { return count; }
  static Raw load(const T* from, Mask count) {
    return count == width ? load(from) : bit_cast<Raw>(Vector::loadu(from, count));
  }
#endif
  static Raw load(const T* from) { return bit_cast<Raw>(Vector::loadu(from)); }
  static Raw all(T value) { return bit_cast<Raw>(Vector(value)); }
  static Raw fmadd(Raw first, Raw second, Raw third) {
    return bit_cast<Raw>(at::vec::fmadd(of(first), of(second), of(third)));
  }
  static Vector of(Raw raw) { return bit_cast<Vector>(raw); }
};

// Some rows and vectors of columns of a job; the last vector has `last` elements. All loops over `i` are unrolled.
template <typename T, int Rows, int Vectors>
void tile(const Job<T>& job, int64_t row, int64_t column, int64_t last) {
  using L = Lanes<T>;
  using Raw = typename L::Raw;
  constexpr int64_t width = L::width;
  constexpr int count = Rows * Vectors;
  const auto mask = L::first(last);
  auto loaded = [&](const T* from, int v) {
    return v == Vectors - 1 ? L::load(from + v * width, mask) : L::load(from + v * width);
  };
  Raw sums[count];
  if (job.added) {
    const int64_t next = job.added->row, along = job.added->column;
    const T* from = job.added->data + row * next + column * along;
#pragma GCC unroll 32
    for (int i = 0; i < count; ++i) {
      const T* line = from + i / Vectors * next;
      sums[i] = along ? loaded(line, i % Vectors) : L::all(*line);
    }
  } else {
#pragma GCC unroll 32
    for (int i = 0; i < count; ++i) sums[i] = Raw{};
  }
  const int64_t left_row = job.left.row, left_column = job.left.column, right_row = job.right_row;
  const T *left = job.left.data + row * left_row, *right = job.right + column;
  for (int64_t k = job.left.columns; k > 0; --k) {
    Raw parts[Vectors];
#pragma GCC unroll 32
    for (int i = 0; i < Vectors; ++i) parts[i] = loaded(right, i);
#pragma GCC unroll 32
    for (int i = 0; i < count; ++i) sums[i] = L::fmadd(L::all(left[i / Vectors * left_row]), parts[i % Vectors], sums[i]);
    left += left_column;
    right += right_row;
  }
  const int64_t out_row = job.out.row;
  T* to = job.out.data + row * out_row + column;
#pragma GCC unroll 32
  for (int i = 0; i < count; ++i) {
    T* line = to + i / Vectors * out_row + i % Vectors * width;
    if (i % Vectors == Vectors - 1 && last != width) L::of(sums[i]).store(line, last);
    else L::of(sums[i]).store(line);
  }
}

template <typename T>
using Tile = void (*)(const Job<T>&, int64_t, int64_t, int64_t);

constexpr int REGISTERS = sizeof(at::vec::Vectorized<float>) == 64 ? 32 : 16;

template <typename T, int Vectors, int... Row>
constexpr std::array<Tile<T>, sizeof...(Row)> tiles_of(std::integer_sequence<int, Row...>) {
  return {tile<T, Row + 1, Vectors>...};
}

// The tiles of 1, 2 ... rows: their sums, one line of vectors and a factor are in registers.
template <typename T, int Vectors>
constexpr auto tiles =
    tiles_of<T, Vectors>(std::make_integer_sequence<int, std::min(8, (REGISTERS - Vectors - 1) / Vectors)>{});

template <typename T, int Vectors>
void panel(const Job<T>& job, int64_t column, int64_t last) {
  const auto& kernels = tiles<T, Vectors>;
  const int64_t rows = job.out.rows, most = kernels.size();
  int64_t parts = (rows + most - 1) / most;  // of about equal size
  for (int64_t row = 0; parts > 0; --parts) {
    const int64_t count = (rows - row + parts - 1) / parts;
    kernels[count - 1](job, row, column, last);
    row += count;
  }
}

template <typename T>
void row_major(const Job<T>& job) {
  constexpr int64_t width = at::vec::Vectorized<T>::size();
  int64_t left = (job.out.columns + width - 1) / width;  // vectors
  for (int64_t column = 0; left > 0;) {
    const int64_t now = left == 4 ? 2 : std::min<int64_t>(left, 3);
    left -= now;
    const int64_t last = left ? width : job.out.columns - column - (now - 1) * width;
    if (now == 3) panel<T, 3>(job, column, last);
    else if (now == 2) panel<T, 2>(job, column, last);
    else panel<T, 1>(job, column, last);
    column += now * width;
  }
}

// to[c][r] = from[r][c] of a block of up to a vector of rows and columns.
template <typename T>
inline void turn(const T* from, int64_t from_row, T* to, int64_t to_row, int rows, int columns) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, float>) {
    const auto inner = Lanes<T>::first(columns), outer = Lanes<T>::first(rows);
    __m512 a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) a[i] = i < rows ? _mm512_maskz_loadu_ps(inner, from + i * from_row) : _mm512_setzero_ps();
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {  // pairs of rows
      b[i] = i % 2 ? _mm512_unpackhi_ps(a[i - 1], a[i]) : _mm512_unpacklo_ps(a[i], a[i + 1]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {  // four rows: the columns i % 4, 4 + i % 4 ... in four lanes
      const auto one = _mm512_castps_pd(b[i / 4 * 4 + i % 4 / 2]), other = _mm512_castps_pd(b[i / 4 * 4 + i % 4 / 2 + 2]);
      a[i] = _mm512_castpd_ps(i % 2 ? _mm512_unpackhi_pd(one, other) : _mm512_unpacklo_pd(one, other));
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {  // eight rows: lanes 0 and 2, or 1 and 3
      const auto one = a[i / 8 * 8 + i % 4], other = a[i / 8 * 8 + i % 4 + 4];
      b[i] = i % 8 < 4 ? _mm512_shuffle_f32x4(one, other, 0x88) : _mm512_shuffle_f32x4(one, other, 0xdd);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {  // all rows of one column
      const auto one = b[i % 8], other = b[i % 8 + 8];
      const auto line = i < 8 ? _mm512_shuffle_f32x4(one, other, 0x88) : _mm512_shuffle_f32x4(one, other, 0xdd);
      if (i < columns) _mm512_mask_storeu_ps(to + i * to_row, outer, line);
    }
    return;
  }
#endif
  if constexpr (std::is_same_v<T, float> && Lanes<T>::width == 8) {
    if (rows == 8 && columns == 8) return at::vec::transpose_mxn<T, 8, 8>(from, from_row, to, to_row);
  }
  for (int c = 0; c < columns; ++c) {
    for (int r = 0; r < rows; ++r) to[c * to_row + r] = from[r * from_row + c];
  }
}

// Copies a matrix, so that it has unit stride along its columns.
template <typename T>
void pack(const Matrix<const T>& from, T* to) {
  constexpr int64_t width = Lanes<T>::width;
  for (int64_t row = 0; from.row == 1 && row < from.rows; row += width) {
    for (int64_t column = 0; column < from.columns; column += width) {
      turn(from.data + row + column * from.column, from.column, to + row * from.columns + column, from.columns,
           static_cast<int>(std::min(width, from.columns - column)), static_cast<int>(std::min(width, from.rows - row)));
    }
  }
  for (int64_t row = 0; from.row != 1 && row < from.rows; ++row) {
    const T* line = from.data + row * from.row;
    for (int64_t column = 0; column < from.columns; ++column) to[row * from.columns + column] = line[column * from.column];
  }
}

// out = left @ right + added; `out` has unit stride along its columns, or along its rows.
template <typename T>
void product(Matrix<T> out, Matrix<const T> left, Matrix<const T> right, const Matrix<const T>* added) {
  Matrix<const T> turned;
  if (out.columns == 1 && out.row == 1 && out.rows > 1 && (!added || added->row <= 1)) {  // vectors run along the rows
    out = out.transposed();
    std::swap(left, right);
    left = left.transposed(), right = right.transposed();
    if (added) turned = added->transposed(), added = &turned;
  }
  if (right.column == 1 || right.columns == 1) return row_major(Job<T>{out, left, right.data, right.row, added});
  thread_local std::vector<T> space;
  const size_t needed = right.rows * right.columns;
  if (space.size() < needed) space.resize(needed);
  pack(right, space.data());
  row_major(Job<T>{out, left, space.data(), right.columns, added});
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
    for (int64_t index = 0; index < count * parts; ++index) one(index);
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
