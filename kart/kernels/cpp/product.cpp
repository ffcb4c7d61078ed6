// The streamed product of a linear family in float32, forward and backward:
//   y[n, p] = sum_m mask[n, m] sum_j f_j(scale q_n . k_m) C[p, m, j],
// and, where SOFTMAX is 1, from the same scores softmax(scale q k^T) v. kart/kernels/cpp/build.py puts the
// family's `struct Piece` and the constants BASE and SOFTMAX before this file; what it computes is held
// against kart/kernels/chunked.py.

#include "tile.h"

// --- features --------------------------------------------------------------------------------------

// the family's features, then the base activation: 0 none, 1 identity, 2 SiLU, 3 GELU
struct Features : Piece {
  static constexpr int K = Piece::K + (BASE > 0);
  using Piece::Piece;
  INLINE void features(vec x, vec* f) const {
    Piece::features(x, f);
    vec density;
    if constexpr (BASE == 1) f[K - 1] = x;
    if constexpr (BASE == 2) f[K - 1] = x * sigmoid(x);
    if constexpr (BASE == 3) f[K - 1] = x * normal(x, density);
  }
  INLINE void slopes(vec x, const vec* f, vec* g) const {
    Piece::slopes(x, f, g);
    if constexpr (BASE == 1) g[K - 1] = splat(1.0f);
    if constexpr (BASE == 2) {
      const vec s = sigmoid(x);
      g[K - 1] = s + f[K - 1] * (1.0f - s);
    }
    if constexpr (BASE == 3) {
      vec density;
      const vec share = normal(x, density);
      g[K - 1] = share + x * density;
    }
  }
};

constexpr int K = Features::K;
constexpr int KEYS = K <= 6 ? 2 * ROWS : ROWS;     // of a forward tile
constexpr int TILE = KEYS;                          // queries of a backward tile

// scores (keys x LANES) to features (keys * K x LANES); `mask`, where given, has -1 or 0 for each score
template <int V>
static void fill_features(const Features& family, int keys, const float* scores, const int32_t* mask,
                          float* features) {
  for (int m = 0; m < keys; ++m, scores += LANES, features += K * LANES)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      vec f[K];
      family.features(load(scores + v * W), f);
      if (mask) {
        const ivec kept = *reinterpret_cast<const iloose*>(mask + m * LANES + v * W);
        UNROLL for (int j = 0; j < K; ++j) f[j] = keep(f[j], kept);
      }
      UNROLL for (int j = 0; j < K; ++j) store(features + j * LANES + v * W, f[j]);
    }
}

// --- score gradient --------------------------------------------------------------------------------

// ds[n] (+)= sum_j g[n][j] * (sum_p C[p][j] dy[n][p]) for N queries, features FIRST to FIRST + J of each key
template <int N, int FIRST, int J, int V>
static INLINE void pull(const Features& family, int rank, const float* coefs, const float* dy,
                        const float* scores, const int32_t* mask, const float* features, float* ds) {
  vec sum[N][J][V];
#pragma GCC unroll 12
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 12
    for (int j = 0; j < J; ++j)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[n][j][v] = vec{};
  for (int p = 0; p < rank; ++p, coefs += K * LANES) {
    vec x[N];
#pragma GCC unroll 12
    for (int n = 0; n < N; ++n) x[n] = splat(dy[n * rank + p]);
#pragma GCC unroll 12
    for (int j = 0; j < J; ++j)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        const vec c = load(coefs + (FIRST + j) * LANES + v * W);
#pragma GCC unroll 12
        for (int n = 0; n < N; ++n) sum[n][j][v] += c * x[n];
      }
  }
#pragma GCC unroll 12
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      vec f[K], g[K];
      UNROLL for (int j = 0; j < K; ++j) f[j] = load(features + (n * K + j) * LANES + v * W);
      family.slopes(load(scores + n * LANES + v * W), f, g);
      vec total = FIRST > 0 ? load(ds + n * LANES + v * W) : vec{};
      UNROLL for (int j = 0; j < J; ++j) total += sum[n][j][v] * g[FIRST + j];
      if (mask) total = keep(total, *reinterpret_cast<const iloose*>(mask + n * LANES + v * W));
      store(ds + n * LANES + v * W, total);
    }
}

