// y (mix^T v) of every head, values and gradients read and written as they lie in memory:
//   hidden[p, c] = sum_m mix[m, p] v[m, c],   out[n, c] = beside[n, c] + sum_p y[n, p] hidden[p, c].
// What it computes is held against kart/kernels/mixed.py.

#include "tile.h"

// rows to read in whole vectors: in place where they lie so, else packed
struct Rows {
  const float* data;
  long step;
  Rows(const Strided& x, const float* at, long count, long width, long padded, float* room) : data(at), step(x.n) {
    if (x.d == 1 && width == padded) return;
    pack_rows(at, x.n, x.d, count, count, width, padded, 1.0f, room);
    data = room;
    step = padded;
  }
};

// out[i][..] = sum_p a[i * row + p] * hidden[p][..], to where the rows belong; where given, plus the rows at `from`
static void product(int rows, long width, long padded, long rank, const float* a, long row, const float* hidden,
                    const Strided& to, float* out, float* room, const Strided& beside = {}, const float* from = nullptr) {
  const bool there = to.d == 1 && width == padded;
  float* sums = there ? out : room;
  const long step = there ? to.n : padded;
  if (from)
    for (int i = 0; i < rows; ++i) pack_rows(from + i * beside.n, 0, beside.d, 1, 1, width, padded, 1.0f, sums + i * step);
  wide_gemm<WIDE_ROWS, 0>(rows, padded, rank, a, 1, hidden, padded, sums, step, from != nullptr, row);
  if (there) return;
  for (int i = 0; i < rows; ++i)
    for (long c = 0; c < width; ++c) out[i * to.n + c * to.d] = room[i * padded + c];
}

struct Scratch {
  long padded, rank;  // in whole vectors
  Buffer values, douts, room, hidden, turned, y;
  explicit Scratch(const Shape& s)
      : padded(round_up(s.width, W)),
        rank(round_up(s.rank, W)),
        values(s.keys * padded),
        douts(s.queries * padded),
        room(std::max(s.queries, s.keys) * padded),
        hidden(rank * padded),
        turned(padded * rank),
        y(s.queries * rank) {
    // rows beyond the rank are turned with the others, and nothing is read of what they give
    std::fill(hidden.data, hidden.data + rank * padded, 0.0f);
  }
  // sum_c rows[i][c] * hidden[p][c] to out[i * rank + p]. Columns beyond the width take no part: they may hold
  // the NaN of an infinite weight of another sample times their zeros.
  void by_hidden(int count, long width, const Rows& x, float* out, bool add) {
    for (long p = 0; p < rank; p += W)
      for (long c = 0; c < padded; c += W) transpose(hidden + p * padded + c, padded, turned + c * rank + p, rank);
    wide_gemm<ROWS, 0>(count, rank, width, x.data, 1, turned, rank, out, rank, add, x.step);
  }
};

extern "C" {

// hidden is contiguous (batch, heads, rank, width), `beside` may have no data; returns 0, or 1 without memory
int kart_mix(const Shape* shape, const Strided* v, const Strided* y, const Strided* mix, const Strided* beside, int own,
             const Strided* out, float* hidden, int threads) try {
  const Shape& s = *shape;
  const Order order(s, own);
  spread(order.count(), threads, [&](int, long begin, long end) {
    Scratch w(s);
    for (long task = begin; task < end; ++task) {
      const long b = order.b(task), h = order.h(task);
      const Rows values(*v, v->at(b, h), s.keys, s.width, w.padded, w.values);
      wide_gemm<WIDE_ROWS, 1>(s.rank, w.padded, s.keys, mix->at(own ? b : 0, h), mix->n, values.data, values.step,
                              w.hidden, w.padded, false);
      float* to = hidden + (b * s.heads + h) * s.rank * s.width;
      for (long p = 0; p < s.rank; ++p) std::memcpy(to + p * s.width, w.hidden + p * w.padded, 4 * s.width);
      product(s.queries, s.width, w.padded, s.rank, y->at(b, h), y->n, w.hidden, *out,
              const_cast<float*>(out->at(b, h)), w.room, *beside, beside->data ? beside->at(b, h) : nullptr);
    }
  });
  return 0;
} catch (...) {
  return 1;
}

// dy and dmix are contiguous, (batch, heads, queries, rank) and (batch or 1, heads, keys, rank)
int kart_unmix(const Shape* shape, const Strided* dout, const Strided* v, const Strided* y, const Strided* mix, int own,
               const float* hidden, const Strided* dv, float* dy, float* dmix, int threads) try {
  const Shape& s = *shape;
  const Order order(s, own);
  const Slots slots(order, threads);
  const long rank = round_up(s.rank, W), size = s.keys * rank;
  Buffer sums(slots.count * size);
  std::fill(sums.data, sums.data + slots.count * size, 0.0f);
  spread(order.count(), threads, [&](int thread, long begin, long end) {
    Scratch w(s);
    for (long task = begin; task < end; ++task) {
      const long b = order.b(task), h = order.h(task), head = b * s.heads + h;
      const float *units = y->at(b, h), *mixing = mix->at(own ? b : 0, h), *u = hidden + head * s.rank * s.width;
      const Rows pulled(*dout, dout->at(b, h), s.queries, s.width, w.padded, w.douts);
      const Rows values(*v, v->at(b, h), s.keys, s.width, w.padded, w.values);
      // dy = dout hidden^T
      for (long p = 0; p < s.rank; ++p) std::memcpy(w.hidden + p * w.padded, u + p * s.width, 4 * s.width);
      w.by_hidden(s.queries, s.width, pulled, w.y, false);
      float* to = dy + head * s.queries * s.rank;
      for (long n = 0; n < s.queries; ++n) std::memcpy(to + n * s.rank, w.y + n * w.rank, 4 * s.rank);
      // dhidden = y^T dout, dv = mix dhidden, dmix = v dhidden^T
      wide_gemm<WIDE_ROWS, 1>(s.rank, w.padded, s.queries, units, y->n, pulled.data, pulled.step, w.hidden, w.padded,
                              false);
      product(s.keys, s.width, w.padded, s.rank, mixing, mix->n, w.hidden, *dv, const_cast<float*>(dv->at(b, h)),
              w.room);
      w.by_hidden(s.keys, s.width, values, sums + slots.slot(thread, order.head(task)) * size, true);
    }
  });
  slots.collect(sums, size, [&](long head, const float* sum, bool fresh) {
    float* out = dmix + head * s.keys * s.rank;
    for (long m = 0; m < s.keys; ++m)
      for (long p = 0; p < s.rank; ++p, ++out) *out = fresh ? sum[m * rank + p] : *out + sum[m * rank + p];
  });
  return 0;
} catch (...) {
  return 1;
}

}  // extern "C"
