// Elementary functions of vectors, in place of methods that are slow: see lean.py.

namespace gimli {

template <typename V>
inline V tanh(const V& x) {
  return x.tanh();
}

// Within two units in the last place, in less than half of the time. Below 0.625 it is x + x^3 p(x^2), whose relative
// error of 4.4e-9 is the smallest that five coefficients reach; above, 1 - 2 / (exp(2 |x|) + 1), where nothing cancels.
inline at::vec::Vectorized<float> tanh(const at::vec::Vectorized<float>& x) {
  using V = at::vec::Vectorized<float>;
  const V one(1.0f), two(2.0f), size = x.abs(), square = x * x;
  V p = at::vec::fmadd(V(-0.00570498695913f), square, V(0.0206390871791f));
  p = at::vec::fmadd(p, square, V(-0.0537397150508f));
  p = at::vec::fmadd(p, square, V(0.133314421975f));
  p = at::vec::fmadd(p, square, V(-0.33333281942f));
  const V small = at::vec::fmadd(p * square, x, x);
  const V large = one - two / ((size + size).exp() + one);
  return V::blendv(large, small, size < V(0.625f)).copysign(x);
}

}  // namespace gimli