// for N queries, FIRST on: as many features at a time as fill the registers
template <int N, int FIRST, int V>
static INLINE void pull_from(const Features& family, int rank, const float* coefs, const float* dy,
                             const float* scores, const int32_t* mask, const float* features, float* ds) {
  if constexpr (FIRST < K) {
    constexpr int J = std::min(ROWS / N, K - FIRST);
    pull<N, FIRST, J, V>(family, rank, coefs, dy, scores, mask, features, ds);
    pull_from<N, FIRST + J, V>(family, rank, coefs, dy, scores, mask, features, ds);
  }
}

// Queries at a time: three features of each fill the registers, and what is loaded of C serves them all.
constexpr int AT_ONCE = ROWS / std::min(K, 3);

template <int V>
static void score_gradient(const Features& family, int queries, int rank, const float* coefs, const float* dy,
                           const float* scores, const int32_t* mask, const float* features, float* ds) {
  const auto kept = [mask](long n) { return mask ? mask + n * LANES : nullptr; };
  long n = 0;
  for (; n + AT_ONCE <= queries; n += AT_ONCE)
    pull_from<AT_ONCE, 0, V>(family, rank, coefs, dy + n * rank, scores + n * LANES, kept(n), features + n * K * LANES,
                       ds + n * LANES);
  for (; n < queries; ++n)
    pull_from<1, 0, V>(family, rank, coefs, dy + n * rank, scores + n * LANES, kept(n), features + n * K * LANES,
                       ds + n * LANES);
}

// C as (key, feature, p)
static void pack_coefs(const Coefs& c, const float* x, const Shape& s, float* out) {
  if (c.j == 1 && c.m == K) return transpose_matrix(x, c.p, s.rank, s.keys * K, out, s.rank);
  for (long m = 0; m < s.keys; ++m)
    for (long j = 0; j < K; ++j)
      for (long p = 0; p < s.rank; ++p) *out++ = x[p * c.p + m * c.m + j * c.j];
}

// C as (block of LANES keys, p, feature, key); zero beyond the last key
static void pack_blocks(const Coefs& c, const float* x, const Shape& s, float* out) {
  for (long first = 0; first < s.keys; first += LANES)
    for (long p = 0; p < s.rank; ++p)
      for (long j = 0; j < K; ++j)
        for (long m = first; m < first + LANES; ++m) *out++ = m < s.keys ? x[p * c.p + m * c.m + j * c.j] : 0.0f;
}

// --- one head of one sample ------------------------------------------------------------------------

// Forward: lanes are queries, so that the sum over keys and features stays in registers.
struct Forward {
  long width, value_width;  // padded to whole vectors
  Buffer panels, keys, query_lanes, query_rows, scores, features, y, value_rows, weights, out, statistics;
  std::vector<int32_t> mask;
  explicit Forward(const Shape& s)
      : width(round_up(s.width, W)),
        value_width(SOFTMAX ? round_up(s.value_width, W) : 0),
        panels(round_up(s.keys, ROWS) / ROWS * width * W),
        keys((s.keys + W) * width),  // a panel is read as W rows
        query_lanes(width * LANES),
        query_rows(LANES * width),
        scores(KEYS * LANES),
        features(KEYS * K * LANES),
        y(s.rank * LANES),
        value_rows(s.keys * value_width),
        weights(SOFTMAX ? round_up(s.keys, KEYS) * LANES : 0),
        out(value_width * LANES),
        statistics(2 * LANES),
        mask(KEYS * LANES) {}

