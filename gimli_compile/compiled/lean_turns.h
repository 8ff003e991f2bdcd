// Copies of matrices in another order.

#include "lean_tiles.h"

namespace gimli {

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

// Copies a matrix to where it has unit stride along its columns.
template <typename T>
void pack(const Matrix<const T>& from, T* to, int64_t to_row) {
  constexpr int64_t width = Lanes<T>::width;
  for (int64_t row = 0; from.row == 1 && row < from.rows; row += width) {
    for (int64_t column = 0; column < from.columns; column += width) {
      turn(from.data + row + column * from.column, from.column, to + row * to_row + column, to_row,
           static_cast<int>(std::min(width, from.columns - column)), static_cast<int>(std::min(width, from.rows - row)));
    }
  }
  for (int64_t row = 0; from.row != 1 && row < from.rows; ++row) {
    const T* line = from.data + row * from.row;
    for (int64_t column = 0; column < from.columns; ++column) to[row * to_row + column] = line[column * from.column];
  }
}

// Memory of this thread for so many elements; `place` tells apart what is needed at the same time.
template <typename T, int place>
T* space_for(size_t elements) {
  thread_local std::vector<T> space;
  if (space.size() < elements) space.resize(elements);
  return space.data();
}

}  // namespace gimli
