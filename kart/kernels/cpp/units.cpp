// The streamed sum of units that are not linear in their parameters, in float32, forward and backward:
//   y[n, p] = sum_m mask[n, m] phi(scale q_n . k_m; theta[p, m]).
// kart/kernels/cpp/build.py puts the family's `struct Unit` before this file. A unit is evaluated in
// registers, and again in the backward: there is no matrix product to do it with. The loop over queries is
// innermost, so that the parameters of a unit and their gradients stay in registers.

#include "tile.h"
#include "unit.h"

constexpr int P = Based::P;
// queries whose scores with ROWS keys stay in the level-1 cache
constexpr long SPAN = 8 * LANES;

struct Scratch {
  long width, blocks;
  Buffer panels, keys, query_lanes, query_rows, dy, scores, gradient, y, dq, dk;
  std::vector<int32_t> mask;
  Scratch(const Shape& s, bool backward)
      : width(round_up(s.width, W)),
        blocks(round_up(std::min<long>(SPAN, s.queries), LANES) / LANES),
        panels(panel_floats(s.keys, width)),
        keys((s.keys + PANEL) * width),
        query_lanes(blocks * width * LANES),
        query_rows(blocks * LANES * width),
        dy(backward ? s.rank * blocks * LANES : 0),
        scores(blocks * ROWS * LANES),
        gradient(blocks * ROWS * LANES),
        y(backward ? 0 : s.rank * blocks * LANES),
        dq(backward ? blocks * LANES * width : 0),
        dk(backward ? s.keys * width : 0),
        mask(blocks * ROWS * LANES) {}

  void take_keys(const Strided& k, const float* x, const Shape& s) {
    pack_rows(x, k.n, k.d, s.keys, s.keys + PANEL, s.width, width, 1.0f, keys);
    pack_panels(keys, width, s.keys, panels);
  }
  void take_queries(const Strided& q, const float* x, long count, float scale, const Shape& s) {
    for (long i = 0; i < count; i += LANES, x += LANES * q.n) {
      const long rows = std::min<long>(LANES, count - i);
      pack_rows(x, q.n, q.d, rows, LANES, s.width, width, scale, query_rows + i * width);
      pack_lanes(query_rows + i * width, width, query_lanes + i * width);
    }
  }
  // scores of `keys` keys from `first` on, (block, key, LANES), hidden ones 0; the mask beside them
  void take_scores(const Shape& s, long first, int count, long queries, const uint8_t* mask_at, const Mask& m) {
    for (long i = 0; i < queries; i += LANES) {
      float* out = scores + i * ROWS;
      gemm<ROWS, 2, 1>(count, s.width, panels + panel_floats(first, width), PANEL, query_lanes + i * width, LANES, out,
                       LANES, false);
      if (!m.data) continue;
      int32_t* kept = mask.data() + i * ROWS;
      pack_mask(mask_at + i * m.n + first * m.m, m.m, m.n, count, std::min<long>(LANES, queries - i), kept);
      for (long at = 0; at < count * LANES; at += W)
        store(out + at, keep(load(out + at), *reinterpret_cast<const iloose*>(kept + at)));
    }
  }
};