  void take_keys(const Strided& k, const float* x, const Shape& s) {
    pack_rows(x, k.n, k.d, s.keys, s.keys + W, s.width, width, 1.0f, keys);
    pack_panels(keys, width, s.keys, panels);
  }
  void take_values(const Strided& v, const float* x, const Shape& s) {
    pack_rows(x, v.n, v.d, s.keys, s.keys, s.value_width, value_width, 1.0f, value_rows);
  }
  void take_queries(const Strided& q, const float* x, long count, float scale, const Shape& s) {
    pack_rows(x, q.n, q.d, count, LANES, s.width, width, scale, query_rows);
    pack_lanes(query_rows, width, query_lanes);
  }
};

template <int V>
static void tile(const Features& family, const Shape& s, Forward& w, long first, int keys, const uint8_t* mask_at,
                 const Mask& mask, long queries) {
  for (int m = 0; m < keys; m += ROWS)
    gemm<ROWS, V, 1>(std::min(ROWS, keys - m), s.width, w.panels + (first + m) / ROWS * w.width * W, W, w.query_lanes,
                     LANES, w.scores + m * LANES, LANES, false);
  if (mask.data) pack_mask(mask_at + first * mask.m, mask.m, mask.n, keys, queries, w.mask.data());
  fill_features<V>(family, keys, w.scores, mask.data ? w.mask.data() : nullptr, w.features);
}

// the scores of a tile in place of hidden ones -inf, and their greatest so far
template <int V>
static void take_weights(int keys, const float* scores, const int32_t* mask, float* weights, vec* greatest) {
  for (int m = 0; m < keys; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      vec x = load(scores + m * LANES + v * W);
      if (mask) x = *reinterpret_cast<const iloose*>(mask + m * LANES + v * W) ? x : splat(-INFINITY);
      greatest[v] = clamp_above(greatest[v], x);
      store(weights + m * LANES + v * W, x);
    }
}

template <int V>
static void forward_block(const Features& family, const Shape& s, Forward& w, const float* coefs,
                          const uint8_t* mask_at, const Mask& mask, long queries) {
  std::fill(w.y.data, w.y.data + s.rank * LANES, 0.0f);
  vec greatest[2] = {splat(-INFINITY), splat(-INFINITY)};
  for (long first = 0; first < s.keys; first += KEYS) {
    const int keys = std::min<long>(KEYS, s.keys - first);
    tile<V>(family, s, w, first, keys, mask_at, mask, queries);
    gemm<ROWS, V, 1>(s.rank, (long)keys * K, coefs + first * K * s.rank, s.rank, w.features, LANES, w.y, LANES,
                     true);
    if constexpr (SOFTMAX)
      take_weights<V>(keys, w.scores, mask.data ? w.mask.data() : nullptr, w.weights + first * LANES, greatest);
  }
  if constexpr (SOFTMAX) {
    vec total[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      // a query without keys: its weights are e^-inf whatever is taken away
      greatest[v] = greatest[v] > -INFINITY ? greatest[v] : vec{};
      total[v] = vec{};
    }
    for (long m = 0; m < s.keys; ++m)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        float* at = w.weights + m * LANES + v * W;
        const vec e = exponential(load(at) - greatest[v]);
        total[v] += e;
        store(at, e);
      }
    gemm<ROWS, V, 1>(s.value_width, s.keys, w.value_rows, w.value_width, w.weights, LANES, w.out, LANES, false);
    for (int v = 0; v < V; ++v) {
      store(w.statistics + v * W, total[v]);
      store(w.statistics + LANES + v * W, greatest[v]);
    }
  }
}

