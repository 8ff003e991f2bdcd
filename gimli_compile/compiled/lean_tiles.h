// Products in tiles whose sums are in registers: the kernels of lean_products.h for vectors of columns.

#include <torch/csrc/inductor/cpp_prefix.h>

#include <array>
#include <utility>

namespace gimli {

template <typename T>
struct Matrix {
  T* data;
  int64_t rows, columns, row, column;  // sizes, strides
  Matrix transposed() const { return {data, columns, rows, column, row}; }
  Matrix some_rows(int64_t first, int64_t end) const { return {data + first * row, end - first, columns, row, column}; }
  Matrix some_columns(int64_t first, int64_t end) const { return {data + first * column, rows, end - first, row, column}; }
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

// As `row_major`. Where all rows go through a right matrix that is too large for the first cache, and the result is
// small, they do so part by part.
template <typename T>
void in_parts(const Job<T>& job) {
  constexpr int64_t FEW = 8, CACHED = (24 << 10) / sizeof(T), SMALL = (16 << 10) / sizeof(T);
  const Matrix<const T>& left = job.left;
  const int64_t rows = job.out.rows, columns = job.out.columns, part = CACHED / columns;
  if (rows <= FEW || left.columns <= part || part < FEW || rows * columns > SMALL) return row_major(job);
  const Matrix<const T> before{job.out.data, rows, columns, job.out.row, 1};
  for (int64_t k = 0; k < left.columns; k += part) {
    const auto some = left.some_columns(k, std::min(k + part, left.columns));
    row_major(Job<T>{job.out, some, job.right + k * job.right_row, job.right_row, k ? &before : job.added});
  }
}

}  // namespace gimli