extern "C" {

int kart_forward(const Shape* shape, const float* options, const Strided* q, const Strided* k, const Coefs* units,
                 int own, const Mask* mask, float scale, const void*, float* y, int threads) try {
  const Shape& s = *shape;
  const Order order(s, own);
  spread(order.count(), threads, [&](int, long begin, long end) {
    Scratch w(s, false);
    for (long task = begin; task < end; ++task) {
      const long b = order.b(task), h = order.h(task);
      const float* theta = coefs_at(*units, order, task);
      w.take_keys(*k, k->at(b, h), s);
      for (long n = 0; n < s.queries; n += SPAN) {
        const long queries = std::min(SPAN, s.queries - n), stride = w.blocks * LANES;
        w.take_queries(*q, q->at(b, h) + n * q->n, queries, scale, s);
        const uint8_t* mask_at = mask->data ? mask->data + b * mask->b + h * mask->h + n * mask->n : nullptr;
        std::fill(w.y.data, w.y.data + s.rank * stride, 0.0f);
        for (long first = 0; first < s.keys; first += ROWS) {
          const int keys = std::min<long>(ROWS, s.keys - first);
          w.take_scores(s, first, keys, queries, mask_at, *mask);
          for (int m = 0; m < keys; ++m)
            for (long p = 0; p < s.rank; ++p) {
              float own_theta[P];
              for (int i = 0; i < P; ++i) own_theta[i] = theta[p * units->p + (first + m) * units->m + i * units->j];
              const Based unit(options, own_theta);
              float* sum = w.y + p * stride;
              for (long i = 0; i < queries; i += LANES)
#pragma GCC unroll 2
                for (int v = 0; v < 2; ++v) {
                  const long at = i * ROWS + m * LANES + v * W;
                  vec value = unit.value(load(w.scores + at));
                  if (mask->data) value = keep(value, *reinterpret_cast<const iloose*>(w.mask.data() + at));
                  store(sum + i + v * W, load(sum + i + v * W) + value);
                }
            }
        }
        float* out = y + ((b * s.heads + h) * s.queries + n) * s.rank;
        for (long i = 0; i < queries; ++i)
          for (long p = 0; p < s.rank; ++p) *out++ = w.y[p * stride + i];
      }
    }
  });
  return 0;
} catch (...) {
  return 1;
}

int kart_backward(const Shape* shape, const float* options, const Strided* dy, const Strided* q, const Strided* k,
                  const Coefs* units, int own, const Mask* mask, float scale, const void*, const Room* dq, const Room* dk,
                  float* dunits, int threads) try {
  const Shape& s = *shape;
  const Order order(s, own);
  const Slots slots(order, threads);
  const long size = s.rank * s.keys * P;
  Buffer sums(slots.count * size);
  spread(order.count(), threads, [&](int thread, long begin, long end) {
    Scratch w(s, true);
    long head = -1;
    float* sum = nullptr;
    for (long task = begin; task < end; ++task) {
      const long b = order.b(task), h = order.h(task);
      const float* theta = coefs_at(*units, order, task);
      if (order.head(task) != head) {
        head = order.head(task);
        sum = sums + slots.slot(thread, head) * size;
        std::fill(sum, sum + size, 0.0f);
      }
      w.take_keys(*k, k->at(b, h), s);
      std::fill(w.dk.data, w.dk.data + s.keys * w.width, 0.0f);
      for (long n = 0; n < s.queries; n += SPAN) {
        const long queries = std::min(SPAN, s.queries - n), stride = w.blocks * LANES;
        w.take_queries(*q, q->at(b, h) + n * q->n, queries, scale, s);
        const float* dy_at = dy->at(b, h) + n * dy->n;
        for (long p = 0; p < s.rank; ++p)
          for (long i = 0; i < stride; ++i)
            w.dy[p * stride + i] = i < queries ? dy_at[i * dy->n + p * dy->d] : 0.0f;
        std::fill(w.dq.data, w.dq.data + queries * w.width, 0.0f);
        const uint8_t* mask_at = mask->data ? mask->data + b * mask->b + h * mask->h + n * mask->n : nullptr;
        for (long first = 0; first < s.keys; first += ROWS) {
          const int keys = std::min<long>(ROWS, s.keys - first);
          w.take_scores(s, first, keys, queries, mask_at, *mask);
          std::fill(w.gradient.data, w.gradient.data + stride * ROWS, 0.0f);
          for (int m = 0; m < keys; ++m)
            for (long p = 0; p < s.rank; ++p) {
              float own_theta[P], own_sums[P], gradient[P];
              for (int i = 0; i < P; ++i) own_theta[i] = theta[p * units->p + (first + m) * units->m + i * units->j];
              const Based unit(options, own_theta);
              const float* pull = w.dy + p * stride;
              vec part[P];
              UNROLL for (int i = 0; i < P; ++i) part[i] = vec{};
              for (long i = 0; i < queries; i += LANES)
#pragma GCC unroll 2
                for (int v = 0; v < 2; ++v) {
                  const long at = i * ROWS + m * LANES + v * W;
                  vec g = load(pull + i + v * W);
                  if (mask->data) g = keep(g, *reinterpret_cast<const iloose*>(w.mask.data() + at));
                  const vec slope = unit.slope(load(w.scores + at), g, part);
                  store(w.gradient + at, load(w.gradient + at) + slope * g);
                }
              for (int i = 0; i < P; ++i) own_sums[i] = total(part[i]);
              unit.finish(own_sums, gradient);
              float* out = sum + (p * s.keys + first + m) * P;
              for (int i = 0; i < P; ++i) out[i] += gradient[i];
            }
          for (long i = 0; i < queries; i += LANES) {
            const long count = std::min<long>(LANES, queries - i);
            wide_gemm<WIDE_ROWS, LANES>(keys, w.width, count, w.gradient + i * ROWS, 1, w.query_rows + i * w.width,
                                          w.width, w.dk + first * w.width, w.width);
            wide_gemm<4, 1>(count, w.width, keys, w.gradient + i * ROWS, LANES, w.keys + first * w.width, w.width,
                            w.dq + i * w.width, w.width);
          }
        }
        float* out = dq->at(b, h) + n * dq->n;
        for (long i = 0; i < queries; ++i, out += dq->n)
          for (long c = 0; c < s.width; ++c) out[c] = scale * w.dq[i * w.width + c];
      }
      float* out = dk->at(b, h);
      for (long m = 0; m < s.keys; ++m, out += dk->n) std::memcpy(out, w.dk + m * w.width, 4 * s.width);
    }
  });
  slots.collect(sums, size, [&](long head, const float* sum, bool fresh) {
    float* out = dunits + head * size;
    for (long i = 0; i < size; ++i) out[i] = sum[i] + (fresh ? 0.0f : out[i]);
  });
  return 0;
} catch (...) {
  return 1;
}

}  // extern "C"