// Backward: lanes are keys, so that the sums over queries, of dC and dk, run over rows; a block of keys meets
// all queries before the next.
struct Backward {
  long width, value_width;  // padded to whole vectors
  Buffer query_rows, query_panels, dy, key_rows, key_lanes, scores, features, gradient, dq, dk;
  Buffer dout_rows, dout_panels, value_rows, value_lanes, weights, dv, logsumexp, dots;
  std::vector<int32_t> mask;
  explicit Backward(const Shape& s)
      : width(round_up(s.width, W)),
        value_width(SOFTMAX ? round_up(s.value_width, W) : 0),
        query_rows((s.queries + W) * width),  // a panel is read as W rows
        query_panels(round_up(s.queries, ROWS) / ROWS * width * W),
        dy(s.queries * s.rank),
        key_rows(LANES * width),
        key_lanes(width * LANES),
        scores(TILE * LANES),
        features(TILE * K * LANES),
        gradient(TILE * LANES),
        dq(s.queries * width),
        dk(LANES * width),
        dout_rows((s.queries + W) * value_width),
        dout_panels(round_up(s.queries, ROWS) / ROWS * value_width * W),
        value_rows(LANES * value_width),
        value_lanes(value_width * LANES),
        weights(SOFTMAX ? TILE * LANES : 0),
        dv(LANES * value_width),
        logsumexp(SOFTMAX ? s.queries : 0),
        dots(SOFTMAX ? s.queries : 0),
        mask(TILE * LANES) {}

  void take_queries(const Strided& q, const float* x, float scale, const Strided& pulled, const float* y,
                    const Shape& s) {
    pack_rows(x, q.n, q.d, s.queries, s.queries + W, s.width, width, scale, query_rows);
    pack_panels(query_rows, width, s.queries, query_panels);
    pack_rows(y, pulled.n, pulled.d, s.queries, s.queries, s.rank, s.rank, 1.0f, dy);
    std::fill(dq.data, dq.data + s.queries * width, 0.0f);
  }
  void take_outputs(const Strided& d, const float* x, const Strided& o, const float* out, const float* sums,
                    const Shape& s) {
    pack_rows(x, d.n, d.d, s.queries, s.queries + W, s.value_width, value_width, 1.0f, dout_rows);
    pack_panels(dout_rows, value_width, s.queries, dout_panels);
    for (long n = 0; n < s.queries; ++n, out += o.n) {
      float dot = 0;
      for (long c = 0; c < s.value_width; ++c) dot += dout_rows[n * value_width + c] * out[c * o.d];
      logsumexp[n] = sums[n];
      dots[n] = dot;
    }
  }
  void take_keys(const Strided& k, const float* x, long count, const Shape& s) {
    pack_rows(x, k.n, k.d, count, LANES, s.width, width, 1.0f, key_rows);
    pack_lanes(key_rows, width, key_lanes);
    std::fill(dk.data, dk.data + count * width, 0.0f);
  }
  void take_values(const Strided& v, const float* x, long count, const Shape& s) {
    pack_rows(x, v.n, v.d, count, LANES, s.value_width, value_width, 1.0f, value_rows);
    pack_lanes(value_rows, value_width, value_lanes);
    std::fill(dv.data, dv.data + count * value_width, 0.0f);
  }
};

// rows of panels times lanes: out[n][..] = sum_c panels[n][c] lanes[c][..]
template <int V>
static void by_panels(int rows, long width, long padded, const float* panels, const float* lanes, float* out) {
  for (int n = 0; n < rows; n += ROWS)
    gemm<ROWS, V, 1>(std::min(ROWS, rows - n), width, panels + n / ROWS * padded * W, W, lanes, LANES,
                     out + n * LANES, LANES, false);
}

