// Products of a matrix and a column: scalar products along the rows, a vector of sums at a time.

#include "lean_turns.h"

namespace gimli {

// One half of a and b, element by element in turn.
template <typename T, int Half>
inline typename Lanes<T>::Raw mixed(typename Lanes<T>::Raw a, typename Lanes<T>::Raw b) {
  constexpr int width = Lanes<T>::width;
  return [&]<int... I>(std::integer_sequence<int, I...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, (I % 2 * width + I / 2 + Half * width / 2)...);
#else
    using Index = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
    typedef Index Places __attribute__((vector_size(sizeof(a))));
    return __builtin_shuffle(a, b, Places{(I % 2 * width + I / 2 + Half * width / 2)...});
#endif
  }(std::make_integer_sequence<int, width>{});
}

// Up to a vector of rows of out = left @ right + added: `count` of them, of a job whose `right` is one after another.
template <typename T>
inline void dots(const Job<T>& job, int64_t row, int64_t count) {
  using L = Lanes<T>;
  using Raw = typename L::Raw;
  constexpr int width = L::width;
  const int64_t inner = job.left.columns, next = job.left.row;
  const T* left = job.left.data + row * next;
  Raw sums[width] = {};
  auto add = [&](int64_t k, auto load) {
    const Raw part = load(job.right + k);
    if (count == width) {
#pragma GCC unroll 16
      for (int r = 0; r < width; ++r) sums[r] += load(left + r * next + k) * part;
    } else {
#pragma GCC unroll 16
      for (int r = 0; r < width; ++r) sums[r] += load(left + std::min<int64_t>(r, count - 1) * next + k) * part;
    }
  };
  int64_t k = 0;
  for (; k + width <= inner; k += width) add(k, [](const T* from) { return L::load(from); });
  if (k < inner) add(k, [mask = L::first(inner - k)](const T* from) { return L::load(from, mask); });
#pragma GCC unroll 4
  for (int half = width / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) sums[i] = mixed<T, 0>(sums[i], sums[i + half]) + mixed<T, 1>(sums[i], sums[i + half]);
  }
  Raw found = sums[0];
  for (int i = 0; job.added && i < count; ++i) found[i] += job.added->data[(row + i) * job.added->row];
  T* to = job.out.data + row * job.out.row;
  if (job.out.row == 1) return L::of(found).store(to, static_cast<int>(count));
  for (int i = 0; i < count; ++i) to[i * job.out.row] = found[i];
}

// Whether the kernel above is for it: one column, and rows of some vectors, each one after another.
template <typename T>
bool is_dotted(const Matrix<T>& out, const Matrix<const T>& left) {
  constexpr int64_t FEW = 4;
  return out.columns == 1 && out.rows >= FEW && left.column == 1 && left.columns >= Lanes<T>::width;
}

// out = left @ right + added, of one column.
template <typename T>
void one_column(const Matrix<T>& out, const Matrix<const T>& left, const Matrix<const T>& right,
                const Matrix<const T>* added) {
  const T* column = right.data;
  if (right.row != 1) {
    T* packed = space_for<T, 0>(right.rows);
    for (int64_t k = 0; k < right.rows; ++k) packed[k] = right.data[k * right.row];
    column = packed;
  }
  const Job<T> job{out, left, column, 1, added};
  constexpr int64_t width = Lanes<T>::width;
  for (int64_t row = 0; row < out.rows; row += width) dots(job, row, std::min(width, out.rows - row));
}

}  // namespace gimli