// one block of `keys` keys; `mask_at` is at its first
template <int V>
static void backward_block(const Features& family, const Shape& s, Backward& w, int keys, const float* coefs,
                           float* dcoefs, const uint8_t* mask_at, const Mask& mask) {
  for (long first = 0; first < s.queries; first += TILE) {
    const int queries = std::min<long>(TILE, s.queries - first);
    const int32_t* kept = mask.data ? w.mask.data() : nullptr;
    by_panels<V>(queries, s.width, w.width, w.query_panels + first / ROWS * w.width * W, w.key_lanes, w.scores);
    if (kept) pack_mask(mask_at + first * mask.n, mask.n, mask.m, queries, keys, w.mask.data());
    fill_features<V>(family, queries, w.scores, kept, w.features);
    const float* dy = w.dy + first * s.rank;
    score_gradient<V>(family, queries, s.rank, coefs, dy, w.scores, kept, w.features, w.gradient);
    for (int j = 0; j < K; ++j)
      gemm<ROWS, V, 1>(s.rank, queries, dy, s.rank, w.features + j * LANES, K * LANES, dcoefs + j * LANES, K * LANES,
                       true);
    if constexpr (SOFTMAX) {
      // the features have been used: their room is for dL/dweights
      by_panels<V>(queries, s.value_width, w.value_width, w.dout_panels + first / ROWS * w.value_width * W,
                   w.value_lanes, w.features);
      for (int n = 0; n < queries; ++n)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
          const long at = n * LANES + v * W;
          vec p = exponential(load(w.scores + at) - w.logsumexp[first + n]);
          if (kept) p = keep(p, *reinterpret_cast<const iloose*>(kept + at));
          store(w.weights + at, p);
          store(w.gradient + at, load(w.gradient + at) + p * (load(w.features + at) - w.dots[first + n]));
        }
      wide_gemm<WIDE_ROWS, 1>(keys, w.value_width, queries, w.weights, LANES, w.dout_rows + first * w.value_width,
                              w.value_width, w.dv, w.value_width);
    }
    wide_gemm<WIDE_ROWS, 1>(keys, w.width, queries, w.gradient, LANES, w.query_rows + first * w.width, w.width, w.dk,
                            w.width);
    wide_gemm<WIDE_ROWS, LANES>(queries, w.width, keys, w.gradient, 1, w.key_rows, w.width, w.dq + first * w.width,
                                w.width);
  }
}

// What softmax adds: its values, its output (batch, heads, queries, value_width) and the logarithm of its
// sums, contiguous; the gradients of the output and of the values.
struct Soft {
  Strided v, dout, out;
  float *result, *logsumexp, *dv;
};

extern "C" {

int kart_lanes() { return W; }

// y is contiguous (batch, heads, queries, rank); returns 0, or 1 without memory
int kart_forward(const Shape* shape, const float* options, const Strided* q, const Strided* k, const Coefs* coefs,
                 int own, const Mask* mask, float scale, const Soft* soft, float* y, int threads) try {
  const Shape& s = *shape;
  const Order order(s, own);
  const Features family(options);
  std::atomic<bool> failed{false};
  spread(order.count(), threads, [&](int, long begin, long end) {
    try {
      Forward w(s);
      Buffer packed(s.keys * K * s.rank);
      long head = -1;
      for (long task = begin; task < end; ++task) {
        const long b = order.b(task), h = order.h(task);
        if (order.head(task) != head) {
          head = order.head(task);
          pack_coefs(*coefs, coefs_at(*coefs, order, task), s, packed);
        }
        w.take_keys(*k, k->at(b, h), s);
        if (SOFTMAX) w.take_values(soft->v, soft->v.at(b, h), s);
        for (long n = 0; n < s.queries; n += LANES) {
          const long queries = std::min<long>(LANES, s.queries - n);
          w.take_queries(*q, q->at(b, h) + n * q->n, queries, scale, s);
          const uint8_t* mask_at = mask->data ? mask->data + b * mask->b + h * mask->h + n * mask->n : nullptr;
          if (queries > W)
            forward_block<2>(family, s, w, packed, mask_at, *mask, queries);
          else
            forward_block<1>(family, s, w, packed, mask_at, *mask, queries);
          const long row = (b * s.heads + h) * s.queries + n;
          float* out = y + row * s.rank;
          for (long i = 0; i < queries; ++i)
            for (long p = 0; p < s.rank; ++p) *out++ = w.y[p * LANES + i];
          if (SOFTMAX) {
            out = soft->result + row * s.value_width;
            for (long i = 0; i < queries; ++i) {
              const float total = w.statistics[i];
              const float inverse = total > 0 ? 1 / total : 0;
              for (long c = 0; c < s.value_width; ++c) *out++ = w.out[c * LANES + i] * inverse;
              // of a query without keys: e^(score - inf) is 0
              soft->logsumexp[row + i] = total > 0 ? w.statistics[LANES + i] + std::log(total) : INFINITY;
            }
          }
        }
      }
    } catch (const std::bad_alloc&) {
      failed = true;
    }
  });
  return failed;
} catch (...) {
  return 1;
}

// dq, dk are contiguous like q and k; dcoefs is contiguous (samples with coefficients, heads, rank, keys, K)
int kart_backward(const Shape* shape, const float* options, const Strided* dy, const Strided* q, const Strided* k,
                  const Coefs* coefs, int own, const Mask* mask, float scale, const Soft* soft, float* dq, float* dk,
                  float* dcoefs, int threads) try {
  const Shape& s = *shape;
  const Order order(s, own);
  const Features family(options);
  const Slots slots(order, threads);
  const long blocks = round_up(s.keys, LANES) / LANES, block = s.rank * K * LANES, size = blocks * block;
  Buffer sums(slots.count * size);
  std::atomic<bool> failed{false};
  spread(order.count(), threads, [&](int thread, long begin, long end) {
    try {
      Backward w(s);
      Buffer packed(size);
      long head = -1;
      float* sum = nullptr;
      for (long task = begin; task < end; ++task) {
        const long b = order.b(task), h = order.h(task);
        if (order.head(task) != head) {
          head = order.head(task);
          pack_blocks(*coefs, coefs_at(*coefs, order, task), s, packed);
          sum = sums + slots.slot(thread, head) * size;
          std::fill(sum, sum + size, 0.0f);
        }
        w.take_queries(*q, q->at(b, h), scale, *dy, dy->at(b, h), s);
        if (SOFTMAX)
          w.take_outputs(soft->dout, soft->dout.at(b, h), soft->out, soft->out.at(b, h),
                         soft->logsumexp + (b * s.heads + h) * s.queries, s);
        for (long i = 0; i < blocks; ++i) {
          const long first = i * LANES, row = (b * s.heads + h) * s.keys + first;
          const int keys = std::min<long>(LANES, s.keys - first);
          w.take_keys(*k, k->at(b, h) + first * k->n, keys, s);
          if (SOFTMAX) w.take_values(soft->v, soft->v.at(b, h) + first * soft->v.n, keys, s);
          const uint8_t* mask_at = mask->data ? mask->data + b * mask->b + h * mask->h + first * mask->m : nullptr;
          (keys > W ? backward_block<2> : backward_block<1>)(family, s, w, keys, packed + i * block, sum + i * block,
                                                             mask_at, *mask);
          for (int m = 0; m < keys; ++m) std::memcpy(dk + (row + m) * s.width, w.dk + m * w.width, 4 * s.width);
          if (SOFTMAX)
            for (int m = 0; m < keys; ++m)
              std::memcpy(soft->dv + (row + m) * s.value_width, w.dv + m * w.value_width, 4 * s.value_width);
        }
        float* out = dq + (b * s.heads + h) * s.queries * s.width;
        for (long n = 0; n < s.queries; ++n)
          for (long c = 0; c < s.width; ++c) *out++ = scale * w.dq[n * w.width + c];
      }
    } catch (const std::bad_alloc&) {
      failed = true;
    }
  });
  if (failed) return 1;
  slots.collect(sums, size, [&](long head, const float* sum, bool fresh) {
    float* out = dcoefs + head * s.rank * s.keys * K;
    for (long p = 0; p < s.rank; ++p)
      for (long m = 0; m < s.keys; ++m)
        for (long j = 0; j < K; ++j, ++out) {
          const float x = sum[m / LANES * block + (p * K + j) * LANES + m % LANES];
          *out = fresh ? x : *out + x;
        }
  });
  return 0;
} catch (...) {
  return 1;
}

}  // extern "C"
